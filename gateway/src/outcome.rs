//! One stored outcome, and the lines that a caller gets of it.
//!
//! Each request of a job gets exactly one line, whatever the job's end: a job that was refused as a whole
//! gives each of its requests a line with the error.

use std::collections::HashMap;

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use bytes::Bytes;
use millrace_crds::job::header;
use millrace_crds::names::{JobId, ModelRef};
use millrace_crds::result::{OutcomeKind, OutputLine, OutputReference};
use millrace_queue::identity::AnswerOf;

use crate::direct::job_of;
use crate::output::note;
use crate::plan::PlannedJob;

/// A stored outcome.
#[derive(Debug, Clone)]
pub struct CollectedOutcome {
    /// Whose.
    pub job: JobId,
    /// How the job ended.
    pub kind: OutcomeKind,
    /// How long the job waited, if the worker says so.
    pub queue_wait_ms: Option<f64>,
    /// How long the attempt ran, if the worker says so.
    pub run_ms: Option<f64>,
    /// Whose answer it is.
    pub of: AnswerOf,
    /// One line a request, or a reference to them.
    pub body: Bytes,
}

impl CollectedOutcome {
    /// Reads a message of the RESULTS stream; `None` for one that is no outcome: a cancel marker, or what the broker
    /// leaves where an outcome aged away. A message under an
    /// outcome's subject that is none is named, and becomes an outcome without lines: it must not hide the others.
    pub fn read(model: &ModelRef, message: StreamMessage) -> Option<Self> {
        let job = job_of(model, "results", &message.subject)?;
        if message.headers.get("Nats-Marker-Reason").is_some() {
            return None;
        }
        Some(Self::from_parts(job, &message.headers, message.payload))
    }

    /// The same of a job's headers and body, as they are stored or as a copy of them came.
    pub fn from_parts(job: JobId, headers: &HeaderMap, body: Bytes) -> Self {
        let text = |name: &str| headers.get(name).map(|value| value.as_str());
        let of = AnswerOf::read(Some(headers));
        let kind = match text(header::OUTCOME) {
            Some("completed") => OutcomeKind::Completed,
            Some("rejected") => OutcomeKind::Rejected,
            Some("dead") => OutcomeKind::Dead,
            other => {
                note(&format!("error: job {job}: header {} of the outcome is {other:?}", header::OUTCOME));
                let (kind, body) = (OutcomeKind::Rejected, Bytes::new());
                return Self { job, kind, queue_wait_ms: None, run_ms: None, of, body };
            }
        };
        let number = |name: &str| text(name).and_then(|value| value.parse().ok());
        let (queue_wait_ms, run_ms) = (number(header::QUEUE_WAIT_MS), number(header::RUN_MS));
        Self { kind, queue_wait_ms, run_ms, of, body, job }
    }

    /// The address of the body, if it is not in the message.
    pub fn reference(&self) -> Option<OutputReference> {
        serde_json::from_slice(&self.body).ok()
    }

    /// The lines as they stand in the body.
    ///
    /// # Errors
    /// When one is no output line, or there is none.
    pub fn lines(&self) -> Result<Vec<OutputLine>, String> {
        if self.body.trim_ascii().is_empty() {
            return Err(format!("job {}: the outcome holds no line", self.job));
        }
        let lines = self.body.split(|&b| b == b'\n').filter(|line| !line.trim_ascii().is_empty());
        lines
            .enumerate()
            .map(|(index, line)| {
                let bad = |e: serde_json::Error| {
                    format!("job {}: line {} of the outcome: {e}", self.job, index + 1)
                };
                serde_json::from_slice(line).map_err(bad)
            })
            .collect()
    }

    /// One line for each of the job's requests, in their order, under the caller's own ids.
    ///
    /// # Errors
    /// When the outcome's lines are not those of the job's requests.
    pub fn lines_of(&self, job: &PlannedJob) -> Result<Vec<OutputLine>, String> {
        let mut lines = self.lines()?;
        if !job.jsonl {
            let count = lines.len();
            let [line] = <[OutputLine; 1]>::try_from(std::mem::take(&mut lines))
                .map_err(|_| format!("job {}: the outcome has {count} lines; a request has one", job.id))?;
            return Ok(vec![OutputLine { custom_id: job.custom_ids[0].clone(), ..line }]);
        }
        if let [whole] = lines.as_slice()
            && whole.error.is_some()
            && self.kind != OutcomeKind::Completed
        {
            let each = |(index, custom_id): (usize, &String)| OutputLine {
                id: format!("{}-{index}", job.id),
                custom_id: custom_id.clone(),
                ..whole.clone()
            };
            return Ok(job.custom_ids.iter().enumerate().map(each).collect());
        }
        let mut by_id: HashMap<String, OutputLine> =
            lines.into_iter().map(|line| (line.custom_id.clone(), line)).collect();
        let found = job.custom_ids.iter().map(|custom_id| {
            let missing = || format!("job {}: the outcome has no line for custom_id {custom_id:?}", job.id);
            by_id.remove(custom_id).ok_or_else(missing)
        });
        found.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entries::Origin;

    fn outcome(kind: OutcomeKind, body: &str) -> CollectedOutcome {
        CollectedOutcome {
            job: "j".parse().unwrap(),
            kind,
            queue_wait_ms: None,
            run_ms: None,
            of: AnswerOf::default(),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    fn job(jsonl: bool, custom_ids: &[&str]) -> PlannedJob {
        PlannedJob {
            id: "j".parse().unwrap(),
            custom_ids: custom_ids.iter().map(ToString::to_string).collect(),
            body: Bytes::new(),
            jsonl,
            origin: Origin { file: "f".into(), line: 1 },
        }
    }

    fn ok(id: &str, custom_id: &str) -> String {
        let response = format!(r#"{{"status_code":200,"request_id":"{id}","body":{{}}}}"#);
        format!(r#"{{"id":"{id}","custom_id":"{custom_id}","response":{response},"error":null}}"#)
    }

    const REFUSED: &str =
        r#"{"id":"j","custom_id":"j","response":null,"error":{"code":"INVALID_REQUEST","message":"no"}}"#;

    #[test]
    fn a_line_gets_back_the_callers_id() {
        let lines = outcome(OutcomeKind::Completed, &ok("j", "j")).lines_of(&job(false, &["mine"])).unwrap();
        assert_eq!((lines[0].id.as_str(), lines[0].custom_id.as_str()), ("j", "mine"));
    }

    #[test]
    fn lines_of_a_pack_come_in_the_order_asked() {
        let body = format!("{}\n{}\n", ok("j-0", "b"), ok("j-1", "a"));
        let lines = outcome(OutcomeKind::Completed, &body).lines_of(&job(true, &["a", "b"])).unwrap();
        assert_eq!(lines.iter().map(|l| l.custom_id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let error = outcome(OutcomeKind::Completed, &body).lines_of(&job(true, &["a", "c"])).unwrap_err();
        assert_eq!(error, "job j: the outcome has no line for custom_id \"c\"");
    }

    #[test]
    fn a_pack_refused_as_a_whole_gives_each_request_the_error() {
        let lines = outcome(OutcomeKind::Rejected, REFUSED).lines_of(&job(true, &["a", "b"])).unwrap();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.error.is_some()));
        assert_eq!((lines[1].id.as_str(), lines[1].custom_id.as_str()), ("j-1", "b"));
    }

    #[test]
    fn what_is_no_outcome_is_said() {
        let error = outcome(OutcomeKind::Completed, "{}").lines_of(&job(false, &["a"])).unwrap_err();
        assert!(error.starts_with("job j: line 1 of the outcome: missing field"), "{error}");
        let error = outcome(OutcomeKind::Completed, "").lines_of(&job(false, &["a"])).unwrap_err();
        assert_eq!(error, "job j: the outcome holds no line");
    }

    #[test]
    fn references_are_recognised() {
        let body = r#"{"output":"s3://b/k","bytes":3,"sha256":"00"}"#;
        assert_eq!(outcome(OutcomeKind::Completed, body).reference().unwrap().output, "s3://b/k");
        assert!(outcome(OutcomeKind::Completed, REFUSED).reference().is_none());
    }
}
