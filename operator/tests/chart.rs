//! The chart, rendered by helm: golden files, and what must hold between chart and code.
//!
//! Skipped, loudly, where helm is missing; `MILLRACE_REQUIRE_TOOLS` makes that a failure. `MILLRACE_UPDATE=1`
//! writes the golden files anew.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use k8s_openapi::api::rbac::v1::PolicyRule;
use millrace_autoscaler::{ClassReading, Memory, QueueReading, Reading, decide};
use millrace_crds::names::{Class, ModelRef};
use millrace_operator::config::Config;
use millrace_operator::metrics::OperatorMetrics;
use serde::Deserialize;
use serde_json::Value;

mod shapes;

const SERVERS: &str = "nats.servers[0]=nats://nats.queues.svc:4222";
const FULL: [&str; 14] = [
    SERVERS,
    "scope=namespace",
    "replicas=2",
    "nats.secret=operator-nats",
    "nats.credentialsKey=nats.creds",
    "nats.caKey=ca.crt",
    "worker.natsServers[0]=nats://workers.queues.svc:4222",
    "worker.natsMonitor=http://nats.queues.svc:8222",
    "worker.natsSecret=worker-nats",
    "podDisruptionBudget.enabled=true",
    "monitoring.serviceMonitor=true",
    "monitoring.podMonitors=true",
    "monitoring.rules=true",
    "monitoring.labels.release=prometheus",
];

const BUNDLED: [&str; 2] = ["nats.bundled.enabled=true", "nats.bundled.storage=10Gi"];
/// Every verb that a role of the chart may hold.
const VERBS: [&str; 7] = ["get", "list", "watch", "create", "update", "patch", "delete"];
/// Resources with which one becomes more than one is, or reads what one should not.
const FORBIDDEN: [&str; 6] =
    ["secrets", "pods/exec", "serviceaccounts/token", "roles", "clusterroles", "rolebindings"];

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/millrace")
}

/// helm, from `KUBEBUILDER_ASSETS` or the tools' cache.
fn helm() -> Option<PathBuf> {
    let cache = std::env::var_os("MILLRACE_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/millrace")));
    let versions = cache.and_then(|cache| std::fs::read_dir(cache.join("kube")).ok());
    let cached = versions.into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = cached.collect();
    folders.sort();
    folders.extend(std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from));
    let found = folders.into_iter().rev().map(|folder| folder.join("helm")).find(|path| path.is_file());
    if found.is_none() {
        let required = std::env::var_os("MILLRACE_REQUIRE_TOOLS").is_some();
        assert!(!required, "helm is missing: run scripts/kube");
        eprintln!("SKIPPED: helm is missing: run scripts/kube");
    }
    found
}

fn render(helm: &Path, values: &[&str]) -> Result<String, String> {
    let mut command = Command::new(helm);
    command.args(["template", "mr"]).arg(chart()).args(["--namespace", "mr", "--kube-version", "1.34.0"]);
    for value in values {
        command.args(["--set", value]);
    }
    let output = command.output().expect("helm runs");
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).expect("text")),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn documents(text: &str) -> Vec<Value> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).expect("a document"))
        .filter(|document| !document.is_null())
        .collect()
}

/// Everything but the definition, which is compared elsewhere.
fn check(helm: &Path, name: &str, values: &[&str]) {
    let text = render(helm, values).expect(name);
    let kept = documents(&text).into_iter().filter(|document| document["kind"] != "CustomResourceDefinition");
    let kept: String =
        kept.map(|document| format!("---\n{}", serde_yaml::to_string(&document).expect("YAML"))).collect();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/chart-{name}.yaml"));
    if std::env::var_os("MILLRACE_UPDATE").is_some() {
        std::fs::write(&file, &kept).expect("a golden file");
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        kept == expected,
        "chart-{name} differs from its golden file; look, then run with MILLRACE_UPDATE=1"
    );
}

#[test]
fn charts_are_rendered_as_the_golden_files_say() {
    let Some(helm) = helm() else { return };
    check(&helm, "default", &[SERVERS]);
    check(&helm, "full", &FULL);
    check(&helm, "bundled", &BUNDLED);
}

#[test]
fn values_that_cannot_work_are_refused() {
    let Some(helm) = helm() else { return };
    let cases = [
        (vec![], "nats.servers is empty"),
        (vec![SERVERS, "replica=2"], "replica"),
        (vec![SERVERS, "scope=galaxy"], "scope"),
        (vec!["nats.servers[0]=nats://user:secret@h:4222"], "servers"),
        (vec![SERVERS, "operator.pollIdle=soon"], "pollIdle"),
    ];
    for (values, words) in cases {
        let error = render(&helm, &values).expect_err(words);
        assert!(error.contains(words), "{values:?}: {error}");
    }
}

#[test]
fn the_chart_sets_only_options_that_the_operator_has() {
    let Some(helm) = helm() else { return };
    let command = Config::command();
    let known: BTreeSet<String> = command
        .get_arguments()
        .filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned()))
        .collect();
    let text = render(&helm, &FULL).expect("a chart");
    let deployments = documents(&text).into_iter().filter(|document| document["kind"] == "Deployment");
    let mut seen = 0;
    for deployment in deployments {
        let env = deployment["spec"]["template"]["spec"]["containers"][0]["env"].clone();
        for variable in env.as_array().expect("variables") {
            let name = variable["name"].as_str().expect("a name");
            assert!(known.contains(name) || name == "RUST_LOG", "the operator does not read {name}");
            seen += 1;
        }
    }
    assert!(seen > 15, "only {seen} variables");
}

#[test]
fn the_operator_may_do_little() {
    let Some(helm) = helm() else { return };
    for values in [&[SERVERS][..], &FULL[..]] {
        let text = render(&helm, values).expect("a chart");
        let mut seen = 0;
        for document in documents(&text) {
            for rule in document["rules"].as_array().into_iter().flatten() {
                let rule: PolicyRule = serde_json::from_value(rule.clone()).expect("a rule");
                check_rule(&rule);
                seen += 1;
            }
        }
        assert!(seen > 5, "{seen} rules: where did they go?");
    }
    let text = render(&helm, &FULL).expect("a chart");
    let kinds: Vec<Value> =
        documents(&text).into_iter().map(|mut document| document["kind"].take()).collect();
    assert!(kinds.contains(&"Role".into()) && kinds.contains(&"RoleBinding".into()), "{kinds:?}");
    let of_the_cluster = |kind: &Value| kind.as_str().is_some_and(|kind| kind.starts_with("ClusterRole"));
    assert!(
        !kinds.iter().any(of_the_cluster),
        "a namespaced install needs nothing of the cluster: {kinds:?}"
    );
}

fn check_rule(rule: &PolicyRule) {
    let resources = rule.resources.as_deref().unwrap_or_default();
    assert!(!resources.is_empty() && rule.non_resource_urls.is_none(), "{rule:?}");
    for verb in &rule.verbs {
        assert!(VERBS.contains(&verb.as_str()), "{verb}: {rule:?}");
    }
    for name in rule.api_groups.iter().flatten().chain(resources) {
        assert!(!name.contains('*') && !FORBIDDEN.contains(&name.as_str()), "{name}: {rule:?}");
    }
}

#[test]
fn objects_are_what_an_api_server_takes() {
    let Some(helm) = helm() else { return };
    let mut kinds = BTreeSet::new();
    for values in [&[SERVERS][..], &FULL[..], &BUNDLED[..]] {
        // An octal number in YAML 1.1, which Kubernetes' own tools read; here it would be a word.
        let text = render(&helm, values).expect("a chart").replace("defaultMode: 0440", "defaultMode: 288");
        for document in documents(&text) {
            shapes::check(&document).unwrap_or_else(|error| panic!("{error}"));
            kinds.insert(document["kind"].to_string());
        }
    }
    assert!(kinds.len() >= 15, "only {kinds:?}");
    // The check sees a field that is written wrong, wherever it is.
    let text = render(&helm, &FULL).expect("a chart").replace("defaultMode: 0440", "defaultMode: 288");
    for (good, bad) in
        [("containerPort:", "containerport:"), ("endpoints:", "endpoint:"), ("expr:", "expression:")]
    {
        assert!(text.contains(good), "{good} is nowhere");
        let broken = documents(&text.replace(good, bad));
        assert!(broken.iter().any(|document| shapes::check(document).is_err()), "{bad} is not noticed");
    }
}

/// Whether an object's labels hold all of a selector, of which there is some.
fn selects(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object().expect("a selector");
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// A monitor finds its Service, the Service its pods, and each the port that it names.
#[test]
fn the_operators_metrics_are_found() {
    let Some(helm) = helm() else { return };
    let all = documents(&render(&helm, &FULL).expect("a chart"));
    let of_kind = |kind: &str| all.iter().filter(|document| document["kind"] == kind).collect::<Vec<_>>();
    let [monitor] = of_kind("ServiceMonitor")[..] else { panic!("one ServiceMonitor") };
    let services = of_kind("Service").into_iter();
    let services: Vec<_> = services
        .filter(|service| {
            selects(&monitor["spec"]["selector"]["matchLabels"], &service["metadata"]["labels"])
        })
        .collect();
    let [service] = services[..] else { panic!("{} Services are monitored", services.len()) };
    let port = &service["spec"]["ports"][0];
    assert_eq!(monitor["spec"]["endpoints"][0]["port"], port["name"]);
    let deployments = of_kind("Deployment").into_iter();
    let deployments: Vec<_> = deployments
        .filter(|found| {
            selects(&service["spec"]["selector"], &found["spec"]["template"]["metadata"]["labels"])
        })
        .collect();
    let [deployment] = deployments[..] else { panic!("{} Deployments are served", deployments.len()) };
    let ports = deployment["spec"]["template"]["spec"]["containers"][0]["ports"].as_array();
    let named = |found: &Value| found["name"] == port["targetPort"];
    assert!(
        ports.is_some_and(|ports| ports.iter().any(named)),
        "{} is no port of the pod",
        port["targetPort"]
    );
}

/// The names of all series of an operator that has done each thing once.
fn series() -> BTreeSet<String> {
    let metrics = OperatorMetrics::new().expect("metrics");
    let class = ClassReading { class: Class::Normal, pending: 1, unacked: 0, oldest_age_ms: None };
    let queue = QueueReading { published: 1, classes: vec![class] };
    metrics.show(&ModelRef::new("team", "m").expect("a model"), 1, 1, Some(&queue));
    metrics.errors.with_label_values(&["apply"]).inc();
    metrics.writes.with_label_values(&["apply"]).inc();
    metrics.decided(&decide(&Default::default(), &Memory::default(), &Reading::default()).0);
    let page = metrics.text();
    let names = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    names.map(str::to_owned).collect()
}

#[test]
fn alerts_look_at_metrics_that_there_are() {
    let Some(helm) = helm() else { return };
    let known = series();
    let all = documents(&render(&helm, &FULL).expect("a chart"));
    let rules = all.iter().find(|document| document["kind"] == "PrometheusRule").expect("rules");
    let rules = rules["spec"]["groups"][0]["rules"].as_array().expect("alerts");
    assert!(rules.len() >= 5, "{} alerts", rules.len());
    for rule in rules {
        let expression = rule["expr"].as_str().expect("an expression");
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names: Vec<&str> = words.filter(|word| word.starts_with("millrace_")).collect();
        assert!(!names.is_empty(), "{expression} looks at nothing of ours");
        for name in names {
            assert!(known.contains(name), "{name} of {} is not among {known:?}", rule["alert"]);
        }
    }
}
