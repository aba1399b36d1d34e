//! A container's surroundings from its pod's spec: user, mounts, environment and command. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, VolumeMount};

use super::environment::{Environment, expand};
use super::images::Image;
use super::sandbox::{Mount, Sandbox, User};

/// The user of an image that is only said not to be root.
const NON_ROOT: u32 = 65_532;

/// What all containers of a pod share.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// Where references are resolved.
    pub environment: Environment<'a>,
    /// The volumes' folders by name.
    pub volumes: &'a BTreeMap<String, PathBuf>,
    /// Variables that the node adds.
    pub given: &'a [(String, String)],
}

impl Surroundings<'_> {
    /// The sandbox of one container, whose root is `root`.
    ///
    /// # Errors
    /// When a reference leads nowhere or the container has nothing to run.
    pub fn sandbox(&self, container: &Container, image: &Image, root: PathBuf) -> Result<Sandbox> {
        let pod = self.environment.pod;
        let mut variables = self.given.to_vec();
        variables.extend(self.environment.variables(container)?);
        let mut mounts = Vec::new();
        for (name, file) in &image.programs {
            for folder in ["/usr/local/bin", "/"] {
                let target = Path::new(folder).join(name);
                mounts.push(Mount { source: file.clone(), target, read_only: true });
            }
        }
        for mount in container.volume_mounts.iter().flatten() {
            mounts.push(self.mount(mount)?);
        }
        // Outer mounts first: a later one may lie inside of an earlier one.
        mounts.sort_by_key(|mount| mount.target.components().count());
        let folder = container.working_dir.clone().filter(|folder| !folder.is_empty());
        Ok(Sandbox {
            root,
            hostname: pod.metadata.name.clone().unwrap_or_default().chars().take(63).collect(),
            mounts,
            user: user(pod.spec.as_ref().context("the pod has no spec")?, container),
            folder: folder.unwrap_or_else(|| "/".to_owned()).into(),
            command: command(container, image, &variables)?,
            environment: variables,
        })
    }

    fn mount(&self, mount: &VolumeMount) -> Result<Mount> {
        let folder = self.volumes.get(&mount.name).with_context(|| format!("no volume {:?}", mount.name))?;
        let source = match mount.sub_path.as_deref().filter(|path| !path.is_empty()) {
            Some(path) => folder.join(path),
            None => folder.clone(),
        };
        Ok(Mount { source, target: (&mount.mount_path).into(), read_only: mount.read_only == Some(true) })
    }
}

/// `command` replaces the image's entry point and `args` its arguments.
fn command(container: &Container, image: &Image, variables: &[(String, String)]) -> Result<Vec<String>> {
    let given = container.command.as_ref().filter(|command| !command.is_empty());
    let words = given.unwrap_or(&image.entrypoint).iter().chain(container.args.iter().flatten());
    let command: Vec<String> = words.map(|word| expand(word, variables)).collect();
    if command.is_empty() {
        bail!("no command specified");
    }
    Ok(command)
}

/// The container's security context, and the pod's where the container is silent.
fn user(spec: &PodSpec, container: &Container) -> User {
    let pod = spec.security_context.clone().unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let number = |id: Option<i64>| id.and_then(|id| u32::try_from(id).ok());
    let non_root = own.run_as_non_root.or(pod.run_as_non_root) == Some(true);
    let id = number(own.run_as_user.or(pod.run_as_user)).or(non_root.then_some(NON_ROOT));
    let group = number(own.run_as_group.or(pod.run_as_group));
    let further = pod.supplemental_groups.iter().flatten().copied().chain(pod.fs_group);
    let dropped = own.capabilities.and_then(|capabilities| capabilities.drop).unwrap_or_default();
    User {
        id: id.map(|id| (id, group.unwrap_or(id))),
        groups: further.filter_map(|group| u32::try_from(group).ok()).collect(),
        drop_capabilities: dropped.iter().any(|capability| capability == "ALL"),
        no_new_privileges: own.allow_privilege_escalation == Some(false),
        read_only_root: own.read_only_root_filesystem == Some(true),
    }
}

/// The first part of a pod that this node cannot run faithfully, with the field's name.
pub fn unsupported(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let mut refused = Vec::new();
    if spec.readiness_gates.as_ref().is_some_and(|gates| !gates.is_empty()) {
        refused.push("spec.readinessGates".to_owned());
    }
    if spec.share_process_namespace == Some(true) {
        refused.push("spec.shareProcessNamespace".to_owned());
    }
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let probes = [&container.startup_probe, &container.liveness_probe, &container.readiness_probe];
        if probes.into_iter().flatten().any(|probe| probe.grpc.is_some()) {
            refused.push(format!("a grpc probe of container {}", container.name));
        }
        if container.lifecycle.is_some() {
            refused.push(format!("lifecycle of container {}", container.name));
        }
        if container.restart_policy.is_some() {
            refused.push(format!("restartPolicy of init container {}", container.name));
        }
    }
    refused.first().map(|field| format!("this node runs pods as processes and has no {field}"))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use serde_json::json;

    use super::super::environment::Sources;
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn sandbox(pod: &Pod) -> Result<Sandbox> {
        let sources = Sources::default();
        let volumes = BTreeMap::from([("v".to_owned(), PathBuf::from("/volumes/v"))]);
        let environment = Environment { pod, ip: Ipv4Addr::LOCALHOST, sources: &sources };
        let given = [("HOSTNAME".to_owned(), "p".to_owned())];
        let surroundings = Surroundings { environment, volumes: &volumes, given: &given };
        let programs = BTreeMap::from([("worker".to_owned(), PathBuf::from("/build/worker"))]);
        let image = Image { entrypoint: vec!["worker".into()], programs };
        surroundings.sandbox(&pod.spec.as_ref().unwrap().containers[0], &image, "/root-of-it".into())
    }

    #[test]
    fn command_and_arguments_replace_those_of_the_image() {
        let cases = [
            (json!({}), vec!["worker"]),
            (json!({"args": ["--name", "$(HOSTNAME)"]}), vec!["worker", "--name", "p"]),
            (json!({"command": ["sh"], "args": ["-c", "x"]}), vec!["sh", "-c", "x"]),
        ];
        for (mut container, wanted) in cases {
            container["name"] = json!("c");
            assert_eq!(sandbox(&pod(json!({"containers": [container]}))).unwrap().command, wanted);
        }
    }

    #[test]
    fn mounts_are_ordered_from_outer_to_inner() {
        let container = json!({"name": "c", "volumeMounts": [
            {"name": "v", "mountPath": "/etc/a/b", "subPath": "x", "readOnly": true},
            {"name": "v", "mountPath": "/etc"},
        ]});
        let mounts = sandbox(&pod(json!({"containers": [container]}))).unwrap().mounts;
        let targets: Vec<&str> = mounts.iter().map(|mount| mount.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["/worker", "/etc", "/etc/a/b", "/usr/local/bin/worker"]);
        assert_eq!(mounts[2].source, Path::new("/volumes/v/x"));
        let container = json!({"name": "c", "volumeMounts": [{"name": "w", "mountPath": "/w"}]});
        let error = sandbox(&pod(json!({"containers": [container]}))).unwrap_err();
        assert_eq!(error.to_string(), "no volume \"w\"");
    }

    #[test]
    fn the_container_overrides_the_pod() {
        let spec = json!({
            "securityContext": {"runAsNonRoot": true, "runAsUser": 7, "fsGroup": 9},
            "containers": [{"name": "c", "securityContext": {
                "runAsUser": 8, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            }}],
        });
        let user = sandbox(&pod(spec)).unwrap().user;
        assert_eq!((user.id, user.groups.as_slice()), (Some((8, 8)), [9].as_slice()));
        assert!(user.drop_capabilities && user.no_new_privileges && user.read_only_root);
        let spec = json!({"securityContext": {"runAsNonRoot": true}, "containers": [{"name": "c"}]});
        assert_eq!(sandbox(&pod(spec)).unwrap().user.id, Some((NON_ROOT, NON_ROOT)));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let lifecycle = json!({"containers": [{"name": "c", "lifecycle": {}}]});
        assert!(unsupported(&pod(lifecycle)).unwrap().contains("lifecycle of container c"));
        let grpc = json!({"containers": [{"name": "c", "livenessProbe": {"grpc": {"port": 1}}}]});
        assert!(unsupported(&pod(grpc)).unwrap().contains("grpc"));
        assert_eq!(unsupported(&pod(json!({"containers": [{"name": "c"}]}))), None);
    }
}
