//! The pods of a model. Every one of them passes the `restricted` Pod Security Standard, whatever the spec says.
//!
//! Pure. A user's template adds placement, labels and variables; there is no way through it to the security
//! context, the volumes or the command.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, HTTPGetAction, LocalObjectReference, ObjectFieldSelector,
    PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ProjectedVolumeSource, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext,
    ServiceAccountTokenProjection, Toleration, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use millrace_crds::model::pods::Amount;
use millrace_crds::units::Bytes;

use crate::names;
use crate::validate::Plan;
use crate::worker_config::{CACHE_DIR, CONFIG_DIR, CONFIG_FILE, MODEL_DIR, PORT, TOKEN_FILE};

/// The user and group of the worker's process; the images have the same.
const USER: i64 = 65_532;
/// Room for temporary files.
const TMP_BYTES: u64 = 64 << 20;
/// Files of Secrets can be read by the pod's group and nobody else.
const SECRET_MODE: i32 = 0o440;
/// For so long a token of the service account holds; the kubelet replaces it in time.
const TOKEN_SECONDS: i64 = 3600;
/// Pause between two looks whether a worker has started: it adds to every cold start.
const STARTUP_PERIOD_S: i32 = 1;

/// The pods' template. `revision` is the hash of what workers read at start.
pub fn template(plan: &Plan, revision: &str) -> PodTemplateSpec {
    let user = &plan.pod.template;
    let mut labels: BTreeMap<String, String> =
        user.labels.iter().map(|(key, value)| (key.clone(), value.0.clone())).collect();
    labels.extend(names::labels(plan.model.name.as_str()));
    if let Some(weights) = &plan.pod.weights_revision {
        labels.insert(names::WEIGHTS_LABEL.into(), weights.clone());
    }
    // The schema refuses these; here they would weaken the profile of an old cluster.
    let allowed = |key: &str| !key.starts_with("container.");
    let mut annotations: BTreeMap<String, String> = user
        .annotations
        .iter()
        .filter(|(key, _)| allowed(key))
        .map(|(key, value)| (key.clone(), value.0.clone()))
        .collect();
    annotations.insert(names::REVISION_ANNOTATION.into(), revision.into());
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(pod_spec(plan)),
    }
}

fn pod_spec(plan: &Plan) -> PodSpec {
    let user = &plan.pod.template;
    let secrets: Vec<LocalObjectReference> = user
        .image_pull_secrets
        .iter()
        .map(|secret| LocalObjectReference { name: secret.name.clone() })
        .collect();
    let selector: BTreeMap<String, String> =
        user.node_selector.iter().map(|(key, value)| (key.clone(), value.0.clone())).collect();
    let own = names::objects(plan.model.name.as_str());
    PodSpec {
        containers: vec![container(plan)],
        volumes: Some(volumes(plan)),
        service_account_name: Some(user.service_account_name.clone().unwrap_or(own)),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(seconds(plan.pod.grace)),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".into()),
            seccomp_profile: Some(runtime_default()),
            ..PodSecurityContext::default()
        }),
        image_pull_secrets: (!secrets.is_empty()).then_some(secrets),
        node_selector: (!selector.is_empty()).then_some(selector),
        tolerations: tolerations(plan),
        affinity: plan.pod.affinity.clone(),
        priority_class_name: user.priority_class_name.clone(),
        runtime_class_name: user.runtime_class_name.clone(),
        scheduler_name: user.scheduler_name.clone(),
        ..PodSpec::default()
    }
}

fn runtime_default() -> SeccompProfile {
    SeccompProfile { type_: "RuntimeDefault".into(), ..SeccompProfile::default() }
}

/// A duration in whole seconds, not less than it is.
pub(crate) fn seconds(duration: std::time::Duration) -> i64 {
    let whole = duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0));
    i64::try_from(whole).unwrap_or(i64::MAX)
}

fn tolerations(plan: &Plan) -> Option<Vec<Toleration>> {
    let list: Vec<Toleration> = plan
        .pod
        .template
        .tolerations
        .iter()
        .map(|toleration| Toleration {
            key: toleration.key.clone(),
            operator: toleration.operator.map(|operator| format!("{operator:?}")),
            value: toleration.value.clone(),
            effect: toleration.effect.map(|effect| format!("{effect:?}")),
            toleration_seconds: toleration.toleration_seconds,
        })
        .collect();
    (!list.is_empty()).then_some(list)
}

fn container(plan: &Plan) -> Container {
    let user = &plan.pod.template;
    let mut env = vec![EnvVar {
        name: "POD_NAME".into(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".into()),
                field_path: "metadata.name".into(),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }];
    env.extend(user.env.iter().filter(|(name, _)| *name != "POD_NAME").map(|(name, value)| EnvVar {
        name: name.clone(),
        value: Some(value.0.clone()),
        ..EnvVar::default()
    }));
    let args = ["serve", "--config", &format!("{CONFIG_DIR}/{CONFIG_FILE}"), "--name", "$(POD_NAME)"];
    Container {
        name: names::CONTAINER.into(),
        image: Some(plan.pod.image.clone()),
        image_pull_policy: user.image_pull_policy.map(|policy| policy.as_str().into()),
        command: Some(vec!["millrace-worker".into()]),
        args: Some(args.map(str::to_owned).to_vec()),
        env: Some(env),
        ports: Some(vec![ContainerPort {
            name: Some("metrics".into()),
            container_port: PORT.into(),
            protocol: Some("TCP".into()),
            ..ContainerPort::default()
        }]),
        resources: Some(resources(plan)),
        volume_mounts: Some(mounts(plan)),
        startup_probe: Some(startup_probe(plan)),
        readiness_probe: Some(probe("/readyz", 5, 2)),
        liveness_probe: Some(probe("/healthz", 10, 3)),
        // A worker's last words become the condition's message.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), ..Capabilities::default() }),
            seccomp_profile: Some(runtime_default()),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// Ready for the first time: weights are there and the warm-up is through.
fn startup_probe(plan: &Plan) -> Probe {
    let tries = seconds(plan.pod.start_timeout) / i64::from(STARTUP_PERIOD_S);
    probe("/readyz", STARTUP_PERIOD_S, i32::try_from(tries.max(1)).unwrap_or(i32::MAX))
}

fn probe(path: &str, period_s: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::Int(PORT.into()),
            scheme: Some("HTTP".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_s),
        failure_threshold: Some(failures),
        timeout_seconds: Some(period_s.min(5)),
        ..Probe::default()
    }
}

fn resources(plan: &Plan) -> ResourceRequirements {
    let amounts = |map: &BTreeMap<String, Amount>| {
        let amounts: BTreeMap<String, Quantity> =
            map.iter().map(|(name, amount)| (name.clone(), Quantity(canonical(amount)))).collect();
        (!amounts.is_empty()).then_some(amounts)
    };
    ResourceRequirements {
        requests: amounts(&plan.pod.resources.requests),
        limits: amounts(&plan.pod.resources.limits),
        ..ResourceRequirements::default()
    }
}

/// The form in which an API server gives a quantity back, for the forms that people write: `1000m` is `1`,
/// and `1024Mi` is `1Gi`. Others are compared as they are.
fn canonical(amount: &Amount) -> String {
    let text = amount.to_string();
    if let Some(milli) = text.strip_suffix('m').and_then(|digits| digits.parse::<u64>().ok()) {
        return if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") };
    }
    if let Some((whole, fraction)) = text.split_once('.')
        && let (Ok(whole), Ok(part)) = (whole.parse::<u64>(), format!("{fraction:0<3}").parse::<u64>())
        && fraction.len() <= 3
    {
        let milli = whole.saturating_mul(1000).saturating_add(part);
        return canonical(&Amount::Text(format!("{milli}m")));
    }
    let binary = ["Ki", "Mi", "Gi", "Ti", "Pi"];
    let Some(mut unit) = binary.iter().position(|suffix| text.ends_with(suffix)) else { return text };
    let Ok(mut number) = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).parse::<u64>() else {
        return text;
    };
    while number > 0 && number.is_multiple_of(1024) && unit + 1 < binary.len() {
        number /= 1024;
        unit += 1;
    }
    format!("{number}{}", binary.get(unit).copied().unwrap_or_default())
}

fn volumes(plan: &Plan) -> Vec<Volume> {
    let own = names::objects(plan.model.name.as_str());
    let empty = |bytes: u64| EmptyDirVolumeSource {
        size_limit: Some(Quantity(Bytes(bytes).to_string())),
        ..EmptyDirVolumeSource::default()
    };
    let claim = |name: &String, read_only: bool| PersistentVolumeClaimVolumeSource {
        claim_name: name.clone(),
        read_only: read_only.then_some(true),
    };
    let named = |name: &str| Volume { name: name.into(), ..Volume::default() };
    let mut volumes = vec![
        Volume {
            config_map: Some(ConfigMapVolumeSource { name: own, ..ConfigMapVolumeSource::default() }),
            ..named("config")
        },
        Volume { empty_dir: Some(empty(TMP_BYTES)), ..named("tmp") },
    ];
    volumes.push(match &plan.mounts.cache_claim {
        Some(name) => Volume { persistent_volume_claim: Some(claim(name, false)), ..named("cache") },
        None => Volume { empty_dir: Some(empty(plan.mounts.cache_bytes)), ..named("cache") },
    });
    if let Some(name) = &plan.mounts.model_claim {
        volumes.push(Volume { persistent_volume_claim: Some(claim(name, true)), ..named("model") });
    }
    volumes.extend(plan.mounts.secrets.iter().map(|mount| Volume {
        secret: Some(SecretVolumeSource {
            secret_name: Some(mount.secret.clone()),
            default_mode: Some(SECRET_MODE),
            ..SecretVolumeSource::default()
        }),
        ..named(mount.volume)
    }));
    volumes.extend(plan.mounts.tokens.iter().map(|mount| Volume {
        projected: Some(ProjectedVolumeSource {
            default_mode: Some(SECRET_MODE),
            sources: Some(vec![VolumeProjection {
                service_account_token: Some(ServiceAccountTokenProjection {
                    audience: Some(mount.audience.clone()),
                    expiration_seconds: Some(TOKEN_SECONDS),
                    path: TOKEN_FILE.into(),
                }),
                ..VolumeProjection::default()
            }]),
        }),
        ..named(mount.volume)
    }));
    volumes
}

fn mounts(plan: &Plan) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let mut mounts = vec![
        mount("config", CONFIG_DIR, true),
        mount("tmp", "/tmp", false),
        mount("cache", CACHE_DIR, false),
    ];
    if plan.mounts.model_claim.is_some() {
        mounts.push(mount("model", MODEL_DIR, true));
    }
    mounts.extend(plan.mounts.secrets.iter().map(|secret| mount(secret.volume, secret.path, true)));
    mounts.extend(plan.mounts.tokens.iter().map(|token| mount(token.volume, token.path, true)));
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_written_as_the_api_server_gives_them_back() {
        let cases = [
            ("1", "1"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.5", "500m"),
            ("1.25", "1250m"),
            ("2.0", "2"),
            ("1024Mi", "1Gi"),
            ("1536Mi", "1536Mi"),
            ("16Gi", "16Gi"),
            ("1G", "1G"),
        ];
        for (text, expected) in cases {
            assert_eq!(canonical(&Amount::Text(text.into())), expected, "{text}");
        }
        assert_eq!(canonical(&Amount::Number(2)), "2");
    }
}
