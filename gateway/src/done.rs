//! Whether stored outcomes answer the jobs that are asked for: the same body, by the model that is served.
//!
//! An outcome never changes, so a job that was answered by another model cannot be run again under its id. Then the
//! command asks instead of choosing: old answers may be what is wanted, or the very thing that is not.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use millrace_crds::names::JobId;
use millrace_queue::identity::body_digest;

use crate::connect::Connection;
use crate::failure::Failure;
use crate::outcome::CollectedOutcome;
use crate::output::note;
use crate::plan::{MESSAGE_BODY_BYTES_MAX, PlannedJob};
use crate::queue;
use crate::summary::counted;

/// Characters of a digest that a message shows: `sha256:` and twelve digits.
const DIGEST_SHOWN: usize = 19;

/// What the outcomes that were looked at say of themselves.
#[derive(Debug)]
pub struct DoneCheck<'a> {
    jobs: HashMap<&'a JobId, &'a PlannedJob>,
    /// Outcomes by the digest of the model that gave them.
    by_model: BTreeMap<String, u64>,
    other_body: Option<&'a PlannedJob>,
}

impl<'a> DoneCheck<'a> {
    /// For outcomes of these jobs.
    pub fn new(jobs: &'a [PlannedJob]) -> Self {
        let jobs = jobs.iter().map(|job| (&job.id, job)).collect();
        Self { jobs, by_model: BTreeMap::new(), other_body: None }
    }

    /// Looks at outcomes. A body that travels as a claim check is the worker's to compare: its address may be another.
    pub fn look(&mut self, outcomes: &[CollectedOutcome]) {
        for outcome in outcomes {
            if let Some(model) = &outcome.of.model {
                *self.by_model.entry(model.clone()).or_default() += 1;
            }
            let Some(&job) = self.jobs.get(&outcome.job) else { continue };
            let in_message = job.body.len() <= MESSAGE_BODY_BYTES_MAX;
            if in_message && !outcome.of.is_of_body(&body_digest(&job.body, None)) {
                self.other_body.get_or_insert(job);
            }
        }
    }

    /// Refuses outcomes of other bodies, and, unless any model will do, those of a model that is not served.
    ///
    /// # Errors
    /// [`Failure::Usage`], with what can be done.
    pub async fn settle(self, broker: &Connection, any_model: bool) -> Result<(), Failure> {
        if let Some(job) = self.other_body {
            return Err(Failure::Usage(format!(
                "{}: job id {} has the outcome of another body; give another --id-prefix, or leave --id-from \
                 custom-id out",
                job.origin, job.id
            )));
        }
        if any_model || self.by_model.is_empty() {
            return Ok(());
        }
        let workers = queue::workers(broker).await?;
        self.of_served(&workers.into_iter().filter_map(|worker| worker.model_digest).collect())
    }

    /// Whether all outcomes are of a model that is served. Where nobody says what is served, outcomes of one model are
    /// taken for its answers, and it is said.
    fn of_served(&self, served: &BTreeSet<String>) -> Result<(), Failure> {
        let total: u64 = self.by_model.values().sum();
        let others: u64 =
            self.by_model.iter().filter(|(model, _)| !served.contains(*model)).map(|(_, count)| count).sum();
        let shown = |models: &mut dyn Iterator<Item = &String>| {
            models.map(|model| model.get(..DIGEST_SHOWN).unwrap_or(model)).collect::<Vec<_>>().join(", ")
        };
        let answered_by = shown(&mut self.by_model.keys());
        if served.is_empty() && self.by_model.len() == 1 {
            note(&format!(
                "{} done before, by the model {answered_by}; no worker reports which one is served now",
                counted(total, "job")
            ));
            return Ok(());
        }
        if others == 0 {
            return Ok(());
        }
        let now = if served.is_empty() { "no worker reports".to_owned() } else { shown(&mut served.iter()) };
        Err(Failure::Usage(format!(
            "{others} of {} that are done were answered by another model (answers: {answered_by}; served now: \
             {now}): --any-model counts them as done, --id-prefix TEXT runs all of them under other ids",
            counted(total, "job")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_served_model_counts() {
        let of = |models: &[(&str, u64)]| DoneCheck {
            jobs: HashMap::new(),
            by_model: models.iter().map(|(model, count)| ((*model).to_owned(), *count)).collect(),
            other_body: None,
        };
        let served = |models: &[&str]| models.iter().map(|model| (*model).to_owned()).collect();
        assert!(of(&[("sha256:a", 3)]).of_served(&served(&["sha256:a"])).is_ok());
        assert!(
            of(&[("sha256:a", 3), ("sha256:b", 1)]).of_served(&served(&["sha256:b", "sha256:a"])).is_ok()
        );
        assert!(of(&[("sha256:a", 3)]).of_served(&served(&[])).is_ok(), "unknown: said, and taken");
        let mixed = of(&[("sha256:a", 3), ("sha256:b", 1)]).of_served(&served(&["sha256:b"]));
        let text = mixed.unwrap_err().to_string();
        assert!(text.contains("3 of 4 jobs") && text.contains("--any-model"), "{text}");
        assert!(of(&[("sha256:a", 3), ("sha256:b", 1)]).of_served(&served(&[])).is_err());
    }
}
