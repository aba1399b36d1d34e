//! Room for the bodies of held jobs: how many bytes of inputs behind claim checks a worker holds at once.
//!
//! A worker pulls by sequences, and a body may be 200 MiB. Large bodies wait for room, each class for room of its own,
//! so that a low one that runs for hours keeps no higher one waiting; small ones have room beside them.

use std::sync::Arc;

use millrace_crds::job::INPUT_BYTES_MAX;
use millrace_crds::names::Class;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::classes::PerClass;

/// Bodies up to this size are small: a single request is never larger.
const SMALL_BYTES_MAX: u64 = 4 << 20;
/// Room for small bodies of all classes.
const SMALL_ROOM: u64 = 128 << 20;
/// Room for large bodies of one class: one that runs, and one that is ready behind it.
const LARGE_ROOM: u64 = 2 * INPUT_BYTES_MAX;
/// Room is given out in pieces of this many bytes.
const PIECE_BYTES: u64 = 1 << 10;

/// The room. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BodyRoom {
    small: Arc<Semaphore>,
    large: PerClass<Arc<Semaphore>>,
}

/// A part of it, given back when dropped.
#[derive(Debug)]
pub struct BodyPlace {
    _permit: OwnedSemaphorePermit,
}

impl Default for BodyRoom {
    fn default() -> Self {
        let of = |bytes: u64| Arc::new(Semaphore::new(pieces(bytes) as usize));
        Self { small: of(SMALL_ROOM), large: [(); Class::ALL.len()].map(|()| of(LARGE_ROOM)) }
    }
}

impl BodyRoom {
    /// Waits for room, in the order of asking. At most [`INPUT_BYTES_MAX`] bytes.
    pub async fn take(&self, class: Class, bytes: u64) -> BodyPlace {
        let room = if bytes <= SMALL_BYTES_MAX { &self.small } else { &self.large[class as usize] };
        let permit = room.clone().acquire_many_owned(pieces(bytes)).await;
        BodyPlace { _permit: permit.expect("nobody closes it") }
    }
}

fn pieces(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(PIECE_BYTES)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn large_bodies_wait_and_keep_nobody_else_waiting() {
        let room = BodyRoom::default();
        let mut held = Vec::new();
        while let Some(place) = room.take(Class::Low, INPUT_BYTES_MAX).now_or_never() {
            held.push(place);
            assert!(held.len() < 256, "nothing bounds them");
        }
        assert_eq!(held.len(), 2, "of 256 the two that run and come next");
        assert!(room.take(Class::High, INPUT_BYTES_MAX).now_or_never().is_some(), "another class");
        assert!(room.take(Class::Low, SMALL_BYTES_MAX).now_or_never().is_some(), "a small one");
        held.pop();
        assert!(room.take(Class::Low, INPUT_BYTES_MAX).now_or_never().is_some(), "what was given back");
        let mut small = Vec::new();
        while let Some(place) = room.take(Class::Low, SMALL_BYTES_MAX).now_or_never() {
            small.push(place);
            assert!(small.len() < 256, "nothing bounds them");
        }
    }
}
