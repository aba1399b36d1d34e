//! `millrace dead`: jobs that were given up.
//!
//! A job's outcome never changes, so a dead job is published again under a new id, `<id>-r<n>`. The letter is
//! removed only after the broker has acknowledged the new job: killed at any moment, nothing is lost, and
//! repeating the command does not publish a third copy.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use millrace_crds::job::header;
use millrace_crds::names::{Class, JOB_ID_BYTES_MAX, JobId};
use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::{DeadCommand, Global};
use crate::connect::{self, Connection};
use crate::direct::{self, Ask, job_of};
use crate::failure::{Failure, Verdict};
use crate::follow;
use crate::input;
use crate::output::{Printer, line, note, table};
use crate::summary::counted;

/// Headers of the old message that the new one keeps.
const KEPT: [&str; 9] = [
    header::CONTENT_TYPE,
    header::STREAM,
    header::REPLY_SUBJECT,
    header::INPUT,
    header::OUTPUT,
    header::UNKNOWN_FIELDS,
    header::TRACEPARENT,
    header::TRACESTATE,
    header::DEADLINE,
];

/// One dead letter, as it is listed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeadLetter {
    /// The job.
    pub job: JobId,
    /// Why it was given up.
    pub reason: String,
    /// Its class.
    pub class: Class,
    /// Attempts made.
    pub attempt: Option<u64>,
    /// Who made the last one.
    pub worker: Option<String>,
    /// When it was given up.
    pub time: String,
    /// Bytes of its body.
    pub bytes: usize,
}

/// What a stored letter says.
pub fn letter(job: JobId, message: &StreamMessage) -> DeadLetter {
    let text = |name: &str| message.headers.get(name).map(|value| value.as_str().to_owned());
    DeadLetter {
        job,
        reason: text(header::REASON).unwrap_or_default(),
        class: text(header::CLASS).and_then(|class| class.parse().ok()).unwrap_or_default(),
        attempt: text(header::ATTEMPT).and_then(|attempt| attempt.parse().ok()),
        worker: text(header::WORKER),
        time: message.time.replace_nanosecond(0).unwrap_or(message.time).format(&Rfc3339).unwrap_or_default(),
        bytes: message.payload.len(),
    }
}

/// Runs the command.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, command: &DeadCommand) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let named = match command {
        DeadCommand::List => Vec::new(),
        DeadCommand::Show { job } => input::job_ids(std::slice::from_ref(job), None)?,
        DeadCommand::Requeue { jobs, .. } => input::job_ids(jobs, None)?,
    };
    if let DeadCommand::Requeue { all: false, .. } = command
        && named.is_empty()
    {
        return Err(Failure::Usage("no job: name job ids, or --all".to_owned()));
    }
    let broker = connect::connect(global).await?;
    let name = broker.model.dead_stream();
    broker.stream(name.clone()).await?;
    match command {
        DeadCommand::List => list(&broker, &name, printer).await,
        DeadCommand::Show { .. } => show(&broker, &name, &named[0]).await,
        DeadCommand::Requeue { all, .. } => {
            requeue(&broker, &name, if *all { None } else { Some(named) }, printer).await
        }
    }
}

/// Reads the letters from a sequence on; none at the end.
///
/// # Errors
/// [`Failure::Refused`].
pub async fn letters_from(
    broker: &Connection,
    stream: &str,
    sequence: u64,
) -> Result<Vec<(JobId, StreamMessage)>, Failure> {
    let wildcard = broker.model.dead_wildcard();
    let batch = direct::read(broker, stream, Ask::From { subject: &wildcard, sequence }).await?;
    let with_job = |message: StreamMessage| Some((job_of(&broker.model, "dead", &message.subject)?, message));
    Ok(batch.messages.into_iter().filter_map(with_job).collect())
}

async fn list(broker: &Connection, stream: &str, printer: Printer) -> Result<Verdict, Failure> {
    let mut rows = Vec::new();
    let mut sequence = 1;
    loop {
        let letters = letters_from(broker, stream, sequence).await?;
        let Some((_, last)) = letters.last() else { break };
        sequence = last.sequence + 1;
        for (job, message) in letters {
            let letter = letter(job, &message);
            printer.object(&letter);
            let attempt = letter.attempt.map_or(String::new(), |n| n.to_string());
            let cells =
                [letter.job.to_string(), letter.class.to_string(), attempt, letter.time, letter.reason];
            rows.push(cells.to_vec());
        }
    }
    if rows.is_empty() {
        note(&format!("no dead letters of {}", broker.model));
    } else {
        printer.say(&table(&["JOB", "CLASS", "ATTEMPTS", "TIME", "REASON"], &rows));
    }
    Ok(Verdict::Well)
}

async fn show(broker: &Connection, stream: &str, job: &JobId) -> Result<Verdict, Failure> {
    let Some(message) = find(broker, stream, job).await? else {
        return Err(Failure::Usage(format!("job {job} has no dead letter: see `millrace dead list`")));
    };
    let headers: serde_json::Map<String, Value> = message
        .headers
        .iter()
        .filter_map(|(name, values)| Some((name.to_string(), json!(values.first()?.as_str()))))
        .collect();
    let body = serde_json::from_slice(&message.payload)
        .unwrap_or_else(|_| json!(String::from_utf8_lossy(&message.payload)));
    let shown = json!({"letter": letter(job.clone(), &message), "headers": headers, "body": body});
    line(&serde_json::to_string_pretty(&shown).expect("a JSON value is JSON"));
    Ok(Verdict::Well)
}

/// The letter of a job.
///
/// # Errors
/// [`Failure::Refused`].
pub async fn find(broker: &Connection, stream: &str, job: &JobId) -> Result<Option<StreamMessage>, Failure> {
    let subjects = [broker.model.dead_subject(job)];
    Ok(direct::read(broker, stream, Ask::LastOf(&subjects)).await?.messages.pop())
}

async fn requeue(
    broker: &Connection,
    stream: &str,
    jobs: Option<Vec<JobId>>,
    printer: Printer,
) -> Result<Verdict, Failure> {
    let mut missing = 0;
    let mut count = 0;
    if let Some(jobs) = jobs {
        for job in jobs {
            match find(broker, stream, &job).await? {
                Some(message) => {
                    requeue_one(broker, stream, &job, message, printer).await?;
                    count += 1;
                }
                None => {
                    note(&format!("{job}: no dead letter"));
                    missing += 1;
                }
            }
        }
    } else {
        // A letter that arrives meanwhile lies behind this sequence and is left for the next time.
        let end = broker.stream(stream.to_owned()).await?.cached_info().state.last_sequence;
        let mut sequence = 1;
        'pages: loop {
            let letters = letters_from(broker, stream, sequence).await?;
            if letters.is_empty() {
                break;
            }
            for (job, message) in letters {
                if message.sequence > end {
                    break 'pages;
                }
                sequence = message.sequence + 1;
                requeue_one(broker, stream, &job, message, printer).await?;
                count += 1;
            }
        }
    }
    note(&format!("{} published again", counted(count, "job")));
    Ok(Verdict::of(missing == 0))
}

async fn requeue_one(
    broker: &Connection,
    stream: &str,
    job: &JobId,
    message: StreamMessage,
    printer: Printer,
) -> Result<(), Failure> {
    let Requeued { job: new, class, late, sequence } = publish_again(broker, stream, job, message).await?;
    if late {
        note(&format!("{job}: its deadline has passed; {new} has none"));
    }
    let done = sequence.is_none();
    printer.object(&json!({"job": job, "requeued_as": new, "class": class, "done_before": done}));
    printer.say(&format!("{job}: requeued as {new}"));
    Ok(())
}

/// A dead job that is published again.
#[derive(Debug)]
pub struct Requeued {
    /// Its new id.
    pub job: JobId,
    /// Its class.
    pub class: Class,
    /// Whether a deadline that has passed was left out.
    pub late: bool,
    /// Its place in the queue; none where it had been published again before, and has ended.
    pub sequence: Option<u64>,
}

/// Publishes a dead job under its next id, and removes its letter.
///
/// # Errors
/// [`Failure::Refused`]. The letter stays until the broker has acknowledged the new job.
pub async fn publish_again(
    broker: &Connection,
    stream: &str,
    job: &JobId,
    message: StreamMessage,
) -> Result<Requeued, Failure> {
    let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("requeueing job {job}: {e}"));
    if let Some(bytes) = message.headers.get(header::BODY_DROPPED) {
        return Err(refused(&format!(
            "its body of {bytes} bytes did not fit into its letter; publish it anew"
        )));
    }
    let class = letter(job.clone(), &message).class;
    let mut again = Requeued { job: next_id(job), class, late: false, sequence: None };
    // An earlier run may have been killed between publishing and removing the letter.
    if follow::stored(broker, std::slice::from_ref(&again.job)).await?.is_empty() {
        let (headers, late) = headers(&message.headers, &again.job, OffsetDateTime::now_utc());
        again.late = late;
        let publish = PublishMessage::build().headers(headers).payload(message.payload);
        let subject = broker.model.jobs_subject(class);
        let ack = broker.jetstream.send_publish(subject, publish).await.map_err(|e| refused(&e))?;
        let ack = tokio::time::timeout(Duration::from_secs(30), std::future::IntoFuture::into_future(ack))
            .await
            .map_err(|e| refused(&e))?
            .map_err(|e| refused(&e))?;
        again.sequence = Some(ack.sequence);
    }
    let dead = broker.stream(stream.to_owned()).await?;
    dead.delete_message(message.sequence).await.map_err(|e| refused(&e))?;
    Ok(again)
}

/// The headers of the new message, and whether a deadline that has passed was left out.
fn headers(old: &HeaderMap, id: &JobId, now: OffsetDateTime) -> (HeaderMap, bool) {
    let mut headers = HeaderMap::new();
    headers.insert(header::JOB_ID, id.as_str());
    let mut late = false;
    for (name, values) in old.iter() {
        let name = name.to_string();
        let Some(kept) = KEPT.into_iter().find(|kept| kept.eq_ignore_ascii_case(&name)) else { continue };
        let Some(value) = values.first() else { continue };
        let passed = |text: &str| OffsetDateTime::parse(text, &Rfc3339).is_ok_and(|time| time <= now);
        if kept == header::DEADLINE && passed(value.as_str()) {
            late = true;
        } else {
            headers.insert(kept, value.as_str());
        }
    }
    (headers, late)
}

/// `a` becomes `a-r1`, `a-r1` becomes `a-r2`; an id that would be too long loses bytes before its end.
fn next_id(job: &JobId) -> JobId {
    let text = job.as_str();
    let (stem, n) = match text.rsplit_once("-r").map(|(stem, n)| (stem, n.parse::<u32>())) {
        Some((stem, Ok(n))) if !stem.is_empty() && n < u32::MAX => (stem, n + 1),
        _ => (text, 1),
    };
    let ending = format!("-r{n}");
    let stem = &stem[..stem.len().min(JOB_ID_BYTES_MAX - ending.len())];
    format!("{stem}{ending}").parse().expect("a job id with a letter and digits at its end is a job id")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_count_up() {
        let next = |id: &str| next_id(&id.parse().unwrap()).to_string();
        assert_eq!(next("a"), "a-r1");
        assert_eq!(next("a-r1"), "a-r2");
        assert_eq!(next("a-r9"), "a-r10");
        assert_eq!(next("a-rest"), "a-rest-r1");
        let long = "x".repeat(JOB_ID_BYTES_MAX);
        assert_eq!(next(&long).len(), JOB_ID_BYTES_MAX);
        assert!(next(&next(&long)).ends_with("-r2"));
    }

    #[test]
    fn the_new_message_keeps_what_is_the_jobs_own() {
        let mut old = HeaderMap::new();
        for (name, value) in [
            ("Nats-Msg-Id", "a"),
            ("Content-Type", "application/jsonl"),
            ("Millrace-Deadline", "2026-01-01T00:00:00Z"),
            ("Millrace-Reason", "why"),
            ("Millrace-Attempt", "5"),
        ] {
            old.insert(name, value);
        }
        let at = |text: &str| OffsetDateTime::parse(text, &Rfc3339).unwrap();
        let (new, late) = headers(&old, &"a-r1".parse().unwrap(), at("2026-06-01T00:00:00Z"));
        assert!(late);
        assert_eq!(new.get("Nats-Msg-Id").unwrap().as_str(), "a-r1");
        assert_eq!(new.get("Content-Type").unwrap().as_str(), "application/jsonl");
        assert_eq!(new.len(), 2);
        let (new, late) = headers(&old, &"a-r1".parse().unwrap(), at("2025-06-01T00:00:00Z"));
        assert!(!late && new.get("Millrace-Deadline").is_some());
    }
}
