//! The control plane and the node of the harness themselves: what they promise to the tests that run on them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client, ResourceExt};
use millrace_tests::kube::control_plane::{ControlPlane, ControlPlaneOptions};
use millrace_tests::kube::node::{self, Image, Images, Node};
use millrace_tests::kube::programs;
use serde_json::{Value, json};

/// A pod is scheduled, started and probed within this time on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

struct World {
    client: Client,
    node: Node,
    plane: ControlPlane,
}

async fn world() -> Result<World> {
    let plane = ControlPlane::start(&ControlPlaneOptions::default()).await?;
    let images = Images::default().with("shell", Image { entrypoint: vec!["sh".into()], ..Image::default() });
    let node = Node::start(&plane, node::NodeOptions { name: "node-1".into(), gpus: 2, images }).await?;
    let client = plane.admin().await?;
    eprintln!("control plane ready in {:?}", plane.started_in());
    Ok(World { client, node, plane })
}

impl World {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "default")
    }

    /// Creates a pod, once the namespace has its service account.
    async fn create(&self, name: &str, spec: Value) -> Result<()> {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
        let start = Instant::now();
        while let Err(error) = self.pods().create(&PostParams::default(), &pod).await {
            if start.elapsed() > LIMIT {
                return Err(error)
                    .with_context(|| self.plane.log("kube-controller-manager").unwrap_or_default());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    async fn wait(&self, name: &str, what: &str, good: impl Fn(&Pod) -> bool) -> Result<Pod> {
        let start = Instant::now();
        loop {
            let pod = self.pods().get(name).await?;
            if good(&pod) {
                return Ok(pod);
            }
            if start.elapsed() > LIMIT {
                let status = serde_json::to_string_pretty(&pod.status)?;
                bail!(
                    "{name} is not {what}: {status}\n{:?}\n{}",
                    self.node.logs("default", name),
                    self.node.notes()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn wait_gone(&self, name: &str) -> Result<Duration> {
        let start = Instant::now();
        while self.pods().get_opt(name).await?.is_some() {
            if start.elapsed() > LIMIT {
                bail!("{name} is still there\n{}", self.node.notes());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(start.elapsed())
    }

    fn log(&self, pod: &str) -> String {
        self.node.logs("default", pod).into_iter().map(|(_, text)| text).collect()
    }
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn condition(pod: &Pod, name: &str) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == name && condition.status == "True")
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref());
    statuses.unwrap_or_default().iter().map(|status| status.restart_count).sum()
}

fn shell(script: &str) -> Value {
    json!({"name": "main", "image": "registry.example/shell:1", "args": ["-c", script]})
}

/// One world for all: its start is most of the time that these tests take.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_as_on_a_kubelet() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let world = world().await?;
    tokio::try_join!(
        configuration(&world),
        probes(&world),
        restart(&world),
        grace(&world),
        gpus(&world),
        refusals(&world),
        admission(&world),
    )?;
    Ok(())
}

/// Environment, volumes, service account token, init containers, security context.
async fn configuration(world: &World) -> Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), "default");
    let volume = json!([
        {"name": "files", "configMap": {"name": "settings"}},
        {"name": "keys", "secret": {"secretName": "keys", "defaultMode": 0o400}},
        {"name": "scratch", "emptyDir": {}},
    ]);
    let restricted = json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
    });
    let mut main = shell(
        "cat /settings/a /keys/k /scratch/from-init; echo \"$NAME $IP $KEY $(id -u)\"; touch /x || echo refused; \
         ls /var/run/secrets/kubernetes.io/serviceaccount | sort | tr '\\n' ' '; exit 0",
    );
    main["securityContext"] = restricted;
    main["volumeMounts"] = json!([
        {"name": "files", "mountPath": "/settings"},
        {"name": "keys", "mountPath": "/keys", "readOnly": true},
        {"name": "scratch", "mountPath": "/scratch"},
    ]);
    main["env"] = json!([
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}},
    ]);
    let mut init = shell("printf init- > /scratch/from-init");
    init["name"] = json!("init");
    init["volumeMounts"] = json!([{"name": "scratch", "mountPath": "/scratch"}]);
    let spec = json!({
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": true, "runAsUser": 1234, "fsGroup": 1234},
        "volumes": volume, "initContainers": [init], "containers": [main],
    });
    world.create("configured", spec).await?;
    // What the pod refers to comes later, as it may.
    let waiting = |pod: &Pod| serde_json::to_string(&pod.status).is_ok_and(|text| text.contains("not found"));
    world.wait("configured", "waiting for its references", waiting).await?;
    let map = json!({"metadata": {"name": "settings"}, "data": {"a": "map-"}});
    maps.create(&PostParams::default(), &serde_json::from_value(map)?).await?;
    let secret = json!({"metadata": {"name": "keys"}, "stringData": {"k": "secret-"}});
    secrets.create(&PostParams::default(), &serde_json::from_value(secret)?).await?;
    let over = |pod: &Pod| matches!(phase(pod), "Succeeded" | "Failed");
    let pod = world.wait("configured", "over", over).await?;
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).context("no address")?;
    let log = world.log("configured");
    assert_eq!(phase(&pod), "Succeeded", "{log}");
    assert!(log.contains(&format!("map-secret-init-configured {ip} secret- 1234\n")), "{log}");
    assert!(log.contains("refused") && log.ends_with("ca.crt namespace token "), "{log}");
    Ok(())
}

/// A container is ready when its probe says so, and is restarted when its liveness probe fails.
async fn probes(world: &World) -> Result<()> {
    let mut main = shell("touch /tmp/alive; sleep 1; touch /tmp/ready; sleep 2; rm /tmp/alive; sleep 600");
    let exec = |file: &str| {
        let command = json!({"command": ["test", "-e", file]});
        json!({"exec": command, "periodSeconds": 1, "failureThreshold": 1})
    };
    main["readinessProbe"] = exec("/tmp/ready");
    main["livenessProbe"] = exec("/tmp/alive");
    main["livenessProbe"]["terminationGracePeriodSeconds"] = json!(1);
    main["livenessProbe"]["initialDelaySeconds"] = json!(1);
    world.create("probed", json!({"containers": [main], "terminationGracePeriodSeconds": 0})).await?;
    world
        .wait("probed", "running and not ready", |pod| phase(pod) == "Running" && !condition(pod, "Ready"))
        .await?;
    world.wait("probed", "ready", |pod| condition(pod, "Ready") && condition(pod, "ContainersReady")).await?;
    world.wait("probed", "restarted by its liveness probe", |pod| restarts(pod) > 0).await?;
    world.pods().delete("probed", &DeleteParams::default()).await?;
    world.wait_gone("probed").await?;
    Ok(())
}

/// A container that fails is started again, later each time.
async fn restart(world: &World) -> Result<()> {
    world.create("failing", json!({"containers": [shell("echo try; exit 3")]})).await?;
    let waiting = |pod: &Pod| {
        serde_json::to_string(&pod.status).is_ok_and(|text| text.contains("CrashLoopBackOff"))
            && restarts(pod) >= 2
    };
    let pod = world.wait("failing", "in back-off", waiting).await?;
    let text = serde_json::to_string(&pod.status)?;
    assert!(text.contains("\"exitCode\":3") && phase(&pod) == "Running", "{text}");
    world.pods().delete("failing", &DeleteParams::default()).await?;
    world.wait_gone("failing").await?;
    Ok(())
}

/// SIGTERM comes first, SIGKILL after the grace period, and only then the pod is gone.
async fn grace(world: &World) -> Result<()> {
    let polite = shell("trap 'sleep 0.5; echo drained; exit 0' TERM; echo up; while :; do sleep 0.05; done");
    let stubborn = shell("trap '' TERM; echo up; while :; do sleep 0.05; done");
    world.create("polite", json!({"containers": [polite]})).await?;
    world.create("stubborn", json!({"containers": [stubborn], "terminationGracePeriodSeconds": 2})).await?;
    for name in ["polite", "stubborn"] {
        world.wait(name, "running", |pod| phase(pod) == "Running").await?;
        while !world.log(name).contains("up") {
            tokio::time::sleep(POLL).await;
        }
        world.pods().delete(name, &DeleteParams::default()).await?;
    }
    assert!(world.wait_gone("polite").await? < LIMIT);
    assert!(world.log("polite").ends_with("drained\n"), "{}", world.log("polite"));
    world.wait_gone("stubborn").await?;
    Ok(())
}

/// The scheduler counts the advertised GPUs.
async fn gpus(world: &World) -> Result<()> {
    let pod = |count: u32| {
        let mut main = shell("sleep 600");
        main["resources"] = json!({"limits": {"nvidia.com/gpu": count.to_string()}});
        json!({"containers": [main], "terminationGracePeriodSeconds": 0})
    };
    world.create("two-gpus", pod(2)).await?;
    world.wait("two-gpus", "running", |pod| phase(pod) == "Running").await?;
    world.create("one-gpu", pod(1)).await?;
    let unschedulable = |pod: &Pod| {
        serde_json::to_string(&pod.status).is_ok_and(|text| text.contains("Insufficient nvidia.com/gpu"))
    };
    world.wait("one-gpu", "waiting for a GPU", unschedulable).await?;
    world.pods().delete("two-gpus", &DeleteParams::default()).await?;
    world.wait("one-gpu", "running", |pod| phase(pod) == "Running").await?;
    Ok(())
}

/// What the node cannot do, it says.
async fn refusals(world: &World) -> Result<()> {
    world.create("no-image", json!({"containers": [{"name": "a", "image": "nothing:1"}]})).await?;
    let told = |word: &'static str| {
        move |pod: &Pod| serde_json::to_string(&pod.status).is_ok_and(|text| text.contains(word))
    };
    world.wait("no-image", "refused", told("ErrImageNeverPull")).await?;
    let mut hooked = shell("sleep 600");
    hooked["lifecycle"] = json!({"preStop": {"exec": {"command": ["true"]}}});
    world.create("hooked", json!({"containers": [hooked]})).await?;
    let pod = world.wait("hooked", "failed", |pod| phase(pod) == "Failed").await?;
    assert!(told("lifecycle of container main")(&pod));
    Ok(())
}

/// The API server's own admission and authorization are on.
async fn admission(world: &World) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    let namespace = json!({"metadata": {
        "name": "restricted", "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
    }});
    namespaces.create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
    let pods: Api<Pod> = Api::namespaced(world.client.clone(), "restricted");
    let pod = json!({"metadata": {"name": "root"}, "spec": {"containers": [shell("true")]}});
    let start = Instant::now();
    // The namespace's service account comes a moment later; only then admission looks at the pod itself.
    let error = loop {
        let error =
            pods.create(&PostParams::default(), &serde_json::from_value(pod.clone())?).await.unwrap_err();
        if !error.to_string().contains("serviceaccount") || start.elapsed() > LIMIT {
            break error.to_string();
        }
        tokio::time::sleep(POLL).await;
    };
    assert!(error.contains("violates PodSecurity \"restricted"), "{error}");
    let stranger = world.plane.client("stranger", None).await?;
    let seen = Api::<Pod>::all(stranger).list(&ListParams::default()).await;
    assert!(matches!(seen, Err(kube::Error::Api(refusal)) if refusal.code == 403));
    assert!(world.pods().list(&ListParams::default()).await?.iter().all(|pod| !pod.name_any().is_empty()));
    Ok(())
}
