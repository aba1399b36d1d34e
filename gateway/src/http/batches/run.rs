//! A batch is run: its input checked, its lines made jobs, their outcomes its files, and its end told.
//!
//! Two things go on beside each other: lines are published, as long as there is room for more on their way, and
//! outcomes are looked up and written in the order of the input. Both begin where the record says that they are.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use millrace_crds::names::{JobId, ModelRef};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::cancel;
use crate::connect::Connection;
use crate::direct::SUBJECTS_MAX;
use crate::entries::Origin;
use crate::follow;
use crate::http::batches::flight::{FlightLine, LineFlight, ReadySegment};
use crate::http::batches::held::{HeldBatch, RunError};
use crate::http::batches::input::InputLines;
use crate::http::batches::lines::{LineRequest, fault};
use crate::http::batches::record::{BatchRecord, BatchStatus, BatchTask, ResultSegment};
use crate::http::batches::result::{LineResult, job_id};
use crate::http::batches::{finish, webhook};
use crate::http::blobs::Blob;
use crate::http::error::ApiCode;
use crate::http::records::{new_id, now};
use crate::outcome::CollectedOutcome;
use crate::plan::PlannedJob;
use crate::publish::{self, JobEnvelope, Parcel};

/// Pause after something did not answer.
const AGAIN_PAUSE: Duration = Duration::from_secs(1);
/// Most lines, and bytes of their bodies, that are published together.
const FEED_LINES: usize = 1024;
const FEED_BYTES: usize = 4 << 20;
/// How long one publish may bring nothing before the batch is looked at again.
const FEED_STALL: Duration = Duration::from_secs(20);
/// Pause while there is no room for more lines.
const ROOM_PAUSE: Duration = Duration::from_millis(20);
/// Pause after a look that found nothing; it doubles.
const LOOK_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// Once a batch is stopped, its lines are given up after so long without a new outcome.
const STOP_QUIET: Duration = Duration::from_secs(10);
/// How often it is looked whether a batch is stopped while lines are published.
const STOP_PAUSE: Duration = Duration::from_millis(250);
/// Cancel markers that are stored at once.
const MARKS_AT_ONCE: usize = 64;

/// Runs a batch until it has ended, is another gateway's, or this one drains.
pub async fn run(held: Arc<HeldBatch>) {
    let id = held.look().await.id;
    let ended = tokio::select! {
        ended = work(&held) => ended,
        beat = held.beat() => match beat {
            Ok(()) => {
                held.release().await;
                return tracing::info!(batch = id, "a batch was given back");
            }
            Err(error) => Err(error),
        },
    };
    match ended {
        Ok(()) => tracing::info!(batch = id, "a batch has ended"),
        Err(error) => tracing::info!(batch = id, %error, "a batch runs here no more"),
    }
}

async fn work(held: &Arc<HeldBatch>) -> Result<(), RunError> {
    loop {
        let record = held.look().await;
        let done = match record.task() {
            BatchTask::Validate => validate(held, &record).await,
            BatchTask::Run => run_lines(held, &record).await,
            BatchTask::Finish => finish::finish(held, &record).await,
            BatchTask::Notify => webhook::notify(held, &record).await,
            BatchTask::Rest => {
                let removed = held.front.archive.active.remove(&record.id).await;
                return removed.map_err(RunError::again);
            }
        };
        match done {
            Ok(()) => {}
            Err(RunError::Again(reason)) => {
                tracing::warn!(batch = record.id, reason, "a batch is tried again");
                tokio::time::sleep(AGAIN_PAUSE).await;
            }
            Err(lost) => return Err(lost),
        }
    }
}

/// Reads the whole input once.
async fn validate(held: &HeldBatch, record: &BatchRecord) -> Result<(), RunError> {
    let front = &held.front;
    let refuse = async |code: &str, line: Option<u64>, message: String, param: Option<&str>| {
        let faults = vec![fault(code, line, message, param)];
        held.change(|record| record.refused(faults.clone(), now())).await
    };
    let mut input = match InputLines::open(front, record).await {
        Ok(input) => input,
        Err(error) if error.code == ApiCode::FileNotFound => {
            return refuse("file_not_found", None, error.message, Some("input_file_id")).await;
        }
        Err(error) => return Err(RunError::again(error.message)),
    };
    while let Some(line) = input.cut().await? {
        if !input.checker.check(&line) || record_has_stopped(held).await {
            break;
        }
    }
    let mut checker = input.checker;
    checker.end();
    if !checker.faults.is_empty() {
        return held.change(|record| record.refused(checker.faults.clone(), now())).await;
    }
    let name = checker.model.unwrap_or_default();
    match front.catalog.find(&name, &record.scopes).await {
        Ok(found) => {
            held.fresh.store(true, Ordering::Relaxed);
            held.change(|record| record.validated(&name, &found.model, checker.lines, now())).await
        }
        Err(error) if error.code == ApiCode::ModelNotFound => {
            refuse("model_not_found", Some(1), error.message, Some("body.model")).await
        }
        Err(error) => Err(RunError::again(error.message)),
    }
}

async fn record_has_stopped(held: &HeldBatch) -> bool {
    held.stop().await == Some(BatchStatus::Cancelled)
}

/// A batch whose lines are on their way.
struct LineRun<'a> {
    held: &'a HeldBatch,
    record: &'a BatchRecord,
    broker: Connection,
    envelope: JobEnvelope,
    flight: Mutex<LineFlight>,
    /// Whether another run may have published lines.
    resumed: bool,
}

async fn run_lines(held: &HeldBatch, record: &BatchRecord) -> Result<(), RunError> {
    let (namespace, name) = record.queue.as_ref().ok_or_else(|| RunError::again("the batch has no model"))?;
    let model = ModelRef::new(namespace, name).map_err(RunError::again)?;
    let deadline = OffsetDateTime::from_unix_timestamp(record.expires_at).ok();
    let envelope = JobEnvelope {
        class: record.class,
        deadline: deadline.and_then(|at| at.format(&Rfc3339).ok()),
        ..JobEnvelope::default()
    };
    let run = LineRun {
        held,
        record,
        broker: held.front.connection(&model),
        envelope,
        flight: Mutex::new(LineFlight::new(record.counts.total)),
        resumed: !held.fresh.swap(false, Ordering::Relaxed),
    };
    let (fed, gathered) = {
        let (feed, gather) = (std::pin::pin!(run.feed()), std::pin::pin!(run.gather()));
        match futures::future::select(feed, gather).await {
            // Lines that nobody can read have no results either.
            futures::future::Either::Left((Ok(()), gather)) => (Ok(()), gather.await),
            futures::future::Either::Left((Err(error), _)) => (Err(error), Ok(())),
            futures::future::Either::Right((gathered, _)) => (Ok(()), gathered),
        }
    };
    held.saw((0, 0));
    match (fed, gathered) {
        (Err(RunError::Again(reason)), _) if held.stop().await.is_some() => run.abandon(&reason).await,
        (fed, gathered) => fed.and(gathered),
    }
}

impl LineRun<'_> {
    fn flight(&self) -> MutexGuard<'_, LineFlight> {
        self.flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes all lines that are not written, or gives them up once the batch is stopped.
    async fn feed(&self) -> Result<(), RunError> {
        let open = InputLines::open(&self.held.front, self.record).await;
        let mut input = open.map_err(|error| RunError::again(error.message))?;
        let mut number = self.record.written;
        input.skip(number).await?;
        let most = self.held.front.args.files.batch_flight as usize;
        loop {
            while self.flight().count() >= most {
                tokio::time::sleep(ROOM_PAUSE).await;
            }
            let room = (most - self.flight().count().min(most - 1)).min(FEED_LINES);
            let requests = input.chunk(room, FEED_BYTES).await?;
            if requests.is_empty() {
                self.flight().closed = true;
                return Ok(());
            }
            let count = requests.len() as u64;
            self.feed_some(number, requests).await?;
            number += count;
        }
    }

    async fn feed_some(&self, first: u64, requests: Vec<LineRequest>) -> Result<(), RunError> {
        let jobs = (first..).map(|number| job_id(&self.record.id, number));
        let mut lines: Vec<FlightLine> = jobs
            .zip(&requests)
            .map(|(job, request)| {
                let custom_id = request.custom_id.clone();
                FlightLine { job, custom_id, result: None, cancelled: false }
            })
            .collect();
        // What a run before this one may have published is looked for, even if it is given up.
        let out_before = self.record.written + u64::from(self.held.front.args.files.batch_flight);
        let mut maybe_out = self.resumed && first < out_before;
        loop {
            if let Some(why) = self.held.stop().await {
                if !maybe_out {
                    for line in &mut lines {
                        line.result = Some(LineResult::given_up(&line.job, &line.custom_id, why));
                    }
                }
                self.flight().push(lines);
                return Ok(());
            }
            maybe_out = true;
            let published = tokio::select! {
                published = self.publish(&lines, &requests) => published,
                () = self.stopped() => continue,
            };
            match published {
                Ok(()) => break,
                Err(error) => tracing::warn!(batch = self.record.id, %error, "lines are not published yet"),
            }
            tokio::time::sleep(AGAIN_PAUSE).await;
        }
        self.flight().push(lines);
        Ok(())
    }

    /// Waits until the batch is stopped.
    async fn stopped(&self) {
        while self.held.stop().await.is_none() {
            tokio::time::sleep(STOP_PAUSE).await;
        }
    }

    async fn publish(&self, lines: &[FlightLine], requests: &[LineRequest]) -> Result<(), RunError> {
        let mut done = std::collections::HashSet::new();
        if self.resumed {
            let jobs: Vec<JobId> = lines.iter().map(|line| line.job.clone()).collect();
            for some in jobs.chunks(SUBJECTS_MAX) {
                let outcomes = follow::stored(&self.broker, some).await.map_err(RunError::again)?;
                done.extend(outcomes.into_iter().map(|outcome| outcome.job));
            }
        }
        let file: Arc<str> = self.record.input_file_id.as_str().into();
        let planned = |(index, (line, request)): (usize, (&FlightLine, &LineRequest))| PlannedJob {
            id: line.job.clone(),
            custom_ids: vec![request.custom_id.clone()],
            body: request.body.clone(),
            jsonl: false,
            origin: Origin { file: file.clone(), line: index + 1 },
        };
        let left = lines.iter().zip(requests).filter(|(line, _)| !done.contains(&line.job)).enumerate();
        let jobs: Vec<PlannedJob> = left.map(planned).collect();
        let front = &self.held.front;
        let mut parcels = Vec::with_capacity(jobs.len());
        for job in &jobs {
            let input = match &front.args.object_store {
                Some(prefix) if job.body.len() > front.message_bytes_max() => {
                    Some(front.bodies.put(prefix, job.body.clone()).await.map_err(RunError::again)?)
                }
                _ => None,
            };
            parcels.push(Parcel { job, input });
        }
        let counted =
            |_: usize, _: &async_nats::jetstream::publish::PublishAck| front.metrics.published.inc();
        let published = publish::publish_all(&self.broker, &self.envelope, &parcels, FEED_STALL, counted);
        published.await.map_err(RunError::again)
    }

    /// Looks outcomes up and writes them, until all lines are written.
    async fn gather(&self) -> Result<(), RunError> {
        let mut written = self.record.written;
        let (mut pause, mut quiet_since) = (LOOK_PAUSE.0, None::<Instant>);
        loop {
            let missing = self.flight().missing(SUBJECTS_MAX);
            let found = self.collect(&missing).await;
            let found = match found {
                Ok(found) => found,
                Err(RunError::Again(reason)) => {
                    tracing::warn!(batch = self.record.id, reason, "outcomes cannot be looked up");
                    0
                }
                Err(lost) => return Err(lost),
            };
            if let Some(why) = self.held.stop().await {
                let cancelled = self.cancel(why).await;
                let since = quiet_since.get_or_insert_with(Instant::now);
                if found + cancelled > 0 {
                    *since = Instant::now();
                }
                if since.elapsed() >= STOP_QUIET {
                    self.flight().fill_all(|line| LineResult::given_up(&line.job, &line.custom_id, why));
                }
            }
            self.held.saw(self.flight().seen());
            loop {
                let Some(ready) = self.flight().take() else { break };
                written = self.write(ready, written).await?;
            }
            if self.flight().is_over() {
                return Ok(());
            }
            pause = if found > 0 { LOOK_PAUSE.0 } else { (pause * 2).min(LOOK_PAUSE.1) };
            if found < SUBJECTS_MAX / 2 {
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// The outcomes of these lines, as far as there are any; how many.
    async fn collect(&self, missing: &[(usize, JobId)]) -> Result<usize, RunError> {
        if missing.is_empty() {
            return Ok(0);
        }
        let jobs: Vec<JobId> = missing.iter().map(|(_, job)| job.clone()).collect();
        let outcomes = follow::stored(&self.broker, &jobs).await.map_err(RunError::again)?;
        let places: std::collections::HashMap<&JobId, usize> =
            missing.iter().map(|(place, job)| (job, *place)).collect();
        let count = outcomes.len();
        for outcome in outcomes {
            let Some(place) = places.get(&outcome.job) else { continue };
            self.take(*place, outcome).await;
        }
        Ok(count)
    }

    async fn take(&self, place: usize, mut outcome: CollectedOutcome) {
        let unreadable = match self.held.front.bodies.fetch(&mut outcome).await {
            Ok(Ok(())) => None,
            Ok(Err(reason)) => Some(reason),
            Err(failure) => Some(failure.to_string()),
        };
        if let Some(reason) = &unreadable {
            tracing::error!(job = %outcome.job, reason, "an outcome cannot be read");
        }
        self.flight().fill(place, |line| match unreadable {
            None => LineResult::of_outcome(&line.job, &line.custom_id, &outcome.body),
            Some(_) => {
                LineResult::unreadable(&line.job, &line.custom_id, "the stored outcome cannot be read")
            }
        });
    }

    /// Cancels the jobs of lines that have no result, each once; how many.
    async fn cancel(&self, why: BatchStatus) -> usize {
        if why != BatchStatus::Cancelled {
            return 0;
        }
        let jobs = self.flight().cancel();
        let count = jobs.len();
        futures::stream::iter(jobs)
            .for_each_concurrent(MARKS_AT_ONCE, |job| async move {
                match cancel::mark(&self.broker, &job).await {
                    Ok(()) => self.held.front.metrics.cancelled.inc(),
                    Err(error) => tracing::warn!(%job, %error, "a line of a batch was not cancelled"),
                }
            })
            .await;
        count
    }

    /// Stores a segment and counts its lines as written, in one write of the record.
    async fn write(&self, ready: ReadySegment, from: u64) -> Result<u64, RunError> {
        let ReadySegment { segment, output, errors } = ready;
        let segment = ResultSegment {
            from,
            output: self.store(output).await?,
            errors: self.store(errors).await?,
            ..segment
        };
        let (completed, failed) = self.flight().seen();
        let written = self.held.change(|record| {
            record.wrote(segment.clone());
            record.saw(completed, failed);
        });
        if let Err(error) = written.await {
            let blobs: Vec<Blob> = segment.output.into_iter().chain(segment.errors).collect();
            self.held.front.archive.forget(&blobs).await;
            return Err(error);
        }
        Ok(from + segment.lines)
    }

    async fn store(&self, text: String) -> Result<Option<Blob>, RunError> {
        if text.is_empty() {
            return Ok(None);
        }
        let text = Bytes::from(text);
        loop {
            let mut writer = self.held.front.archive.blobs.writer(&new_id("blob_"));
            let stored = match writer.write(text.clone()).await {
                Ok(()) => writer.finish().await,
                Err(error) => Err(error),
            };
            match stored {
                Ok(blob) => return Ok(Some(blob)),
                // What is computed is not thrown away: there will be room, or the store will be there again.
                Err(error) => tracing::warn!(batch = self.record.id, %error, "results are not stored yet"),
            }
            tokio::time::sleep(AGAIN_PAUSE).await;
        }
    }

    /// Ends a batch that is stopped and whose input cannot be read any more.
    async fn abandon(&self, reason: &str) -> Result<(), RunError> {
        tracing::error!(batch = self.record.id, reason, "the rest of a batch's input is lost");
        self.held
            .change(|record| {
                let segment = ResultSegment {
                    from: record.written,
                    lines: record.counts.total - record.written,
                    late: true,
                    ..ResultSegment::default()
                };
                record.wrote(segment);
            })
            .await
    }
}
