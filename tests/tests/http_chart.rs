//! The chart's gateway: what helm renders is whole, and the program takes the options that it is given.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use millrace_tests::kube::programs;
use millrace_tests::tools;
use serde::Deserialize;
use serde_yaml::Value;

/// The objects that the chart makes with these values.
fn render(values: &[&str]) -> Result<Vec<Value>> {
    let mut command = Command::new(programs::program("helm")?);
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/millrace");
    command.args([
        "template",
        "t",
        chart,
        "--kube-version",
        "1.34.0",
        "--set",
        "nats.servers={nats://n:4222}",
    ]);
    for value in values {
        command.args(["--set", value]);
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    serde_yaml::Deserializer::from_str(&text).map(|object| Ok(Value::deserialize(object)?)).collect()
}

fn named<'a>(objects: &'a [Value], kind: &str) -> Option<&'a Value> {
    objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == "t-millrace-gateway")
}

#[test]
fn the_gateway_is_rendered_by_value() -> Result<()> {
    let kinds = ["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"];
    let none = render(&[])?;
    let plain = render(&["gateway.enabled=true"])?;
    for kind in kinds {
        ensure!(named(&none, kind).is_none() && named(&plain, kind).is_some(), "{kind}");
    }
    ensure!(named(&plain, "HorizontalPodAutoscaler").is_none());
    ensure!(named(&plain, "Deployment").is_some_and(|object| object["spec"]["replicas"] == 2));
    let full = render(&[
        "gateway.enabled=true",
        "gateway.autoscaling.enabled=true",
        "gateway.tlsSecret=tls",
        "gateway.natsSecret=nats",
        "gateway.natsCaKey=ca.crt",
        "gateway.objectStore=s3://bodies/a",
        "gateway.s3.endpoint=https://s3.example",
        "gateway.s3.region=eu-1",
        "gateway.s3.credentialsSecret=s3",
        "gateway.extraArgs={--requests-max=512,--keep-alive=5s}",
        "gateway.keyLimits={requests=60/min,concurrent=8}",
        "gateway.tenantLimits={output-tokens=100k/min}",
        "gateway.cache=always",
        "gateway.memoryMax=64Mi",
        "gateway.oidc.issuer=https://id.example",
        "gateway.oidc.audience=millrace",
        "gateway.oidc.namespacesClaim=spaces",
    ])?;
    let scaler = named(&full, "HorizontalPodAutoscaler").context("no autoscaler")?;
    let deployment = named(&full, "Deployment").context("no deployment")?;
    ensure!(scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]);
    // The autoscaler's number is not taken back by the next upgrade.
    ensure!(deployment["spec"]["replicas"].is_null());
    let pod = &deployment["spec"]["template"]["spec"];
    ensure!(pod["automountServiceAccountToken"] == false);
    ensure!(pod["volumes"].as_sequence().is_some_and(|volumes| volumes.len() == 3));
    ensure!(pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] == 5);
    ensure!(pod["terminationGracePeriodSeconds"] == 45);
    let arguments = pod["containers"][0]["args"].as_sequence().context("no arguments")?;
    let folder = "--s3-credentials-dir=/etc/millrace/s3";
    let limits =
        ["--key-limit=requests=60/min", "--key-limit=concurrent=8", "--tenant-limit=output-tokens=100k/min"];
    let others = [
        "--s3-endpoint=https://s3.example",
        "--s3-region=eu-1",
        folder,
        "--requests-max=512",
        "--cache=always",
    ];
    for given in limits.into_iter().chain(others) {
        ensure!(arguments.iter().any(|argument| argument == given), "{given}");
    }
    for object in [&plain, &full] {
        let deployment = named(object, "Deployment").context("no deployment")?;
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        let arguments = container["args"].as_sequence().context("no arguments")?;
        let arguments = arguments.iter().map(|argument| argument.as_str().context("no text"));
        let mut command = Command::new(tools::program("millrace-gateway")?);
        command.args(arguments.collect::<Result<Vec<_>>>()?).arg("--help");
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[test]
fn a_wrong_value_is_refused() {
    for value in [
        "gateway.replica=3",
        "gateway.class=urgent",
        "gateway.oidc.issuer=http://id.example",
        "gateway.extraArgs={x}",
        "gateway.keyLimits={requests=60}",
        "gateway.cache=on",
    ] {
        let refused = render(&[value]).expect_err(value).to_string();
        assert!(refused.contains("gateway"), "{value}: {refused}");
    }
}
