//! Replays traffic through the autoscaler and its rivals in virtual time, and prints and draws the figures.
//!
//! The last lines of standard output are one JSON object a load and policy. Nothing here decides or
//! simulates; that is the library's.

use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use millrace_sim::compare::{Comparison, compare};
use millrace_sim::load::{SPEED, Speed, Traffic};
use millrace_sim::report::{EXCESS_HEAD, HEAD, excess, figures, line};
use millrace_sim::{plot, report::Row, sweep};

/// Replays traffic through the autoscaler, KEDA's rule, the HPA's rule and the clairvoyant optimum.
#[derive(Debug, Parser)]
struct Args {
    /// Loads to replay; all when absent.
    #[arg(long, value_delimiter = ',')]
    loads: Vec<String>,
    /// Wait target in seconds, instead of each load's own.
    #[arg(long)]
    queue_wait: Option<u64>,
    /// Seconds from the creation of a pod until it takes jobs.
    #[arg(long, default_value_t = SPEED.cold_start_s)]
    cold_start: f64,
    /// Prompt tokens a second of one worker.
    #[arg(long, default_value_t = SPEED.prompt_tokens_per_s)]
    prompt_rate: f64,
    /// Output tokens a second of one worker.
    #[arg(long, default_value_t = SPEED.output_tokens_per_s)]
    output_rate: f64,
    /// Jobs that one worker runs at once.
    #[arg(long, default_value_t = SPEED.slots)]
    slots: u32,
    /// Folder for the plots; none are written when absent.
    #[arg(long)]
    plots: Option<PathBuf>,
    /// File for the judged figures, as millrace-figures takes them; none is written when absent.
    #[arg(long)]
    figures: Option<PathBuf>,
    /// Instead of the table: the Azure traces over all of --rates and --cold-starts; one JSON object a cell.
    #[arg(long)]
    sweep: bool,
    /// Multiples of the rates above that the sweep goes over.
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.5, 1.0, 2.0, 4.0])]
    rates: Vec<f64>,
    /// Cold starts of the sweep, in seconds.
    #[arg(long, value_delimiter = ',', default_values_t = [5.0, 15.0, 30.0, 60.0, 120.0])]
    cold_starts: Vec<f64>,
}

/// The ratios of GPU time that are told.
const RATIOS: [(&str, &str); 7] = [
    ("millrace", "keda-tuned"),
    ("millrace", "keda-sized"),
    ("millrace", "clairvoyant-run"),
    ("millrace", "clairvoyant"),
    ("millrace-tuned", "keda-tuned"),
    ("millrace-tuned", "clairvoyant"),
    ("clairvoyant", "keda-tuned"),
];
/// The policies of which is told where their GPU time goes.
const EXCESSES: [&str; 4] = ["millrace", "millrace-tuned", "keda-tuned", "clairvoyant-run"];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let speed = Speed {
        prompt_tokens_per_s: args.prompt_rate,
        output_tokens_per_s: args.output_rate,
        slots: args.slots,
        cold_start_s: args.cold_start,
    };
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "A worker: {} prompt and {} output tokens/s, {} jobs at once, {} s to start.",
        args.prompt_rate, args.output_rate, args.slots, args.cold_start
    )?;
    if args.sweep {
        return sweep(&mut out, &args, &speed);
    }
    let (mut rows, mut judged): (Vec<Row>, Vec<serde_json::Value>) = Default::default();
    for mut load in loads(&args.loads)? {
        load.queue_wait_s = args.queue_wait.unwrap_or(load.queue_wait_s);
        let comparison = compare(&load, &speed)?;
        print(&mut out, &load, &comparison)?;
        if let Some(folder) = &args.plots {
            draw(folder, &load, &comparison)?;
        }
        judged.extend(figures(&comparison.rows));
        rows.extend(comparison.rows);
    }
    if let Some(path) = &args.figures {
        std::fs::write(path, serde_json::to_string(&judged)?)?;
    }
    writeln!(out)?;
    for row in &rows {
        writeln!(out, "{}", serde_json::to_string(row)?)?;
    }
    Ok(())
}

fn loads(names: &[String]) -> anyhow::Result<Vec<Traffic>> {
    let all = [
        Traffic::azure_code()?,
        Traffic::azure_conv()?,
        Traffic::steps(),
        Traffic::spikes(),
        Traffic::on_off(),
        Traffic::nightly(),
    ];
    for name in names {
        let known: Vec<&str> = all.iter().map(|load| load.name.as_str()).collect();
        anyhow::ensure!(known.contains(&name.as_str()), "no load {name:?}; there are {}", known.join(", "));
    }
    Ok(all.into_iter().filter(|load| names.is_empty() || names.contains(&load.name)).collect())
}

fn print(out: &mut impl Write, load: &Traffic, comparison: &Comparison) -> anyhow::Result<()> {
    writeln!(out, "\n{}: {} jobs, target {} s", load.name, load.jobs.len(), load.queue_wait_s)?;
    writeln!(out, "{HEAD}")?;
    for row in &comparison.rows {
        writeln!(out, "{}", line(row))?;
    }
    match &comparison.keda_tuned {
        Some(pick) => writeln!(out, "keda-tuned: {:?}", pick.settings)?,
        None => writeln!(out, "keda-tuned: no setting of the grid keeps the wait")?,
    }
    if let Some(spec) = &comparison.millrace_tuned {
        writeln!(out, "millrace-tuned: {}", serde_json::to_string(spec)?)?;
    }
    for (one, other) in RATIOS {
        if let Some(ratio) = comparison.ratio(one, other) {
            writeln!(out, "GPU time of {one} / {other}: {ratio:.3}")?;
        }
    }
    let Some(bound) = comparison.row("clairvoyant") else { return Ok(()) };
    writeln!(out, "{EXCESS_HEAD}")?;
    for row in EXCESSES.iter().filter_map(|policy| comparison.row(policy)) {
        writeln!(out, "{}", excess(row, bound.gpu_seconds))?;
    }
    Ok(())
}

/// The bars over a grid of rates and cold starts.
fn sweep(out: &mut impl Write, args: &Args, speed: &Speed) -> anyhow::Result<()> {
    let mut loads = [Traffic::azure_code()?, Traffic::azure_conv()?];
    for load in &mut loads {
        load.queue_wait_s = args.queue_wait.unwrap_or(load.queue_wait_s);
    }
    writeln!(out, "GPU time over that of ..., each at the same wait\n{}", sweep::HEAD)?;
    let mut cells = Vec::new();
    for &cold_start_s in &args.cold_starts {
        for &rate in &args.rates {
            for cell in sweep::point(&loads, &Speed { cold_start_s, ..*speed }, rate)? {
                writeln!(out, "{}", sweep::line(&cell))?;
                cells.push(cell);
            }
        }
    }
    writeln!(out, "\n{}", sweep::summary(&cells))?;
    for cell in &cells {
        writeln!(out, "{}", serde_json::to_string(cell)?)?;
    }
    Ok(())
}

fn draw(folder: &PathBuf, load: &Traffic, comparison: &Comparison) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let arrivals_ms: Vec<u64> = load.jobs.iter().map(|job| job.at_ms).collect();
    let title = format!("{}: arrivals, and workers asked for by each policy", load.name);
    let svg = plot::replicas(&title, &arrivals_ms, load.length_ms, &comparison.series);
    std::fs::write(folder.join(format!("{}-replicas.svg", load.name)), svg)?;
    let svg = plot::bars(&format!("{}: figures of each policy", load.name), &comparison.rows);
    std::fs::write(folder.join(format!("{}-figures.svg", load.name)), svg)?;
    Ok(())
}
