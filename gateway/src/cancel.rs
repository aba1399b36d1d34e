//! `millrace cancel`: a marker that outlives restarts, and that running workers hear at once.
//!
//! A job that has an outcome already keeps it. Cancelling is a wish: the outcome says what became of it.

use millrace_crds::job::own_id;
use millrace_crds::names::{Class, JobId, JobPlace};
use serde_json::json;

use crate::args::{CancelArgs, Global};
use crate::connect::{self, Connection};
use crate::direct::{self, Ask};
use crate::failure::{Failure, Verdict};
use crate::follow;
use crate::input;
use crate::output::{Printer, note};
use crate::summary::counted;

/// Runs the command. Unwell when a job had an outcome already.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, args: &CancelArgs) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let named = input::job_ids(&args.jobs, args.ids.as_deref())?;
    if named.is_empty() && !args.all_pending {
        let message = "no job: name job ids, --ids FILE or --all-pending".to_owned();
        return Err(Failure::Usage(message));
    }
    let broker = connect::connect(global).await?;
    broker.stream(broker.model.results_stream()).await?;
    let jobs = if args.all_pending { pending(&broker).await? } else { named };
    let mut cancelled = 0;
    for chunk in jobs.chunks(direct::SUBJECTS_MAX) {
        let done = follow::stored(&broker, chunk).await?;
        for job in chunk {
            if let Some(outcome) = done.iter().find(|outcome| outcome.job == *job) {
                let kind = outcome.kind.as_str();
                printer.object(&json!({"job": job, "cancelled": false, "outcome": kind}));
                printer.say(&format!("{job}: not cancelled, its outcome is {kind}"));
                continue;
            }
            mark(&broker, job).await?;
            cancelled += 1;
            printer.object(&json!({"job": job, "cancelled": true, "outcome": null}));
            printer.say(&format!("{job}: cancelled"));
        }
    }
    note(&format!("{cancelled} of {} cancelled", counted(jobs.len() as u64, "job")));
    Ok(Verdict::of(cancelled == jobs.len()))
}

/// Stores the marker.
///
/// # Errors
/// [`Failure::Refused`].
pub async fn mark(broker: &Connection, job: &JobId) -> Result<(), Failure> {
    let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("cancelling job {job}: {e}"));
    let subject = broker.model.cancel_subject(job);
    let stored = broker.jetstream.publish(subject, bytes::Bytes::new()).await.map_err(|e| refused(&e))?;
    stored.await.map_err(|e| refused(&e)).map(|_| ())
}

/// The ids of all jobs that lie in the queue, running ones included.
async fn pending(broker: &Connection) -> Result<Vec<JobId>, Failure> {
    let name = broker.model.jobs_stream();
    let created = broker.stream(name.clone()).await?.cached_info().created;
    let stream_created_ms = u64::try_from(created.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
    let mut jobs = Vec::new();
    for class in Class::ALL {
        let subject = broker.model.jobs_subject(class);
        let mut sequence = 1;
        loop {
            let batch = direct::read(broker, &name, Ask::From { subject: &subject, sequence }).await?;
            let Some(last) = batch.messages.last() else { break };
            sequence = last.sequence + 1;
            for message in &batch.messages {
                let pairs = message
                    .headers
                    .iter()
                    .filter_map(|(name, values)| Some((name.as_ref(), values.first()?.as_str())));
                let id = own_id(pairs).and_then(|(_, id)| id.parse().ok());
                // A job with an id that is none gets its outcome under its place's id.
                jobs.push(id.unwrap_or_else(|| {
                    JobId::of_place(JobPlace { stream_created_ms, sequence: message.sequence })
                }));
            }
        }
    }
    Ok(jobs)
}
