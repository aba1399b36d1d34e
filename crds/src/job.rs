//! A job's headers and limits. The body is an OpenAI request, or lines of them.

use std::collections::BTreeMap;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::names::{JobId, JobPlace, NameError};

/// Largest body of a job message; larger inputs come as a claim check.
pub const JOB_BYTES_MAX: usize = 1 << 20;
/// Largest input behind a claim check, as OpenAI's batch limit.
pub const INPUT_BYTES_MAX: u64 = 200 << 20;
/// Most requests in one `application/jsonl` job, as OpenAI's batch limit.
pub const REQUESTS_MAX: usize = 50_000;
/// Longest trace header that is passed on: what W3C Trace Context demands of everybody.
const TRACE_BYTES_MAX: usize = 512;
/// Content type of a body with one OpenAI batch line per request.
pub const JSONL: &str = "application/jsonl";
/// Content type of a body with one request.
pub const JSON: &str = "application/json";

/// Header names, as they stand on the wire.
pub mod header {
    /// The job id. The broker takes a job with an id that it knows for a repetition and drops it.
    pub const JOB_ID: &str = "Nats-Msg-Id";
    /// RFC 3339 time after which the job must not start, and is given up while it runs.
    pub const DEADLINE: &str = "Millrace-Deadline";
    /// A subject to which a copy of the outcome is published, best effort.
    pub const REPLY_SUBJECT: &str = "Millrace-Reply-Subject";
    /// `true` publishes token deltas while the job runs.
    pub const STREAM: &str = "Millrace-Stream";
    /// `s3://` address of the body.
    pub const INPUT: &str = "Millrace-Input";
    /// `s3://` address where the outcome's body shall go.
    pub const OUTPUT: &str = "Millrace-Output";
    /// `ignore` lets requests have unknown fields; they are listed in [`IGNORED_FIELDS`]. `refuse` is the default.
    pub const UNKNOWN_FIELDS: &str = "Millrace-Unknown-Fields";
    /// W3C trace context, passed on to the outcome.
    pub const TRACEPARENT: &str = "traceparent";
    /// W3C trace context of the tracing systems, passed on beside a sound `traceparent`.
    pub const TRACESTATE: &str = "tracestate";
    /// [`super::JSON`] (the default) or [`super::JSONL`].
    pub const CONTENT_TYPE: &str = "Content-Type";
    /// On outcomes, dead letters and tokens: the job's id. On a job: its id, whatever [`JOB_ID`] says to the broker.
    pub const RESULT_JOB_ID: &str = "Millrace-Job-Id";
    /// On outcomes: SHA-256 of the job's body, or of the address of a body behind a claim check.
    pub const BODY_DIGEST: &str = "Millrace-Body-Digest";
    /// On outcomes: `completed`, `rejected` or `dead`.
    pub const OUTCOME: &str = "Millrace-Outcome";
    /// On outcomes, dead letters and tokens: which attempt wrote it, from 1.
    pub const ATTEMPT: &str = "Millrace-Attempt";
    /// On outcomes and dead letters: which worker wrote it.
    pub const WORKER: &str = "Millrace-Worker";
    /// On outcomes: digest of the manifest of the model's files.
    pub const MODEL_DIGEST: &str = "Millrace-Model-Digest";
    /// On outcomes: milliseconds from the job's stream timestamp until a worker began to run it.
    pub const QUEUE_WAIT_MS: &str = "Millrace-Queue-Wait-Ms";
    /// On outcomes: milliseconds that the attempt which wrote it ran.
    pub const RUN_MS: &str = "Millrace-Run-Ms";
    /// On outcomes: the unknown fields that were ignored, sorted, with commas between them.
    pub const IGNORED_FIELDS: &str = "Millrace-Ignored-Fields";
    /// On dead letters: why the job was given up.
    pub const REASON: &str = "Millrace-Reason";
    /// On dead letters whose body did not fit beside their headers: the bytes that it had.
    pub const BODY_DROPPED: &str = "Millrace-Body-Dropped";
    /// On dead letters: the class the job was published with.
    pub const CLASS: &str = "Millrace-Class";
}

/// What a job's headers say, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobHeaders {
    /// The job's id, from the header or from the stream sequence.
    pub id: JobId,
    /// When it must be done.
    pub deadline: Option<OffsetDateTime>,
    /// Where a copy of the outcome goes.
    pub reply_subject: Option<String>,
    /// Whether token deltas are wanted.
    pub stream: bool,
    /// Where the body is, when it is not in the message.
    pub input: Option<String>,
    /// Where the outcome's body shall go.
    pub output: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// What tracing systems added to it.
    pub tracestate: Option<String>,
    /// Whether the body holds many requests, one a line.
    pub jsonl: bool,
    /// Whether unknown fields of requests are ignored.
    pub ignore_unknown: bool,
}

/// Why a job's headers were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The job id is no id.
    #[error("header {name}: {source}")]
    Id {
        /// The header that holds it.
        name: &'static str,
        /// What is wrong with it.
        source: NameError,
    },
    /// A header's value is not what it must be.
    #[error("header {name}: {value:?} is not {expected}")]
    Value {
        /// The header.
        name: &'static str,
        /// The refused value, cut to 80 characters.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
}

/// The id that a job's headers give it, with the header that does; names are compared without case.
pub fn own_id<'a>(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<(&'static str, &'a str)> {
    let mut own = None;
    for (name, value) in headers {
        if name.eq_ignore_ascii_case(header::RESULT_JOB_ID) {
            return Some((header::RESULT_JOB_ID, value));
        }
        if name.eq_ignore_ascii_case(header::JOB_ID) {
            own = Some((header::JOB_ID, value));
        }
    }
    own
}

impl JobHeaders {
    /// Reads the headers of the message at `place`; names are compared without case.
    ///
    /// # Errors
    /// When a value is malformed; the error names header and value.
    pub fn parse<'a>(
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
        place: JobPlace,
    ) -> Result<Self, HeaderError> {
        let map: BTreeMap<String, &str> =
            headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect();
        let get = |name: &str| map.get(&name.to_ascii_lowercase()).copied();
        let refuse = |name: &'static str, value: &str, expected: &'static str| HeaderError::Value {
            name,
            value: value.chars().take(80).collect(),
            expected,
        };
        let uri = |name: &'static str| match get(name) {
            Some(value) if value.starts_with("s3://") && value.len() <= 1024 => Ok(Some(value.to_owned())),
            Some(value) => Err(refuse(name, value, "an s3:// address of at most 1024 bytes")),
            None => Ok(None),
        };
        let deadline = match get(header::DEADLINE) {
            Some(value) => Some(
                OffsetDateTime::parse(value, &Rfc3339)
                    .map_err(|_| refuse(header::DEADLINE, value, "an RFC 3339 time"))?,
            ),
            None => None,
        };
        let stream = match get(header::STREAM) {
            None | Some("false") => false,
            Some("true") => true,
            Some(value) => return Err(refuse(header::STREAM, value, "true or false")),
        };
        let ignore_unknown = match get(header::UNKNOWN_FIELDS) {
            None | Some("refuse") => false,
            Some("ignore") => true,
            Some(value) => return Err(refuse(header::UNKNOWN_FIELDS, value, "ignore or refuse")),
        };
        let jsonl = is_jsonl(get(header::CONTENT_TYPE))?;
        let reply_subject = match get(header::REPLY_SUBJECT) {
            Some(value) if is_publishable(value) => Some(value.to_owned()),
            Some(value) => {
                return Err(refuse(
                    header::REPLY_SUBJECT,
                    value,
                    "a subject outside of $SYS, $JS and millrace",
                ));
            }
            None => None,
        };
        let id = match own_id(map.iter().map(|(name, value)| (name.as_str(), *value))) {
            Some((name, value)) => {
                value.parse::<JobId>().map_err(|source| HeaderError::Id { name, source })?
            }
            None => JobId::of_place(place),
        };
        let traceparent = get(header::TRACEPARENT).filter(|v| is_traceparent(v)).map(str::to_owned);
        let tracestate = get(header::TRACESTATE).filter(|v| traceparent.is_some() && is_tracestate(v));
        Ok(Self {
            id,
            deadline,
            reply_subject,
            stream,
            input: uri(header::INPUT)?,
            output: uri(header::OUTPUT)?,
            traceparent,
            tracestate: tracestate.map(str::to_owned),
            jsonl,
            ignore_unknown,
        })
    }

    /// The id of the trace that the job belongs to, for logs; empty if it belongs to none.
    pub fn trace_id(&self) -> &str {
        self.traceparent.as_deref().and_then(|text| text.split('-').nth(1)).unwrap_or_default()
    }
}

/// Media types are compared without case and without their parameters.
fn is_jsonl(content_type: Option<&str>) -> Result<bool, HeaderError> {
    let Some(value) = content_type else { return Ok(false) };
    let media_type = value.split(';').next().unwrap_or(value).trim().to_ascii_lowercase();
    match media_type.as_str() {
        JSON => Ok(false),
        JSONL | "application/x-ndjson" => Ok(true),
        _ => Err(HeaderError::Value {
            name: header::CONTENT_TYPE,
            value: value.chars().take(80).collect(),
            expected: "application/json or application/jsonl",
        }),
    }
}

/// A job's reply subject may not reach into the broker's or our own subjects.
fn is_publishable(subject: &str) -> bool {
    let reserved = ["$", "millrace."].iter().any(|prefix| subject.starts_with(prefix));
    let tokens_ok = subject
        .split('.')
        .all(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_graphic() && b != b'*' && b != b'>'));
    !reserved && tokens_ok && subject.len() <= 256
}

/// `version-traceid-parentid-flags` in lower-case hex, as in W3C Trace Context: neither id is all zeros,
/// version `ff` is invalid, and only a version after `00` may have more parts. A malformed one is dropped,
/// not refused.
fn is_traceparent(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let [version, trace, parent, flags, more @ ..] = parts.as_slice() else { return false };
    let is_hex = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let lengths = [version.len(), trace.len(), parent.len(), flags.len()];
    lengths == [2, 32, 16, 2]
        && parts[..4].iter().all(|part| is_hex(part))
        && *version != "ff"
        && (more.is_empty() || *version != "00")
        && [trace, parent].iter().all(|id| id.bytes().any(|b| b != b'0'))
        && value.len() <= TRACE_BYTES_MAX
        && value.bytes().all(|b| b.is_ascii_graphic())
}

/// A list of the tracing systems' own entries; not ours to read, only to bound.
fn is_tracestate(value: &str) -> bool {
    !value.is_empty() && value.len() <= TRACE_BYTES_MAX && value.bytes().all(|b| (b' '..=b'~').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(headers: &[(&str, &str)]) -> Result<JobHeaders, HeaderError> {
        let place = JobPlace { stream_created_ms: 1000, sequence: 7 };
        JobHeaders::parse(headers.iter().copied(), place)
    }

    #[test]
    fn a_bare_message_is_a_job() {
        let job = parse(&[]).unwrap();
        assert_eq!(job.id.as_str(), "seq-1000-7");
        assert!(!job.stream && !job.jsonl && job.deadline.is_none());
    }

    #[test]
    fn a_job_may_be_named_apart_from_the_brokers_id() {
        for pairs in [
            [("Nats-Msg-Id", "sent-twice"), ("millrace-job-id", "job-1")],
            [("Millrace-Job-Id", "job-1"), ("Nats-Msg-Id", "sent-twice")],
        ] {
            assert_eq!(parse(&pairs).unwrap().id.as_str(), "job-1");
        }
    }

    #[test]
    fn all_headers() {
        let job = parse(&[
            ("nats-msg-id", "job-1"),
            ("Millrace-Deadline", "2026-11-23T10:00:00Z"),
            ("Millrace-Reply-Subject", "replies.a"),
            ("Millrace-Stream", "true"),
            ("Millrace-Input", "s3://b/in"),
            ("Millrace-Output", "s3://b/out"),
            ("Content-Type", "Application/JSONL; charset=utf-8"),
            ("Millrace-Unknown-Fields", "ignore"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ])
        .unwrap();
        assert_eq!(job.id.as_str(), "job-1");
        assert!(job.stream && job.jsonl && job.ignore_unknown && job.traceparent.is_some());
        assert_eq!(job.deadline.unwrap().unix_timestamp(), 1_795_428_000);
    }

    #[test]
    fn refusals_name_header_and_value() {
        let cases = [
            ("Nats-Msg-Id", "a.b"),
            ("Nats-Msg-Id", ""),
            ("Millrace-Job-Id", "a.b"),
            ("Millrace-Deadline", "tomorrow"),
            ("Millrace-Stream", "yes"),
            ("Millrace-Unknown-Fields", "keep"),
            ("Millrace-Input", "http://x"),
            ("Millrace-Output", "/etc/passwd"),
            ("Millrace-Reply-Subject", "$JS.API.STREAM.DELETE.X"),
            ("Millrace-Reply-Subject", "millrace.jobs.a.b.high"),
            ("Millrace-Reply-Subject", "a.>"),
            ("Content-Type", "text/html"),
        ];
        for (name, value) in cases {
            let error = parse(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name), "{name}={value}: {error}");
            assert!(error.contains(value), "{name}={value}: {error}");
        }
    }

    #[test]
    fn a_sound_trace_is_passed_on_and_another_is_dropped() {
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let job = parse(&[("traceparent", trace), ("tracestate", "a=1,b@c=2")]).unwrap();
        assert_eq!((job.traceparent.as_deref(), job.tracestate.as_deref()), (Some(trace), Some("a=1,b@c=2")));
        assert_eq!(job.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        let later = trace.replacen("00-", "01-", 1) + "-more";
        assert!(parse(&[("traceparent", &later)]).unwrap().traceparent.is_some());
        let zeros = format!("00-{}-b7ad6b7169203331-01", "0".repeat(32));
        let unsound = [
            "junk",
            &zeros,
            &trace.to_uppercase(),
            &trace.replacen("00-", "ff-", 1),
            &format!("{trace}-more"),
        ];
        for text in unsound {
            let job = parse(&[("traceparent", text), ("tracestate", "a=1")]).unwrap();
            assert_eq!((job.traceparent.as_deref(), job.tracestate.as_deref()), (None, None), "{text}");
            assert_eq!(job.trace_id(), "");
        }
        let long = "a=".to_owned() + &"x".repeat(TRACE_BYTES_MAX);
        assert_eq!(parse(&[("traceparent", trace), ("tracestate", &long)]).unwrap().tracestate, None);
    }
}
