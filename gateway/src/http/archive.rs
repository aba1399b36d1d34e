//! What clients leave with a gateway: files, uploads and batches, with the content of files.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use millrace_crds::config::StoreConfig;
use millrace_queue::link::Link;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::http::batches::record::{ActiveBatch, BatchRecord};
use crate::http::blobs::{Blob, Blobs};
use crate::http::error::{ApiCode, ApiError};
use crate::http::files::record::FileRecord;
use crate::http::files::uploads::UploadRecord;
use crate::http::options::FileArgs;
use crate::http::records::Records;

/// Most contents that come in at once: each holds some pieces in memory.
const TRANSFERS_MAX: usize = 16;
/// How long one more waits for its turn.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(20);

/// All of it, shared by all gateways.
#[derive(Debug)]
pub struct Archive {
    /// The files.
    pub files: Records<FileRecord>,
    /// The uploads.
    pub uploads: Records<UploadRecord>,
    /// The batches.
    pub batches: Records<BatchRecord>,
    /// The batches that have not ended, under their ids alone.
    pub active: Records<ActiveBatch>,
    /// The content of files.
    pub blobs: Arc<Blobs>,
    /// Woken when a batch was made here.
    pub made: Notify,
    transfers: Arc<Semaphore>,
}

impl Archive {
    /// In this broker and, below `prefix`, in this object store.
    pub fn new(
        (link, jetstream): (Link, Context),
        (args, replicas): (&FileArgs, usize),
        (prefix, store): (Option<&str>, StoreConfig),
    ) -> Self {
        let broker = (link.clone(), jetstream.clone());
        Self {
            files: Records::new(link.clone(), jetstream.clone(), "MILLRACE_FILES", replicas),
            uploads: Records::new(link.clone(), jetstream.clone(), "MILLRACE_UPLOADS", replicas),
            batches: Records::new(link.clone(), jetstream.clone(), "MILLRACE_BATCHES", replicas),
            active: Records::new(link, jetstream, "MILLRACE_BATCHES_ACTIVE", replicas),
            blobs: Arc::new(Blobs::new(broker, (args.files_bytes.0, replicas), (prefix, store))),
            made: Notify::new(),
            transfers: Arc::new(Semaphore::new(TRANSFERS_MAX)),
        }
    }

    /// A place for content that comes in, waited for a while.
    ///
    /// # Errors
    /// [`ApiCode::Overloaded`].
    pub async fn transfer(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let turn = tokio::time::timeout(TRANSFER_PATIENCE, self.transfers.clone().acquire_owned());
        turn.await.ok().and_then(Result::ok).ok_or_else(|| {
            let message = format!("{TRANSFERS_MAX} files are being uploaded to this gateway already");
            ApiError::new(ApiCode::Overloaded, message)
        })
    }

    /// Removes blobs. What cannot be removed now is told in the log.
    pub async fn forget(&self, blobs: &[Blob]) {
        for blob in blobs {
            if let Err(error) = self.blobs.remove(blob).await {
                tracing::warn!(blob = blob.id, %error, "the content of a file was not removed");
            }
        }
    }
}
