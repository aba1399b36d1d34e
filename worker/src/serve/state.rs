//! The state of a held job: what it asks for, what it owes, and what each event makes of it. Pure.
//!
//! A state asks for one [`Action`] at a time, and what comes of it is the next [`JobEvent`]; a fault may come in place
//! of any. Losing a delivery or the process in any state leads to a redelivery, which finds what was stored.
//!
//! | state | asks for | owes while it waits | a fault leads to |
//! |---|---|---|---|
//! | `Looking` | outcome, marker and ledger | nothing | `TakingBack` |
//! | `Opening` | a ledger, where a delivery before this one left none | nothing | `TakingBack` |
//! | `Waiting` | its turn, alone if a process died of it | nothing | an outcome, or `TakingBack` |
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

use millrace_crds::names::{JobId, SubjectToken};
use millrace_crds::result::{ErrorCode, LineError, OutcomeKind};
use millrace_queue::broker::Created;
use millrace_queue::fault::{Disposition, Fault};
use millrace_queue::identity::AnswerOf;
use millrace_queue::results::{Known, Outcome, StoredOutcome, reason};

/// Deliveries after which a job is given up whatever its ledger says, in multiples of its attempts: the bound
/// for a job that comes back again and again without an attempt that counts. The broker itself has none.
const DELIVERIES_PER_ATTEMPT_MAX: u32 = 10;

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
    /// Replace the ledger by these starts, of which so many ended, if it is the one of this sequence; 0 is none.
    Record {
        /// Attempts begun.
        starts: u32,
        /// Of them, those of which the end is known.
        ended: u32,
        /// The ledger's sequence.
        after: u64,
    },
    /// Write the start of this attempt into the ledger, as [`Action::Record`].
    Start {
        /// Attempts before it of which the end is known.
        ended: u32,
        /// The ledger's sequence.
        after: u64,
    },
    /// Wait for the turn.
    Turn {
        /// With no other job beside it.
        alone: bool,
    },
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
    /// It is its turn.
    Turn,
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
    Opening(Known),
    Waiting,
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

/// A start, as the ledger has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Start {
    /// Sequence of the ledger's last record; 0 if there is none.
    sequence: u64,
    /// Attempts before this one of which the end is known.
    ended: u32,
}

/// A held job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobState {
    state: State,
    /// The attempt, from 1.
    pub attempt: u32,
    /// What the ledger says, once it was read.
    start: Option<Start>,
    /// There is a cancel marker or a ledger.
    marked: bool,
    /// Its id was another one's.
    renamed: bool,
}

impl JobState {
    /// As it is delivered.
    pub fn begin() -> (Self, Action) {
        let begun = Self { state: State::Looking, attempt: 1, start: None, marked: false, renamed: false };
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
            (State::Opening(mut known), JobEvent::Recorded(Created::Stored(sequence))) => {
                self.start = Some(Start { sequence, ended: 0 });
                (known.ledger, self.marked) = (None, true);
                self.count(job, 1, &known)
            }
            (State::Waiting, JobEvent::Turn) => match self.start {
                // The delivery count shows a first attempt well enough.
                Some(Start { sequence: 0, .. }) if self.attempt == 1 => self.to(State::Running),
                _ => self.to(State::Starting),
            },
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
                Some((_, sequence)) if self.start.is_none_or(|start| start.sequence != sequence) => {
                    self.to(State::HandingBack(fault))
                }
                _ => self.hand_back(job, fault),
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
            (_, _) => self.hand_back(job, Fault::Contended),
        }
    }

    /// Enters a state; what it asks for follows from it.
    fn to(mut self, state: State) -> (Self, Action) {
        let start = self.start.unwrap_or(Start { sequence: 0, ended: 0 });
        let action = match &state {
            State::Looking | State::Rereading(_) | State::Contesting => Action::LookUp,
            State::Opening(_) => Action::Record { starts: 1, ended: 0, after: 0 },
            State::Waiting => Action::Turn { alone: false },
            State::Starting => Action::Start { ended: start.ended, after: start.sequence },
            State::Running => Action::Run,
            State::Storing(verdict) => Action::Store(verdict.clone()),
            State::Burying(stored, _) => Action::Bury(stored.clone()),
            State::Releasing(..) => Action::Release,
            State::Acking(..) => Action::Ack,
            // An end of an attempt that counts is written beside its start; another one was no start.
            State::TakingBack(fault) if counts(fault) => {
                Action::Record { starts: self.attempt, ended: start.ended + 1, after: start.sequence }
            }
            State::TakingBack(_) => {
                Action::Record { starts: self.attempt - 1, ended: start.ended, after: start.sequence }
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
                self.start = Some(Start { sequence: *sequence, ended: record.ended });
                self.count(job, record.starts, &known)
            }
            (None, None, None) if job.delivered <= 1 => {
                self.start = Some(Start { sequence: 0, ended: 0 });
                self.count(job, 0, &known)
            }
            // Its first delivery is taken to have been begun. From here on the ledger counts, so that deliveries that
            // are only held beside a killer do not.
            (None, None, None) => self.to(State::Opening(known)),
        }
    }

    /// So many attempts were begun before this delivery.
    fn count(mut self, job: &JobFacts, starts: u32, known: &Known) -> (Self, Action) {
        let limit = job.max_deliver;
        let ended = self.start.map_or(0, |start| start.ended);
        if starts >= limit || job.delivered > limit.saturating_mul(DELIVERIES_PER_ATTEMPT_MAX) {
            self.attempt = starts.max(1);
            let worker = known.ledger.as_ref().map_or("unknown", |(record, _)| record.worker.as_str());
            let message = format!(
                "{starts} attempts of {limit} were begun in {} deliveries, {} of them without an end; the last one \
                 on worker {worker}",
                job.delivered,
                starts.saturating_sub(ended)
            );
            let verdict = JobVerdict::Failed(OutcomeKind::Dead, ErrorCode::WorkerLost, message);
            return self.to(State::Storing(verdict));
        }
        self.attempt = starts + 1;
        // Only a job during which a process died can be a killer. With one attempt in all there is nothing to tell it
        // from its neighbours by.
        let alone = starts > ended && self.attempt == limit && limit > 1;
        self.state = State::Waiting;
        (self, Action::Turn { alone })
    }

    fn started(mut self, sequence: u64) -> (Self, Action) {
        self.start = Some(Start { sequence, ended: self.start.map_or(0, |start| start.ended) });
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
            None => self.hand_back(job, Fault::Contended),
        }
    }

    /// The job goes on under an id of its own. What is written under the other one speaks of the other job.
    fn rename(self) -> (Self, Action) {
        (Self { state: State::Looking, start: None, marked: false, renamed: true, ..self }, Action::Rename)
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
            (State::Waiting | State::Running, _) => self.attempt_failed(job, fault),
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
            _ => self.hand_back(job, fault),
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
            Disposition::Retry { .. } | Disposition::Exit => return self.hand_back(job, fault),
        };
        self.marked |= code == ErrorCode::Cancelled;
        self.to(State::Storing(JobVerdict::Failed(kind, code, message)))
    }

    /// The delivery is given back; before that the ledger is put right, as far as there is something to put right. The
    /// end of the process puts nothing right: its starts are what it dies of.
    fn hand_back(self, job: &JobFacts, fault: Fault) -> (Self, Action) {
        let unread = self.start.is_none() && (job.delivered > 1 || self.renamed);
        match fault.disposition() == Disposition::Exit || unread {
            true => self.to(State::HandingBack(fault)),
            false => self.to(State::TakingBack(fault)),
        }
    }

    /// Whether its outcome was there when it was delivered.
    pub fn is_repetition(&self) -> bool {
        matches!(self.state, State::Burying(_, false) | State::Releasing(_, false) | State::Acking(_, false))
    }
}

/// Whether the attempt of which the fault is counts.
pub fn counts(fault: &Fault) -> bool {
    matches!(fault.disposition(), Disposition::Retry { counts: true, .. })
}

#[cfg(test)]
mod tests;
