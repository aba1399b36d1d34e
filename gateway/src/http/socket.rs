//! `/v1/stream`: many generations on one WebSocket.
//!
//! [`protocol`] is what is said, [`generation`] one generation. A connection has a reader, which is this task, a writer
//! with a short queue, and a task for each generation; when it ends, all of them do.

pub mod generation;
pub mod protocol;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt};
use millrace_crds::names::Class;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::http::awaited::JobOrder;
use crate::http::caller::{self, RequestContext};
use crate::http::error::{ApiCode, ApiError};
use crate::http::followed::FollowedJob;
use crate::http::front::{self, Front};
use crate::http::inference::{self, Asked};
use crate::http::jobs::{self, JobName, TIME_MAX};
use crate::http::keys::Verb;
use crate::http::socket::generation::{GenerationCommand, SocketGeneration};
use crate::http::socket::protocol::{ClientMessage, ClientWish};
use crate::http::texts::JobTexts;
use crate::publish::JobEnvelope;

/// Most generations of one connection at once.
const GENERATIONS_MAX: usize = 256;
/// Messages that wait for a connection; each generation waits for its turn.
const MESSAGES_MAX: usize = 16;
/// Bytes of a message beside the body in it.
const ENVELOPE_BYTES: usize = 4 << 10;
/// How long a client may take nothing of what is sent to it.
const TAKE_PATIENCE: Duration = Duration::from_secs(60);
/// Pings that a client may leave without an answer, or any other sign of life.
const PINGS_MISSED: u32 = 4;
/// Commands that may wait for a generation.
const COMMANDS_MAX: usize = 16;

/// Opens a WebSocket for many generations
///
/// Messages are JSON texts; docs/http.md says which.
#[utoipa::path(get, path = "/v1/stream", tag = "Inference",
    responses((status = 101, description = "The connection is a WebSocket from now on")))]
pub async fn open(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    context.caller()?.may(Verb::Infer)?;
    if !from_here(&front, &headers) {
        let message = "pages of this origin may not open a WebSocket: see --cors-origin";
        return Err(ApiError::of(ApiCode::InsufficientPermissions, "origin", message));
    }
    let upgrade = upgrade
        .map_err(|error| ApiError::of(ApiCode::InvalidParameter, "upgrade", error.body_text()))?
        .max_message_size(front.body_bytes_max() + ENVELOPE_BYTES)
        .max_frame_size(front.body_bytes_max() + ENVELOPE_BYTES);
    let tracker = front.sockets.clone();
    Ok(upgrade.on_upgrade(move |socket| tracker.track_future(serve(front, headers, socket))))
}

/// A browser sends where a page is from, and sends no key of ours: pages of elsewhere must not use what is open to all.
fn from_here(front: &Front, headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().unwrap_or_default();
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let own = origin.split_once("://").is_some_and(|(_, from)| Some(from) == host);
    own || front.args.cors_origin.iter().any(|allowed| allowed == origin || allowed == "*")
}

async fn serve(front: Arc<Front>, headers: HeaderMap, socket: WebSocket) {
    let (sink, mut incoming) = socket.split();
    let (client, messages) = mpsc::channel(MESSAGES_MAX);
    let writer = tokio::spawn(write(front.clone(), sink, messages));
    let silence_max = front.args.keep_alive.0 * PINGS_MISSED;
    let mut connection = SocketConnection {
        front: front.clone(),
        headers,
        client,
        running: HashMap::new(),
        tasks: JoinSet::new(),
    };
    let mut draining = false;
    let code = loop {
        if draining && connection.tasks.is_empty() {
            break close_code::AWAY;
        }
        tokio::select! {
            message = tokio::time::timeout(silence_max, incoming.next()) => match message {
                Ok(Some(Ok(Message::Text(text)))) => connection.hear(text.as_str()).await,
                Ok(Some(Ok(Message::Binary(_)))) => break close_code::UNSUPPORTED,
                Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
                Ok(Some(Ok(Message::Close(_))) | None) | Err(_) => break close_code::NORMAL,
                Ok(Some(Err(_))) => break close_code::SIZE,
            },
            Some(ended) = connection.tasks.join_next() => connection.forget(ended.ok()),
            () = front.draining.cancelled(), if !draining => draining = true,
            () = front.over.cancelled() => break close_code::AWAY,
            () = connection.client.closed() => break close_code::ABNORMAL,
        }
    };
    // Jobs that do not run in the background are cancelled as their generations are dropped.
    let SocketConnection { client, mut tasks, .. } = connection;
    tasks.shutdown().await;
    let _ = client.try_send(Message::Close(Some(CloseFrame { code, reason: "".into() })));
    drop(client);
    let _ = writer.await;
}

/// Writes what is sent until the last sender is gone, and pings in between.
async fn write(
    front: Arc<Front>,
    mut sink: SplitSink<WebSocket, Message>,
    mut messages: mpsc::Receiver<Message>,
) {
    let mut pings = tokio::time::interval(front.args.keep_alive.0);
    pings.reset();
    loop {
        let message = tokio::select! {
            message = messages.recv() => message,
            _ = pings.tick() => Some(Message::Ping("".into())),
        };
        let Some(message) = message else { return };
        match tokio::time::timeout(TAKE_PATIENCE, sink.send(message)).await {
            Ok(Ok(())) => {}
            // It has left, or takes nothing.
            _ => return,
        }
    }
}

/// One connection.
struct SocketConnection {
    front: Arc<Front>,
    headers: HeaderMap,
    client: mpsc::Sender<Message>,
    running: HashMap<String, mpsc::Sender<GenerationCommand>>,
    /// They give back their ids.
    tasks: JoinSet<String>,
}

impl SocketConnection {
    fn forget(&mut self, id: Option<String>) {
        if let Some(id) = id {
            self.running.remove(&id);
        }
    }

    async fn hear(&mut self, text: &str) {
        let refused = match protocol::read(text) {
            Ok(ClientMessage { id, wish }) => self.follow(&id, wish).map_err(|error| (Some(id), error)),
            Err(refused) => Err(refused),
        };
        if let Err((id, error)) = refused {
            // Who takes no answers is read no further.
            let _ = self.client.send(Message::text(protocol::error(id.as_deref(), &error))).await;
        }
    }

    /// Does what a message wants. Nothing here waits: one generation keeps no other from being heard.
    fn follow(&mut self, id: &str, wish: ClientWish) -> Result<(), ApiError> {
        let command = match wish {
            ClientWish::More(count) => GenerationCommand::More(count),
            ClientWish::Cancel => GenerationCommand::Cancel,
            wish => return self.begin(id, wish),
        };
        let unknown = || ApiError::of(ApiCode::InvalidParameter, "id", "no generation runs under it");
        let commands = self.running.get(id).ok_or_else(unknown)?;
        commands.try_send(command).map_err(|_| {
            ApiError::new(
                ApiCode::Overloaded,
                format!("{COMMANDS_MAX} messages of this generation wait already"),
            )
        })
    }

    fn begin(&mut self, id: &str, wish: ClientWish) -> Result<(), ApiError> {
        if self.running.contains_key(id) {
            let message = "a generation of this connection runs under it";
            return Err(ApiError::of(ApiCode::InvalidParameter, "id", message));
        }
        if self.running.len() >= GENERATIONS_MAX {
            let message = format!("{GENERATIONS_MAX} generations run on this connection, as many as may");
            return Err(ApiError::new(ApiCode::Overloaded, message));
        }
        if self.front.draining.is_cancelled() {
            return Err(ApiError::new(ApiCode::Overloaded, "this gateway ends; connect again"));
        }
        let (commands, heard) = mpsc::channel(COMMANDS_MAX);
        self.running.insert(id.to_owned(), commands);
        let (front, headers, client) = (self.front.clone(), self.headers.clone(), self.client.clone());
        let id = id.to_owned();
        self.tasks.spawn(async move {
            if let Err(error) = generate(front, headers, (&id, wish), (client.clone(), heard)).await {
                let _ = client.send(Message::text(protocol::error(Some(&id), &error))).await;
            }
            id
        });
        Ok(())
    }
}

/// Begins a generation, or goes on with one, and follows it to its end.
async fn generate(
    front: Arc<Front>,
    headers: HeaderMap,
    (id, wish): (&str, ClientWish),
    (client, heard): (mpsc::Sender<Message>, mpsc::Receiver<GenerationCommand>),
) -> Result<(), ApiError> {
    let context = RequestContext::new(front::request_id());
    let begun = begin(&front, &headers, &context, (id, wish)).await;
    let status = begun.as_ref().map_or_else(|error| error.code.row().0, |_| 200);
    front.audit.write(&context, "GENERATE", "/v1/stream", status);
    let generation = begun?;
    let accepted = protocol::accepted(id, &generation.name.text());
    if client.send(Message::text(accepted)).await.is_ok() {
        front.metrics.streams.inc();
        generation.run(client, heard).await;
    }
    Ok(())
}

async fn begin(
    front: &Arc<Front>,
    headers: &HeaderMap,
    context: &Arc<RequestContext>,
    (id, wish): (&str, ClientWish),
) -> Result<SocketGeneration, ApiError> {
    // A key may have been revoked since the connection began.
    let caller = caller::identify(front, headers).await?;
    caller.may(Verb::Infer)?;
    let _ = context.caller.set(caller);
    let place = front.admit()?;
    let (name, job, texts, window) = match wish {
        ClientWish::Generate { body, class, deadline, background, window } => {
            let (name, job, n) = publish(front, context, body, (class, deadline, background)).await?;
            (name, job, JobTexts::new(Some(n), &[]), window)
        }
        ClientWish::Resume { job, after, window } => {
            let name = jobs::named(front, context, &job, Verb::Infer).await?;
            let job = FollowedJob::find(front, name.clone()).await?;
            jobs::state_of(front, &name).await?;
            let n = jobs::choices_of(front, &name).await?;
            (name, job, JobTexts::new(n, &after), window)
        }
        ClientWish::More(_) | ClientWish::Cancel => {
            return Err(ApiError::new(ApiCode::Internal, "this begins no generation"));
        }
    };
    Ok(SocketGeneration { front: front.clone(), id: id.to_owned(), name, job, texts, window, place })
}

async fn publish(
    front: &Arc<Front>,
    context: &Arc<RequestContext>,
    body: String,
    (class, deadline, background): (Option<Class>, Option<String>, bool),
) -> Result<(JobName, FollowedJob, u32), ApiError> {
    let caller = context.caller()?;
    let limit = if background { TIME_MAX } else { front.args.timeout };
    let asked = Asked::read(None, body.as_bytes())?;
    let model = front.catalog.find(&asked.model, &caller.scopes).await?.model;
    let _ = context.model.set(model.clone());
    let (envelope, time) = inference::envelope_of(front, caller, (class, deadline.as_deref()), limit)?;
    let order = JobOrder {
        id: jobs::id_of_request(&caller.tenant, &context.id),
        context: context.clone(),
        model: model.clone(),
        envelope: JobEnvelope { stream: true, ..envelope },
        body: front.memory.keep(body.into()).ok_or_else(|| {
            ApiError::new(ApiCode::Overloaded, "this gateway holds as many bytes as it may")
        })?,
        time,
        // An id must lead to a job of its own.
        cache: false,
    };
    let mut name = JobName { model, sequence: 0, job: order.id.clone() };
    let mut job = FollowedJob::publish(front, order).await?;
    name.sequence = job.source.sequence();
    if background {
        job.let_go();
    }
    Ok((name, job, asked.n))
}
