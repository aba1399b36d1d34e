//! `millrace submit`: requests onto the queue, once each, and their outcomes back if asked for.
//!
//! Nothing is published before all of the input is checked. A job that has an outcome is not published
//! again: the broker's own memory of ids ends with its window and with a restart, the outcome does not.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use millrace_crds::names::JobId;
use serde_json::json;
use time::OffsetDateTime;

use crate::args::{Global, SubmitArgs};
use crate::collect::OutputFile;
use crate::connect::{self, Connection};
use crate::direct;
use crate::done::DoneCheck;
use crate::failure::{Failure, Verdict};
use crate::follow::{self, Follower};
use crate::gather::{Gatherer, Sink};
use crate::input;
use crate::live::Live;
use crate::output::{Printer, Progress, line, note};
use crate::plan::{self, PlannedJob};
use crate::publish::{self, JobEnvelope, Parcel};
use crate::store::Bodies;
use crate::summary::{Summary, counted};

/// From this many jobs on, the stored outcomes are listed instead of asked for one by one.
const LISTED_MIN: usize = 4096;

/// `submit` as it will be done.
struct Plan {
    jobs: Vec<PlannedJob>,
    envelope: JobEnvelope,
    wait: bool,
    timeout: Duration,
    object_store: Option<String>,
    any_model: bool,
}

fn ready(args: &SubmitArgs, now: OffsetDateTime) -> Result<Plan, Failure> {
    let jobs = input::plan(&args.input, args.object_store.is_some())?;
    let deadline = args.deadline.as_deref().map(|text| plan::deadline(text, now)).transpose();
    let envelope = JobEnvelope {
        class: args.class,
        deadline: deadline.map_err(Failure::Usage)?,
        stream: args.stream,
        ..JobEnvelope::default()
    };
    if args.stream && (jobs.len() != 1 || args.output.is_some()) {
        let message = format!("--stream prints one answer as it is made; the input has {} jobs", jobs.len());
        return Err(Failure::Usage(message));
    }
    let wait = args.wait || args.stream || args.output.is_some();
    let (object_store, any_model) = (args.object_store.clone(), args.any_model);
    Ok(Plan { jobs, envelope, wait, timeout: args.timeout.0, object_store, any_model })
}

/// Runs the command.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, args: &SubmitArgs) -> Result<Verdict, Failure> {
    let plan = ready(args, OffsetDateTime::now_utc())?;
    let printer = Printer { json: global.json };
    if args.dry_run {
        print_ids(&plan.jobs);
        return Ok(Verdict::Well);
    }
    let sink = match &args.output {
        Some(path) => Sink::File(OutputFile::open(path)?),
        None if plan.wait && !global.json && !args.stream && !is_one_prompt(args) => Sink::Print,
        None => Sink::Count,
    };
    let bodies = Bodies::new(args.store.config());
    let mut gatherer = Gatherer::new(&plan.jobs, sink, bodies)?;
    let broker = connect::connect(global).await?;
    let started = Instant::now();
    let interrupted = async {
        // Without a signal's stream there is nothing to wait for; the process then dies of Ctrl-C as usual.
        match tokio::signal::ctrl_c().await {
            Ok(()) => (),
            Err(_) => std::future::pending().await,
        }
    };
    let working = tokio::select! {
        result = work(&broker, &plan, &mut gatherer, printer) => result,
        () = interrupted => Err(Failure::Interrupted(
            "jobs published stay published; the same command goes on from here".to_owned(),
        )),
    };
    let last = std::mem::take(&mut gatherer.last);
    let summary = gatherer.finish()?;
    let summary = summary.close(*working.as_ref().unwrap_or(&Duration::ZERO), started.elapsed());
    if is_one_prompt(args) && !args.stream && !global.json && working.is_ok() {
        last.iter().for_each(crate::live::print_whole);
    }
    if working.is_ok() || plan.wait {
        report(&summary, plan.wait, printer);
    }
    working?;
    Ok(Verdict::of(summary.is_well()))
}

fn is_one_prompt(args: &SubmitArgs) -> bool {
    args.input.files.is_empty() && args.input.prompt.len() == 1 && args.output.is_none()
}

fn print_ids(jobs: &[PlannedJob]) {
    for job in jobs {
        line(&json!({"job": job.id, "custom_ids": job.custom_ids, "bytes": job.body.len()}).to_string());
    }
}

fn report(summary: &Summary, waited: bool, printer: Printer) {
    if waited {
        note(&summary.sentence());
    } else {
        let Summary { jobs, accepted, published, duplicate, done_before, .. } = summary;
        note(&format!(
            "{accepted} of {} accepted: {published} published, {duplicate} published before, \
             {done_before} done before",
            counted(*jobs, "job")
        ));
    }
    printer.object(summary);
}

/// Publishes what has no outcome, and waits if asked to. Gives the time from the first publish to the end.
async fn work(
    broker: &Connection,
    plan: &Plan,
    gatherer: &mut Gatherer<'_>,
    printer: Printer,
) -> Result<Duration, Failure> {
    broker.stream(broker.model.jobs_stream()).await?;
    let mut follower = Follower::from_now(broker).await?;
    skip_done(broker, plan, gatherer).await?;
    let live = match plan.envelope.stream && gatherer.misses(&plan.jobs[0].id) {
        true => Some(Live::listen(broker, &plan.jobs[0].id, printer.json).await?),
        false => None,
    };
    let started = Instant::now();
    publish(broker, plan, gatherer).await?;
    if !plan.wait {
        return Ok(started.elapsed());
    }
    let Some(mut live) = live else {
        gatherer.wait(&mut follower, plan.timeout).await?;
        if plan.envelope.stream {
            // Its outcome was there before: there is nothing to stream.
            gatherer.last.iter().filter(|_| !printer.json).for_each(crate::live::print_whole);
        }
        return Ok(started.elapsed());
    };
    tokio::select! {
        waited = gatherer.wait(&mut follower, plan.timeout) => waited?,
        () = live.print() => {}
    }
    let elapsed = started.elapsed();
    if let Some(line) = gatherer.last.first() {
        live.end(line);
    }
    Ok(elapsed)
}

/// Takes the outcomes that are stored before anything is published, once it is sure that they answer these jobs.
async fn skip_done(broker: &Connection, plan: &Plan, gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    let missing = gatherer.missing();
    let mut check = DoneCheck::new(&plan.jobs);
    if plan.wait || missing.len() < LISTED_MIN {
        let outcomes = follow::stored(broker, &missing).await?;
        check.look(&outcomes);
        check.settle(broker, plan.any_model).await?;
        gatherer.summary.done_before += outcomes.len() as u64;
        gatherer.summary.accepted += outcomes.len() as u64;
        return gatherer.take(outcomes, false).await;
    }
    let listed: Vec<JobId> = list_done(broker, &missing).await?.into_iter().collect();
    let mut done = HashSet::with_capacity(listed.len());
    for jobs in listed.chunks(direct::SUBJECTS_MAX) {
        let outcomes = follow::stored(broker, jobs).await?;
        check.look(&outcomes);
        done.extend(outcomes.into_iter().map(|outcome| outcome.job));
    }
    check.settle(broker, plan.any_model).await?;
    gatherer.summary.done_before += done.len() as u64;
    gatherer.summary.accepted += done.len() as u64;
    gatherer.skip(&done);
    Ok(())
}

/// Those of `jobs` that have something on their outcome's subject, by the stream's list of subjects.
async fn list_done(broker: &Connection, jobs: &[JobId]) -> Result<HashSet<JobId>, Failure> {
    use futures::TryStreamExt;
    let name = broker.model.results_stream();
    let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("stream {name}: {e}"));
    let stream = broker.stream(name.clone()).await?;
    let wildcard = broker.model.results_wildcard();
    let mut subjects = stream.info_with_subjects(wildcard).await.map_err(|e| refused(&e))?;
    let asked: HashSet<&JobId> = jobs.iter().collect();
    let mut done = HashSet::new();
    while let Some((subject, _)) = subjects.try_next().await.map_err(|e| refused(&e))? {
        let job = crate::direct::job_of(&broker.model, "results", &subject);
        done.extend(job.filter(|job| asked.contains(job)));
    }
    Ok(done)
}

async fn publish(broker: &Connection, plan: &Plan, gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    let mut parcels = Vec::new();
    for job in plan.jobs.iter().filter(|job| gatherer.misses(&job.id)) {
        let input = match &plan.object_store {
            Some(prefix) if job.body.len() > plan::MESSAGE_BODY_BYTES_MAX => {
                Some(gatherer.bodies().put(prefix, job.body.clone()).await?)
            }
            _ => None,
        };
        parcels.push(Parcel { job, input });
    }
    let mut progress = Progress::start("published", parcels.len() as u64);
    let summary = &mut gatherer.summary;
    let mut count = 0;
    let published = publish::publish_all(broker, &plan.envelope, &parcels, plan.timeout, |_, ack| {
        count += 1;
        summary.accepted += 1;
        *(if ack.duplicate { &mut summary.duplicate } else { &mut summary.published }) += 1;
        progress.set(count, String::new());
    })
    .await;
    progress.finish();
    published
}
