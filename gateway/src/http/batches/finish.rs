//! The end of a batch: what was written becomes files.

use hex::ToHex;
use sha2::{Digest, Sha256};

use crate::http::batches::held::{HeldBatch, RunError};
use crate::http::batches::record::{BatchRecord, PREFIX};
use crate::http::blobs::Blob;
use crate::http::files::key_of;
use crate::http::files::record::{self as file, FileRecord};
use crate::http::records::{RecordError, now};

/// Makes the files and ends the batch.
///
/// # Errors
/// See [`RunError`].
pub async fn finish(held: &HeldBatch, record: &BatchRecord) -> Result<(), RunError> {
    held.change(|record| record.finalize(now())).await?;
    let output = publish(held, record, "output", &record.output).await?;
    let errors = publish(held, record, "errors", &record.error_output).await?;
    held.change(|record| record.end((output.clone(), errors.clone()), now())).await
}

/// The id of a file of a batch: the same whoever makes it.
fn file_id(batch: &str, kind: &str) -> String {
    let digits = batch.trim_start_matches(PREFIX);
    let hash: String = Sha256::digest(format!("{batch}/{kind}")).encode_hex();
    // The time of the batch, so that files are listed in their order.
    format!("{}{}{}", file::PREFIX, &digits[..digits.len().min(12)], &hash[..20])
}

async fn publish(
    held: &HeldBatch,
    record: &BatchRecord,
    kind: &str,
    blobs: &[Blob],
) -> Result<Option<String>, RunError> {
    if blobs.is_empty() {
        return Ok(None);
    }
    let made = FileRecord {
        id: file_id(&record.id, kind),
        filename: format!("{}_{kind}.jsonl", record.id),
        purpose: "batch_output".to_owned(),
        created_at: now(),
        expires_at: file::end("batch_output", record.output_life, now()),
        complete: true,
        blobs: blobs.to_vec(),
    };
    match held.front.archive.files.create(&key_of(&record.tenant, &made.id), &made).await {
        // Another gateway may have made it and not come further.
        Ok(_) | Err(RecordError::Conflict) => Ok(Some(made.id)),
        Err(error) => Err(RunError::again(error)),
    }
}
