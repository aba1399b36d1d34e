//! Where the bytes of files lie: in the S3 bucket of `--object-store`, or in an object store of JetStream.
//!
//! A blob is written once, in pieces, and read piece by piece, so that nothing ever holds a whole file. In JetStream
//! the layout is that of its object stores, so that its tools see the objects too: pieces on one subject in their
//! order, each accepted only behind the one before, and a record of the whole at the end. In S3 each piece is an
//! object.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::context::{GetStreamErrorKind, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::jetstream::{Context, ErrorCode};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use bytes::{Bytes, BytesMut};
use futures::Stream;
use millrace_queue::link::Link;
use millrace_queue::store::{S3Uri, Store, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use crate::direct::{self, Ask};
use crate::http::error::{ApiCode, ApiError};
use crate::publish::{self, Next};

/// The object store's name in JetStream.
const BUCKET: &str = "MILLRACE_FILES";
/// Bytes of a piece in JetStream: some of them fit into its messages and into memory.
const BROKER_PIECE_BYTES: usize = 256 << 10;
/// Bytes of a piece in S3.
const STORE_PIECE_BYTES: usize = 4 << 20;
/// Pieces that one read asks the broker for.
const READ_PIECES: usize = 8;
/// How long a piece is tried while the broker does not answer: as long as its restart takes.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
const WRITE_PAUSE: Duration = Duration::from_millis(200);

/// Why a blob was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// There is no room for it.
    #[error("there is no room: {0}")]
    Full(String),
    /// It is not there, or not whole.
    #[error("{0}")]
    Broken(String),
    /// The broker or the object store did not do it.
    #[error("{0}")]
    Away(String),
}

impl From<BlobError> for ApiError {
    fn from(error: BlobError) -> Self {
        tracing::warn!(%error, "the content of a file");
        match error {
            BlobError::Full(_) => ApiError::new(ApiCode::StorageFull, "there is no room for more files"),
            BlobError::Broken(_) => {
                ApiError::new(ApiCode::Internal, "the stored content of the file is not whole")
            }
            BlobError::Away(_) => {
                ApiError::new(ApiCode::BrokerUnavailable, "the store of files does not answer")
            }
        }
    }
}

fn away(error: impl std::fmt::Display) -> BlobError {
    BlobError::Away(error.to_string())
}

/// In which store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlobPlace {
    /// JetStream's.
    Broker,
    /// Below this `s3://` address.
    Store(String),
}

/// Bytes that lie in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its name.
    pub id: String,
    /// Where.
    pub at: BlobPlace,
    /// How many.
    pub bytes: u64,
}

/// The stores.
#[derive(Debug)]
pub struct Blobs {
    link: Link,
    jetstream: Context,
    bytes_max: u64,
    replicas: usize,
    place: BlobPlace,
    config: millrace_crds::config::StoreConfig,
    made: OnceCell<()>,
    store: OnceCell<Store>,
}

impl Blobs {
    /// New blobs go below `prefix` in S3, or into JetStream without one.
    pub fn new(
        (link, jetstream): (Link, Context),
        (bytes_max, replicas): (u64, usize),
        (prefix, config): (Option<&str>, millrace_crds::config::StoreConfig),
    ) -> Self {
        let place = prefix.map_or(BlobPlace::Broker, |prefix| BlobPlace::Store(prefix.to_owned()));
        Self {
            link,
            jetstream,
            bytes_max,
            replicas,
            place,
            config,
            made: OnceCell::new(),
            store: OnceCell::new(),
        }
    }

    fn stream() -> String {
        format!("OBJ_{BUCKET}")
    }

    fn pieces_subject(id: &str) -> String {
        format!("$O.{BUCKET}.C.{id}")
    }

    fn record_subject(id: &str) -> String {
        format!("$O.{BUCKET}.M.{}", URL_SAFE.encode(id))
    }

    async fn ensure(&self) -> Result<(), BlobError> {
        let making = async {
            match self.jetstream.get_stream(Self::stream()).await.map_err(|error| error.kind()) {
                Ok(_) => return Ok(()),
                Err(GetStreamErrorKind::JetStream(said))
                    if said.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
                Err(kind) => return Err(away(kind)),
            }
            let config = Config {
                name: Self::stream(),
                subjects: vec![format!("$O.{BUCKET}.C.>"), format!("$O.{BUCKET}.M.>")],
                discard: DiscardPolicy::New,
                storage: StorageType::File,
                allow_rollup: true,
                allow_direct: true,
                max_bytes: i64::try_from(self.bytes_max).unwrap_or(i64::MAX),
                num_replicas: self.replicas,
                ..Config::default()
            };
            self.jetstream.create_stream(config).await.map(|_| ()).map_err(away)
        };
        self.made.get_or_try_init(|| making).await.map(|_| ())
    }

    async fn store(&self) -> Result<&Store, BlobError> {
        self.store.get_or_try_init(|| Store::connect(&self.config)).await.map_err(away)
    }

    fn object(prefix: &str, id: &str, piece: u64) -> Result<S3Uri, BlobError> {
        let prefix: S3Uri = prefix.parse().map_err(away)?;
        Ok(prefix.join("files").join(id).join(&format!("{piece:06}")))
    }

    /// The blob of this name before anything of it is written.
    pub fn empty(&self, id: &str) -> Blob {
        Blob { id: id.to_owned(), at: self.place.clone(), bytes: 0 }
    }

    /// Begins a blob, whose name was never used before.
    pub fn writer(self: &Arc<Self>, id: &str) -> BlobWriter {
        let blob = self.empty(id);
        let piece_bytes = match &blob.at {
            // A broker that takes smaller messages gets smaller pieces.
            BlobPlace::Broker => match self.link.client().max_payload() {
                0 => BROKER_PIECE_BYTES,
                limit => BROKER_PIECE_BYTES.min(limit / 2),
            },
            BlobPlace::Store(_) => STORE_PIECE_BYTES,
        };
        BlobWriter {
            blobs: self.clone(),
            blob,
            piece_bytes,
            waiting: BytesMut::new(),
            pieces: 0,
            last: 0,
            hash: Sha256::new(),
        }
    }

    /// The bytes of blobs, one after another.
    pub fn read(
        self: &Arc<Self>,
        blobs: &[Blob],
    ) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + use<> {
        let reader =
            BlobReader { blobs: self.clone(), left: blobs.iter().rev().cloned().collect(), current: None };
        futures::stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|bytes| (bytes, reader)))
        })
    }

    /// Removes a blob, or what was written of it.
    ///
    /// # Errors
    /// [`BlobError::Away`].
    pub async fn remove(&self, blob: &Blob) -> Result<(), BlobError> {
        match &blob.at {
            BlobPlace::Broker => {
                self.ensure().await?;
                let stream = self.jetstream.get_stream_no_info(Self::stream()).await.map_err(away)?;
                for subject in [Self::record_subject(&blob.id), Self::pieces_subject(&blob.id)] {
                    stream.purge().filter(subject).await.map_err(away)?;
                }
                Ok(())
            }
            BlobPlace::Store(prefix) => {
                let store = self.store().await?;
                let prefix: S3Uri = prefix.parse().map_err(away)?;
                let folder = prefix.join("files").join(&blob.id);
                for (name, _) in store.list(&folder).await.map_err(away)? {
                    store.delete(&folder.join(&name)).await.map_err(away)?;
                }
                Ok(())
            }
        }
    }
}

/// A blob that is being written.
#[derive(Debug)]
pub struct BlobWriter {
    blobs: Arc<Blobs>,
    blob: Blob,
    piece_bytes: usize,
    waiting: BytesMut,
    pieces: u64,
    /// The sequence of the last piece in the stream.
    last: u64,
    hash: Sha256,
}

impl BlobWriter {
    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.blob.bytes
    }

    /// Appends bytes; whole pieces are stored before this returns.
    ///
    /// # Errors
    /// [`BlobError::Full`], [`BlobError::Away`]. What is there already stays until it is removed.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), BlobError> {
        self.blob.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let room = self.piece_bytes - self.waiting.len();
            let taken = bytes.split_to(room.min(bytes.len()));
            self.waiting.extend_from_slice(&taken);
            if self.waiting.len() == self.piece_bytes {
                self.put_piece().await?;
            }
        }
        Ok(())
    }

    /// Stores what is left, and the record of the whole.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn finish(mut self) -> Result<Blob, BlobError> {
        if !self.waiting.is_empty() {
            self.put_piece().await?;
        }
        if self.blob.at == BlobPlace::Broker {
            let digest = URL_SAFE.encode(self.hash.finalize_reset());
            let record = json!({
                "name": self.blob.id, "bucket": BUCKET, "nuid": self.blob.id, "size": self.blob.bytes,
                "chunks": self.pieces, "digest": format!("SHA-256={digest}"), "deleted": false,
                "options": {"max_chunk_size": self.piece_bytes},
            });
            let subject = Blobs::record_subject(&self.blob.id);
            self.blobs.publish(&subject, record.to_string().into(), 0).await?;
        }
        Ok(self.blob)
    }

    async fn put_piece(&mut self) -> Result<(), BlobError> {
        let piece = self.waiting.split().freeze();
        match &self.blob.at {
            BlobPlace::Broker => {
                self.hash.update(&piece);
                let subject = Blobs::pieces_subject(&self.blob.id);
                self.last = self.blobs.publish(&subject, piece, self.last).await?;
            }
            BlobPlace::Store(prefix) => {
                let uri = Blobs::object(prefix, &self.blob.id, self.pieces)?;
                self.blobs.store().await?.put(&uri, piece).await.map_err(|error| match error {
                    StoreError::Refused { .. } => BlobError::Full(error.to_string()),
                    _ => away(error),
                })?;
            }
        }
        self.pieces += 1;
        Ok(())
    }
}

impl Blobs {
    /// Stores a message behind the one with this sequence on its subject, once, and gives its own.
    async fn publish(&self, subject: &str, body: Bytes, last: u64) -> Result<u64, BlobError> {
        self.ensure().await?;
        let over_at = Instant::now() + WRITE_PATIENCE;
        loop {
            let message = PublishMessage::build()
                .payload(body.clone())
                .expected_last_subject_sequence(last)
                .expected_stream(Self::stream());
            let sent = async { self.jetstream.send_publish(subject.to_owned(), message).await?.await };
            let error = match sent.await {
                Ok(ack) => return Ok(ack.sequence),
                Err(error) => error,
            };
            if error.kind() == PublishErrorKind::WrongLastSequence {
                // Nobody else writes there: it is this very message, whose acknowledgement was lost.
                let stream = self.jetstream.get_stream_no_info(Self::stream()).await.map_err(away)?;
                let found = stream.direct_get_last_for_subject(subject).await.map_err(away)?;
                if found.sequence > last && found.payload == body {
                    return Ok(found.sequence);
                }
                return Err(BlobError::Broken(format!("{subject}: somebody else writes there")));
            }
            match publish::next(&error) {
                Next::WaitForRoom => return Err(BlobError::Full(error.to_string())),
                Next::Repeat if Instant::now() < over_at => tokio::time::sleep(WRITE_PAUSE).await,
                _ => return Err(away(error)),
            }
        }
    }
}

/// A blob that is being read.
#[derive(Debug)]
struct CurrentBlob {
    blob: Blob,
    /// The next sequence in the stream, or the next piece in S3.
    next: u64,
    left: u64,
    ready: std::collections::VecDeque<Bytes>,
}

#[derive(Debug)]
struct BlobReader {
    blobs: Arc<Blobs>,
    /// The last one first.
    left: Vec<Blob>,
    current: Option<CurrentBlob>,
}

impl BlobReader {
    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        loop {
            if self.current.as_ref().is_none_or(|current| current.left == 0) {
                let Some(blob) = self.left.pop() else { return Ok(None) };
                self.current =
                    Some(CurrentBlob { next: 0, left: blob.bytes, ready: Default::default(), blob });
            }
            let Some(current) = &mut self.current else { return Ok(None) };
            if current.left == 0 {
                continue;
            }
            if current.ready.is_empty() {
                self.blobs.fetch(current).await?;
            }
            let Some(piece) = current.ready.pop_front() else {
                let reason =
                    format!("blob {}: {} bytes are missing at its end", current.blob.id, current.left);
                return Err(BlobError::Broken(reason));
            };
            let left = current.left.checked_sub(piece.len() as u64);
            let longer =
                || BlobError::Broken(format!("blob {} is longer than its record says", current.blob.id));
            current.left = left.ok_or_else(longer)?;
            return Ok(Some(piece));
        }
    }
}

impl Blobs {
    async fn fetch(&self, current: &mut CurrentBlob) -> Result<(), BlobError> {
        match &current.blob.at {
            BlobPlace::Broker => {
                let subject = Self::pieces_subject(&current.blob.id);
                let ask =
                    Ask::Few { subject: &subject, sequence: current.next.max(1), messages: READ_PIECES };
                let read = direct::read_of(&self.link, &Self::stream(), ask).await.map_err(away)?;
                for message in read.messages {
                    current.next = message.sequence + 1;
                    current.ready.push_back(message.payload);
                }
            }
            BlobPlace::Store(prefix) => {
                let uri = Self::object(prefix, &current.blob.id, current.next)?;
                let piece = self.store().await?.get(&uri, STORE_PIECE_BYTES as u64).await;
                current.ready.push_back(piece.map_err(|error| match error {
                    StoreError::Missing(_) => BlobError::Broken(error.to_string()),
                    _ => away(error),
                })?);
                current.next += 1;
            }
        }
        Ok(())
    }
}
