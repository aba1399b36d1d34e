//! The ledger of a job's attempts: how often a worker began to run it, and how processes died while it ran.
//!
//! The broker's delivery count is not that number. It also counts deliveries that were held and never run
//! because a neighbour ended the process, and it is lost when the broker is killed. So a job that is
//! delivered a second time gets a record, replaced by compare-and-set before each start.
//!
//! A process that dies takes all jobs that run in it along, and one of them may have killed it. Which one is found by
//! halving (Dorfman 1943, adaptive group testing): suspected jobs run in cohorts, half of them at a time, until the
//! killer is the only one suspected. Only deaths from then on count as its attempts.

use serde::{Deserialize, Serialize};

use crate::names::SubjectToken;

/// Deaths that a ledger remembers; earlier ones are forgotten first.
pub const DEATHS_KEPT: usize = 8;
/// Characters of what a process said when it died.
pub const CAUSE_CHARS_MAX: usize = 200;

/// Beside what a job ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Company {
    /// Beside others, any of which may be to blame if the process dies.
    Crowd,
    /// Beside jobs during which no process has died.
    OnlySuspect,
    /// Beside no other job.
    Alone,
}

impl Company {
    /// Whether a death in it speaks against the job.
    pub fn accuses(self) -> bool {
        self != Company::Crowd
    }
}

/// A process died while the job ran, or lost its delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Death {
    /// Its worker.
    pub worker: SubjectToken,
    /// Beside what the job ran.
    pub company: Company,
    /// What the process said before it ended; nothing if it was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

/// One job's ledger, the body of the message on its attempts subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptRecord {
    /// Attempts that were started and not handed back.
    pub starts: u32,
    /// Of them, those whose worker lived to say how they ended. The others may have killed it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ended: u32,
    /// Of them, those in which a process died that others may have killed. They count for nothing.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub crowded: u32,
    /// Beside what the last one runs, until its end is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub company: Option<Company>,
    /// The last deaths, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deaths: Vec<Death>,
    /// The worker that wrote the record.
    pub worker: SubjectToken,
}

impl AttemptRecord {
    /// A job of which no attempt is known.
    pub fn unstarted(worker: SubjectToken) -> Self {
        Self { starts: 0, ended: 0, crowded: 0, company: None, deaths: Vec::new(), worker }
    }

    /// Starts of which no end is known: a process died, or lost its delivery, while the job ran in it.
    pub fn unended(&self) -> u32 {
        self.starts.saturating_sub(self.ended)
    }

    /// Attempts that count against the limit.
    pub fn counted(&self) -> u32 {
        self.starts.saturating_sub(self.crowded)
    }

    /// As it stands when the job is delivered again: a start of which the end is not known was a death.
    pub fn delivered_again(self) -> Self {
        let worker = self.worker.clone();
        self.died(worker, None)
    }

    /// The process ends, or has ended, while the last start runs; nothing changes where none does.
    pub fn died(mut self, worker: SubjectToken, cause: Option<&str>) -> Self {
        let Some(company) = self.company.take() else { return self };
        self.crowded += u32::from(!company.accuses());
        let cause = cause.map(|cause| cause.chars().take(CAUSE_CHARS_MAX).collect());
        self.deaths.push(Death { worker, company, cause });
        let forgotten = self.deaths.len().saturating_sub(DEATHS_KEPT);
        self.deaths.drain(..forgotten);
        self
    }

    /// The next start, by this worker.
    pub fn started(self, company: Company, worker: SubjectToken) -> Self {
        Self { starts: self.starts + 1, company: Some(company), worker, ..self }
    }

    /// The last start came to an end that counts.
    pub fn ended(self) -> Self {
        Self { ended: self.ended + 1, company: None, ..self }
    }

    /// The last start was no attempt.
    pub fn taken_back(self) -> Self {
        Self { starts: self.starts.saturating_sub(1), company: None, ..self }
    }

    /// Whether the last death speaks against this job, so that it must run beside none.
    pub fn is_accused(&self) -> bool {
        self.deaths.last().is_some_and(|death| death.company.accuses())
    }

    /// Whether it killed its processes beyond doubt: the last two deaths accuse it, and both processes said the same.
    pub fn is_convicted(&self) -> bool {
        let [.., earlier, last] = self.deaths.as_slice() else { return false };
        let said = |death: &Death| death.cause.as_deref().map(without_numbers);
        last.company == Company::Alone && said(last).is_some() && said(last) == said(earlier)
    }

    /// Each remembered death in words.
    pub fn history(&self) -> String {
        let words = |death: &Death| {
            let company = match death.company {
                Company::Crowd => "beside others",
                Company::OnlySuspect => "the only one suspected",
                Company::Alone => "alone",
            };
            format!("{} ({company}): {}", death.worker, death.cause.as_deref().unwrap_or("no last word"))
        };
        self.deaths.iter().map(words).collect::<Vec<_>>().join("; ")
    }
}

/// Numbers differ from death to death: addresses, steps, rows.
fn without_numbers(cause: &str) -> String {
    cause.chars().filter(|c| !c.is_ascii_digit()).collect()
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(name: &str) -> SubjectToken {
        name.parse().unwrap()
    }

    #[test]
    fn form_on_the_wire() {
        let record = AttemptRecord { starts: 2, ..AttemptRecord::unstarted(token("w-1")) };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(json, r#"{"starts":2,"worker":"w-1"}"#);
        assert_eq!(serde_json::from_str::<AttemptRecord>(&json).unwrap(), record);
        let record = AttemptRecord { ended: 1, crowded: 1, company: Some(Company::OnlySuspect), ..record };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(json, r#"{"starts":2,"ended":1,"crowded":1,"company":"onlySuspect","worker":"w-1"}"#);
        assert_eq!(serde_json::from_str::<AttemptRecord>(&json).unwrap(), record);
    }

    #[test]
    fn deaths_in_a_crowd_count_for_nothing() {
        let (one, two) = (token("w-1"), token("w-2"));
        let record = AttemptRecord::unstarted(one.clone()).started(Company::Crowd, one.clone());
        let record = record.delivered_again();
        assert_eq!((record.starts, record.counted(), record.is_accused()), (1, 0, false));
        let record =
            record.started(Company::OnlySuspect, two.clone()).died(two.clone(), Some("step 7: broken"));
        assert_eq!((record.counted(), record.is_accused(), record.is_convicted()), (1, true, false));
        let again = record.clone().started(Company::Alone, one.clone());
        assert!(again.clone().died(one.clone(), Some("step 8: broken")).is_convicted());
        assert!(!again.clone().died(one.clone(), Some("killed")).is_convicted());
        let silent = again.delivered_again();
        assert_eq!((silent.counted(), silent.is_convicted()), (2, false));
        let history = "w-1 (beside others): no last word; w-2 (the only one suspected): step 7: broken; \
                       w-1 (alone): no last word";
        assert_eq!(silent.history(), history);
        // What ended, or was no attempt, leaves nothing to be suspected of.
        assert_eq!(
            silent.clone().started(Company::Alone, two.clone()).ended().delivered_again().unended(),
            3
        );
        assert_eq!(
            silent.clone().started(Company::Alone, two).taken_back(),
            AttemptRecord { worker: token("w-2"), ..silent }
        );
    }

    #[test]
    fn memory_is_bounded() {
        let worker = token("w-1");
        let long = "x".repeat(10 * CAUSE_CHARS_MAX);
        let dies = |record: AttemptRecord, _| {
            record.started(Company::Crowd, worker.clone()).died(worker.clone(), Some(&long))
        };
        let record = (0..100).fold(AttemptRecord::unstarted(worker.clone()), dies);
        assert_eq!((record.deaths.len(), record.crowded, record.starts), (DEATHS_KEPT, 100, 100));
        assert!(serde_json::to_vec(&record).unwrap().len() < 4 << 10);
    }
}
