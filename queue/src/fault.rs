//! Faults, sorted by what must happen next.
//!
//! Every stage of a job's way fails with a [`Fault`]; [`Fault::disposition`] alone decides what follows:
//! the caller's mistake becomes a stored outcome, our own trouble hands the delivery back, and a broken
//! engine ends the process. There is no fourth kind.

use std::time::Duration;

use millrace_crds::result::ErrorCode;

use crate::broker::BrokerError;

/// Why a job did not get its answer in this attempt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The job can never have an answer; the message names field, value and limit.
    #[error("{message}")]
    Invalid {
        /// For the caller.
        message: String,
    },
    /// Its deadline passed.
    #[error("the deadline {deadline} has passed")]
    Late {
        /// The deadline, as RFC 3339.
        deadline: String,
    },
    /// Somebody cancelled it.
    #[error("the job was cancelled")]
    Cancelled,
    /// The engine failed on this job alone.
    #[error("the engine failed on the job: {message}")]
    Inference {
        /// What the engine said; it holds no text of the job.
        message: String,
    },
    /// The attempt ran longer than one may.
    #[error("the attempt ran longer than {limit_s} s")]
    Overrun {
        /// The limit of one attempt, in seconds.
        limit_s: u64,
    },
    /// The object store did not answer.
    #[error("claim check: {message}")]
    Store {
        /// What went wrong; it names the object and not its bytes.
        message: String,
    },
    /// The broker did not answer.
    #[error("broker: {message}")]
    Broker {
        /// What went wrong.
        message: String,
    },
    /// Another worker began an attempt of this job at the same moment.
    #[error("another worker holds the job")]
    Contended,
    /// The worker drains and the job did not finish in time.
    #[error("the worker is shutting down")]
    Draining,
    /// The engine ended or the device broke.
    #[error("{cause}")]
    EngineStopped {
        /// What broke; it holds no text of the job.
        cause: String,
    },
}

/// What must happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The caller's fault: store a rejected outcome with this code.
    Reject(ErrorCode),
    /// Ours: hand the delivery back, to be redelivered after a while.
    Retry {
        /// The while; `None` asks for the queue's backoff of this attempt.
        after: Option<Duration>,
        /// Whether the attempt counts against the limit.
        counts: bool,
    },
    /// The engine or the device is broken: end the process.
    Exit,
}

/// Pause before a job that another worker holds, or that a draining worker gave back, comes again.
const HAND_OVER: Duration = Duration::from_millis(200);

impl Fault {
    /// Every [`Fault::category`].
    pub const CATEGORIES: [&str; 10] = [
        "broker",
        "cancelled",
        "contended",
        "draining",
        "engine_stopped",
        "inference",
        "invalid",
        "late",
        "overrun",
        "store",
    ];

    /// What must happen next. The one place where that is decided.
    pub fn disposition(&self) -> Disposition {
        match self {
            Fault::Invalid { .. } => Disposition::Reject(ErrorCode::InvalidRequest),
            Fault::Late { .. } => Disposition::Reject(ErrorCode::DeadlineExceeded),
            Fault::Cancelled => Disposition::Reject(ErrorCode::Cancelled),
            Fault::Inference { .. } | Fault::Overrun { .. } => {
                Disposition::Retry { after: None, counts: true }
            }
            // An outage is nobody's attempt.
            Fault::Broker { .. } | Fault::Store { .. } => Disposition::Retry { after: None, counts: false },
            Fault::Contended | Fault::Draining => {
                Disposition::Retry { after: Some(HAND_OVER), counts: false }
            }
            Fault::EngineStopped { .. } => Disposition::Exit,
        }
    }

    /// A word for metrics and logs; the set is closed.
    pub fn category(&self) -> &'static str {
        match self {
            Fault::Invalid { .. } => "invalid",
            Fault::Late { .. } => "late",
            Fault::Cancelled => "cancelled",
            Fault::Inference { .. } => "inference",
            Fault::Overrun { .. } => "overrun",
            Fault::Store { .. } => "store",
            Fault::Broker { .. } => "broker",
            Fault::Contended => "contended",
            Fault::Draining => "draining",
            Fault::EngineStopped { .. } => "engine_stopped",
        }
    }
}

impl From<BrokerError> for Fault {
    fn from(error: BrokerError) -> Self {
        match error {
            // Asking again would not help.
            BrokerError::TooLarge { .. } => Fault::Invalid { message: error.to_string() },
            other => Fault::Broker { message: other.to_string() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_next() {
        let text = String::new;
        let backoff = Disposition::Retry { after: None, counts: true };
        let free = |after| Disposition::Retry { after, counts: false };
        let table = [
            (Fault::Invalid { message: text() }, Disposition::Reject(ErrorCode::InvalidRequest)),
            (Fault::Late { deadline: text() }, Disposition::Reject(ErrorCode::DeadlineExceeded)),
            (Fault::Cancelled, Disposition::Reject(ErrorCode::Cancelled)),
            (Fault::Inference { message: text() }, backoff),
            (Fault::Overrun { limit_s: 1 }, backoff),
            (Fault::Store { message: text() }, free(None)),
            (Fault::Broker { message: text() }, free(None)),
            (Fault::Contended, free(Some(HAND_OVER))),
            (Fault::Draining, free(Some(HAND_OVER))),
            (Fault::EngineStopped { cause: String::new() }, Disposition::Exit),
        ];
        let mut categories = std::collections::BTreeSet::new();
        for (fault, expected) in table {
            assert_eq!(fault.disposition(), expected, "{fault:?}");
            assert!(categories.insert(fault.category()), "{fault:?} shares its category");
        }
        assert!(categories.into_iter().eq(Fault::CATEGORIES));
    }
}
