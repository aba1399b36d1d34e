//! What the operator builds, over a grid of specs: golden files of whole models, and rules that hold for all.
//!
//! `MILLRACE_UPDATE=1` writes the golden files anew.

use std::path::Path;

use clap::Parser;
use k8s_openapi::api::core::v1::PodSpec;
use millrace_crds::model::InferenceModel;
use millrace_operator::build::{ModelObjects, build, revision};
use millrace_operator::config::Config;
use millrace_operator::validate::{Plan, plan};
use serde::Serialize;

const ARGS: [&str; 7] = [
    "millrace-operator",
    "--nats-servers=nats://nats.queues.svc:4222",
    "--worker-image=worker:cpu",
    "--worker-image-cuda=worker:cuda",
    "--worker-nats-secret=millrace-nats",
    "--worker-nats-monitor=http://nats.queues.svc:8222",
    "--pod-monitors",
];

fn planned(spec: &str, args: &[&str]) -> Plan {
    let text = format!(
        "apiVersion: millrace.dev/v1alpha1\nkind: InferenceModel\n\
         metadata: {{name: m, namespace: team, uid: 00000000-0000-0000-0000-000000000001, generation: 1}}\n\
         spec: {spec}"
    );
    let object: InferenceModel =
        serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{spec}: {error}"));
    plan(&object, &Config::parse_from(args)).unwrap_or_else(|refusal| panic!("{spec}: {refusal}"))
}

fn text(resources: ModelObjects) -> String {
    let ModelObjects {
        service_account,
        config_map,
        network_policy,
        disruption_budget,
        pod_monitor,
        deployment,
    } = resources;
    fn document(text: &mut String, object: &impl Serialize) {
        *text += "---\n";
        *text += &serde_yaml::to_string(object).expect("an object is YAML");
    }
    let mut text = String::new();
    service_account.iter().for_each(|object| document(&mut text, object));
    document(&mut text, &config_map);
    document(&mut text, &network_policy);
    document(&mut text, &disruption_budget);
    pod_monitor.iter().for_each(|object| document(&mut text, object));
    document(&mut text, &deployment);
    text
}

fn check(name: &str, spec: &str, args: &[&str]) {
    let built = text(build(&planned(spec, args), 1));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.yaml"));
    if std::env::var_os("MILLRACE_UPDATE").is_some() {
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        std::fs::write(&file, &built).expect("a golden file");
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        built == expected,
        "{name} differs from its golden file; look, then run with MILLRACE_UPDATE=1\n{built}"
    );
}

#[test]
fn models_are_built_as_the_golden_files_say() {
    let plain = &ARGS[..3];
    check("short", "{model: {uri: 's3://bucket/m'}, scaling: {}}", plain);
    check("claim", "{model: {uri: 'pvc://weights/m', cacheClaim: cache}, replicas: 2}", plain);
    check(
        "gpu",
        "{model: {uri: 's3://bucket/m', \
         digest: 'sha256:0000000000000000000000000000000000000000000000000000000000000000', \
         endpoint: 'http://s3.storage:8333', pathStyle: true, credentialsSecretRef: {name: s3}}, \
         engine: {maxModelLen: 4096, kvCacheFraction: 0.9}, scaling: {minReplicas: 1, maxReplicas: 4}, \
         results: {ttl: 1h, objectStore: {uri: 's3://results/m', credentialsSecretRef: {name: results}}}, \
         drain: {timeout: 5m}, start: {timeout: 10m}, \
         resources: {requests: {cpu: '4'}, limits: {nvidia.com/gpu: 1, memory: 32Gi}}, \
         template: {nodeSelector: {zone: a}, tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}], \
         priorityClassName: batch, runtimeClassName: nvidia, serviceAccountName: reader, \
         imagePullSecrets: [{name: registry}], labels: {team: x}, annotations: {note: y}, env: {RUST_LOG: debug}, \
         affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: \
         [{matchExpressions: [{key: gpu, operator: Exists}]}]}}}}}",
        &ARGS,
    );
}

/// The `restricted` Pod Security Standard, rule by rule, as the standard words it.
fn violations(pod: &PodSpec) -> Vec<String> {
    let mut found = Vec::new();
    let mut demand = |holds: bool, rule: &str| {
        if !holds {
            found.push(rule.to_owned());
        }
    };
    let security = pod.security_context.clone().unwrap_or_default();
    demand(security.run_as_non_root == Some(true), "runs as non-root");
    demand(security.run_as_user.is_some_and(|user| user != 0), "runs as a user other than 0");
    demand(security.seccomp_profile.is_some_and(|profile| profile.type_ == "RuntimeDefault"), "seccomp");
    demand(security.sysctls.is_none(), "no sysctls");
    demand(
        pod.host_network != Some(true) && pod.host_pid != Some(true) && pod.host_ipc != Some(true),
        "host",
    );
    demand(pod.automount_service_account_token == Some(false), "no token");
    demand(pod.init_containers.is_none() && pod.ephemeral_containers.is_none(), "one container");
    for volume in pod.volumes.iter().flatten() {
        let allowed = volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.empty_dir.is_some()
            || volume.persistent_volume_claim.is_some();
        demand(allowed, "volume kinds");
        demand(volume.empty_dir.as_ref().is_none_or(|dir| dir.size_limit.is_some()), "emptyDir has a limit");
    }
    for container in &pod.containers {
        let security = container.security_context.clone().unwrap_or_default();
        let capabilities = security.capabilities.unwrap_or_default();
        demand(security.privileged != Some(true), "not privileged");
        demand(security.allow_privilege_escalation == Some(false), "no privilege escalation");
        demand(security.read_only_root_filesystem == Some(true), "read-only root");
        demand(security.proc_mount.is_none(), "default proc mount");
        demand(capabilities.drop == Some(vec!["ALL".into()]) && capabilities.add.is_none(), "capabilities");
        demand(container.ports.iter().flatten().all(|port| port.host_port.is_none()), "no host port");
    }
    found
}

#[test]
fn every_pod_is_restricted_whatever_the_spec_says() {
    let uris = ["s3://bucket/m", "pvc://claim/m", "file:///m"];
    let engines = ["{}", "{dtype: bf16, quantization: int8, maxSequences: 8}"];
    let limits =
        ["{}", "{limits: {nvidia.com/gpu: 1}}", "{limits: {cpu: 2, memory: 1Gi}, requests: {cpu: 100m}}"];
    let templates = [
        "{}",
        "{env: {A: b}, labels: {a: b}, annotations: {container.apparmor.security.beta.kubernetes.io/worker: x}}",
        "{serviceAccountName: s, runtimeClassName: nvidia, imagePullPolicy: Always, schedulerName: z}",
    ];
    let stores = ["{}", "{objectStore: {uri: 's3://r/m', credentialsSecretRef: {name: r}}}"];
    let sizes = ["replicas: 3", "scaling: {minReplicas: 1}"];
    let mut built = 0;
    for uri in uris {
        for engine in engines {
            for limit in limits {
                for template in templates {
                    for store in stores {
                        for (size, args) in sizes.iter().zip([&ARGS[..3], &ARGS[..]]) {
                            let spec = format!(
                                "{{model: {{uri: '{uri}'}}, engine: {engine}, resources: {limit}, \
                                 template: {template}, results: {store}, {size}}}"
                            );
                            let deployment = build(&planned(&spec, args), 1).deployment;
                            let template = deployment.spec.expect("a spec").template;
                            let pod = template.spec.expect("a pod");
                            assert_eq!(violations(&pod), Vec::<String>::new(), "{spec}");
                            built += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(built, 3 * 2 * 3 * 3 * 2 * 2);
}

/// The rules above can fail.
#[test]
fn a_weak_pod_is_seen() {
    let mut pod = build(&planned("{model: {uri: 's3://b/m'}, replicas: 1}", &ARGS), 1)
        .deployment
        .spec
        .and_then(|spec| spec.template.spec)
        .expect("a pod");
    pod.host_network = Some(true);
    pod.containers[0].security_context = None;
    pod.security_context = None;
    assert!(violations(&pod).len() >= 6, "{:?}", violations(&pod));
}

#[test]
fn the_revision_follows_what_workers_read_and_nothing_else() {
    let base = "model: {uri: 's3://bucket/m', revision: v1}, engine: {maxSequences: 8}";
    let of = |spec: &str| revision(&planned(&format!("{{{spec}}}"), &ARGS));
    let first = of(&format!("{base}, replicas: 1"));
    assert_eq!(first, of(&format!("{base}, replicas: 1")), "equal specs");
    assert_eq!(first, of(&format!("{base}, replicas: 5")), "the number of workers");
    assert_eq!(first, of(&format!("{base}, scaling: {{maxReplicas: 3}}")), "scaling");
    assert_eq!(first, of(&format!("{base}, replicas: 1, queue: {{onDelete: Delete}}")), "onDelete");
    assert_ne!(
        first,
        of(&format!("{base}, replicas: 1, engine: {{maxSequences: 9}}").replacen(
            "engine: {maxSequences: 8}, ",
            "",
            1
        ))
    );
    assert_ne!(first, of(&format!("{base}, replicas: 1, template: {{env: {{A: b}}}}")), "the pods");
    assert_ne!(first, of(&format!("{base}, replicas: 1").replace("v1", "v2")), "the revision");
}

#[test]
fn gpus_are_never_needed_twice() {
    let strategy = |limits: &str| {
        let spec = format!("{{model: {{uri: 's3://b/m'}}, replicas: 1, resources: {limits}}}");
        let deployment = build(&planned(&spec, &ARGS), 1).deployment;
        let rolling =
            deployment.spec.and_then(|s| s.strategy).and_then(|s| s.rolling_update).expect("rolling");
        (
            serde_json::to_string(&rolling.max_surge).unwrap(),
            serde_json::to_string(&rolling.max_unavailable).unwrap(),
        )
    };
    assert_eq!(strategy("{limits: {nvidia.com/gpu: 1}}"), ("0".into(), "1".into()));
    assert_eq!(strategy("{}"), ("1".into(), "0".into()));
}
