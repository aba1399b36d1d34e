//! The figures of a long run, from what its tests said: one JSON object a line among other lines.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::Figure;

/// The figures in the output of `make soak`.
///
/// # Errors
/// When neither the run of crashes nor that of many models is in it.
pub fn figures(log: &str) -> Result<Vec<Figure>> {
    let mut found = Vec::new();
    for line in log.lines() {
        match serde_json::from_str::<Value>(line) {
            Ok(said) if said["models"].is_u64() => found.extend(models(&said)),
            Ok(said) if said["worker_kills"].is_u64() => found.extend(crashes(&said)),
            _ => {}
        }
    }
    ensure!(!found.is_empty(), "no line of it is the JSON object of a long run");
    Ok(found)
}

fn number(said: &Value, name: &str) -> f64 {
    said[name].as_f64().unwrap_or(f64::NAN)
}

/// What became of jobs while workers and the broker were killed.
pub fn crashes(said: &Value) -> Vec<Figure> {
    let number = |name| number(said, name);
    let (jobs, kills, broker_kills) = (number("jobs"), number("worker_kills"), number("broker_kills"));
    let name = format!("{jobs} jobs under {kills} kills of workers and {broker_kills} of the broker");
    vec![
        Figure::new(&format!("{name}: outcomes"), number("outcomes"), "").least(jobs),
        Figure::new(&format!("{name}: delivered again"), number("redelivered"), "jobs").least(1.0),
        Figure::new(&format!("{name}: until all have an outcome"), number("elapsed_s"), "s"),
    ]
}

fn models(said: &Value) -> Vec<Figure> {
    let number = |name| number(said, name);
    let name = format!("{} sleeping models under one operator", number("models"));
    vec![
        Figure::new(&format!("{name}: settled after"), number("settled_s"), "s").most(20.0),
        Figure::new(&format!("{name}: memory"), number("memory_mib"), "MiB").most(80.0),
        Figure::new(&format!("{name}: idle"), 100.0 * number("idle_cpu_share"), "% of a core").most(2.0),
        Figure::new(
            &format!("{name}: first job until its worker is ordered, p50"),
            number("wake_p50_ms"),
            "ms",
        ),
        Figure::new(
            &format!("{name}: first job until its worker is ordered, p99"),
            number("wake_p99_ms"),
            "ms",
        )
        .most(300.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gives_the_figures_that_it_holds() {
        let log = "running 1 test\n{\"jobs\":10,\"outcomes\":9,\"redelivered\":2,\"worker_kills\":3,\
                   \"broker_kills\":1,\"elapsed_s\":1.5}\ntest a ... ok\n{\"models\":500,\"settled_s\":19.0}\n";
        let found = figures(log).unwrap();
        let met: Vec<bool> = found.iter().map(Figure::is_met).collect();
        assert_eq!(met, [false, true, true, true, false, false, false, false], "{found:#?}");
        assert!(found[0].name.starts_with("10 jobs under 3 kills of workers and 1 of the broker"));
        assert!(figures("test a ... ok\n").is_err());
    }
}
