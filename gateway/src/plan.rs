//! Requests to jobs: the pure second half of `submit`. After this, nothing about a job is left open.
//!
//! A job's id follows from its request, so that the same file submitted twice is the same set of jobs.
//! By default the content takes part: a custom_id is unique within a file only, and two files that both
//! number their lines from 1 must not get each other's answers.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use hex::ToHex;
use millrace_crds::job::{JOB_BYTES_MAX, REQUESTS_MAX};
use millrace_crds::names::{JOB_ID_BYTES_MAX, JobId};
use serde_json::Value;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::{IdFrom, InputArgs};
use crate::entries::{Origin, Problem, RequestEntry};

/// Largest body that goes into a message: headers count in the broker's limit too, which is 1 MiB unless
/// it is configured.
pub const MESSAGE_BODY_BYTES_MAX: usize = JOB_BYTES_MAX - (8 << 10);
/// Most jobs in one command: what is held in memory at once.
pub const JOBS_MAX: usize = 1_000_000;
/// Hex digits of the content's SHA-256 in an id: 64 bits tell a billion requests of one custom_id apart.
const ID_DIGITS: usize = 16;
/// Bytes of the custom_id that an id repeats, so that people recognise it.
const ID_NAME_BYTES: usize = 48;

/// One job, ready to be published.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedJob {
    /// Its id.
    pub id: JobId,
    /// The caller's ids of its requests, in order; one unless `jsonl`.
    pub custom_ids: Vec<String>,
    /// The message's body: a request, or lines of them.
    pub body: Bytes,
    /// Whether the body is one batch line per request.
    pub jsonl: bool,
    /// Where its first request stands.
    pub origin: Origin,
}

/// What planning depends on beside the requests.
#[derive(Debug, Clone)]
pub struct PlanOptions {
    /// Put before each id.
    pub id_prefix: String,
    /// How ids are made.
    pub id_from: IdFrom,
    /// Most lines in one job, or a job for each request.
    pub pack: Option<usize>,
    /// Largest body of a message.
    pub body_bytes_max: usize,
    /// Whether larger bodies may go to an object store.
    pub claim_checks: bool,
}

impl PlanOptions {
    /// Options as typed, for a body limit.
    pub fn new(input: &InputArgs, claim_checks: bool) -> Self {
        Self {
            id_prefix: input.id_prefix.clone(),
            id_from: input.id_from,
            pack: input.pack.map(|lines| lines as usize),
            body_bytes_max: MESSAGE_BODY_BYTES_MAX,
            claim_checks,
        }
    }
}

/// Plans all requests as jobs, in order.
///
/// # Errors
/// All that is wrong, each with its place.
pub fn plan(entries: &[RequestEntry], options: &PlanOptions) -> Result<Vec<PlannedJob>, Vec<Problem>> {
    let groups: Vec<&[RequestEntry]> = match options.pack {
        None => entries.chunks(1).collect(),
        Some(lines) => pack(entries, lines.min(REQUESTS_MAX), options),
    };
    let mut jobs = Vec::with_capacity(groups.len());
    let mut problems = Vec::new();
    let mut seen: HashMap<JobId, Origin> = HashMap::with_capacity(groups.len());
    for group in groups {
        let origin = group[0].origin.clone();
        let planned = options.job(group).and_then(|job| match seen.insert(job.id.clone(), origin.clone()) {
            None => Ok(job),
            Some(earlier) => Err(format!("job id {} is that of {earlier} already", job.id)),
        });
        match planned {
            Ok(job) => jobs.push(job),
            Err(message) => problems.push(Problem { origin, message }),
        }
    }
    if jobs.len() > JOBS_MAX {
        let message = format!("{} jobs; at most {JOBS_MAX} in one command: split the input", jobs.len());
        problems.push(Problem { origin: jobs[JOBS_MAX].origin.clone(), message });
    }
    if problems.is_empty() { Ok(jobs) } else { Err(problems) }
}

/// Groups of at most `lines` requests that fit into a message together; with an object store, the number
/// alone counts.
fn pack<'a>(entries: &'a [RequestEntry], lines: usize, options: &PlanOptions) -> Vec<&'a [RequestEntry]> {
    let mut groups = Vec::new();
    let mut start = 0;
    let mut bytes = 0;
    for (index, entry) in entries.iter().enumerate() {
        let size = batch_line(entry).len() + 1;
        let full = bytes + size > options.body_bytes_max && !options.claim_checks;
        if index > start && (index - start == lines || full) {
            groups.push(&entries[start..index]);
            start = index;
            bytes = 0;
        }
        bytes += size;
    }
    if start < entries.len() {
        groups.push(&entries[start..]);
    }
    groups
}

impl PlanOptions {
    fn job(&self, group: &[RequestEntry]) -> Result<PlannedJob, String> {
        let first = &group[0];
        let jsonl = self.pack.is_some();
        let (body, id) = if jsonl {
            let body: String = group.iter().map(|entry| batch_line(entry) + "\n").collect();
            let id = self.content_id("pack", &[body.as_bytes()]);
            (Bytes::from(body), id)
        } else {
            (first.body.clone(), self.id(first)?)
        };
        if body.len() > self.body_bytes_max && !self.claim_checks {
            return Err(format!(
                "the request has {} bytes; a message holds {}: give --object-store s3://bucket/prefix, \
                 where workers may read it",
                body.len(),
                self.body_bytes_max
            ));
        }
        let id = id.parse::<JobId>().map_err(|error| match self.id_from {
            IdFrom::CustomId => format!("{error}; without --id-from custom-id any custom_id will do"),
            IdFrom::Content => format!("--id-prefix {:?}: {error}", self.id_prefix),
        })?;
        let custom_ids = group.iter().map(|entry| entry.custom_id.clone()).collect();
        Ok(PlannedJob { id, custom_ids, body, jsonl, origin: first.origin.clone() })
    }

    fn id(&self, entry: &RequestEntry) -> Result<String, String> {
        match self.id_from {
            IdFrom::CustomId => Ok(format!("{}{}", self.id_prefix, entry.custom_id)),
            IdFrom::Content => {
                let parts = [entry.custom_id.as_bytes(), &entry.body[..]];
                Ok(self.content_id(&entry.custom_id, &parts))
            }
        }
    }

    fn content_id(&self, name: &str, parts: &[&[u8]]) -> String {
        let mut hash = Sha256::new();
        for part in parts {
            // Lengths keep ("ab", "c") and ("a", "bc") apart.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let digits: String = hash.finalize().encode_hex();
        let room = JOB_ID_BYTES_MAX.saturating_sub(self.id_prefix.len() + ID_DIGITS + 1).min(ID_NAME_BYTES);
        let name = recognisable(name, room, self.id_prefix.is_empty());
        let dash = if name.is_empty() { "" } else { "-" };
        format!("{}{name}{dash}{}", self.id_prefix, &digits[..ID_DIGITS])
    }
}

/// What of a custom_id may stand in a job id, cut to `room` bytes. At an id's start it must be a letter or
/// digit.
fn recognisable(name: &str, room: usize, at_start: bool) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let text: String = name.chars().map(|c| if allowed(c) { c } else { '-' }).take(room).collect();
    let text = text.trim_end_matches(['-', '_']);
    if at_start { text.trim_start_matches(['-', '_']).to_owned() } else { text.to_owned() }
}

/// An entry as a line of an OpenAI batch file.
fn batch_line(entry: &RequestEntry) -> String {
    let custom_id = serde_json::to_string(&entry.custom_id).expect("text is JSON");
    let body = String::from_utf8_lossy(&entry.body);
    let body = if body.contains(['\n', '\r']) {
        let value: Value = serde_json::from_str(&body).expect("an entry's body was parsed before");
        value.to_string()
    } else {
        body.into_owned()
    };
    format!(r#"{{"custom_id":{custom_id},"method":"POST","url":"{}","body":{body}}}"#, entry.url)
}

/// A deadline as typed, in RFC 3339.
///
/// # Errors
/// What is wrong with it.
pub fn deadline(text: &str, now: OffsetDateTime) -> Result<String, String> {
    let time = time("--deadline", text, now)?;
    time.format(&Rfc3339).map_err(|error| format!("--deadline {text:?}: {error}"))
}

/// A time in the future, typed as a span from now or in RFC 3339; `option` is what it was typed for.
///
/// # Errors
/// What is wrong with it.
pub fn time(option: &str, text: &str, now: OffsetDateTime) -> Result<OffsetDateTime, String> {
    let time = match (text.parse::<millrace_crds::units::Span>(), OffsetDateTime::parse(text, &Rfc3339)) {
        (Ok(span), _) => now.checked_add(time::Duration::try_from(span.0).unwrap_or(time::Duration::MAX)),
        (_, Ok(time)) => Some(time),
        _ => {
            return Err(format!(
                "{option} {text:?} is neither a span such as 10m nor a time such as 2027-01-31T18:00:00Z"
            ));
        }
    };
    time.filter(|time| *time > now)
        .ok_or_else(|| format!("{option} {text:?} is not in the future, or too far in it"))
}

/// Job ids as text, one a line; empty lines are skipped, repeated ones counted once.
///
/// # Errors
/// All that is wrong.
pub fn job_ids(name: &str, text: &str) -> Result<Vec<JobId>, Vec<Problem>> {
    let mut ids = Vec::new();
    let mut problems = Vec::new();
    let mut seen = HashSet::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match line.trim().parse::<JobId>() {
            Ok(id) if seen.insert(id.clone()) => ids.push(id),
            Ok(_) => {}
            Err(error) => {
                let origin = Origin { file: name.into(), line: index + 1 };
                problems.push(Problem { origin, message: error.to_string() });
            }
        }
    }
    if problems.is_empty() { Ok(ids) } else { Err(problems) }
}

#[cfg(test)]
mod tests;
