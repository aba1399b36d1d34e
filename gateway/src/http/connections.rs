//! How many connections there may be, and how long one may take nothing of what is sent to it.
//!
//! A connection beyond the bound is told so (where it speaks no TLS) and closed. A client that takes no byte of an
//! answer for [`TAKE_PATIENCE`] has left.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::accept::Accept;
use futures::future::BoxFuture;
use prometheus::IntCounter;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

use crate::failure::Failure;
use crate::http::error::{ApiCode, ApiError};

/// How long a client may take no byte of what is sent to it.
const TAKE_PATIENCE: Duration = Duration::from_secs(60);
/// Files that are open beside connections: the broker's, the object store's, logs.
const OTHER_FILES: u64 = 128;
/// Connections by default, where the system allows so many files.
const CONNECTIONS: u32 = 8192;
/// Connections that are told at once that there are too many.
const TOLD_MAX: usize = 64;
/// How long one of them may take to hear it.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of its request that are thrown away meanwhile.
const TELL_BYTES: u64 = 64 << 10;

/// How many connections there may be: as many as are asked for, or [`CONNECTIONS`] as far as the system lets it. The
/// process may open as many files from now on as the system lets it.
///
/// # Errors
/// [`Failure::Usage`] where the system does not let it open as many as are asked for.
pub fn connections_max(asked: Option<u32>) -> Result<u32, Failure> {
    let limits = getrlimit(Resource::Nofile);
    let hard = limits.maximum.unwrap_or(u64::MAX);
    // Where it cannot be raised, what there is counts.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum });
    let files = if raised.is_ok() { hard } else { limits.current.unwrap_or(u64::MAX) };
    bounded(asked, files)
}

fn bounded(asked: Option<u32>, files: u64) -> Result<u32, Failure> {
    let most = u32::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(u32::MAX);
    match asked {
        None => Ok(CONNECTIONS.min(most).max(1)),
        Some(asked) if asked <= most => Ok(asked),
        Some(asked) => Err(Failure::Usage(format!(
            "--connections-max {asked}: this process may open {files} files (ulimit -n), of which {OTHER_FILES} are \
             for other things; at most {most} connections fit"
        ))),
    }
}

/// Lets connections in while there are places.
#[derive(Debug, Clone)]
pub struct BoundedAcceptor {
    places: Arc<Semaphore>,
    told: Arc<Semaphore>,
    refused: IntCounter,
    /// Whether a client without a place understands plain text.
    plain: bool,
}

impl BoundedAcceptor {
    /// With the places of all connections; `refused` counts those without one.
    pub fn new(places: Arc<Semaphore>, refused: IntCounter, plain: bool) -> Self {
        Self { places, told: Arc::new(Semaphore::new(TOLD_MAX)), refused, plain }
    }
}

impl<S: Send + 'static> Accept<TcpStream, S> for BoundedAcceptor {
    type Stream = BoundedStream;
    type Service = S;
    type Future = BoxFuture<'static, io::Result<(BoundedStream, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            self.refused.inc();
            let told = self.told.clone().try_acquire_owned().ok().filter(|_| self.plain);
            return Box::pin(async move {
                if told.is_some() {
                    let _ = tokio::time::timeout(TELL_TIMEOUT, tell(stream)).await;
                }
                Err(io::Error::other("there are as many connections as may be"))
            });
        };
        Box::pin(async move {
            stream.set_nodelay(true)?;
            Ok((BoundedStream { stream, stalled: None, _place: place }, service))
        })
    }
}

/// Tells a client that there are too many, and reads what it sent: a socket that is closed with bytes unread takes the
/// answer back.
async fn tell(mut stream: TcpStream) -> io::Result<()> {
    let error = ApiError::new(ApiCode::Overloaded, "this gateway has as many connections as it may");
    let body = error.body().to_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 2\r\n\
        x-should-retry: true\r\nconnection: close\r\n";
    stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await?;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(TELL_BYTES), &mut tokio::io::sink()).await?;
    Ok(())
}

/// A connection with its place.
#[derive(Debug)]
pub struct BoundedStream {
    stream: TcpStream,
    /// When the client that takes nothing has left.
    stalled: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

impl BoundedStream {
    /// Lets a write wait, but not for ever.
    fn patient<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(TAKE_PATIENCE)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.patient(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.patient(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.patient(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_the_system_lets_it_open() {
        assert_eq!(bounded(None, 1 << 20).ok(), Some(CONNECTIONS));
        assert_eq!(bounded(None, 1024).ok(), Some(896));
        assert_eq!(bounded(Some(896), 1024).ok(), Some(896));
        let refused = bounded(Some(897), 1024).unwrap_err().to_string();
        for said in ["--connections-max 897", "1024 files", "at most 896"] {
            assert!(refused.contains(said), "{refused}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_has_left() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut bounded = BoundedStream { stream, stalled: None, _place: place };
        let sent = bounded.write_all(&vec![0; 64 << 20]).await;
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
