//! How many bytes of requests and answers this gateway holds, and may.
//!
//! Bytes are counted where they are held, in steps of 1 KiB: a body while it comes and until its job is published, an
//! answer until its client has taken it. The count goes with the bytes, and ends with their last user.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::error::{ApiCode, ApiError};

/// Bytes of one permit.
const STEP_BYTES: usize = 1 << 10;

/// The bytes that may be held.
#[derive(Debug, Clone)]
pub struct MemoryBudget {
    steps: Arc<Semaphore>,
    bytes_max: u64,
}

/// Bytes that count as held until this is dropped.
#[derive(Debug)]
pub struct HeldMemory {
    budget: MemoryBudget,
    held: Option<OwnedSemaphorePermit>,
}

/// Bytes with their count.
struct Counted<T> {
    bytes: T,
    _held: HeldMemory,
}

impl<T: AsRef<[u8]>> AsRef<[u8]> for Counted<T> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

fn steps(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(STEP_BYTES)).unwrap_or(u32::MAX)
}

impl MemoryBudget {
    /// A budget of so many bytes, of which none is held.
    pub fn new(bytes_max: u64) -> Self {
        let count = usize::try_from(bytes_max).unwrap_or(usize::MAX) / STEP_BYTES;
        Self { steps: Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS))), bytes_max }
    }

    /// Nothing yet.
    pub fn nothing(&self) -> HeldMemory {
        HeldMemory { budget: self.clone(), held: None }
    }

    /// Counts bytes that are here already; `None` where there is no room for them.
    pub fn keep(&self, bytes: Bytes) -> Option<Bytes> {
        let mut held = self.nothing();
        held.grow(bytes.len()).ok()?;
        Some(held.with(bytes))
    }

    /// Bytes that are held.
    pub fn held(&self) -> u64 {
        self.bytes_max.saturating_sub((self.steps.available_permits() * STEP_BYTES) as u64)
    }

    /// Whether less than an eighth of it is free.
    pub fn is_short(&self) -> bool {
        self.held() > self.bytes_max - self.bytes_max / 8
    }
}

impl HeldMemory {
    /// Counts more bytes, before they are held.
    ///
    /// # Errors
    /// [`ApiCode::Overloaded`].
    pub fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let more = self.budget.steps.clone().try_acquire_many_owned(steps(bytes)).map_err(|_| {
            let limit = self.budget.bytes_max;
            let message =
                format!("this gateway holds {limit} bytes of requests and answers, as many as it may");
            ApiError::new(ApiCode::Overloaded, message)
        })?;
        match &mut self.held {
            Some(held) => held.merge(more),
            None => self.held = Some(more),
        }
        Ok(())
    }

    /// These bytes, which count for as long as somebody has them.
    pub fn with<T: AsRef<[u8]> + Send + 'static>(self, bytes: T) -> Bytes {
        Bytes::from_owner(Counted { bytes, _held: self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_count_until_their_last_user_is_gone() {
        let budget = MemoryBudget::new(8 << 10);
        let kept = budget.keep(Bytes::from(vec![7; 5 << 10])).unwrap();
        assert_eq!(budget.held(), 5 << 10);
        assert!(budget.keep(Bytes::from(vec![7; 4 << 10])).is_none(), "no room");
        let slice = kept.slice(10..20);
        drop(kept);
        assert_eq!((budget.held(), slice.as_ref()), (5 << 10, [7; 10].as_slice()));
        let mut held = budget.nothing();
        assert!(held.grow(1).is_ok() && held.grow(2 << 10).is_ok());
        assert_eq!((budget.held(), budget.is_short()), (8 << 10, true));
        let refused = held.grow(1).unwrap_err();
        assert_eq!(refused.code, ApiCode::Overloaded);
        assert!(refused.message.contains("8192"), "{}", refused.message);
        drop(slice);
        assert_eq!(budget.held(), 3 << 10);
        drop(held);
        assert_eq!(budget.held(), 0);
    }
}
