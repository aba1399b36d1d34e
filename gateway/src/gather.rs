//! The common part of `submit --wait` and `results`: outcomes of known jobs into a file or onto standard
//! output, in input order, and into the summary.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use millrace_crds::names::JobId;
use millrace_crds::result::OutputLine;

use crate::collect::{Collector, OutputFile, Placed};
use crate::failure::Failure;
use crate::follow::{Follower, StallClock};
use crate::outcome::CollectedOutcome;
use crate::output::{Progress, line, note};
use crate::plan::PlannedJob;
use crate::store::Bodies;
use crate::summary::Summary;

/// Where lines go.
pub enum Sink {
    /// Into a file, in input order.
    File(OutputFile),
    /// Onto standard output, in input order.
    Print,
    /// Nowhere: they are counted.
    Count,
}

/// Outcomes on their way to the caller.
pub struct Gatherer<'a> {
    jobs: &'a [PlannedJob],
    collector: Collector,
    sink: Sink,
    bodies: Bodies,
    /// The account so far.
    pub summary: Summary,
    /// The lines of the last outcome taken: those of a single job, for printing its text.
    pub last: Vec<OutputLine>,
}

impl<'a> Gatherer<'a> {
    /// For these jobs; those in the file already are not asked for again.
    ///
    /// # Errors
    /// [`Failure::Usage`] when the file is of other jobs.
    pub fn new(jobs: &'a [PlannedJob], sink: Sink, bodies: Bodies) -> Result<Self, Failure> {
        let mut collector = Collector::new(jobs.iter().map(|job| &job.id));
        let mut summary = Summary::of(jobs.len());
        if let Sink::File(file) = &sink {
            for job in file.jobs_present(jobs)? {
                collector.put(&job, Vec::new());
                summary.done_before += 1;
                summary.accepted += 1;
            }
            summary.collected_before = summary.done_before;
        }
        Ok(Self { jobs, collector, sink, bodies, summary, last: Vec::new() })
    }

    /// Where large bodies are.
    pub fn bodies(&self) -> &Bodies {
        &self.bodies
    }

    /// Jobs without an outcome, in order.
    pub fn missing(&self) -> Vec<JobId> {
        self.collector.missing(self.jobs.len()).into_iter().cloned().collect()
    }

    /// Whether a job has no outcome yet.
    pub fn misses(&self, job: &JobId) -> bool {
        self.collector.misses(job)
    }

    /// Marks jobs as done whose outcomes nobody wants.
    pub fn skip(&mut self, done: &HashSet<JobId>) {
        for job in done {
            self.collector.put(job, Vec::new());
        }
    }

    /// Takes outcomes; `fresh` when they arrived in this run.
    ///
    /// # Errors
    /// [`Failure::File`], or when there is no object store for a body. A body that cannot be read is counted and named.
    pub async fn take(&mut self, outcomes: Vec<CollectedOutcome>, fresh: bool) -> Result<(), Failure> {
        for mut outcome in outcomes {
            let Some(place) = self.collector.place_of(&outcome.job) else { continue };
            let lines = match self.bodies.fetch(&mut outcome).await? {
                Ok(()) => outcome.lines_of(&self.jobs[place]),
                Err(reason) => Err(reason),
            };
            let lines = lines.unwrap_or_else(|error| {
                note(&format!("error: {error}"));
                self.summary.malformed += 1;
                Vec::new()
            });
            let text = lines.iter().map(|l| serde_json::to_string(l).expect("our own types are JSON"));
            if self.collector.put(&outcome.job, text.collect()) == Placed::New {
                self.summary.count(&outcome, &lines, fresh);
                self.last = lines;
            }
        }
        let lines = self.collector.take_in_order();
        self.emit(&lines)
    }

    fn emit(&mut self, lines: &[String]) -> Result<(), Failure> {
        match &mut self.sink {
            Sink::File(file) => file.append(lines),
            Sink::Print => {
                lines.iter().for_each(|text| line(text));
                Ok(())
            }
            Sink::Count => Ok(()),
        }
    }

    /// Waits until all jobs have an outcome.
    ///
    /// # Errors
    /// [`Failure::Stalled`] when none arrives for `timeout`.
    pub async fn wait(&mut self, follower: &mut Follower<'_>, timeout: Duration) -> Result<(), Failure> {
        let mut patience = StallClock::new(timeout);
        let mut progress = Progress::start("outcomes", self.jobs.len() as u64);
        while self.collector.missing_count() > 0 {
            let outcomes = follower.look(&self.collector).await?;
            let found = !outcomes.is_empty();
            self.take(outcomes, true).await?;
            let missing = self.collector.missing_count();
            let summary = &self.summary;
            let message = format!(
                "{} rejected, {} dead, {} tokens",
                summary.rejected, summary.dead, summary.output_tokens
            );
            progress.set((self.jobs.len() - missing) as u64, message);
            if found {
                patience.renew();
            } else if patience.is_over() {
                return Err(Failure::Stalled(format!(
                    "no outcome for --timeout {}; {missing} of {} jobs have none: look at `millrace queue`",
                    patience.limit(),
                    self.jobs.len()
                )));
            }
            if missing > 0 {
                follower.rest(found).await;
            }
        }
        progress.finish();
        Ok(())
    }

    /// Writes what is there, also behind missing jobs, and closes the file.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn finish(mut self) -> Result<Summary, Failure> {
        let lines = self.collector.take_all();
        self.emit(&lines)?;
        self.summary.missing = self.collector.missing_count() as u64;
        if let Sink::File(file) = self.sink {
            let ids = self.jobs.iter().flat_map(|job| &job.custom_ids);
            let order: HashMap<&str, usize> = ids.enumerate().map(|(i, id)| (id.as_str(), i)).collect();
            file.finish(&order)?;
        }
        Ok(self.summary)
    }
}
