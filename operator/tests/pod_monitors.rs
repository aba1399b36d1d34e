//! The definition of PodMonitors is deleted while the operator runs, before an API server of a few lines: first it
//! refuses them while they end, then it does not know them. Models run without, and are told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::response::Response;
use clap::Parser;
use kube::Client;
use millrace_crds::model::InferenceModel;
use millrace_operator::apply::{Applier, ApplyError};
use millrace_operator::build::build;
use millrace_operator::caches::{Caches, Scope};
use millrace_operator::config::Config;
use millrace_operator::fetch::Existing;
use millrace_operator::pod_monitors::PodMonitors;
use millrace_operator::validate::plan;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

mod shapes;

/// Until a change must have been noticed: a few retries of a watch.
const LIMIT: Duration = Duration::from_secs(30);
const GROUP: &str = "/apis/monitoring.coreos.com/v1";

/// What the API server does with PodMonitors.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Definition {
    /// Lists, watches and takes them.
    Served,
    /// Still names them among its resources, and answers each request for them with this code.
    Refused(u16),
    /// Does not know them; the group has another kind.
    Gone,
    /// Does not know the group.
    GroupGone,
}

/// An API server that holds one InferenceModel and takes each object that is applied as it should be.
#[derive(Debug, Clone)]
struct Server {
    definition: watch::Sender<Definition>,
    /// Requests for PodMonitors that were refused.
    refused: watch::Sender<u32>,
    /// The kinds that were written, in order.
    written: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(definition: Definition) -> Self {
        let (definition, refused) = (watch::Sender::new(definition), watch::Sender::new(0));
        Self { definition, refused, written: Arc::default() }
    }

    fn client(&self) -> Client {
        Client::new(Router::new().fallback(answer).with_state(self.clone()), "default")
    }

    fn definition(&self) -> Definition {
        *self.definition.borrow()
    }

    fn pod_monitors(&self) -> Result<(), u16> {
        match self.definition() {
            Definition::Served => Ok(()),
            Definition::Refused(code) => Err(code),
            Definition::Gone | Definition::GroupGone => Err(404),
        }
    }
}

fn model() -> Value {
    json!({
        "apiVersion": "millrace.dev/v1alpha1", "kind": "InferenceModel",
        "metadata": {"name": "m", "namespace": "team", "uid": "1", "resourceVersion": "1"},
        "spec": {"model": {"uri": "s3://models/m"}, "replicas": 1},
    })
}

fn config() -> Config {
    Config::parse_from([
        "millrace-operator",
        "--nats-servers=nats://nats.queues.svc:4222",
        "--worker-image=worker:cpu",
        "--worker-image-cuda=worker:cuda",
        "--pod-monitors",
    ])
}

fn reply(code: u16, body: &Value) -> Response {
    let status = StatusCode::from_u16(code).expect("a status code");
    Response::builder().status(status).body(Body::from(body.to_string())).expect("a response")
}

fn refusal(code: u16) -> Response {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        _ => "MethodNotAllowed",
    };
    let message = "not while the definition ends";
    reply(
        code,
        &json!({"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": reason}),
    )
}

async fn answer(State(server): State<Server>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    if path == GROUP {
        let name = match server.definition() {
            Definition::Served | Definition::Refused(_) => "podmonitors",
            Definition::Gone => "servicemonitors",
            Definition::GroupGone => return refusal(404),
        };
        let resource = json!({"name": name, "singularName": "", "namespaced": true, "kind": "", "verbs": []});
        return reply(200, &json!({"groupVersion": "monitoring.coreos.com/v1", "resources": [resource]}));
    }
    let of_pod_monitors = path.contains("/podmonitors");
    if let (true, Err(code)) = (of_pod_monitors, server.pod_monitors()) {
        server.refused.send_modify(|count| *count += 1);
        return refusal(code);
    }
    if request.method() == Method::PATCH {
        return match applied(&path, &query, request).await {
            Ok(object) => {
                let kind = object["kind"].as_str().expect("a kind").to_owned();
                server.written.lock().expect("no panic").push(kind);
                reply(200, &object)
            }
            Err(error) => {
                reply(422, &json!({"kind": "Status", "status": "Failure", "code": 422, "message": error}))
            }
        };
    }
    if query.contains("watch=") {
        // Nothing changes but the definition, with which the watches of PodMonitors end.
        let mut definition = server.definition.subscribe();
        match definition.wait_for(|definition| of_pod_monitors && *definition != Definition::Served).await {
            Ok(_) | Err(_) => return reply(200, &json!({})),
        }
    }
    match path.rsplit('/').next() {
        Some("inferencemodels") => reply(200, &list(vec![model()])),
        Some(_) if query.contains("limit=") => reply(200, &list(Vec::new())),
        _ => refusal(404),
    }
}

/// The object of a server-side apply, if the API server would take it: in the right form, at its own address, and
/// of the shape of its kind.
async fn applied(path: &str, query: &str, request: Request) -> Result<Value, String> {
    let form = request.headers().get(CONTENT_TYPE).cloned();
    if form.as_ref().is_none_or(|form| form != "application/apply-patch+yaml") {
        return Err(format!("{form:?} is no apply"));
    }
    for wanted in ["fieldManager=millrace-operator", "force=true"] {
        if !query.split(['?', '&']).any(|found| found == wanted) {
            return Err(format!("{wanted} is not in {query}"));
        }
    }
    let body = to_bytes(request.into_body(), 1 << 20).await.expect("a body");
    let object: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (word(&object["apiVersion"]), word(&object["kind"]).to_lowercase());
    let (namespace, name) = (word(&object["metadata"]["namespace"]), word(&object["metadata"]["name"]));
    let root = if version.contains('/') { "apis" } else { "api" };
    let plural = kind.strip_suffix('y').map_or_else(|| format!("{kind}s"), |stem| format!("{stem}ies"));
    let address = format!("/{root}/{version}/namespaces/{namespace}/{plural}/{name}");
    if path != address {
        return Err(format!("{path} is not {address}"));
    }
    shapes::check(&object).map(|()| object)
}

fn list(items: Vec<Value>) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items})
}

/// Follows PodMonitors until the definition is gone in a way, and asks for what is told.
async fn deleted(code: u16, gone: Definition) {
    let server = Server::new(Definition::Served);
    let (changes, mut told) = mpsc::channel(64);
    let scope = Scope { client: server.client(), namespace: None };
    let (caches, watches) = Caches::new(&scope, true, &changes);
    let watches = tokio::spawn(futures::future::join_all(watches));
    timeout(LIMIT, caches.ready()).await.expect("lists in time").expect("watches");
    let mut state = caches.pod_monitors.clone().expect("PodMonitors are wanted");
    assert!(matches!(&*state.borrow(), PodMonitors::Known(_)));
    while told.try_recv().is_ok() {}

    server.definition.send_replace(Definition::Refused(code));
    let mut refused = server.refused.subscribe();
    timeout(LIMIT, refused.wait_for(|count| *count >= 2)).await.expect("tries again").expect("a server");
    assert!(matches!(&*state.borrow(), PodMonitors::Known(_)), "they are still there");
    assert!(told.try_recv().is_err(), "nothing to do yet");

    server.definition.send_replace(gone);
    let undefined = state.wait_for(|state| matches!(state, PodMonitors::Undefined));
    timeout(LIMIT, undefined).await.expect("notices").expect("a follower");
    let looked_at = timeout(LIMIT, told.recv()).await.expect("in time").expect("a model");
    assert_eq!((looked_at.name.as_str(), looked_at.namespace.as_deref()), ("m", Some("team")));
    watches.abort();
}

#[tokio::test]
async fn a_definition_that_ends_is_followed_until_it_is_gone() {
    tokio::join!(
        deleted(403, Definition::Gone),
        deleted(404, Definition::GroupGone),
        deleted(405, Definition::Gone)
    );
}

/// Whatever the API server says to the PodMonitor, the rest is written before, and the refusal is told.
#[tokio::test]
async fn a_refused_pod_monitor_holds_up_no_worker() {
    let object: InferenceModel = serde_json::from_value(model()).expect("a model");
    let plan = plan(&object, &config()).expect("a plan");
    for code in [403, 404, 405] {
        let server = Server::new(Definition::Refused(code));
        let applier = Applier::new(server.client());
        let resources = build(&plan, 1);
        let monitor = resources.pod_monitor.clone().expect("a PodMonitor");
        let existing = Existing::default();
        assert_eq!(applier.apply(resources, &existing, &plan.uid).await.expect("the rest"), 5);
        let written = server.written.lock().expect("no panic").clone();
        let order = ["ServiceAccount", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Deployment"];
        assert_eq!(written, order, "what a pod needs is there before it");
        let refused = applier.monitor(Some(&monitor), &existing, ("team", &plan.uid)).await;
        let Err(ApplyError::Api { kind, source, .. }) = refused else { panic!("{refused:?}") };
        assert!(kind == "PodMonitor" && source.to_string().contains("not while"), "{kind}: {source}");
    }
}

/// A PodMonitor that the API server knows is applied as the rest is.
#[tokio::test]
async fn a_pod_monitor_is_applied_where_its_kind_is_known() {
    let server = Server::new(Definition::Served);
    let plan = plan(&serde_json::from_value(model()).expect("a model"), &config()).expect("a plan");
    let monitor = build(&plan, 1).pod_monitor.expect("a PodMonitor");
    let applier = Applier::new(server.client());
    let writes = applier.monitor(Some(&monitor), &Existing::default(), ("team", &plan.uid)).await;
    assert_eq!(writes.expect("applied"), 1);
    assert_eq!(*server.written.lock().expect("no panic"), ["PodMonitor"]);
}
