//! Claim checks: bodies too large for a message, kept in an object store.
//!
//! A job's input is read from an address that must lie under the configured prefix, so that a job cannot
//! make the worker read what its publisher may not. A large outcome is put first, under its job and a name made
//! from its own bytes, and the record that refers to it is created last: whoever sees the record sees the bytes.
//! No object is ever overwritten.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use millrace_crds::job::{INPUT_BYTES_MAX, JobHeaders};
use millrace_crds::names::Class;
use millrace_crds::result::OutputReference;
use sha2::{Digest, Sha256};

use crate::fault::Fault;
use crate::room::{BodyPlace, BodyRoom};

/// How long one claim check may take to be read or written: 200 MiB at a few MiB/s.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(300);

/// Why an object could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectError {
    /// Asking again would not help: there is no such object, or it is too large.
    Refused(String),
    /// It may work later.
    Unavailable(String),
}

/// An object store, as claim checks need it.
pub trait Objects: Send + Sync + std::fmt::Debug {
    /// The bytes of an object of at most this size.
    fn get<'a>(&'a self, uri: &'a str, bytes_max: u64) -> BoxFuture<'a, Result<Bytes, ObjectError>>;
    /// The bytes that an object has.
    fn size<'a>(&'a self, uri: &'a str) -> BoxFuture<'a, Result<u64, ObjectError>>;
    /// Writes an object where there is none; `false` if there is one.
    fn create<'a>(&'a self, uri: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<bool, ObjectError>>;
}

/// The claim checks of one model. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Claims {
    store: Option<(Arc<dyn Objects>, String)>,
    inline_bytes_max: u64,
    room: BodyRoom,
}

/// A job's body, and the room that it has until it is dropped.
#[derive(Debug)]
pub struct RedeemedBody {
    /// The bytes.
    pub bytes: Bytes,
    /// None where they came with the message.
    pub place: Option<BodyPlace>,
}

impl Claims {
    /// Without an object store: claim checks are refused, and so are outcomes over `inline_bytes_max`.
    pub fn without_store(inline_bytes_max: u64) -> Self {
        Self { store: None, inline_bytes_max, room: BodyRoom::default() }
    }

    /// With a store; every address must lie under `prefix` (`s3://bucket/folder`).
    pub fn new(objects: Arc<dyn Objects>, prefix: &str, inline_bytes_max: u64) -> Self {
        let prefix = format!("{}/", prefix.trim_end_matches('/'));
        Self { store: Some((objects, prefix)), inline_bytes_max, room: BodyRoom::default() }
    }

    fn store(&self, header: &str) -> Result<(&dyn Objects, &str), Fault> {
        let (objects, prefix) = self.store.as_ref().ok_or_else(|| Fault::Invalid {
            message: format!("header {header}: this model has no results.objectStore"),
        })?;
        Ok((objects.as_ref(), prefix))
    }

    /// The job's body: the message's own, or what its `Millrace-Input` points at, once there is room for it.
    ///
    /// # Errors
    /// [`Fault::Invalid`] when the address is not allowed, absent or too large; [`Fault::Store`] when the
    /// store does not answer.
    pub async fn redeem(
        &self,
        class: Class,
        headers: &JobHeaders,
        body: &Bytes,
    ) -> Result<RedeemedBody, Fault> {
        let Some(uri) = &headers.input else { return Ok(RedeemedBody { bytes: body.clone(), place: None }) };
        if !body.is_empty() {
            let message =
                format!("header Millrace-Input: the message has a body of {} bytes beside it", body.len());
            return Err(Fault::Invalid { message });
        }
        let (objects, prefix) = self.store("Millrace-Input")?;
        allowed("Millrace-Input", uri, prefix)?;
        let failed = |error| fault("Millrace-Input", uri, error);
        let bytes = within(objects.size(uri)).await.map_err(failed)?;
        if bytes > INPUT_BYTES_MAX {
            let message = format!("{uri} has {bytes} bytes; the limit is {INPUT_BYTES_MAX}");
            return Err(failed(ObjectError::Refused(message)));
        }
        let place = Some(self.room.take(class, bytes).await);
        // Not more than it has room for, should it have changed meanwhile.
        let bytes = within(objects.get(uri, bytes)).await.map_err(failed)?;
        Ok(RedeemedBody { bytes, place })
    }

    /// Refuses an outcome address that could not be written later, before any work is done.
    ///
    /// # Errors
    /// [`Fault::Invalid`] when the address is not allowed.
    pub fn check_output(&self, headers: &JobHeaders) -> Result<(), Fault> {
        match &headers.output {
            None => Ok(()),
            Some(uri) => allowed("Millrace-Output", uri, self.store("Millrace-Output")?.1),
        }
    }

    /// The bytes that the outcome's record shall hold: the answer, or a reference to where it was put.
    /// `message_bytes_max` is what the broker takes beside the record's headers.
    ///
    /// # Errors
    /// [`Fault::Invalid`] when it is too large and there is no store; [`Fault::Store`] when the store does
    /// not answer.
    pub async fn deposit(
        &self,
        headers: &JobHeaders,
        answer: Bytes,
        message_bytes_max: u64,
    ) -> Result<Bytes, Fault> {
        let inline = self.inline_bytes_max.min(message_bytes_max);
        if headers.output.is_none() && answer.len() as u64 <= inline {
            return Ok(answer);
        }
        let Some((objects, prefix)) = self.store.as_ref().map(|(objects, prefix)| (objects.as_ref(), prefix))
        else {
            let message = format!(
                "the outcome has {} bytes; results.inlineBytesMax is {}, the broker takes {message_bytes_max} in \
                 one message, and there is no results.objectStore",
                answer.len(),
                self.inline_bytes_max
            );
            return Err(Fault::Invalid { message });
        };
        let sha256 = hex::encode(Sha256::digest(&answer));
        let bytes = answer.len() as u64;
        let own = |folder: &str| format!("{folder}{}/{sha256}", headers.id);
        let output = match &headers.output {
            Some(uri) if !uri.ends_with('/') => {
                place(objects, uri, answer, || format!("{uri}.{}-{sha256}", headers.id)).await?
            }
            Some(folder) => create(objects, own(folder), answer).await?.0,
            None => create(objects, own(prefix), answer).await?.0,
        };
        let reference = OutputReference { output, bytes, sha256 };
        Ok(serde_json::to_vec(&reference).expect("strings and numbers serialise").into())
    }
}

/// Creates an object whose name holds its hash, so that one that is there is this one. Says whether there was none.
async fn create(objects: &dyn Objects, uri: String, bytes: Bytes) -> Result<(String, bool), Fault> {
    let created = within(objects.create(&uri, bytes)).await;
    let created = created.map_err(|error| fault("Millrace-Output", &uri, error))?;
    Ok((uri, created))
}

/// Creates an object where the job asked for it. What is there may be this job's own, of an attempt before; if not, the
/// address is taken, and the object is created `beside` it.
async fn place(
    objects: &dyn Objects,
    uri: &str,
    bytes: Bytes,
    beside: impl Fn() -> String,
) -> Result<String, Fault> {
    let (uri, created) = create(objects, uri.to_owned(), bytes.clone()).await?;
    if created {
        return Ok(uri);
    }
    match within(objects.get(&uri, bytes.len() as u64)).await {
        Ok(there) if there == bytes => Ok(uri),
        // Larger than this one, or gone again.
        Ok(_) | Err(ObjectError::Refused(_)) => Ok(create(objects, beside(), bytes).await?.0),
        Err(error) => Err(fault("Millrace-Output", &uri, error)),
    }
}

async fn within<T>(transfer: BoxFuture<'_, Result<T, ObjectError>>) -> Result<T, ObjectError> {
    match tokio::time::timeout(TRANSFER_TIMEOUT, transfer).await {
        Ok(result) => result,
        Err(_) => Err(ObjectError::Unavailable(format!("no end after {} s", TRANSFER_TIMEOUT.as_secs()))),
    }
}

fn allowed(header: &str, uri: &str, prefix: &str) -> Result<(), Fault> {
    let inside = uri
        .strip_prefix(prefix)
        .is_some_and(|rest| !rest.is_empty() && rest.split('/').all(|part| part != ".." && part != "."));
    if inside {
        return Ok(());
    }
    Err(Fault::Invalid { message: format!("header {header}: {uri:?} does not lie under {prefix:?}") })
}

fn fault(header: &str, uri: &str, error: ObjectError) -> Fault {
    match error {
        ObjectError::Refused(message) => Fault::Invalid { message: format!("header {header}: {message}") },
        ObjectError::Unavailable(message) => Fault::Store { message: format!("{uri}: {message}") },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Memory(Mutex<HashMap<String, Bytes>>);

    impl Objects for Memory {
        fn get<'a>(&'a self, uri: &'a str, bytes_max: u64) -> BoxFuture<'a, Result<Bytes, ObjectError>> {
            let found = self.0.lock().unwrap().get(uri).cloned();
            Box::pin(async move {
                match found {
                    Some(bytes) if bytes.len() as u64 <= bytes_max => Ok(bytes),
                    Some(_) => Err(ObjectError::Refused("too large".into())),
                    None => Err(ObjectError::Refused(format!("{uri} does not exist"))),
                }
            })
        }
        fn size<'a>(&'a self, uri: &'a str) -> BoxFuture<'a, Result<u64, ObjectError>> {
            let found = self.0.lock().unwrap().get(uri).map(|bytes| bytes.len() as u64);
            Box::pin(
                async move { found.ok_or_else(|| ObjectError::Refused(format!("{uri} does not exist"))) },
            )
        }
        fn create<'a>(&'a self, uri: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<bool, ObjectError>> {
            let mut map = self.0.lock().unwrap();
            let free = !map.contains_key(uri);
            if free {
                map.insert(uri.to_owned(), bytes);
            }
            Box::pin(async move { Ok(free) })
        }
    }

    fn headers(pairs: &[(&str, &str)]) -> JobHeaders {
        JobHeaders::parse(pairs.iter().copied(), Default::default()).unwrap()
    }

    #[tokio::test]
    async fn addresses_outside_the_prefix_are_refused() {
        let claims = Claims::new(Arc::new(Memory::default()), "s3://b/claims", 10);
        for uri in
            ["s3://b/other/x", "s3://b/claims", "s3://b/claims/", "s3://b/claims/../x", "s3://b/claimsx/y"]
        {
            let asked = headers(&[("Millrace-Input", uri)]);
            let error = claims.redeem(Class::Normal, &asked, &Bytes::new()).await.unwrap_err();
            assert!(error.to_string().contains(uri), "{error}");
            assert_eq!(error.category(), "invalid");
        }
        assert!(claims.check_output(&headers(&[("Millrace-Output", "s3://x/y")])).is_err());
        let none = Claims::without_store(10);
        let asked = headers(&[("Millrace-Input", "s3://b/x")]);
        let error = none.redeem(Class::Normal, &asked, &Bytes::new()).await.unwrap_err();
        assert!(error.to_string().contains("objectStore"), "{error}");
    }

    #[tokio::test]
    async fn large_answers_become_references() {
        let memory = Arc::new(Memory::default());
        let claims = Claims::new(memory.clone(), "s3://b/claims/", 10);
        let plain = headers(&[("Nats-Msg-Id", "j1")]);
        assert_eq!(claims.deposit(&plain, "0123456789".into(), u64::MAX).await.unwrap(), "0123456789");
        let record = claims.deposit(&plain, "0123456789a".into(), u64::MAX).await.unwrap();
        let reference: OutputReference = serde_json::from_slice(&record).unwrap();
        assert!(reference.output.starts_with("s3://b/claims/j1/") && reference.bytes == 11);
        assert!(reference.output.ends_with(&reference.sha256));
        let asked = headers(&[("Millrace-Output", "s3://b/claims/out.jsonl")]);
        let record = claims.deposit(&asked, "x".into(), u64::MAX).await.unwrap();
        let reference: OutputReference = serde_json::from_slice(&record).unwrap();
        assert_eq!(reference.output, "s3://b/claims/out.jsonl");
        // Another job's answer does not take its place, the same one again does not take another.
        let output = async |id: &str, uri: &str, answer: &'static str| {
            let asked = headers(&[("Nats-Msg-Id", id), ("Millrace-Output", uri)]);
            let record = claims.deposit(&asked, answer.into(), u64::MAX).await.unwrap();
            serde_json::from_slice::<OutputReference>(&record).unwrap().output
        };
        let taken = "s3://b/claims/out.jsonl";
        assert_eq!(output("j2", taken, "x").await, taken, "equal bytes");
        for answer in ["y", "longer"] {
            let beside = output("j2", taken, answer).await;
            assert!(beside.starts_with("s3://b/claims/out.jsonl.j2-"), "{beside}");
            assert_eq!(memory.0.lock().unwrap()[&beside], answer);
        }
        assert!(output("j3", "s3://b/claims/out/", "x").await.starts_with("s3://b/claims/out/j3/"));
        let input = headers(&[("Millrace-Input", "s3://b/claims/out.jsonl")]);
        assert_eq!(claims.redeem(Class::Normal, &input, &Bytes::new()).await.unwrap().bytes, "x");
        let beside = claims.redeem(Class::Normal, &input, &Bytes::from_static(b"y")).await;
        assert!(beside.is_err(), "a body beside it");
        assert!(Claims::without_store(10).deposit(&plain, "0123456789a".into(), u64::MAX).await.is_err());
        // The broker's limit counts where it is the smaller one.
        assert!(claims.deposit(&plain, "0123".into(), 3).await.unwrap().len() > 4);
        let error =
            Claims::without_store(10).deposit(&plain, "0123".into(), 3).await.unwrap_err().to_string();
        assert!(error.contains("4 bytes") && error.contains("takes 3"), "{error}");
    }
}
