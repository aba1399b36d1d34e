//! Invalid specs at a real API server: each is refused by the schema or a rule, with a message that names the
//! field and what to do, and nothing of it is stored.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, ValidationDirective};
use millrace_crds::model::InferenceModel;
use millrace_crds::model::rules::RULES;
use millrace_tests::kube::cluster::define;
use millrace_tests::kube::control_plane::{ControlPlane, ControlPlaneOptions};
use millrace_tests::kube::programs;
use serde_json::{Value, json};

/// A spec that is accepted; the cases change one thing of it.
fn valid() -> Value {
    json!({
        "model": {
            "uri": "s3://models/tiny", "endpoint": "http://s3.storage.svc:8333",
            "credentialsSecretRef": {"name": "s3"},
        },
        "scaling": {"minReplicas": 0, "maxReplicas": 2},
    })
}

/// A JSON pointer below `spec`, the value that is put there (null removes), and words of the refusal.
type Case = (&'static str, Value, &'static [&'static str]);

fn cases() -> Vec<Case> {
    let long = "x".repeat(1025);
    let mut cases = model_cases();
    cases.extend(engine_and_queue_cases());
    cases.extend(scaling_cases());
    cases.extend(template_cases());
    cases.extend(login_cases());
    cases.push(("/model/uri", json!(format!("s3://models/{long}")), &["spec.model.uri", "1024"]));
    cases
}

fn model_cases() -> Vec<Case> {
    vec![
        ("/model", Value::Null, &["spec.model", "Required"]),
        ("/model/uri", Value::Null, &["spec.model.uri", "Required"]),
        ("/model/uri", json!(7), &["spec.model.uri", "string"]),
        ("/model/uri", json!("meta-llama/Llama-3.1-8B"), &["spec.model.uri must begin with s3://", "import"]),
        ("/model/uri", json!("hf://a/b"), &["spec.model.uri must begin with s3://"]),
        ("/model/uri", json!("s3://UPPER/x"), &["spec.model.uri must be s3://bucket/prefix"]),
        ("/model/uri", json!("s3://a/b c"), &["spec.model.uri must be s3://bucket/prefix"]),
        ("/model/uri", json!("s3://bucket/x?y=1"), &["spec.model.uri must be s3://bucket/prefix"]),
        ("/model/uri", json!("s3://bucket/../x"), &["spec.model.uri must not contain", "write the path out"]),
        ("/model/uri", json!("pvc://Claim/x"), &["spec.model.uri must be pvc://claim/path"]),
        ("/model/uri", json!("pvc://claim/x"), &["endpoint", "s3:// only", "remove them"]),
        ("/model/uri", json!("file:///a b"), &["spec.model.uri must be file:///path"]),
        ("/model/revision", json!(""), &["spec.model.revision"]),
        ("/model/revision", json!("a b"), &["spec.model.revision must be a label value"]),
        ("/model/digest", json!("sha256:xyz"), &["spec.model.digest must be 'sha256:' and 64"]),
        ("/model/digest", json!("md5:00"), &["spec.model.digest must be 'sha256:'"]),
        ("/model/endpoint", json!("s3.storage:8333"), &["spec.model.endpoint must be http://host:port"]),
        ("/model/endpoint", json!("http://user:pw@s3:1"), &["spec.model.endpoint", "credentialsSecretRef"]),
        ("/model/endpoint", json!("http://s3:1/path"), &["spec.model.endpoint", "without a path"]),
        ("/model/credentialsSecretRef", json!({}), &["spec.model.credentialsSecretRef.name", "Required"]),
        (
            "/model/credentialsSecretRef/name",
            json!("A_B"),
            &["must be the name of a Secret of this namespace"],
        ),
        ("/model/credentialsSecretRef/secret", json!("x"), &["secret", "field not declared"]),
        ("/model/cacheSize", json!("0"), &["spec.model.cacheSize must be above 0"]),
        ("/model/cacheSize", json!("2 GB"), &["spec.model.cacheSize"]),
        (
            "/model/cacheClaim",
            json!("A"),
            &["spec.model.cacheClaim must be the name of a PersistentVolumeClaim"],
        ),
        ("/model/pathStyle", json!("yes"), &["spec.model.pathStyle", "boolean"]),
        ("/model/url", json!("s3://a/b"), &["url", "field not declared"]),
    ]
}

fn engine_and_queue_cases() -> Vec<Case> {
    vec![
        ("/engine/dtype", json!("fp8"), &["spec.engine.dtype", "supported values", "bf16"]),
        ("/engine/quantization", json!("int3"), &["spec.engine.quantization", "supported values"]),
        ("/engine/maxSequences", json!(0), &["spec.engine.maxSequences", "greater than or equal to 1"]),
        ("/engine/maxSequences", json!(5000), &["spec.engine.maxSequences", "less than or equal to 4096"]),
        ("/engine/maxBatchTokens", json!(8), &["spec.engine.maxBatchTokens", "greater than or equal to 16"]),
        ("/engine/maxModelLen", json!(1), &["spec.engine.maxModelLen must be between 2 and"]),
        ("/engine/kvCacheFraction", json!(0.0), &["spec.engine.kvCacheFraction must be above 0"]),
        ("/engine/kvCacheFraction", json!(0.99), &["spec.engine.kvCacheFraction", "0.95"]),
        ("/engine/kvCacheBytes", json!("1Ki"), &["spec.engine.kvCacheBytes must be at least 1Mi"]),
        ("/engine/kvCacheBytes", json!("lots"), &["spec.engine.kvCacheBytes"]),
        ("/engine/stepTimeout", json!("1ms"), &["spec.engine.stepTimeout must be between 100ms and 1h"]),
        ("/engine/stepTimeout", json!("soon"), &["spec.engine.stepTimeout"]),
        ("/engine/stepTimeout", json!("31s"), &["spec.queue.ackWait must be at least twice"]),
        ("/engine/threads", json!(0), &["spec.engine.threads must be between 1 and 1024"]),
        ("/engine/gpuMemoryUtilization", json!(0.9), &["gpuMemoryUtilization", "field not declared"]),
        ("/parallelism/tensor", json!(2), &["spec.parallelism.tensor must be 1"]),
        ("/queue/maxDeliver", json!(0), &["spec.queue.maxDeliver", "greater than or equal to 1"]),
        ("/queue/maxDeliver", json!(101), &["spec.queue.maxDeliver", "less than or equal to 100"]),
        ("/queue/ackWait", json!("10ms"), &["spec.queue.ackWait must be between 1s and 1h"]),
        ("/queue/ackWait", json!("2h"), &["spec.queue.ackWait must be between 1s and 1h"]),
        ("/queue/ackWait", json!(30), &["spec.queue.ackWait", "string"]),
        ("/queue/backoff", json!([]), &["spec.queue.backoff", "at least 1"]),
        ("/queue/backoff", json!(["1s", "25h"]), &["spec.queue.backoff", "at most 24h"]),
        ("/queue/maxJobs", json!(0), &["spec.queue.maxJobs", "greater than or equal to 1"]),
        ("/queue/maxBytes", json!("0"), &["spec.queue.maxBytes must be above 0"]),
        ("/queue/replicas", json!(6), &["spec.queue.replicas", "less than or equal to 5"]),
        ("/queue/attemptTimeout", json!("721h"), &["spec.queue.attemptTimeout must be between 1s and 720h"]),
        ("/queue/attemptTimeout", json!("1s"), &["spec.queue.attemptTimeout", "ackWait"]),
        ("/queue/weights/high", json!(0), &["spec.queue.weights.high", "greater than or equal to 1"]),
        ("/queue/onDelete", json!("Orphan"), &["spec.queue.onDelete", "supported values", "Retain"]),
        ("/results/ttl", json!("0s"), &["spec.results.ttl must be between 1s and 720h"]),
        ("/results/deadTtl", json!("8761h"), &["spec.results.deadTtl must be at most 8760h"]),
        (
            "/results/deadTtl",
            json!("1h"),
            &["spec.results.deadTtl must not be shorter than spec.results.ttl"],
        ),
        ("/results/maxBytes", json!("0"), &["spec.results.maxBytes must be above 0"]),
        ("/results/deadMaxBytes", json!("0"), &["spec.results.deadMaxBytes must be above 0"]),
        ("/results/inlineBytesMax", json!("65Mi"), &["spec.results.inlineBytesMax", "64Mi"]),
        (
            "/results/objectStore",
            json!({"uri": "file:///x"}),
            &["spec.results.objectStore.uri must be s3://"],
        ),
        (
            "/results/objectStore",
            json!({"uri": "s3://results/x", "endpoint": "s3"}),
            &["objectStore.endpoint must be"],
        ),
        (
            "/results/objectStore",
            json!({"uri": "s3://results/x", "credentialsSecretRef": {"name": "A_B"}}),
            &["spec.results.objectStore.credentialsSecretRef.name must be the name of a Secret"],
        ),
        ("/drain/timeout", json!("25h"), &["spec.drain.timeout must be at most 24h"]),
        ("/start/timeout", json!("1s"), &["spec.start.timeout must be between 10s and 24h"]),
    ]
}

/// Logins, authorities and proxies, of the model's store, of the results' and of the broker.
fn login_cases() -> Vec<Case> {
    let role = "arn:aws:iam::123456789012:role/models";
    let results = |more: Value| {
        let mut store = json!({"uri": "s3://results/x"});
        store.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        ("/results/objectStore", store)
    };
    let with =
        |(pointer, value): (&'static str, Value), words: &'static [&'static str]| (pointer, value, words);
    vec![
        (
            "/model/webIdentity",
            json!({"roleArn": role}),
            &["spec.model: credentialsSecretRef and webIdentity"],
        ),
        ("/model/caSecretRef", json!({"name": "A_B"}), &["spec.model.caSecretRef.name must be the name"]),
        ("/model/proxy", json!("proxy:3128"), &["spec.model.proxy must be http://host:port"]),
        (
            "/model/webIdentity",
            json!({"roleArn": role, "endpoint": "sts"}),
            &["spec.model.webIdentity.endpoint must be http://host:port"],
        ),
        with(
            results(json!({"credentialsSecretRef": {"name": "s3"}, "webIdentity": {"roleArn": role}})),
            &["spec.results.objectStore: credentialsSecretRef and webIdentity"],
        ),
        with(
            results(json!({"caSecretRef": {"name": "A_B"}})),
            &["objectStore.caSecretRef.name must be the name"],
        ),
        with(results(json!({"proxy": "proxy:3128"})), &["spec.results.objectStore.proxy must be"]),
        with(
            results(json!({"webIdentity": {"roleArn": role, "endpoint": "sts"}})),
            &["spec.results.objectStore.webIdentity.endpoint must be"],
        ),
        (
            "/queue/credentialsSecretRef",
            json!({"name": "A_B"}),
            &["spec.queue.credentialsSecretRef.name must be"],
        ),
    ]
}

fn scaling_cases() -> Vec<Case> {
    vec![
        ("/scaling", Value::Null, &["set exactly one of spec.replicas and spec.scaling"]),
        ("/replicas", json!(1), &["set exactly one of spec.replicas and spec.scaling"]),
        ("/replicas", json!(-1), &["spec.replicas", "greater than or equal to 0"]),
        (
            "/scaling/minReplicas",
            json!(3),
            &["spec.scaling.minReplicas must not exceed", "raise maxReplicas"],
        ),
        ("/scaling/maxReplicas", json!(0), &["spec.scaling.maxReplicas", "greater than or equal to 1"]),
        ("/scaling/maxReplicas", json!(2000), &["spec.scaling.maxReplicas", "less than or equal to 1024"]),
        ("/scaling/idleAfter", json!("0s"), &["spec.scaling.idleAfter must be at least 1s", "minReplicas"]),
        ("/scaling/idleAfter", json!("200h"), &["spec.scaling.idleAfter must be at most 168h"]),
        ("/scaling/idleAfter", json!("5 minutes"), &["spec.scaling.idleAfter"]),
        ("/scaling/maxStep", json!(0), &["spec.scaling.maxStep", "greater than or equal to 1"]),
        ("/scaling/onSignalLost", json!("Zero"), &["spec.scaling.onSignalLost", "supported values", "Hold"]),
        ("/scaling/targets/queueWait", json!("10ms"), &["spec.scaling.targets.queueWait must be between 1s"]),
        ("/scaling/targets/kvUtilization", json!(0.01), &["spec.scaling.targets.kvUtilization", "0.1"]),
        ("/scaling/targets/kvUtilization", json!(1.5), &["spec.scaling.targets.kvUtilization", "1"]),
        ("/scaling/stabilization/up", json!("169h"), &["spec.scaling.stabilization.up must be at most 168h"]),
        (
            "/scaling/stabilization/down",
            json!("169h"),
            &["spec.scaling.stabilization.down must be at most 168h"],
        ),
        ("/scaling/cooldown", json!("5m"), &["cooldown", "field not declared"]),
    ]
}

fn template_cases() -> Vec<Case> {
    vec![
        (
            "/resources/limits",
            json!({"nvidia.com/gpu": 2}),
            &["spec.resources.limits", "spec.parallelism.tensor"],
        ),
        (
            "/resources/requests",
            json!({"nvidia.com/gpu": 1}),
            &["spec.resources.requests", "spec.resources.limits"],
        ),
        ("/resources/requests", json!({"cpu": "many"}), &["spec.resources.requests"]),
        (
            "/template/securityContext",
            json!({"privileged": true}),
            &["securityContext", "field not declared"],
        ),
        ("/template/hostNetwork", json!(true), &["hostNetwork", "field not declared"]),
        ("/template/labels", json!({"millrace.dev/model": "x"}), &["spec.template.labels must not set"]),
        ("/template/labels", json!({"a b": "x"}), &["spec.template.labels: keys and values must be valid"]),
        (
            "/template/annotations",
            json!({"millrace.dev/x": "x"}),
            &["spec.template.annotations must not set"],
        ),
        ("/template/env", json!({"1A": "x"}), &["spec.template.env: names must be"]),
        ("/template/env", json!({"MILLRACE_CONFIG": "x"}), &["spec.template.env must not set MILLRACE_"]),
        (
            "/template/env",
            json!({"AWS_SECRET_ACCESS_KEY": "x"}),
            &["spec.template.env", "credentialsSecretRef"],
        ),
        ("/template/tolerations", json!([{"operator": "Exists", "value": "x"}]), &["Exists takes no value"]),
        (
            "/template/tolerations",
            json!([{"operator": "Equal", "value": "x"}]),
            &["spec.template.tolerations", "key"],
        ),
        ("/template/image", json!("a b"), &["spec.template.image must be an image reference"]),
        ("/template/serviceAccountName", json!("A"), &["must be the name of a ServiceAccount"]),
        ("/template/priorityClassName", json!("A_"), &["must be the name of a PriorityClass"]),
        ("/template/runtimeClassName", json!("A_"), &["must be the name of a RuntimeClass"]),
    ]
}

/// Puts a value at a JSON pointer and makes the objects on its way; null removes.
fn put(spec: &mut Value, pointer: &str, value: &Value) {
    let (parent, last) = pointer.rsplit_once('/').expect("a pointer begins with a slash");
    let mut place = spec;
    for part in parent.split('/').skip(1) {
        place = &mut place[part];
    }
    match value {
        Value::Null => drop(place.as_object_mut().and_then(|map| map.remove(last))),
        value => place[last] = value.clone(),
    }
}

/// The messages of the rules that a refusal tells.
fn rules_in(refusal: &str) -> impl Iterator<Item = &'static str> {
    RULES.iter().filter(move |rule| refusal.contains(rule.message)).map(|rule| rule.message)
}

async fn apply(models: &Api<InferenceModel>, name: &str, spec: &Value) -> Result<(), String> {
    let object = json!({
        "apiVersion": "millrace.dev/v1alpha1", "kind": "InferenceModel", "metadata": {"name": name}, "spec": spec,
    });
    let params =
        PatchParams { field_validation: Some(ValidationDirective::Strict), ..PatchParams::apply("test") };
    match models.patch(name, &params, &Patch::Apply(&object)).await {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_specs_are_refused_with_field_and_fix() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let plane =
        ControlPlane::start(&ControlPlaneOptions { api_only: true, ..ControlPlaneOptions::default() })
            .await?;
    let client = plane.admin().await?;
    define(&client).await?;
    let models: Api<InferenceModel> = Api::namespaced(client, "default");
    apply(&models, "neighbour", &valid()).await.map_err(anyhow::Error::msg)?;

    let mut wrong = Vec::new();
    let mut told = BTreeSet::new();
    let cases = cases();
    for (at, (pointer, value, words)) in cases.iter().enumerate() {
        let mut spec = valid();
        put(&mut spec, pointer, value);
        match apply(&models, &format!("case-{at}"), &spec).await {
            Ok(()) => wrong.push(format!("{pointer} = {value} is accepted")),
            Err(refusal) => {
                told.extend(rules_in(&refusal));
                let missing: Vec<_> = words.iter().filter(|word| !refusal.contains(**word)).collect();
                if !missing.is_empty() {
                    wrong.push(format!("{pointer} = {value}: {missing:?} is not in {refusal}"));
                }
            }
        }
    }
    for name in ["llama-3.1", "UPPER", &"x".repeat(41)] {
        match apply(&models, name, &valid()).await {
            Ok(()) => wrong.push(format!("the name {name} is accepted")),
            Err(refusal) => {
                ensure!(refusal.contains("metadata.name"), "{name}: {refusal}");
                told.extend(rules_in(&refusal));
            }
        }
    }
    let mut moved = valid();
    put(&mut moved, "/model/uri", &json!("s3://models/other"));
    let refusal = apply(&models, "neighbour", &moved).await.err().unwrap_or_default();
    ensure!(refusal.contains("set spec.model.revision to a new value"), "a new uri alone: {refusal:?}");

    ensure!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    told.extend(rules_in(&refusal));
    let untold: Vec<_> = RULES.iter().filter(|rule| !told.contains(rule.message)).collect();
    ensure!(untold.is_empty(), "{} of {} rules have no case: {untold:#?}", untold.len(), RULES.len());
    let stored: Vec<_> = models.list(&ListParams::default()).await?.items;
    ensure!(stored.len() == 1, "only the valid neighbour is stored");
    eprintln!("{} invalid specs refused, {} of {} rules told", cases.len() + 4, told.len(), RULES.len());
    Ok(())
}
