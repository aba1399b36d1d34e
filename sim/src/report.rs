//! Figures of a run: one [`Row`] a load and policy, and where its GPU time goes.

use serde::Serialize;
use serde_json::{Value, json};

use super::cluster::SimOutcome;
use super::load::Traffic;
use super::optimum::Optimum;

/// The figures of one policy on one load.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The load.
    pub trace: String,
    /// The policy.
    pub policy: String,
    /// GPU time from the creation of each worker's pod until it is gone.
    pub gpu_seconds: f64,
    /// Median wait from publication to start.
    pub wait_p50_s: f64,
    /// 95th percentile.
    pub wait_p95_s: f64,
    /// 99th percentile.
    pub wait_p99_s: f64,
    /// Jobs that waited longer than the target.
    pub missed_targets: u64,
    /// Changes of the number of workers.
    pub scale_events: u64,
    /// Workers started.
    pub starts: u64,
    /// Most workers at once.
    pub replicas_max: u32,
    /// Of the GPU time, that in which workers started.
    pub starting_s: f64,
    /// Of it, that in which slots of workers that drained were of no use.
    pub draining_s: f64,
    /// Of it, that in which slots of other workers stood empty; the rest is work.
    pub idle_s: f64,
    /// Of the idle time, that of workers that held no job at all.
    pub empty_s: f64,
}

impl Row {
    /// The figures of a run.
    pub fn new(load: &Traffic, policy: &str, outcome: &SimOutcome) -> Self {
        let SimOutcome { gpu_ms, starting_ms, draining_ms, empty_ms, working_ms, .. } = *outcome;
        let [gpu_seconds, starting_s, draining_s, empty_s, working_s] =
            [gpu_ms, starting_ms, draining_ms, empty_ms, working_ms].map(|ms| ms as f64 / 1e3);
        let row = Self::of(load, policy, gpu_seconds, &outcome.waits_ms, &outcome.replicas);
        let idle_s = gpu_seconds - starting_s - draining_s - working_s;
        Self { starting_s, draining_s, idle_s, empty_s, ..row }
    }

    /// The figures of the optimum's plan; its GPU time is the bound, of which no parts are told.
    pub fn of_optimum(load: &Traffic, optimum: &Optimum) -> Self {
        Self::of(load, "clairvoyant", optimum.gpu_s, &optimum.waits_ms, &optimum.replicas)
    }

    fn of(load: &Traffic, policy: &str, gpu_seconds: f64, waits_ms: &[u64], replicas: &[(u64, u32)]) -> Self {
        let mut sorted = waits_ms.to_vec();
        sorted.sort_unstable();
        let limit_ms = load.queue_wait_s * 1000;
        // The last entry ends the run; it is no decision.
        let decided = &replicas[..replicas.len().saturating_sub(1)];
        let up = |pair: &[(u64, u32)]| u64::from(pair[1].1.saturating_sub(pair[0].1));
        let first = decided.first().map_or(0, |&(_, n)| n);
        Self {
            trace: load.name.clone(),
            policy: policy.into(),
            gpu_seconds,
            wait_p50_s: percentile_s(&sorted, 0.50),
            wait_p95_s: percentile_s(&sorted, 0.95),
            wait_p99_s: percentile_s(&sorted, 0.99),
            missed_targets: sorted.iter().filter(|&&wait_ms| wait_ms > limit_ms).count() as u64,
            scale_events: decided.windows(2).filter(|pair| pair[0].1 != pair[1].1).count() as u64
                + u64::from(first > 0),
            starts: u64::from(first) + decided.windows(2).map(up).sum::<u64>(),
            replicas_max: decided.iter().map(|&(_, n)| n).max().unwrap_or(0),
            starting_s: 0.0,
            draining_s: 0.0,
            idle_s: 0.0,
            empty_s: 0.0,
        }
    }
}

/// The nearest-rank percentile, in seconds.
fn percentile_s(sorted_ms: &[u64], share: f64) -> f64 {
    let rank = (share * sorted_ms.len() as f64).ceil() as usize;
    sorted_ms.get(rank.saturating_sub(1)).map_or(0.0, |&ms| ms as f64 / 1e3)
}

/// The head of the table.
pub const HEAD: &str = "load        policy            GPU-s  p50 s   p95 s   p99 s  missed  events  starts  most  \
starting  draining  idle";

/// One line of the table.
pub fn line(row: &Row) -> String {
    format!(
        "{:<11} {:<15} {:>7.0} {:>6.1} {:>7.1} {:>7.1} {:>7} {:>7} {:>7} {:>5} {:>9.0} {:>9.0} {:>5.0}",
        row.trace,
        row.policy,
        row.gpu_seconds,
        row.wait_p50_s,
        row.wait_p95_s,
        row.wait_p99_s,
        row.missed_targets,
        row.scale_events,
        row.starts,
        row.replicas_max,
        row.starting_s,
        row.draining_s,
        row.idle_s
    )
}

/// The head of the table of excesses.
pub const EXCESS_HEAD: &str = "GPU-s over the bound   in all  more starts  drains  empty  part full";

/// Where the GPU time of a policy beyond the clairvoyant bound goes, as a line. The bound pays for the work and for
/// the starts of its plan, so the parts are: what starts cost beyond those; slots of no use in workers that drain;
/// workers that wait for jobs; free slots in workers that have some.
pub fn excess(row: &Row, bound_s: f64) -> String {
    let work_s = row.gpu_seconds - row.starting_s - row.draining_s - row.idle_s;
    format!(
        "{:<20} {:>8.0} {:>12.0} {:>7.0} {:>6.0} {:>10.0}",
        row.policy,
        row.gpu_seconds - bound_s,
        row.starting_s - (bound_s - work_s),
        row.draining_s,
        row.empty_s,
        row.idle_s - row.empty_s
    )
}

/// The wait target of the judged traces.
const WAIT_P95_S: f64 = 60.0;
/// Most GPU time over the bound's, of each trace that is judged.
const OVER_BOUND: [(&str, f64); 2] = [("azure-code", 1.33), ("azure-conv", 1.02)];

/// The figures of a judged trace as a result file has them (`docs/figures.md`), of the rows of its policies; none of
/// other loads. Policies without a row are left out.
pub fn figures(rows: &[Row]) -> Vec<Value> {
    let row = |policy: &str| rows.iter().find(|row| row.policy == policy);
    let Some(own) = row("millrace") else { return Vec::new() };
    let Some((_, over_bound)) = OVER_BOUND.iter().find(|(trace, _)| *trace == own.trace) else {
        return Vec::new();
    };
    let figure = |what: &str, value: f64, unit: &str, bar: Value| {
        let value = (value * 1e4).round() / 1e4;
        json!({"name": format!("{}, {what}", own.trace), "value": value, "unit": unit, "bar": bar})
    };
    let ratio = |what: &str, (one, other): (&str, &str), bar: Value| {
        let value = row(one)?.gpu_seconds / row(other)?.gpu_seconds;
        Some(figure(&format!("GPU time {what}"), value, "x", bar))
    };
    let most = |value: f64| json!({"most": value});
    let beside = |rival: &Row| {
        let later = own.wait_p95_s / rival.wait_p95_s;
        [
            figure(
                "changes of the number of workers",
                own.scale_events as f64,
                "",
                most(rival.scale_events as f64),
            ),
            figure("wait, p95 over that of KEDA tuned", later, "x", most(1.0)),
        ]
    };
    let mut found: Vec<Value> = [
        ratio("over the bound", ("millrace", "clairvoyant"), most(*over_bound)),
        ratio("over the bound's plan as it runs", ("millrace", "clairvoyant-run"), Value::Null),
        ratio("over KEDA tuned", ("millrace", "keda-tuned"), Value::Null),
        ratio("over KEDA as a user sizes it", ("millrace", "keda-sized"), Value::Null),
        ratio("over KEDA's defaults", ("millrace", "keda-default"), Value::Null),
        ratio("of the bound over KEDA tuned", ("clairvoyant", "keda-tuned"), Value::Null),
        ratio("tuned likewise, over the bound", ("millrace-tuned", "clairvoyant"), Value::Null),
        ratio("tuned likewise, over KEDA tuned", ("millrace-tuned", "keda-tuned"), Value::Null),
    ]
    .into_iter()
    .flatten()
    .collect();
    found.push(figure("wait, p95", own.wait_p95_s, "s", most(WAIT_P95_S)));
    found.extend(row("keda-tuned").into_iter().flat_map(beside));
    found
}
