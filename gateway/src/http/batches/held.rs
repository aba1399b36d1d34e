//! A batch that this gateway runs: each write to its record is made on what was last read of it, and only while the
//! claim in it is this gateway's.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;

use crate::http::batches::record::BatchRecord;
use crate::http::front::Front;
use crate::http::records::{RecordError, Revised};

/// How often a record is written that nothing happens to: a sign of life.
const BEAT: Duration = Duration::from_secs(2);
/// Pause before a write is tried again while the broker does not answer.
const PAUSE: Duration = Duration::from_millis(500);

/// Why a run of a batch ends before the batch does.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It is another gateway's now, or gone.
    #[error("the batch is another gateway's")]
    Lost,
    /// Something does not answer; it is to be tried again.
    #[error("{0}")]
    Again(String),
}

impl RunError {
    /// Of anything that may pass.
    pub fn again(error: impl std::fmt::Display) -> Self {
        RunError::Again(error.to_string())
    }
}

/// A batch under this gateway's claim.
#[derive(Debug)]
pub struct HeldBatch {
    /// What all requests share.
    pub front: Arc<Front>,
    /// Its record's key.
    pub key: String,
    claim: String,
    record: AsyncMutex<Revised<BatchRecord>>,
    /// Whether nobody can have published any of its lines.
    pub fresh: AtomicBool,
    /// Lines with an answer and with an error that are known and not written.
    seen: Mutex<(u64, u64)>,
}

impl HeldBatch {
    /// Claims a batch as it was read; `None` where somebody else was first.
    ///
    /// # Errors
    /// [`RecordError::Away`].
    pub async fn claim(
        front: &Arc<Front>,
        key: &str,
        read: Revised<BatchRecord>,
    ) -> Result<Option<Arc<Self>>, RecordError> {
        let claim = crate::http::front::random_id();
        let value = BatchRecord { claim: Some(claim.clone()), ..read.value };
        match front.archive.batches.update(key, &value, read.revision).await {
            Ok(revision) => Ok(Some(Arc::new(Self {
                front: front.clone(),
                key: key.to_owned(),
                claim,
                record: AsyncMutex::new(Revised { value, revision }),
                fresh: AtomicBool::new(false),
                seen: Mutex::default(),
            }))),
            Err(RecordError::Conflict) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The record as it was last read or written.
    pub async fn look(&self) -> BatchRecord {
        self.record.lock().await.value.clone()
    }

    /// Why no more jobs are published, if so.
    pub async fn stop(&self) -> Option<crate::http::batches::record::BatchStatus> {
        self.record.lock().await.value.stop(crate::http::records::now())
    }

    /// Writes what `change` makes of the record, which may be called more than once, and waits for a broker that does
    /// not answer.
    ///
    /// # Errors
    /// [`RunError::Lost`].
    pub async fn change(&self, change: impl Fn(&mut BatchRecord)) -> Result<(), RunError> {
        let mut held = self.record.lock().await;
        loop {
            let mut value = held.value.clone();
            change(&mut value);
            match self.front.archive.batches.update(&self.key, &value, held.revision).await {
                Ok(revision) => {
                    *held = Revised { value, revision };
                    return Ok(());
                }
                Err(RecordError::Conflict) => *held = self.reread().await?,
                Err(error) => {
                    tracing::warn!(batch = held.value.id, %error, "a batch's record was not written");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn reread(&self) -> Result<Revised<BatchRecord>, RunError> {
        loop {
            match self.front.archive.batches.get(&self.key).await {
                Ok(Some(read)) if read.value.claim.as_deref() == Some(&self.claim) => return Ok(read),
                Ok(_) => return Err(RunError::Lost),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// So many lines are known to have results that are not written.
    pub fn saw(&self, seen: (u64, u64)) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }

    /// What [`Self::saw`] was last told.
    pub fn seen(&self) -> (u64, u64) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives signs of life until the batch is lost or the gateway drains.
    ///
    /// # Errors
    /// [`RunError::Lost`].
    pub async fn beat(&self) -> Result<(), RunError> {
        while !self.front.is_draining() {
            tokio::time::sleep(BEAT).await;
            let (completed, failed) = self.seen();
            self.change(|record| record.saw(completed, failed)).await?;
        }
        Ok(())
    }

    /// Gives the claim back, so that another gateway goes on at once.
    pub async fn release(&self) {
        if let Err(error) = self.change(|record| record.claim = None).await {
            tracing::info!(%error, "a batch was not released");
        }
    }
}
