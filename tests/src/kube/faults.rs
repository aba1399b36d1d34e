//! An HTTP proxy in front of the API server that goes wrong on purpose: it counts writes and tells when the n-th
//! is done, before its answer is passed on; it cuts watches; it answers lists from the past.
//!
//! It listens without TLS on loopback and asks the API server with a client certificate of its own.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use kube::Client;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::control_plane::ControlPlane;

/// Larger than any list of a test.
const BODY_BYTES_MAX: usize = 64 << 20;

/// What goes wrong.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// After this many writes nothing is answered any more: the moment to kill the client.
    pub stop_after: Option<u64>,
    /// Watches end after this time.
    pub cut_watches: Option<Duration>,
    /// For this time after the first answer, lists are answered as they were then.
    pub stale_lists: Option<Duration>,
}

/// A running proxy.
#[derive(Debug)]
pub struct FaultyApi {
    _server: AbortOnDropHandle<()>,
    counted: watch::Receiver<u64>,
    folder: TempDir,
}

struct Proxy {
    client: Client,
    faults: Faults,
    writes: AtomicU64,
    counted: watch::Sender<u64>,
    started: Instant,
    lists: Mutex<HashMap<String, Bytes>>,
}

impl FaultyApi {
    /// Starts one in front of a control plane.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start(plane: &ControlPlane, user: &str, faults: Faults) -> Result<Self> {
        let sender = watch::Sender::new(0);
        let counted = sender.subscribe();
        let proxy = Arc::new(Proxy {
            client: plane.client(user, Some("system:masters")).await?,
            faults,
            writes: AtomicU64::new(0),
            counted: sender,
            started: Instant::now(),
            lists: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let router = axum::Router::new().fallback(forward).with_state(proxy);
        let server = tokio::spawn(async move {
            // It ends when it is dropped.
            let _ = axum::serve(listener, router).await;
        });
        let folder = tempfile::Builder::new().prefix("millrace-faults-").tempdir()?;
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "c", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        std::fs::write(folder.path().join("kubeconfig"), kubeconfig.to_string())?;
        Ok(Self { _server: AbortOnDropHandle::new(server), counted, folder })
    }

    /// The kubeconfig of its clients.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Writes so far: creations, changes and deletions, without leases and events.
    pub fn writes(&self) -> u64 {
        *self.counted.borrow()
    }

    /// Waits until so many writes were done.
    pub async fn wait_writes(&self, count: u64) {
        // The sender lives as long as the server.
        let _ = self.counted.clone().wait_for(|writes| *writes >= count).await;
    }
}

async fn forward(State(proxy): State<Arc<Proxy>>, request: Request) -> Response {
    match proxy.answer(request).await {
        Ok(response) => response,
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
    }
}

impl Proxy {
    async fn answer(&self, request: Request) -> Result<Response> {
        let stopped =
            || self.faults.stop_after.is_some_and(|most| self.writes.load(Ordering::SeqCst) >= most);
        if stopped() {
            std::future::pending::<()>().await;
        }
        let (parts, body) = request.into_parts();
        let uri = parts.uri.to_string();
        let write = parts.method != Method::GET && !uri.contains("/leases") && !uri.contains("/events");
        let watch = uri.contains("watch=true") || uri.contains("watch=1");
        let list = parts.method == Method::GET && !watch;
        if list && let Some(old) = self.old_list(&uri) {
            return Ok(([("content-type", "application/json")], old).into_response());
        }
        let body = axum::body::to_bytes(body, BODY_BYTES_MAX).await?;
        let mut asked = http::Request::from_parts(parts, kube::client::Body::from(body.to_vec()));
        // The client brings its own.
        asked.headers_mut().remove("host");
        let answer = self.client.send(asked).await?;
        if write && answer.status().is_success() {
            let writes = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
            self.counted.send_replace(writes);
            if stopped() {
                std::future::pending::<()>().await;
            }
        }
        let (mut parts, body) = answer.into_parts();
        // How one connection frames a body says nothing of the other.
        for name in ["transfer-encoding", "content-length", "connection"] {
            parts.headers.remove(name);
        }
        parts.version = http::Version::HTTP_11;
        let body = Body::new(body);
        if watch {
            return Ok(Response::from_parts(parts, self.cut(body)));
        }
        let bytes = axum::body::to_bytes(body, BODY_BYTES_MAX).await?;
        if list && self.faults.stale_lists.is_some() {
            let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
            lists.entry(path(&uri).to_owned()).or_insert_with(|| bytes.clone());
        }
        Ok(Response::from_parts(parts, Body::from(bytes)))
    }

    /// The first answer to this list, while lists are stale.
    fn old_list(&self, uri: &str) -> Option<Bytes> {
        let limit = self.faults.stale_lists?;
        if self.started.elapsed() >= limit {
            return None;
        }
        self.lists.lock().unwrap_or_else(PoisonError::into_inner).get(path(uri)).cloned()
    }

    /// A watch that ends early, if watches are cut.
    fn cut(&self, body: Body) -> Body {
        let Some(limit) = self.faults.cut_watches else { return body };
        let end = Box::pin(tokio::time::sleep(limit));
        Body::from_stream(futures::StreamExt::take_until(body.into_data_stream(), end))
    }
}

fn path(uri: &str) -> &str {
    uri.split('?').next().unwrap_or(uri)
}
