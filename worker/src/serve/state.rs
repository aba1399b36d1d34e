//! The state of a held job: what it asks for, what it owes, and what each event makes of it. Pure.
//!
//! A state asks for one [`Action`] at a time, and what comes of it is the next [`JobEvent`]; a fault may come in
//! place of any. Losing a delivery or the process in any state leads to a redelivery, which finds what was stored.
//!
//! | state | asks for | owes while it waits | a fault leads to |
//! |---|---|---|---|
//! | `Looking` | outcome, marker and ledger | nothing | `TakingBack` |
//! | `Opening` | a ledger, where a delivery before this one left none | nothing | `TakingBack` |
//! | `Waiting` | its turn, as `cohorts` gives it | nothing | an outcome, or `TakingBack` |
//! | `Starting` | its start in the ledger | the start, if it was written | `Rereading` |
//! | `Rereading` | the ledger, to see whether the start was written | the same | `HandingBack` |
//! | `Running` | the answer | the start | an outcome, or `TakingBack`, counted if the fault counts |
//! | `Storing` | the outcome created where there is none | the answer, the start | `TakingBack`, not if it is dead |
//! | `Contesting` | the outcome that was there first | the start | `TakingBack` |
//! | `Burying` | a dead job's copy | the copy, the ack | `HandingBack` |
//! | `Releasing` | marks that age with the outcome | the ack | `Acking`: the marks age by themselves |
//! | `Acking` | the ack | nothing | `Over`: unconfirmed, it comes again |
//! | `TakingBack` | the start taken out of the ledger, or its end put in | the delivery | `HandingBack` |
//! | `HandingBack` | the delivery given back | nothing | `Over`: it comes again after the ack wait |
//! | `Over` | nothing | nothing | |
//!
//! Kept: no ack before the outcome is stored; a job with an outcome never runs again; a start that was no attempt is
//! taken back, and one that ended is not taken for a death.

use millrace_crds::attempts::{AttemptRecord, Company};
use millrace_crds::names::{JobId, SubjectToken};
use millrace_crds::result::{ErrorCode, LineError, OutcomeKind};
use millrace_queue::broker::Created;
use millrace_queue::fault::{Disposition, Fault};
use millrace_queue::identity::AnswerOf;
use millrace_queue::results::{Known, Outcome, StoredOutcome, reason};

use super::cohorts::Suspicion;

/// Deliveries after which a job is given up whatever its ledger says, in multiples of its attempts: the bound
/// for a job that comes back again and again without an attempt that counts. The broker itself has none.
const DELIVERIES_PER_ATTEMPT_MAX: u32 = 10;
/// And not before so many: a killer among many jobs takes them along as often as their number has halves.
const DELIVERIES_MIN: u32 = 64;

/// What does not change about a held job.
#[derive(Debug, Clone)]
pub struct JobFacts {
    /// Its id, as it was published.
    pub id: JobId,
    /// Who holds it.
    pub worker: SubjectToken,
    /// How often the broker delivered it, this time included.
    pub delivered: u32,
    /// Attempts before it is dead.
    pub max_deliver: u32,
    /// The digest of its body.
    pub body_digest: String,
}

/// Why a job ends without an answer, or its answer.
#[derive(Debug, Clone, PartialEq)]
pub enum JobVerdict {
    /// It has its answer.
    Answer(Outcome),
    /// It has none.
    Failed(OutcomeKind, ErrorCode, String),
}

/// What a state asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Read outcome, marker and ledger.
    LookUp,
    /// Name the job anew, since its id is another one's, and read as [`Action::LookUp`].
    Rename,
    /// Replace the ledger, if it is the one of this sequence; 0 is none.
    Record {
        /// The new one.
        record: AttemptRecord,
        /// The ledger's sequence.
        after: u64,
    },
    /// Write the start of this attempt into the ledger, as [`Action::Record`].
    Start {
        /// The ledger with the start.
        record: AttemptRecord,
        /// The ledger's sequence.
        after: u64,
    },
    /// Wait for the turn.
    Turn(Suspicion),
    /// Run the attempt.
    Run,
    /// Create the outcome.
    Store(JobVerdict),
    /// Keep a dead job's copy.
    Bury(StoredOutcome),
    /// Let marker and ledger age with the outcome.
    Release,
    /// Acknowledge.
    Ack,
    /// Give the delivery back.
    HandBack(Fault),
    /// Nothing more.
    End,
}

/// What came of an action.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// What the broker knows, and why the job is refused, if it is.
    Known(Known, Option<Fault>),
    /// The ledger was replaced, or is another one.
    Recorded(Created),
    /// It is its turn, in this company.
    Turn(Company),
    /// The answer.
    Answered(Outcome),
    /// The outcome was created by this worker, or was there.
    Created(Created),
    /// It was done: buried, released, acknowledged or given back.
    Done,
    /// It was not done, or nobody knows.
    Failed(Fault),
}

/// How it was left.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEnd {
    /// Its outcome was stored, now by this worker, and it was acknowledged.
    Finished(OutcomeKind),
    /// Its outcome was there already.
    AlreadyDone(OutcomeKind),
    /// Its outcome is stored and the ack was not confirmed: it comes again and is finished then.
    Unconfirmed(OutcomeKind),
    /// It was given back for this reason.
    HandedBack(Fault),
}

/// The states; see the table above.
#[derive(Debug, Clone, PartialEq)]
enum State {
    Looking,
    Opening(AttemptRecord),
    Waiting(Suspicion),
    Starting,
    Rereading(Fault),
    Running,
    Storing(JobVerdict),
    Contesting,
    Burying(StoredOutcome, bool),
    Releasing(StoredOutcome, bool),
    Acking(StoredOutcome, bool),
    TakingBack(Fault),
    HandingBack(Fault),
    Over(JobEnd),
}

/// The ledger, with this delivery's start once there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ledger {
    /// Sequence of the ledger's last record; 0 if there is none.
    sequence: u64,
    record: AttemptRecord,
}

/// A held job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobState {
    state: State,
    /// The attempt, from 1.
    pub attempt: u32,
    /// What the ledger says, once it was read.
    ledger: Option<Ledger>,
    /// There is a cancel marker or a ledger.
    marked: bool,
    /// Its id was another one's.
    renamed: bool,
}

impl JobState {
    /// As it is delivered.
    pub fn begin() -> (Self, Action) {
        let begun = Self { state: State::Looking, attempt: 1, ledger: None, marked: false, renamed: false };
        (begun, Action::LookUp)
    }

    /// How it was left, if it is over.
    pub fn end(&self) -> Option<&JobEnd> {
        match &self.state {
            State::Over(end) => Some(end),
            _ => None,
        }
    }

    /// What an event makes of the state, and what that asks for. An event that the state did not ask for is a mistake
    /// of the caller; the delivery is then given back.
    pub fn next(mut self, job: &JobFacts, event: JobEvent) -> (Self, Action) {
        let state = std::mem::replace(&mut self.state, State::Looking);
        match (state, event) {
            (State::Looking, JobEvent::Known(known, refused)) => self.known(job, known, refused),
            (State::Opening(record), JobEvent::Recorded(Created::Stored(sequence))) => {
                self.ledger = Some(Ledger { sequence, record });
                self.marked = true;
                self.count(job)
            }
            (State::Waiting(_), JobEvent::Turn(company)) => {
                let Some(ledger) = self.ledger.take() else { return self.hand_back(Fault::Contended) };
                // The delivery count shows a first attempt well enough.
                let first = ledger.sequence == 0 && self.attempt == 1;
                let record = ledger.record.started(company, job.worker.clone());
                self.ledger = Some(Ledger { record, ..ledger });
                self.to(if first { State::Running } else { State::Starting })
            }
            (State::Starting, JobEvent::Recorded(Created::Stored(sequence))) => self.started(sequence),
            // Not written, or its answer was lost and it lost against itself.
            (State::Starting, JobEvent::Recorded(Created::Lost)) => {
                self.to(State::Rereading(Fault::Contended))
            }
            (State::Starting, JobEvent::Failed(fault)) => self.to(State::Rereading(fault)),
            (State::Rereading(fault), JobEvent::Known(known, _)) => match known.ledger {
                Some((record, sequence)) if record.starts == self.attempt && record.worker == job.worker => {
                    self.started(sequence)
                }
                Some((_, sequence)) if self.ledger.as_ref().is_none_or(|own| own.sequence != sequence) => {
                    self.to(State::HandingBack(fault))
                }
                _ => self.hand_back(fault),
            },
            (State::Rereading(_), JobEvent::Failed(fault)) => self.to(State::HandingBack(fault)),
            (State::Running, JobEvent::Answered(outcome)) => {
                self.to(State::Storing(JobVerdict::Answer(outcome)))
            }
            (State::Storing(verdict), JobEvent::Created(Created::Stored(_))) => {
                let stored = self.stored(job, &verdict);
                self.conclude(stored, true)
            }
            (State::Storing(_), JobEvent::Created(Created::Lost)) => self.to(State::Contesting),
            (State::Contesting, JobEvent::Known(known, _)) => self.contested(job, known),
            (State::Burying(stored, own), JobEvent::Done) => self.release(stored, own),
            (State::Releasing(stored, own), JobEvent::Done | JobEvent::Failed(_)) => {
                self.to(State::Acking(stored, own))
            }
            (State::Acking(stored, own), JobEvent::Done) => {
                let end = if own { JobEnd::Finished } else { JobEnd::AlreadyDone };
                self.to(State::Over(end(stored.kind)))
            }
            (State::Acking(stored, _), JobEvent::Failed(_)) => {
                self.to(State::Over(JobEnd::Unconfirmed(stored.kind)))
            }
            (State::TakingBack(fault), JobEvent::Recorded(_) | JobEvent::Failed(_)) => {
                self.to(State::HandingBack(fault))
            }
            (State::HandingBack(fault), JobEvent::Done | JobEvent::Failed(_)) => {
                self.to(State::Over(JobEnd::HandedBack(fault)))
            }
            (state, JobEvent::Failed(fault)) => self.failed(job, &state, fault),
            // Somebody else wrote it at the same moment: what is there is not ours.
            (State::Opening(_), JobEvent::Recorded(Created::Lost)) => {
                self.to(State::HandingBack(Fault::Contended))
            }
            (_, _) => self.hand_back(Fault::Contended),
        }
    }

    /// Enters a state; what it asks for follows from it.
    ///
    /// # Panics
    /// When what is to be written was never read: a mistake of this file.
    fn to(mut self, state: State) -> (Self, Action) {
        let ledger = || self.ledger.clone().expect("the ledger was read before it is written");
        let action = match &state {
            State::Looking | State::Rereading(_) | State::Contesting => Action::LookUp,
            State::Opening(record) => Action::Record { record: record.clone(), after: 0 },
            State::Waiting(suspicion) => Action::Turn(*suspicion),
            State::Starting => {
                let Ledger { record, sequence: after } = ledger();
                Action::Start { record, after }
            }
            State::Running => Action::Run,
            State::Storing(verdict) => Action::Store(verdict.clone()),
            State::Burying(stored, _) => Action::Bury(stored.clone()),
            State::Releasing(..) => Action::Release,
            State::Acking(..) => Action::Ack,
            State::TakingBack(fault) => {
                let Ledger { record, sequence: after } = ledger();
                Action::Record { record: left_by(record, fault), after }
            }
            State::HandingBack(fault) => Action::HandBack(fault.clone()),
            State::Over(_) => Action::End,
        };
        self.state = state;
        (self, action)
    }

    /// The broker said what it knows of the job.
    fn known(mut self, job: &JobFacts, known: Known, refused: Option<Fault>) -> (Self, Action) {
        self.marked |= known.cancelled || known.ledger.is_some();
        match (&known.outcome, refused, &known.ledger) {
            (Some(stored), ..) if self.renamed || stored.of.is_of_body(&job.body_digest) => {
                self.conclude(stored.clone(), false)
            }
            (Some(_), ..) => self.rename(),
            (None, ..) if self.renamed => {
                let message =
                    format!("job id {} was used before with another body, and keeps that outcome", job.id);
                self.to(State::Storing(JobVerdict::Failed(OutcomeKind::Dead, ErrorCode::IdReused, message)))
            }
            (None, Some(fault), _) => self.attempt_failed(job, fault),
            (None, None, Some((record, sequence))) => {
                let record = record.clone().delivered_again();
                self.ledger = Some(Ledger { sequence: *sequence, record });
                self.count(job)
            }
            (None, None, None) if job.delivered <= 1 => {
                let record = AttemptRecord::unstarted(job.worker.clone());
                self.ledger = Some(Ledger { sequence: 0, record });
                self.count(job)
            }
            (None, None, None) => self.to(State::Opening(opened(job))),
        }
    }

    /// The ledger was read: the job is given up, or has its next attempt.
    fn count(mut self, job: &JobFacts) -> (Self, Action) {
        let Some(Ledger { record, .. }) = &self.ledger else { return self.hand_back(Fault::Contended) };
        let (limit, counted) = (job.max_deliver, record.counted());
        let deliveries_max = limit.saturating_mul(DELIVERIES_PER_ATTEMPT_MAX).max(DELIVERIES_MIN);
        if counted >= limit || record.is_convicted() || job.delivered > deliveries_max {
            let message = given_up(job, record);
            self.attempt = record.starts.max(1);
            let verdict = JobVerdict::Failed(OutcomeKind::Dead, ErrorCode::WorkerLost, message);
            return self.to(State::Storing(verdict));
        }
        self.attempt = record.starts + 1;
        // A last attempt after a death is alone, too: it decides. With one attempt in all there is nothing to tell the
        // job from its neighbours by.
        let last = record.unended() > 0 && counted + 1 == limit && limit > 1;
        let suspicion = Suspicion { deaths: record.unended(), alone: record.is_accused() || last };
        self.to(State::Waiting(suspicion))
    }

    fn started(mut self, sequence: u64) -> (Self, Action) {
        self.ledger = self.ledger.map(|ledger| Ledger { sequence, ..ledger });
        self.marked = true;
        self.to(State::Running)
    }

    /// Somebody else's outcome counts, if it is one of this body. It may be of another kind.
    fn contested(mut self, job: &JobFacts, known: Known) -> (Self, Action) {
        self.marked |= known.cancelled || known.ledger.is_some();
        match known.outcome {
            Some(stored) if self.renamed || stored.of.is_of_body(&job.body_digest) => {
                self.conclude(stored, true)
            }
            Some(_) => self.rename(),
            None => self.hand_back(Fault::Contended),
        }
    }

    /// The job goes on under an id of its own. What is written under the other one speaks of the other job.
    fn rename(self) -> (Self, Action) {
        (Self { state: State::Looking, ledger: None, marked: false, renamed: true, ..self }, Action::Rename)
    }

    fn stored(&self, job: &JobFacts, verdict: &JobVerdict) -> StoredOutcome {
        let (kind, reason) = match verdict {
            JobVerdict::Answer(outcome) => {
                (outcome.kind, outcome.error.as_ref().map(reason).unwrap_or_default())
            }
            JobVerdict::Failed(kind, code, message) => {
                (*kind, reason(&LineError { code: *code, message: message.clone() }))
            }
        };
        let of = AnswerOf { body: Some(job.body_digest.clone()), model: None };
        StoredOutcome { kind, attempt: self.attempt, reason, of }
    }

    /// The outcome is stored: what is left is the copy of a dead job, the marks, and the ack.
    fn conclude(self, stored: StoredOutcome, own: bool) -> (Self, Action) {
        match stored.kind {
            OutcomeKind::Dead => self.to(State::Burying(stored, own)),
            _ => self.release(stored, own),
        }
    }

    fn release(self, stored: StoredOutcome, own: bool) -> (Self, Action) {
        match self.marked {
            true => self.to(State::Releasing(stored, own)),
            false => self.to(State::Acking(stored, own)),
        }
    }

    /// A fault came in place of what the state asked for.
    fn failed(self, job: &JobFacts, state: &State, fault: Fault) -> (Self, Action) {
        match (state, &fault) {
            (State::Waiting(_) | State::Running, _) => self.attempt_failed(job, fault),
            // An outcome that the broker refuses for its size is replaced by one that says so.
            (State::Storing(JobVerdict::Answer(_)), Fault::Invalid { message }) => {
                let message = format!("the outcome: {message}");
                let verdict = JobVerdict::Failed(OutcomeKind::Rejected, ErrorCode::InvalidRequest, message);
                self.to(State::Storing(verdict))
            }
            // What it is dead of stays counted.
            (State::Burying(..) | State::Storing(JobVerdict::Failed(OutcomeKind::Dead, ..)), _) => {
                self.to(State::HandingBack(fault))
            }
            _ => self.hand_back(fault),
        }
    }

    /// What a fault of the job itself, or of an attempt, amounts to.
    fn attempt_failed(mut self, job: &JobFacts, fault: Fault) -> (Self, Action) {
        let (kind, code, message) = match fault.disposition() {
            Disposition::Reject(code) => (OutcomeKind::Rejected, code, fault.to_string()),
            Disposition::Retry { counts: true, .. } if self.attempt >= job.max_deliver => {
                let message = format!("attempt {} was the last one: {fault}", self.attempt);
                (OutcomeKind::Dead, ErrorCode::InferenceError, message)
            }
            Disposition::Retry { .. } | Disposition::Exit => return self.hand_back(fault),
        };
        self.marked |= code == ErrorCode::Cancelled;
        self.to(State::Storing(JobVerdict::Failed(kind, code, message)))
    }

    /// The delivery is given back; before that the ledger is put right, as far as it is known.
    fn hand_back(self, fault: Fault) -> (Self, Action) {
        match self.ledger.is_none() {
            true => self.to(State::HandingBack(fault)),
            false => self.to(State::TakingBack(fault)),
        }
    }

    /// Whether its outcome was there when it was delivered.
    pub fn is_repetition(&self) -> bool {
        matches!(self.state, State::Burying(_, false) | State::Releasing(_, false) | State::Acking(_, false))
    }
}

/// The ledger of a job that comes again and has none. Its first delivery is taken to have been begun, beside others.
/// From here on the ledger counts, so that deliveries that are only held beside a killer do not.
fn opened(job: &JobFacts) -> AttemptRecord {
    AttemptRecord { starts: 1, crowded: 1, ..AttemptRecord::unstarted(job.worker.clone()) }
}

/// What a fault leaves in the ledger: the end of an attempt that counts is written beside its start, and so is that
/// of the process; another attempt was none.
fn left_by(record: AttemptRecord, fault: &Fault) -> AttemptRecord {
    if record.company.is_none() {
        return record;
    }
    match fault.disposition() {
        Disposition::Exit => {
            let worker = record.worker.clone();
            record.died(worker, Some(&fault.to_string()))
        }
        _ if counts(fault) => record.ended(),
        _ => record.taken_back(),
    }
}

/// Why a job is given up whose processes died, or that comes again and again.
fn given_up(job: &JobFacts, record: &AttemptRecord) -> String {
    let (counted, limit, deaths) = (record.counted(), job.max_deliver, record.unended());
    let history = match record.history() {
        history if history.is_empty() => format!("the last one on worker {}", record.worker),
        history => history,
    };
    format!(
        "{counted} attempts of {limit} count, in {} deliveries; {deaths} processes died while it ran, {} of them \
         beside other suspects: {history}",
        job.delivered, record.crowded
    )
}

/// Whether the attempt of which the fault is counts.
pub fn counts(fault: &Fault) -> bool {
    matches!(fault.disposition(), Disposition::Retry { counts: true, .. })
}

#[cfg(test)]
mod tests;
