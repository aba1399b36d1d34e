//! The one S3 client: whole objects under a limit, ranges of large ones, uploads in parts.
//!
//! Refused: addresses that are no `s3://bucket/key`, objects over the caller's limit. Retries of single
//! requests are the SDK's, with exponential backoff and a bound.

mod failure;
mod session;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use aws_config::BehaviorVersion;
use aws_config::retry::RetryConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Region, RequestChecksumCalculation, ResponseChecksumValidation};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use millrace_crds::config::StoreConfig;

use crate::claim::{ObjectError, Objects};
use failure::{broken, failed};
use session::{FileKeys, WebIdentity};

/// Tries of one request before it fails.
const ATTEMPTS_MAX: u32 = 5;
/// Objects that one listing may hold; a model has at most 1000 files.
const LISTED_MAX: usize = 10_000;
/// Size of an upload's parts; S3 allows 10,000 of them, so that files up to 160 GB fit.
const UPLOAD_PART_BYTES: u64 = 16 << 20;
/// Parts of one file that are uploaded at once: bounds the memory to 64 MiB.
const UPLOADS_AT_ONCE: usize = 4;
/// What a store answers to a write under a condition that does not hold, or that it does not know.
const PRECONDITION_FAILED: u16 = 412;
const NOT_IMPLEMENTED: u16 = 501;
/// Used with a service of one's own, and where neither configuration nor environment names a region.
const REGION_DEFAULT: &str = "us-east-1";

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The address is not one of an object or folder in S3.
    #[error("{0:?} is not an address such as s3://bucket/folder")]
    Address(String),
    /// A credentials file cannot be read.
    #[error("store.credentialsDir: {file}: {source}")]
    Credentials {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A field of the configuration cannot do.
    #[error("store.{field}: {message}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// There is no such object.
    #[error("{0} does not exist")]
    Missing(S3Uri),
    /// The object is larger than the caller can take.
    #[error("{uri} has {bytes} bytes; the limit is {limit}")]
    TooLarge {
        /// The object.
        uri: S3Uri,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The service will never take an object of this name or size.
    #[error("{uri}: {reason}")]
    Refused {
        /// The object.
        uri: S3Uri,
        /// What the service said.
        reason: String,
    },
    /// The service refused or did not answer.
    #[error("{uri}: {reason}")]
    Service {
        /// The object or folder.
        uri: S3Uri,
        /// What the service or the connection said.
        reason: String,
    },
    /// A local file cannot be read.
    #[error("{file}: {source}")]
    File {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
}

/// `s3://bucket/key`; the key may be empty or a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct S3Uri {
    /// The bucket.
    pub bucket: String,
    /// The key, without a leading or trailing slash.
    pub key: String,
}

impl S3Uri {
    /// The address of a name below this one.
    pub fn join(&self, name: &str) -> Self {
        let key = if self.key.is_empty() { name.to_owned() } else { format!("{}/{name}", self.key) };
        Self { bucket: self.bucket.clone(), key }
    }
}

impl FromStr for S3Uri {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let refuse = || StoreError::Address(text.chars().take(200).collect());
        let (bucket, key) = match text.strip_prefix("s3://").ok_or_else(refuse)?.split_once('/') {
            Some((bucket, key)) => (bucket, key.trim_end_matches('/')),
            None => (text.trim_start_matches("s3://"), ""),
        };
        let bucket_ok = (3..=63).contains(&bucket.len())
            && bucket.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
        let key_ok = key.len() <= 1024
            && !key.starts_with('/')
            && !key.split('/').any(|part| part == "." || part == "..")
            && !key.chars().any(char::is_control);
        if !bucket_ok || !key_ok {
            return Err(refuse());
        }
        Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() })
    }
}

impl fmt::Display for S3Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

/// What the store knows of an object without sending it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Size in bytes.
    pub bytes: u64,
    /// The version of its content, quoted as the service sends it.
    pub etag: String,
}

/// The bytes of a range, in their order.
#[derive(Debug)]
pub struct RangeBody {
    uri: S3Uri,
    body: ByteStream,
    count: u64,
    left: u64,
}

impl RangeBody {
    /// The next bytes, as many as one read of the connection gave; none after the last.
    ///
    /// # Errors
    /// When the transfer breaks off, or more or fewer bytes come than were asked for.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let chunk = self.body.try_next().await.map_err(|error| broken(&self.uri, &error))?;
        let came = chunk.as_ref().map_or(0, Bytes::len) as u64;
        if came > self.left || (chunk.is_none() && self.left > 0) {
            let reason =
                format!("a range of {} bytes came with {}", self.count, self.count - self.left + came);
            return Err(StoreError::Service { uri: self.uri.clone(), reason });
        }
        self.left -= came;
        Ok(chunk)
    }
}

/// One object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    client: Client,
}

impl Store {
    /// A client as the configuration says. Nothing is sent yet.
    ///
    /// # Errors
    /// When a file of it cannot be read, or a field cannot do.
    pub async fn connect(config: &StoreConfig) -> Result<Self, StoreError> {
        let mut shared = aws_config::defaults(BehaviorVersion::latest())
            .http_client(session::http_client(config)?)
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS_MAX));
        if let Some(folder) = &config.credentials_dir {
            let keys = FileKeys(folder.clone());
            keys.read()?;
            shared = shared.credentials_provider(keys);
        }
        if let Some(endpoint) = &config.endpoint {
            shared = shared.endpoint_url(endpoint);
        }
        // A service of one's own has no regions; asking the chain for one would wait for AWS's metadata.
        let own = config.endpoint.is_some().then(|| REGION_DEFAULT.to_owned());
        if let Some(region) = config.region.clone().or(own) {
            shared = shared.region(Region::new(region));
        }
        let shared = shared.load().await;
        let region = shared.region().cloned().unwrap_or(Region::from_static(REGION_DEFAULT));
        // Not every compatible service knows the SDK's own checksums; our manifests have SHA-256.
        let mut s3 = aws_sdk_s3::config::Builder::from(&shared)
            .region(region)
            .force_path_style(config.path_style)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if let Some(identity) = &config.web_identity {
            s3 = s3.credentials_provider(WebIdentity::new(identity, &shared));
        }
        Ok(Self { client: Client::from_conf(s3.build()) })
    }

    /// Size and version of an object.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when there is none.
    pub async fn head(&self, uri: &S3Uri) -> Result<Head, StoreError> {
        let request = self.client.head_object().bucket(&uri.bucket).key(&uri.key);
        let answer = request.send().await.map_err(|error| failed(uri, &error))?;
        Ok(Head {
            bytes: answer.content_length().unwrap_or(0).max(0) as u64,
            etag: answer.e_tag().unwrap_or_default().to_owned(),
        })
    }

    /// A whole object of at most `limit` bytes.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::TooLarge`], or what the service said.
    pub async fn get(&self, uri: &S3Uri, limit: u64) -> Result<Bytes, StoreError> {
        let request = self.client.get_object().bucket(&uri.bucket).key(&uri.key);
        let answer = request.send().await.map_err(|error| failed(uri, &error))?;
        let too_large = |bytes| StoreError::TooLarge { uri: uri.clone(), bytes, limit };
        let announced = answer.content_length().unwrap_or(0).max(0) as u64;
        if announced > limit {
            return Err(too_large(announced));
        }
        let mut body = answer.body;
        let mut whole = BytesMut::with_capacity(announced as usize);
        while let Some(chunk) = body.try_next().await.map_err(|error| broken(uri, &error))? {
            if (whole.len() + chunk.len()) as u64 > limit {
                return Err(too_large((whole.len() + chunk.len()) as u64));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    /// The bytes `first..first + count` of an object, of the version that `head` saw, as they come.
    ///
    /// # Errors
    /// When the object changed, or what the service said.
    pub async fn get_range(
        &self,
        uri: &S3Uri,
        head: &Head,
        first: u64,
        count: u64,
    ) -> Result<RangeBody, StoreError> {
        let range = format!("bytes={first}-{}", first + count - 1);
        let mut request = self.client.get_object().bucket(&uri.bucket).key(&uri.key).range(range);
        if !head.etag.is_empty() {
            request = request.if_match(&head.etag);
        }
        let answer = request.send().await.map_err(|error| failed(uri, &error))?;
        Ok(RangeBody { uri: uri.clone(), body: answer.body, count, left: count })
    }

    /// Names and sizes of the objects directly below a prefix.
    ///
    /// # Errors
    /// When there are too many, or what the service said.
    pub async fn list(&self, uri: &S3Uri) -> Result<Vec<(String, u64)>, StoreError> {
        let prefix = if uri.key.is_empty() { String::new() } else { format!("{}/", uri.key) };
        let request = self.client.list_objects_v2().bucket(&uri.bucket).prefix(&prefix).delimiter("/");
        let mut pages = request.into_paginator().send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            for object in page.map_err(|error| failed(uri, &error))?.contents() {
                let name = object.key().and_then(|key| key.strip_prefix(&prefix)).unwrap_or_default();
                found.push((name.to_owned(), object.size().unwrap_or(0).max(0) as u64));
            }
            if found.len() > LISTED_MAX {
                let reason = format!("more than {LISTED_MAX} objects lie below it");
                return Err(StoreError::Service { uri: uri.clone(), reason });
            }
        }
        found.retain(|(name, _)| !name.is_empty());
        Ok(found)
    }

    /// Writes an object from memory.
    ///
    /// # Errors
    /// What the service said.
    pub async fn put(&self, uri: &S3Uri, bytes: Bytes) -> Result<(), StoreError> {
        let request = self.client.put_object().bucket(&uri.bucket).key(&uri.key);
        request.body(ByteStream::from(bytes)).send().await.map_err(|error| failed(uri, &error))?;
        Ok(())
    }

    /// Removes an object; one that is not there is removed already.
    ///
    /// # Errors
    /// What the service said.
    pub async fn delete(&self, uri: &S3Uri) -> Result<(), StoreError> {
        let request = self.client.delete_object().bucket(&uri.bucket).key(&uri.key);
        match request.send().await.map_err(|error| failed(uri, &error)) {
            Ok(_) | Err(StoreError::Missing(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Writes an object where there is none; `false` if there is one. A store that does not know the condition is asked
    /// before, which leaves a moment in which another writer may be first.
    ///
    /// # Errors
    /// What the service said.
    pub async fn create(&self, uri: &S3Uri, bytes: Bytes) -> Result<bool, StoreError> {
        let request = self.client.put_object().bucket(&uri.bucket).key(&uri.key).if_none_match("*");
        let error = match request.body(ByteStream::from(bytes.clone())).send().await {
            Ok(_) => return Ok(true),
            Err(error) => error,
        };
        match error.raw_response().map(|response| response.status().as_u16()) {
            Some(PRECONDITION_FAILED) => Ok(false),
            Some(NOT_IMPLEMENTED) => match self.head(uri).await {
                Ok(_) => Ok(false),
                Err(StoreError::Missing(_)) => self.put(uri, bytes).await.map(|()| true),
                Err(error) => Err(error),
            },
            _ => Err(failed(uri, &error)),
        }
    }

    /// Writes an object from a file, in parts when it is large.
    ///
    /// # Errors
    /// When the file cannot be read, or what the service said; an upload begun is given up.
    pub async fn put_file(&self, uri: &S3Uri, path: &Path) -> Result<(), StoreError> {
        let unreadable = |source| StoreError::File { file: path.display().to_string(), source };
        let bytes = tokio::fs::metadata(path).await.map_err(unreadable)?.len();
        if bytes <= UPLOAD_PART_BYTES {
            return self.put(uri, tokio::fs::read(path).await.map_err(unreadable)?.into()).await;
        }
        let request = self.client.create_multipart_upload().bucket(&uri.bucket).key(&uri.key);
        let begun = request.send().await.map_err(|error| failed(uri, &error))?;
        let id = begun.upload_id().unwrap_or_default();
        let uploaded = self.put_parts(uri, path, bytes, id).await;
        match uploaded {
            Ok(parts) => {
                let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
                let request = self.client.complete_multipart_upload().bucket(&uri.bucket).key(&uri.key);
                let request = request.upload_id(id).multipart_upload(parts);
                request.send().await.map_err(|error| failed(uri, &error))?;
                Ok(())
            }
            Err(error) => {
                let request = self.client.abort_multipart_upload().bucket(&uri.bucket).key(&uri.key);
                // The first error is the one to tell; what is left over expires by the bucket's rules.
                let _ = request.upload_id(id).send().await;
                Err(error)
            }
        }
    }

    async fn put_parts(
        &self,
        uri: &S3Uri,
        path: &Path,
        bytes: u64,
        id: &str,
    ) -> Result<Vec<CompletedPart>, StoreError> {
        let parts = bytes.div_ceil(UPLOAD_PART_BYTES) as i32;
        futures::stream::iter(0..parts)
            .map(|index| async move {
                let first = index as u64 * UPLOAD_PART_BYTES;
                let body = ByteStream::read_from()
                    .path(path)
                    .offset(first)
                    .length(aws_smithy_types::byte_stream::Length::Exact(
                        UPLOAD_PART_BYTES.min(bytes - first),
                    ))
                    .build()
                    .await
                    .map_err(|error| broken(uri, &error))?;
                let request = self.client.upload_part().bucket(&uri.bucket).key(&uri.key).upload_id(id);
                let request = request.part_number(index + 1).body(body);
                let answer = request.send().await.map_err(|error| failed(uri, &error))?;
                let etag = answer.e_tag().map(str::to_owned);
                Ok(CompletedPart::builder().part_number(index + 1).set_e_tag(etag).build())
            })
            .buffered(UPLOADS_AT_ONCE)
            .try_collect()
            .await
    }

    /// Creates a bucket unless it is there.
    ///
    /// # Errors
    /// What the service said.
    pub async fn create_bucket(&self, bucket: &str) -> Result<(), StoreError> {
        let uri = S3Uri { bucket: bucket.to_owned(), key: String::new() };
        match self.client.create_bucket().bucket(bucket).send().await {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.code(), Some("BucketAlreadyOwnedByYou" | "BucketAlreadyExists")) => {
                Ok(())
            }
            Err(error) => Err(failed(&uri, &error)),
        }
    }
}

impl Objects for Store {
    fn get<'a>(&'a self, uri: &'a str, bytes_max: u64) -> BoxFuture<'a, Result<Bytes, ObjectError>> {
        Box::pin(
            async move { Store::get(self, &uri.parse().map_err(object)?, bytes_max).await.map_err(object) },
        )
    }

    fn size<'a>(&'a self, uri: &'a str) -> BoxFuture<'a, Result<u64, ObjectError>> {
        Box::pin(async move {
            let head = self.head(&uri.parse().map_err(object)?).await;
            head.map(|head| head.bytes).map_err(object)
        })
    }

    fn create<'a>(&'a self, uri: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<bool, ObjectError>> {
        Box::pin(
            async move { Store::create(self, &uri.parse().map_err(object)?, bytes).await.map_err(object) },
        )
    }
}

fn object(error: StoreError) -> ObjectError {
    match error {
        StoreError::Address(_)
        | StoreError::Missing(_)
        | StoreError::TooLarge { .. }
        | StoreError::Refused { .. } => ObjectError::Refused(error.to_string()),
        _ => ObjectError::Unavailable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let uri: S3Uri = "s3://models/llm/smollm2/".parse().expect("an address");
        assert_eq!((uri.bucket.as_str(), uri.key.as_str()), ("models", "llm/smollm2"));
        assert_eq!(uri.join("config.json").to_string(), "s3://models/llm/smollm2/config.json");
        assert_eq!("s3://models".parse::<S3Uri>().expect("a bucket").join("x").key, "x");
        for wrong in [
            "",
            "models/x",
            "http://a/b",
            "s3://",
            "s3:///x",
            "s3://UPPER/x",
            "s3://models/../x",
            "s3://models//x",
        ] {
            let error = wrong.parse::<S3Uri>().expect_err("refused").to_string();
            assert!(error.contains("s3://bucket/folder"), "{wrong:?}: {error}");
        }
    }
}
