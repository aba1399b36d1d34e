//! Tokens of batches that are not done, of one tenant or key and one model. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::http::limits::set::Limited;
use crate::http::limits::window::Shortage;

/// Most batches of one tenant and model at once.
const BATCHES_MAX: usize = 1_000;
/// When a batch may be sent again that found no room, in seconds.
const RETRY_S: u64 = 60;

/// What each batch still has to come to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnqueuedTokens {
    batches: BTreeMap<String, u64>,
}

impl EnqueuedTokens {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.batches.values().fold(0, |sum, tokens| sum.saturating_add(*tokens))
    }

    /// Sets what a batch still has to come to; 0 forgets it. What is said twice changes nothing, so that a gateway
    /// which goes on with the batch of another one may say it again. Less is always taken.
    ///
    /// # Errors
    /// [`Shortage`] where more than the limit would be enqueued.
    pub fn set(&mut self, batch: &str, tokens: u64, limit: Option<u64>) -> Result<(), Shortage> {
        let known = self.batches.get(batch).copied().unwrap_or(0);
        if tokens > known {
            let limit = limit.unwrap_or(u64::MAX);
            let crowded = known == 0 && self.batches.len() >= BATCHES_MAX;
            if crowded || (self.total() - known).saturating_add(tokens) > limit {
                return Err(Shortage { limited: Limited::BatchTokens, limit, retry_after_s: RETRY_S });
            }
        }
        match tokens {
            0 => self.batches.remove(batch),
            _ => self.batches.insert(batch.to_owned(), tokens),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_held_and_given_back() {
        let mut enqueued = EnqueuedTokens::default();
        assert_eq!(enqueued.set("a", 60, Some(100)), Ok(()));
        assert_eq!(enqueued.set("b", 41, Some(100)).unwrap_err().limited, Limited::BatchTokens);
        assert_eq!((enqueued.set("b", 40, Some(100)), enqueued.total()), (Ok(()), 100));
        assert_eq!((enqueued.set("b", 40, Some(100)), enqueued.total()), (Ok(()), 100), "said twice");
        // Less is taken also where the limit has become smaller.
        assert_eq!((enqueued.set("a", 50, Some(10)), enqueued.total()), (Ok(()), 90));
        assert_eq!((enqueued.set("a", 0, Some(10)), enqueued.total()), (Ok(()), 40));
        assert_eq!(enqueued.set("unknown", 0, None), Ok(()));
        for batch in 1..BATCHES_MAX {
            assert_eq!(enqueued.set(&format!("n{batch}"), 1, None), Ok(()));
        }
        assert!(enqueued.set("one more", 1, None).is_err());
    }
}
