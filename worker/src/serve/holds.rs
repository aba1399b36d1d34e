//! The jobs that are held here, so that no job is held twice.
//!
//! A message that comes again while its first delivery is held joins that one: an ack or a keep-alive of either
//! delivery is one of the message. Another message of the same job id waits for its turn, and finds the outcome then.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_crds::names::{Class, JobId};
use millrace_queue::classes::PerClass;
use millrace_queue::delivery::Delivery;
use time::OffsetDateTime;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard};

/// A message: its sequence, and its time, because a stream that is made anew numbers its messages from 1 again.
type MessageKey = (u64, OffsetDateTime);

/// The messages and ids that are held. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Holds(Arc<Mutex<Tables>>);

#[derive(Debug, Default)]
struct Tables {
    messages: HashMap<MessageKey, Class>,
    /// How many messages of each class are held.
    by_class: PerClass<usize>,
    /// Who has the id's turn, and how many have or want it.
    turns: HashMap<JobId, (Arc<Turn<()>>, usize)>,
}

/// A held message; forgotten when dropped.
#[derive(Debug)]
pub struct Hold {
    holds: Holds,
    message: MessageKey,
}

/// The turn of an id; passed on when dropped.
#[derive(Debug)]
pub struct IdTurn {
    holds: Holds,
    job: JobId,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Holds {
    /// Holds the message; `None` if it is held already.
    pub fn take(&self, delivery: &Delivery) -> Option<Hold> {
        self.take_message((delivery.stream_sequence, delivery.published), delivery.class)
    }

    fn take_message(&self, message: MessageKey, class: Class) -> Option<Hold> {
        let mut tables = self.lock();
        let Entry::Vacant(place) = tables.messages.entry(message) else { return None };
        place.insert(class);
        tables.by_class[class as usize] += 1;
        Some(Hold { holds: self.clone(), message })
    }

    /// How many messages of each class are held.
    pub fn by_class(&self) -> PerClass<usize> {
        self.lock().by_class
    }

    /// Whether the message is held.
    pub fn has(&self, delivery: &Delivery) -> bool {
        self.lock().messages.contains_key(&(delivery.stream_sequence, delivery.published))
    }

    /// Waits until no other message of this job id has its turn. In the order of coming.
    pub async fn turn(&self, job: &JobId) -> IdTurn {
        let turn = {
            let mut tables = self.lock();
            let (turn, count) = tables.turns.entry(job.clone()).or_default();
            *count += 1;
            turn.clone()
        };
        // Made first, so that who gives up waiting is forgotten too.
        let mut own = IdTurn { holds: self.clone(), job: job.clone(), turn: None };
        own.turn = Some(turn.lock_owned().await);
        own
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut tables = self.holds.lock();
        if let Some(class) = tables.messages.remove(&self.message) {
            tables.by_class[class as usize] -= 1;
        }
    }
}

impl Drop for IdTurn {
    fn drop(&mut self) {
        self.turn = None;
        let mut tables = self.holds.lock();
        if let Some((_, count)) = tables.turns.get_mut(&self.job) {
            *count -= 1;
            if *count == 0 {
                tables.turns.remove(&self.job);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_message_is_held_once() {
        let holds = Holds::default();
        let (then, now) = (OffsetDateTime::UNIX_EPOCH, OffsetDateTime::now_utc());
        let first = holds.take_message((1, now), Class::Low).expect("the first one");
        assert!(holds.take_message((1, now), Class::Low).is_none());
        assert!(holds.take_message((1, then), Class::High).is_some(), "of another stream");
        assert_eq!(holds.by_class(), [0, 0, 1]);
        drop(first);
        assert!(holds.take_message((1, now), Class::Low).is_some());
        assert_eq!(holds.by_class(), [0, 0, 0]);
    }

    #[test]
    fn messages_of_one_id_take_turns() {
        let holds = Holds::default();
        let (a, b): (JobId, JobId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let first = holds.turn(&a).now_or_never().expect("free");
        let _other = holds.turn(&b).now_or_never().expect("of another id");
        assert!(holds.turn(&a).now_or_never().is_none(), "gave up waiting");
        let mut second = Box::pin(holds.turn(&a));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        let second = second.now_or_never().expect("its turn");
        drop((second, _other));
        assert!(holds.lock().turns.is_empty());
    }
}
