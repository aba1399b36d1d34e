//! The ledger of a job's attempts: how often a worker began to run it.
//!
//! The broker's delivery count is not that number. It also counts deliveries that were held and never run
//! because a neighbour ended the process, and it is lost when the broker is killed. So a job that is
//! delivered a second time gets a record, replaced by compare-and-set before each start.

use serde::{Deserialize, Serialize};

use crate::names::SubjectToken;

/// One job's ledger, the body of the message on its attempts subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptRecord {
    /// Attempts that were started and not handed back.
    pub starts: u32,
    /// Of them, those whose worker lived to say how they ended. The others may have killed it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ended: u32,
    /// The worker that wrote the record.
    pub worker: SubjectToken,
}

impl AttemptRecord {
    /// Starts of which no end is known: a process died, or lost its delivery, while the job ran in it.
    pub fn unended(&self) -> u32 {
        self.starts.saturating_sub(self.ended)
    }
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn form_on_the_wire() {
        let record = AttemptRecord { starts: 2, ended: 0, worker: "w-1".parse().unwrap() };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(json, r#"{"starts":2,"worker":"w-1"}"#);
        assert_eq!(serde_json::from_str::<AttemptRecord>(&json).unwrap(), record);
        let record = AttemptRecord { ended: 1, ..record };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(json, r#"{"starts":2,"ended":1,"worker":"w-1"}"#);
        assert_eq!(
            (serde_json::from_str::<AttemptRecord>(&json).unwrap(), record.unended()),
            (record.clone(), 1)
        );
    }
}
