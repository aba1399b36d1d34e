//! What a run of `submit` or `results` comes to: counts, tokens, waits. Pure.

use std::time::Duration;

use millrace_crds::result::{OutcomeKind, OutputLine};
use serde::Serialize;

use crate::outcome::CollectedOutcome;

/// The figures, as `--json` prints them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Jobs asked for.
    pub jobs: u64,
    /// Jobs that the queue holds or held: published now, published before, or with an outcome already.
    pub accepted: u64,
    /// Of them, published now.
    pub published: u64,
    /// Of them, published before and still in the queue's memory.
    pub duplicate: u64,
    /// Of them, with an outcome before this run.
    pub done_before: u64,
    /// Of them, in the output file before this run: they are not counted again below.
    pub collected_before: u64,
    /// Outcomes `completed`.
    pub completed: u64,
    /// Outcomes `rejected`.
    pub rejected: u64,
    /// Outcomes `dead`.
    pub dead: u64,
    /// Jobs without an outcome yet.
    pub missing: u64,
    /// Requests that failed alone within a completed job of many.
    pub failed_lines: u64,
    /// Outcomes that do not answer their job; none, unless a worker is broken.
    pub malformed: u64,
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Tokens of outcomes that arrived in this run, over the time from its first publish to its last outcome.
    pub output_tokens_per_s: f64,
    /// Median time from publish to start.
    pub queue_wait_p50_ms: Option<f64>,
    /// 99th percentile of it.
    pub queue_wait_p99_ms: Option<f64>,
    /// How long it all took.
    pub elapsed_s: f64,
    #[serde(skip)]
    waits_ms: Vec<f64>,
    #[serde(skip)]
    fresh_tokens: u64,
}

impl Summary {
    /// Nothing counted yet, of this many jobs.
    pub fn of(jobs: usize) -> Self {
        Self { jobs: jobs as u64, ..Self::default() }
    }

    /// Counts an outcome and its lines; `fresh` when it arrived in this run.
    pub fn count(&mut self, outcome: &CollectedOutcome, lines: &[OutputLine], fresh: bool) {
        match outcome.kind {
            OutcomeKind::Completed => self.completed += 1,
            OutcomeKind::Rejected => self.rejected += 1,
            OutcomeKind::Dead => self.dead += 1,
        }
        self.waits_ms.extend(outcome.queue_wait_ms);
        for line in lines {
            if line.error.is_some() && outcome.kind == OutcomeKind::Completed {
                self.failed_lines += 1;
            }
            let (prompt, output) = tokens(line);
            self.prompt_tokens += prompt;
            self.output_tokens += output;
            self.fresh_tokens += if fresh { output } else { 0 };
        }
    }

    /// Closes the account: `working` from the first publish to the last outcome, `elapsed` in all.
    pub fn close(mut self, working: Duration, elapsed: Duration) -> Self {
        self.waits_ms.sort_by(f64::total_cmp);
        self.queue_wait_p50_ms = percentile(&self.waits_ms, 50).map(rounded);
        self.queue_wait_p99_ms = percentile(&self.waits_ms, 99).map(rounded);
        let working_s = working.as_secs_f64();
        if working_s > 0.0 {
            self.output_tokens_per_s = rounded(self.fresh_tokens as f64 / working_s);
        }
        self.elapsed_s = rounded(elapsed.as_secs_f64());
        self
    }

    /// Whether nothing went wrong with any job.
    pub fn is_well(&self) -> bool {
        self.rejected + self.dead + self.failed_lines + self.malformed == 0
    }

    /// For people, on one or two lines.
    pub fn sentence(&self) -> String {
        let mut text = format!("{}: {} completed", counted(self.jobs, "job"), self.completed);
        let others = [
            (self.rejected, "rejected"),
            (self.dead, "dead"),
            (self.failed_lines, "failed lines"),
            (self.malformed, "malformed"),
            (self.missing, "without an outcome yet"),
            (self.done_before, "done before"),
            (self.duplicate, "published before"),
        ];
        for (count, what) in others.iter().filter(|(count, _)| *count > 0) {
            text += &format!(", {count} {what}");
        }
        text += &format!(
            "; {} tokens in, {} out, {:.1} out/s",
            self.prompt_tokens, self.output_tokens, self.output_tokens_per_s
        );
        if let (Some(p50), Some(p99)) = (self.queue_wait_p50_ms, self.queue_wait_p99_ms) {
            text += &format!("; queue wait p50 {p50:.0} ms, p99 {p99:.0} ms");
        }
        format!("{text}; {:.1} s", self.elapsed_s)
    }
}

/// `1 job`, `2 jobs`.
pub fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn tokens(line: &OutputLine) -> (u64, u64) {
    let usage = line.response.as_ref().and_then(|response| response.body.get("usage"));
    let count = |name| usage.and_then(|usage| usage.get(name)).and_then(|value| value.as_u64()).unwrap_or(0);
    (count("prompt_tokens"), count("completion_tokens"))
}

/// The smallest value that at least `percent` of the sorted values do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_crds::result::Response;
    use serde_json::json;

    fn outcome(kind: OutcomeKind, queue_wait_ms: f64) -> CollectedOutcome {
        CollectedOutcome {
            job: "j".parse().unwrap(),
            kind,
            queue_wait_ms: Some(queue_wait_ms),
            run_ms: None,
            of: Default::default(),
            body: bytes::Bytes::new(),
        }
    }

    fn line(prompt: u64, output: u64) -> OutputLine {
        let body = json!({"usage": {"prompt_tokens": prompt, "completion_tokens": output}});
        let response = Some(Response { status_code: 200, request_id: "j".into(), body });
        OutputLine { id: "j".into(), custom_id: "j".into(), response, error: None }
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&values, 50), Some(100.0));
        assert_eq!(percentile(&values, 99), Some(198.0));
        assert_eq!(percentile(&values[..1], 99), Some(1.0));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn only_fresh_tokens_count_for_the_rate() {
        let mut summary = Summary { jobs: 3, ..Summary::default() };
        summary.count(&outcome(OutcomeKind::Completed, 3.0), &[line(5, 7)], false);
        summary.count(&outcome(OutcomeKind::Completed, 1.0), &[line(5, 20)], true);
        summary.count(&outcome(OutcomeKind::Dead, 2.0), &[], true);
        let summary = summary.close(Duration::from_secs(2), Duration::from_secs(3));
        assert_eq!((summary.completed, summary.dead), (2, 1));
        assert_eq!((summary.prompt_tokens, summary.output_tokens), (10, 27));
        assert_eq!(summary.output_tokens_per_s, 10.0);
        assert_eq!((summary.queue_wait_p50_ms, summary.queue_wait_p99_ms), (Some(2.0), Some(3.0)));
        assert!(!summary.is_well());
        assert_eq!(
            summary.sentence(),
            "3 jobs: 2 completed, 1 dead; 10 tokens in, 27 out, 10.0 out/s; \
             queue wait p50 2 ms, p99 3 ms; 3.0 s"
        );
    }

    #[test]
    fn the_names_in_json_are_fixed() {
        let json = serde_json::to_value(Summary::default()).unwrap();
        let names: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            names.join(" "),
            "jobs accepted published duplicate done_before collected_before completed rejected dead missing \
             failed_lines malformed prompt_tokens output_tokens output_tokens_per_s queue_wait_p50_ms \
             queue_wait_p99_ms elapsed_s"
        );
    }
}
