//! Plots as SVG: workers over time, and the figures of each policy as bars. Plain text out, nothing read.

use std::fmt::Write;

use super::report::Row;

const WIDTH: f64 = 860.0;
const PANEL_HEIGHT: f64 = 110.0;
const LEFT: f64 = 120.0;
const RIGHT: f64 = 20.0;
/// Colours that stay apart for most kinds of colour blindness (Okabe and Ito, 2008).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#000000", "#f0e442"];
/// Parts into which the time axis is cut for the arrivals.
const BINS: usize = 240;

/// The number of workers of one policy over time, each entry valid until the next.
#[derive(Debug, Clone)]
pub struct Series {
    /// The policy.
    pub name: String,
    /// When, in milliseconds, and how many.
    pub replicas: Vec<(u64, u32)>,
}

/// Arrivals and the workers of each policy, one panel below the other, on one time axis.
pub fn replicas(title: &str, arrivals_ms: &[u64], length_ms: u64, series: &[Series]) -> String {
    let panels = series.len() + 1;
    let mut svg = open(title, panels as f64 * PANEL_HEIGHT + 70.0);
    let x = |ms: u64| LEFT + (ms.min(length_ms) as f64 / length_ms as f64) * (WIDTH - LEFT - RIGHT);
    let mut bins = [0u32; BINS];
    for &ms in arrivals_ms {
        let bin = (ms as usize * BINS / length_ms.max(1) as usize).min(BINS - 1);
        bins[bin] += 1;
    }
    let bin_s = length_ms as f64 / 1e3 / BINS as f64;
    let rates: Vec<(f64, f64)> = bins
        .iter()
        .enumerate()
        .map(|(i, &jobs)| (x(i as u64 * length_ms / BINS as u64), f64::from(jobs) / bin_s))
        .collect();
    panel(&mut svg, 0, "jobs/s", &rates, "#777777");
    let most = series.iter().flat_map(|s| s.replicas.iter().map(|&(_, n)| n)).max().unwrap_or(1);
    for (i, series) in series.iter().enumerate() {
        let mut points: Vec<(f64, f64)> =
            series.replicas.iter().map(|&(ms, n)| (x(ms), f64::from(n))).collect();
        points.insert(0, (LEFT, 0.0));
        scaled_panel(&mut svg, i + 1, &series.name, &points, (COLOURS[i % COLOURS.len()], f64::from(most)));
    }
    let y = 40.0 + panels as f64 * PANEL_HEIGHT + 14.0;
    for part in 0..=6 {
        let ms = length_ms * part / 6;
        let _ = write!(
            svg,
            r##"<text x="{:.0}" y="{y:.0}" text-anchor="middle">{} min</text>"##,
            x(ms),
            ms / 60_000
        );
    }
    svg + "</svg>\n"
}

/// GPU time, wait and scale events of each policy on one load.
pub fn bars(title: &str, rows: &[Row]) -> String {
    type Figure = fn(&Row) -> f64;
    let figures: [(&str, Figure); 6] = [
        ("GPU seconds", |row| row.gpu_seconds),
        ("wait p50, s", |row| row.wait_p50_s),
        ("wait p95, s", |row| row.wait_p95_s),
        ("wait p99, s", |row| row.wait_p99_s),
        ("missed targets", |row| row.missed_targets as f64),
        ("scale events", |row| row.scale_events as f64),
    ];
    let line = 18.0;
    let block = rows.len() as f64 * line + 34.0;
    let mut svg = open(title, 50.0 + block * 3.0);
    for (i, (name, figure)) in figures.iter().enumerate() {
        let left = if i < 3 { 0.0 } else { WIDTH / 2.0 };
        let top = 60.0 + (i % 3) as f64 * block;
        let most = rows.iter().map(figure).fold(f64::MIN_POSITIVE, f64::max);
        let _ =
            write!(svg, r##"<text x="{:.0}" y="{top:.0}" font-weight="bold">{name}</text>"##, left + 10.0);
        for (j, row) in rows.iter().enumerate() {
            let (y, value) = (top + 8.0 + j as f64 * line, figure(row));
            let width = value / most * (WIDTH / 2.0 - LEFT - 70.0);
            let colour = COLOURS[j % COLOURS.len()];
            let bar = left + LEFT;
            let _ = write!(
                svg,
                r##"<text x="{:.0}" y="{:.0}" text-anchor="end">{}</text>"##,
                bar - 6.0,
                y + 11.0,
                row.policy
            );
            let _ = write!(
                svg,
                r##"<rect x="{bar:.0}" y="{y:.0}" width="{width:.1}" height="13" fill="{colour}"/>"##
            );
            let _ = write!(
                svg,
                r##"<text x="{:.1}" y="{:.0}">{}</text>"##,
                bar + width + 5.0,
                y + 11.0,
                (value * 10.0).round() / 10.0
            );
        }
    }
    svg + "</svg>\n"
}

fn open(title: &str, height: f64) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif"
 font-size="12"><rect width="100%" height="100%" fill="white"/>
<text x="10" y="24" font-size="15">{title}</text>"##
    )
}

fn panel(svg: &mut String, index: usize, name: &str, points: &[(f64, f64)], colour: &str) {
    let most = points.iter().map(|&(_, value)| value).fold(f64::MIN_POSITIVE, f64::max);
    scaled_panel(svg, index, name, points, (colour, most));
}

/// One panel: a filled step line on a scale from zero to `most`.
fn scaled_panel(svg: &mut String, index: usize, name: &str, points: &[(f64, f64)], look: (&str, f64)) {
    let (colour, most) = look;
    let top = 40.0 + index as f64 * PANEL_HEIGHT;
    let base = top + PANEL_HEIGHT - 12.0;
    let y = |value: f64| base - value / most * (PANEL_HEIGHT - 24.0);
    let mut path = format!("M{LEFT:.1} {base:.1}");
    for &(x, value) in points {
        let _ = write!(path, "H{x:.1}V{:.1}", y(value));
    }
    let _ = write!(path, "H{:.1}V{base:.1}Z", WIDTH - RIGHT);
    let _ = write!(svg, r##"<path d="{path}" fill="{colour}" fill-opacity="0.55" stroke="{colour}"/>"##);
    let _ = write!(svg, r##"<text x="10" y="{:.0}">{name}</text>"##, top + 18.0);
    let _ = write!(
        svg,
        r##"<text x="{:.0}" y="{:.0}" text-anchor="end">{}</text>"##,
        LEFT - 6.0,
        y(most) + 4.0,
        (most * 10.0).round() / 10.0
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_closed_and_hold_each_policy() {
        let series = Series { name: "a-policy".into(), replicas: vec![(0, 1), (500, 3), (900, 0)] };
        let svg = replicas("A load", &[1, 2, 900], 1000, &[series]);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("a-policy"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
