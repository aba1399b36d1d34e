//! The chart, rendered by helm: golden files, and what must hold between chart and code.
//!
//! Skipped, loudly, where helm is missing; `MILLRACE_REQUIRE_TOOLS` makes that a failure. `MILLRACE_UPDATE=1`
//! writes the golden files anew.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use millrace_operator::config::Config;
use serde::Deserialize;
use serde_json::Value;

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
    check(&helm, "bundled", &["nats.bundled.enabled=true", "nats.bundled.storage=10Gi"]);
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
        for document in documents(&text) {
            for rule in document["rules"].as_array().into_iter().flatten() {
                let words = rule.to_string();
                assert!(!words.contains("\"*\"") && !words.contains("secrets"), "{words}");
                assert!(!words.contains("deletecollection") && !words.contains("escalate"), "{words}");
            }
        }
    }
    let text = render(&helm, &FULL).expect("a chart");
    assert!(!text.contains("kind: ClusterRole"), "a namespaced install needs nothing of the cluster");
}
