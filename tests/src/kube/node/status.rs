//! A pod's status from its containers' progress, as a kubelet reports it. Pure.

use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::container::{ContainerProgress, Ended, Standing, restarts};

/// All that a status says of a pod.
#[derive(Debug, Clone)]
pub struct PodReport<'a> {
    /// The pod as the API server has it, with its last status.
    pub pod: &'a Pod,
    /// Its address.
    pub ip: Ipv4Addr,
    /// When the node took it.
    pub started: Timestamp,
    /// Init containers first, then the others, in the order of the spec.
    pub progress: &'a [ContainerProgress],
    /// Why the pod as a whole failed, if the node refuses it.
    pub refused: Option<&'a str>,
}

impl PodReport<'_> {
    /// The status. Conditions keep their time of transition while they stay as they are.
    pub fn status(&self, now: Timestamp) -> PodStatus {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let inits = spec.init_containers.clone().unwrap_or_default();
        let (init, main) = self.progress.split_at(inits.len().min(self.progress.len()));
        let phase = if self.refused.is_some() { "Failed" } else { phase(&spec, init, main) };
        PodStatus {
            phase: Some(phase.into()),
            reason: self.refused.map(|_| "Unsupported".into()),
            message: self.refused.map(Into::into),
            host_ip: Some(Ipv4Addr::LOCALHOST.to_string()),
            host_ips: Some(vec![HostIP { ip: Ipv4Addr::LOCALHOST.to_string() }]),
            pod_ip: Some(self.ip.to_string()),
            pod_ips: Some(vec![PodIP { ip: self.ip.to_string() }]),
            start_time: Some(Time(self.started)),
            conditions: Some(self.conditions(phase, init, main, now)),
            init_container_statuses: Some(self.statuses(&inits, init)),
            container_statuses: Some(self.statuses(&spec.containers, main)),
            ..PodStatus::default()
        }
    }

    fn statuses(&self, containers: &[Container], progress: &[ContainerProgress]) -> Vec<ContainerStatus> {
        let uid = self.pod.metadata.uid.as_deref().unwrap_or_default();
        let status = |(container, progress): (&Container, &ContainerProgress)| ContainerStatus {
            name: container.name.clone(),
            image: container.image.clone().unwrap_or_default(),
            image_id: container.image.clone().unwrap_or_default(),
            container_id: Some(format!("process://{uid}/{}/{}", container.name, progress.restarts)),
            ready: progress.ready,
            started: Some(progress.started),
            restart_count: progress.restarts,
            state: Some(state(&progress.state)),
            last_state: progress.last.as_ref().map(|ended| ContainerState {
                terminated: Some(terminated(ended)),
                ..ContainerState::default()
            }),
            ..ContainerStatus::default()
        };
        containers.iter().zip(progress).map(status).collect()
    }

    fn conditions(
        &self,
        phase: &str,
        init: &[ContainerProgress],
        main: &[ContainerProgress],
        now: Timestamp,
    ) -> Vec<PodCondition> {
        let over = matches!(phase, "Succeeded" | "Failed");
        let initialized =
            init.iter().all(|progress| matches!(&progress.state, Standing::Ended(ended) if ended.code == 0));
        let ready = !over && initialized && main.iter().all(|progress| progress.ready);
        let why_not = if over { "PodCompleted" } else { "ContainersNotReady" };
        let wanted = [
            ("PodReadyToStartContainers", !over, ""),
            ("Initialized", initialized, "ContainersNotInitialized"),
            ("Ready", ready, why_not),
            ("ContainersReady", ready, why_not),
        ];
        let known = self.pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
        let ours = |condition: &PodCondition| wanted.iter().any(|(name, ..)| *name == condition.type_);
        let mut made: Vec<PodCondition> =
            known.iter().filter(|condition| !ours(condition)).cloned().collect();
        for (name, value, reason) in wanted {
            let status = if value { "True" } else { "False" };
            let before = known.iter().find(|condition| condition.type_ == name && condition.status == status);
            let since = before.and_then(|condition| condition.last_transition_time.clone());
            made.push(PodCondition {
                type_: name.into(),
                status: status.into(),
                reason: (!value && !reason.is_empty()).then(|| reason.into()),
                last_transition_time: Some(since.unwrap_or(Time(now))),
                ..PodCondition::default()
            });
        }
        made
    }
}

fn phase(spec: &PodSpec, init: &[ContainerProgress], main: &[ContainerProgress]) -> &'static str {
    let policy = spec.restart_policy.as_deref();
    let over = |progress: &ContainerProgress| match &progress.state {
        Standing::Ended(ended) if !restarts(policy, ended.code) => Some(ended.code),
        _ => None,
    };
    // Init containers run again on failure, unless the policy is Never.
    let failed =
        |progress: &ContainerProgress| matches!(&progress.state, Standing::Ended(ended) if ended.code != 0);
    let init_failed = |progress: &ContainerProgress| policy == Some("Never") && failed(progress);
    if init.iter().any(init_failed) {
        return "Failed";
    }
    let codes: Vec<Option<i32>> = main.iter().map(over).collect();
    if !main.is_empty() && codes.iter().all(Option::is_some) {
        return if codes.iter().all(|code| *code == Some(0)) { "Succeeded" } else { "Failed" };
    }
    let begun = |progress: &ContainerProgress| {
        !matches!(progress.state, Standing::Waiting { .. }) || progress.restarts > 0
    };
    if main.iter().all(begun) { "Running" } else { "Pending" }
}

fn state(state: &Standing) -> ContainerState {
    match state {
        Standing::Waiting { reason, message } => ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some(reason.clone()),
                message: (!message.is_empty()).then(|| message.clone()),
            }),
            ..ContainerState::default()
        },
        Standing::Running { since } => ContainerState {
            running: Some(ContainerStateRunning { started_at: Some(Time(*since)) }),
            ..ContainerState::default()
        },
        Standing::Ended(ended) => {
            ContainerState { terminated: Some(terminated(ended)), ..ContainerState::default() }
        }
    }
}

fn terminated(ended: &Ended) -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: ended.code,
        signal: (ended.code > 128 && ended.reason == "Error").then(|| ended.code - 128),
        reason: Some(ended.reason.clone()),
        message: (!ended.message.is_empty()).then(|| ended.message.clone()),
        started_at: Some(Time(ended.started)),
        finished_at: Some(Time(ended.finished)),
        ..ContainerStateTerminated::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ended(code: i32) -> ContainerProgress {
        let now = Timestamp::UNIX_EPOCH;
        let reason = if code == 0 { "Completed" } else { "Error" };
        let ended =
            Ended { code, reason: reason.into(), message: String::new(), started: now, finished: now };
        ContainerProgress { state: Standing::Ended(ended), ..ContainerProgress::default() }
    }

    fn running(ready: bool) -> ContainerProgress {
        let state = Standing::Running { since: Timestamp::UNIX_EPOCH };
        ContainerProgress { state, started: true, ready, ..ContainerProgress::default() }
    }

    fn status(policy: &str, inits: usize, progress: &[ContainerProgress]) -> PodStatus {
        let container = |at: usize| json!({"name": format!("c{at}"), "image": "i"});
        let pod = json!({
            "metadata": {"name": "p", "uid": "u"},
            "spec": {
                "restartPolicy": policy,
                "initContainers": (0..inits).map(container).collect::<Vec<_>>(),
                "containers": (inits..progress.len()).map(container).collect::<Vec<_>>(),
            },
            "status": {"conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z"},
            ]},
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let (ip, started) = (Ipv4Addr::new(127, 1, 1, 1), Timestamp::UNIX_EPOCH);
        PodReport { pod: &pod, ip, started, progress, refused: None }.status(Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn phases_follow_containers_and_policy() {
        let cases: [(&str, usize, Vec<ContainerProgress>, &str); 10] = [
            ("Always", 0, vec![ContainerProgress::default()], "Pending"),
            ("Always", 0, vec![running(false)], "Running"),
            ("Always", 0, vec![running(true), ContainerProgress::default()], "Pending"),
            ("Always", 0, vec![ended(0)], "Running"),
            ("OnFailure", 0, vec![ended(1)], "Running"),
            ("OnFailure", 0, vec![ended(0)], "Succeeded"),
            ("Never", 0, vec![ended(0), ended(2)], "Failed"),
            ("Never", 1, vec![ended(1), ContainerProgress::default()], "Failed"),
            ("Always", 1, vec![ended(1), ContainerProgress::default()], "Pending"),
            ("Never", 0, vec![ended(1), running(true)], "Running"),
        ];
        for (policy, inits, progress, phase) in cases {
            assert_eq!(
                status(policy, inits, &progress).phase.as_deref(),
                Some(phase),
                "{policy} {progress:?}"
            );
        }
    }

    #[test]
    fn conditions_keep_their_time_and_those_of_others() {
        let find = |status: &PodStatus, name: &str| {
            let conditions = status.conditions.clone().unwrap();
            conditions.into_iter().find(|condition| condition.type_ == name).unwrap()
        };
        let ready = status("Always", 0, &[running(true)]);
        let condition = find(&ready, "Ready");
        assert_eq!(condition.status, "True");
        assert_eq!(condition.last_transition_time.unwrap().0.to_string(), "2020-01-01T00:00:00Z");
        assert_eq!(find(&ready, "PodScheduled").status, "True");
        let unready = find(&status("Always", 0, &[running(true), running(false)]), "Ready");
        assert_eq!(
            (unready.status.as_str(), unready.reason.as_deref()),
            ("False", Some("ContainersNotReady"))
        );
        assert_eq!(unready.last_transition_time.unwrap().0, Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn signals_are_named() {
        let statuses = status("Never", 0, &[ended(137)]).container_statuses.unwrap();
        let terminated = statuses[0].state.clone().unwrap().terminated.unwrap();
        assert_eq!((terminated.exit_code, terminated.signal), (137, Some(9)));
    }
}
