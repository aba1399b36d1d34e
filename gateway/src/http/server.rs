//! Listens, with TLS where it is told to, and drains: after SIGTERM or SIGINT no connection is taken, and requests that
//! run may go on for `--drain-timeout`. Those that are cut off then cancel their jobs.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum_server::tls_rustls::RustlsAcceptor;
use axum_server::{Address, Control, Handle, Server};
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;
use crate::http::connections::BoundedAcceptor;
use crate::http::front::Front;
use crate::http::{routes, tls};

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Most headers of a request.
const HEADERS_MAX: usize = 100;
/// Most requests at once on one connection of HTTP/2.
const STREAMS_MAX: u32 = 256;
/// Bytes of bodies that one request of HTTP/2, and one connection, may have sent and nobody read yet.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;
/// Bytes of an answer that wait for a connection of HTTP/2.
const SEND_BYTES_MAX: usize = 64 << 10;
/// How often a connection of HTTP/2 is asked whether it lives.
const PROBE_PAUSE: Duration = Duration::from_secs(20);
/// How long the cancelling of jobs may take whose requests the end of the drain cut off.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until a signal and the drain that follows.
///
/// # Errors
/// When the address cannot be bound or the certificate cannot be read.
pub async fn serve(front: Arc<Front>) -> Result<(), Failure> {
    let listen = front.args.listen;
    let refused = |error| Failure::file(format!("--listen {listen}"), error);
    let listener = TcpListener::bind(listen).map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let mut server = axum_server::from_tcp(listener).map_err(refused)?;
    limit(&mut server, front.args.bounds.idle_timeout.0);
    let control = Control::new();
    tokio::spawn(drain_on_signal(front.clone(), control.clone()));
    let server =
        server.handle(Handle::with_control(control)).first_request_timeout(front.args.bounds.head_timeout.0);
    let router: Router = routes::router(front.clone());
    let (places, refused_ones) = (front.connection_places.clone(), front.metrics.refused_connections.clone());
    let bounded = |plain| BoundedAcceptor::new(places, refused_ones, plain);
    let served = match (&front.args.tls_cert, &front.args.tls_key) {
        (Some(cert), Some(key)) => {
            let config =
                tls::certificate(cert.clone(), key.clone(), front.args.tls_client_ca.clone()).await?;
            let acceptor = RustlsAcceptor::new(config).handshake_timeout(HANDSHAKE_TIMEOUT);
            tracing::info!(%address, tls = true, "listening");
            let server = server.acceptor(acceptor.acceptor(bounded(false)));
            server.serve(router.into_make_service()).await
        }
        _ => {
            tracing::info!(%address, tls = false, "listening");
            server.acceptor(bounded(true)).serve(router.into_make_service()).await
        }
    };
    // Sockets are no part of the server's own drain.
    front.sockets.close();
    tokio::select! {
        () = front.sockets.wait() => {}
        () = front.over.cancelled() => {}
    }
    front.over.cancel();
    // Requests that were cut off end now, and cancel their jobs.
    if tokio::time::timeout(SETTLE_TIMEOUT, front.settle()).await.is_err() {
        tracing::warn!(running = front.running(), "not all jobs of requests that were cut off are cancelled");
    }
    served.map_err(refused)
}

fn limit<A: Address>(server: &mut Server<A>, idle: Duration) {
    let builder = server.http_builder();
    builder.http1().header_read_timeout(idle).max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    builder
        .http2()
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BYTES_MAX)
        .keep_alive_interval(PROBE_PAUSE);
}

async fn drain_on_signal(front: Arc<Front>, control: Control) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return tracing::error!("signals cannot be heard: this process ends without a drain");
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let limit = front.args.drain_timeout;
    tracing::info!(running = front.running(), limit = %limit, "draining");
    front.drain();
    control.graceful_shutdown(Some(limit.0));
    tokio::select! {
        _ = terminate.recv() => tracing::warn!("a second signal ends the drain"),
        _ = interrupt.recv() => tracing::warn!("a second signal ends the drain"),
        () = tokio::time::sleep(limit.0) => return front.over.cancel(),
    }
    front.over.cancel();
    control.shutdown();
}
