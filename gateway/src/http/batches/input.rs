//! A batch's input, line by line, read from where its file lies.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};

use crate::http::batches::held::RunError;
use crate::http::batches::lines::{CutLine, LineChecker, LineRequest, LineSplitter};
use crate::http::batches::record::BatchRecord;
use crate::http::blobs::BlobError;
use crate::http::error::ApiError;
use crate::http::files;
use crate::http::front::Front;

/// The lines of an input.
pub struct InputLines {
    pieces: Pin<Box<dyn Stream<Item = Result<Bytes, BlobError>> + Send>>,
    splitter: LineSplitter,
    ended: bool,
    /// Reads and checks them.
    pub checker: LineChecker,
}

impl InputLines {
    /// From the first line.
    ///
    /// # Errors
    /// [`crate::http::error::ApiCode::FileNotFound`], [`crate::http::error::ApiCode::BrokerUnavailable`].
    pub async fn open(front: &Arc<Front>, record: &BatchRecord) -> Result<Self, ApiError> {
        let file = files::find_for_batch(front, &record.tenant, &record.input_file_id).await?;
        let bytes_max = front.body_bytes_max();
        Ok(Self {
            pieces: Box::pin(front.archive.blobs.read(&file.blobs)),
            splitter: LineSplitter::new(bytes_max),
            ended: false,
            checker: LineChecker::new(&record.endpoint, bytes_max, front.args.files.batch_lines.into()),
        })
    }

    /// The next line.
    ///
    /// # Errors
    /// [`RunError::Again`].
    pub async fn cut(&mut self) -> Result<Option<CutLine>, RunError> {
        loop {
            if let Some(line) = self.splitter.next(self.ended) {
                return Ok(Some(line));
            }
            if self.ended {
                return Ok(None);
            }
            match self.pieces.try_next().await.map_err(RunError::again)? {
                Some(piece) => self.splitter.feed(&piece),
                None => self.ended = true,
            }
        }
    }

    /// Passes over so many lines.
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub async fn skip(&mut self, lines: u64) -> Result<(), RunError> {
        for _ in 0..lines {
            self.cut().await?;
        }
        Ok(())
    }

    /// The next requests, at most so many, and of about so many bytes; none at the end.
    ///
    /// # Errors
    /// As [`Self::cut`]; a line that is wrong although it was right before.
    pub async fn chunk(&mut self, lines: usize, bytes: usize) -> Result<Vec<LineRequest>, RunError> {
        let (mut requests, mut size) = (Vec::new(), 0);
        while requests.len() < lines && size < bytes {
            let Some(line) = self.cut().await? else { break };
            let request = self.checker.read(&line).map_err(|fault| RunError::again(fault.message))?;
            size += request.body.len();
            requests.push(request);
        }
        Ok(requests)
    }
}
