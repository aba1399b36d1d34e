//! Removes what has ended: files and uploads whose time is over, and batches that ended long ago. Every gateway does,
//! now and then; that two do it at once changes nothing.

use std::sync::Arc;
use std::time::Duration;

use crate::http::batches;
use crate::http::batches::record::BatchRecord;
use crate::http::files::record::FileRecord;
use crate::http::files::uploads::{UploadRecord, UploadStatus};
use crate::http::front::Front;
use crate::http::records::{RecordError, Revised, now};

/// Pause between two sweeps.
const PAUSE: Duration = Duration::from_secs(300);
/// Before the first one.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
/// Seconds that an upload's record stays behind its end.
const UPLOAD_SECONDS: i64 = 24 * 3600;
/// Most records that one sweep removes of each kind.
const REMOVED_MAX: usize = 1000;

/// Begins to sweep, for as long as the process lives.
pub fn start(front: &Arc<Front>) {
    let front = front.clone();
    tokio::spawn(async move {
        tokio::time::sleep(FIRST_PAUSE).await;
        loop {
            if let Err(error) = sweep(&front, now()).await {
                tracing::warn!(%error, "what has ended was not removed");
            }
            tokio::time::sleep(PAUSE).await;
        }
    });
}

async fn sweep(front: &Front, now: i64) -> Result<(), RecordError> {
    let used = batches::inputs(front).await?;
    let archive = &front.archive;
    let mut files = Vec::new();
    archive
        .files
        .each(None, |key, file: Revised<FileRecord>| {
            if file.value.is_over(now) && files.len() < REMOVED_MAX && !used.contains(&file.value.id) {
                files.push((key.to_owned(), file.value.blobs));
            }
        })
        .await?;
    for (key, blobs) in files {
        archive.forget(&blobs).await;
        archive.files.remove(&key).await?;
    }
    let mut uploads = Vec::new();
    archive
        .uploads
        .each(None, |key, upload: Revised<UploadRecord>| {
            let over = upload.value.expires_at + UPLOAD_SECONDS <= now;
            if over && uploads.len() < REMOVED_MAX {
                uploads.push((key.to_owned(), upload.value));
            }
        })
        .await?;
    for (key, upload) in uploads {
        // The parts of a completed one are its file's.
        if upload.status != UploadStatus::Completed {
            let blobs: Vec<_> = upload.parts.into_iter().map(|part| part.blob).collect();
            archive.forget(&blobs).await;
        }
        archive.uploads.remove(&key).await?;
    }
    let mut ended = Vec::new();
    archive
        .batches
        .each(None, |key, batch: Revised<BatchRecord>| {
            if batch.value.is_forgotten(now) && ended.len() < REMOVED_MAX {
                ended.push(key.to_owned());
            }
        })
        .await?;
    for key in ended {
        archive.batches.remove(&key).await?;
    }
    Ok(())
}
