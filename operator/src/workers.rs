//! What pods and load reports say about a model's workers.
//!
//! Pure. A pod says where a worker is in its life and what went wrong; its load report says what it does.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use millrace_crds::load::LoadReport;
use millrace_crds::model::reason::Reason;
use millrace_crds::model::status::StartPhases;

use millrace_autoscaler::{WorkerLoad, WorkerReading, WorkerState};

use crate::names::REVISION_ANNOTATION;

/// A container that waits longer than this for its volumes lacks one.
const CREATING_MAX_MS: u64 = 60_000;
/// Longest part of a pod's or a worker's words in a condition.
const WORDS_MAX: usize = 400;
/// Words in a worker's last message that are about its weights.
const WEIGHTS_WORDS: [&str; 5] = ["model.uri", "model.digest", "model.bytesMax", "manifest", "model folder"];

fn millis(time: &Time) -> u64 {
    u64::try_from(time.0.as_millisecond()).unwrap_or(0)
}

fn condition<'p>(pod: &'p Pod, kind: &str) -> Option<(&'p str, Option<u64>, &'p str)> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == kind)?;
    let since_ms = found.last_transition_time.as_ref().map(millis);
    Some((&found.status, since_ms, found.message.as_deref().unwrap_or_default()))
}

/// Whether the pod takes jobs.
pub fn is_ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
        && condition(pod, "Ready").is_some_and(|(status, ..)| status == "True")
}

/// Whether the pod has come to its end and only its record is left.
fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The worker of a pod, as the autoscaler reads it. A pod that is over is no worker.
pub fn reading(pod: &Pod, report: Option<&LoadReport>) -> Option<WorkerReading> {
    if is_over(pod) {
        return None;
    }
    let state = if pod.metadata.deletion_timestamp.is_some() {
        WorkerState::Draining
    } else if is_ready(pod) {
        WorkerState::Ready
    } else {
        WorkerState::Starting
    };
    let ready_ms = match condition(pod, "Ready") {
        Some(("True", since_ms, _)) => since_ms,
        _ => None,
    };
    Some(WorkerReading {
        name: pod.name_any(),
        state,
        created_ms: pod.metadata.creation_timestamp.as_ref().map_or(0, millis),
        ready_ms,
        load: report.map(WorkerLoad::from),
    })
}

/// KV blocks in use, in percent of all, over the workers that report; nothing without a report.
pub fn kv_percent(reports: &HashMap<String, LoadReport>) -> Option<u32> {
    let (used, total) = reports.values().fold((0u64, 0u64), |(used, total), report| {
        (used.saturating_add(report.kv_blocks_used), total.saturating_add(report.kv_blocks_total))
    });
    let percent = used.saturating_mul(100).checked_div(total)?;
    u32::try_from(percent.min(100)).ok()
}

/// The phases of the last start, from the pod's moments and the worker's own clock.
pub fn start_phases(pod: &Pod, report: &LoadReport) -> Option<StartPhases> {
    let start = report.cold_start?;
    let created_ms = millis(pod.metadata.creation_timestamp.as_ref()?);
    let scheduled_ms = match condition(pod, "PodScheduled") {
        Some(("True", Some(since_ms), _)) => since_ms.max(created_ms),
        _ => created_ms,
    };
    let ready_ms = match condition(pod, "Ready") {
        Some(("True", Some(since_ms), _)) => since_ms,
        _ => return None,
    };
    let whole = |ms: f64| ms.max(0.0).round() as u64;
    Some(StartPhases {
        schedule_ms: scheduled_ms.saturating_sub(created_ms),
        container_ms: ready_ms.saturating_sub(scheduled_ms).saturating_sub(whole(start.total_ms)),
        connect_ms: whole(start.connect_ms),
        pull_ms: whole(start.pull_ms),
        load_ms: whole(start.load_ms),
        warm_up_ms: whole(start.warm_up_ms),
    })
}

/// Whether no pod is left that was made for another revision: neither one that runs nor one that still drains.
pub fn rolled(pods: &[impl AsRef<Pod>], revision: &str) -> bool {
    let other = |pod: &&Pod| {
        pod.annotations().get(REVISION_ANNOTATION).is_some_and(|found| found != revision) && !is_over(pod)
    };
    !pods.iter().map(AsRef::as_ref).any(|pod| other(&pod))
}

/// What keeps a worker from taking jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Why.
    pub reason: Reason,
    /// Why, in words, with the pod's name.
    pub message: String,
}

/// The worst trouble of a model's pods, if any.
pub fn trouble(pods: &[impl AsRef<Pod>], at_ms: u64) -> Option<Trouble> {
    let rank = |trouble: &Trouble| match trouble.reason {
        Reason::WeightsMissing => 4,
        Reason::WorkersFailing => 3,
        Reason::ImageUnavailable => 2,
        Reason::Unschedulable => 1,
        _ => 0,
    };
    let troubles = pods.iter().map(AsRef::as_ref).filter(|pod| !is_ready(pod) && !is_over(pod));
    troubles.filter_map(|pod| trouble_of(pod, at_ms)).max_by_key(rank)
}

fn trouble_of(pod: &Pod, at_ms: u64) -> Option<Trouble> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let name = pod.name_any();
    let say = |reason, words: &str| Some(Trouble { reason, message: format!("pod {name}: {}", cut(words)) });
    if let Some(("False", _, message)) = condition(pod, "PodScheduled") {
        return say(Reason::Unschedulable, message);
    }
    let status = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    let waiting = status.state.as_ref().and_then(|state| state.waiting.as_ref());
    let why = waiting.and_then(|waiting| waiting.reason.as_deref()).unwrap_or_default();
    let words = waiting.and_then(|waiting| waiting.message.as_deref()).unwrap_or_default();
    if matches!(why, "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull") {
        return say(Reason::ImageUnavailable, if words.is_empty() { why } else { words });
    }
    if why == "CreateContainerConfigError" || why == "CreateContainerError" {
        return say(Reason::WorkersFailing, words);
    }
    if let Some((code, last)) = last_end(status) {
        let text = format!("ended with code {code} after {} restarts: {}", status.restart_count, cut(last));
        let weights = WEIGHTS_WORDS.iter().any(|word| last.contains(word));
        return say(if weights { Reason::WeightsMissing } else { Reason::WorkersFailing }, &text);
    }
    let age_ms = at_ms.saturating_sub(pod.metadata.creation_timestamp.as_ref().map_or(at_ms, millis));
    if why == "ContainerCreating" && age_ms > CREATING_MAX_MS {
        let text =
            "its container waits for over a minute; a Secret or claim that the spec names may be missing";
        return say(Reason::WorkersFailing, text);
    }
    None
}

/// The exit code and the last words of a container that ended badly.
fn last_end(status: &ContainerStatus) -> Option<(i32, &str)> {
    let ended = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
        state.as_ref().and_then(|state| state.terminated.clone())
    };
    let end = ended(&status.state).or_else(|| ended(&status.last_state))?;
    if end.exit_code == 0 {
        return None;
    }
    let state = [&status.state, &status.last_state];
    let words = state.into_iter().flatten().find_map(|state| state.terminated.as_ref()?.message.as_deref());
    Some((end.exit_code, words.unwrap_or("no last words").trim()))
}

/// The last line of a text, cut to a bound: an error stands at the end.
fn cut(words: &str) -> String {
    let line = words.trim().lines().last().unwrap_or_default();
    line.chars().take(WORDS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn pod(status: &str) -> Arc<Pod> {
        let text =
            format!("metadata: {{name: p, creationTimestamp: '1970-01-01T00:00:10Z'}}\nstatus: {status}\n");
        Arc::new(serde_yaml::from_str(&text).expect("a pod"))
    }

    #[test]
    fn troubles_have_reasons_and_words() {
        let cases = [
            ("{phase: Pending}", None),
            (
                "{conditions: [{type: PodScheduled, status: 'False', message: '0/1 nodes have a GPU'}]}",
                Some((Reason::Unschedulable, "0/1 nodes")),
            ),
            (
                "{containerStatuses: [{name: w, state: {waiting: {reason: ErrImagePull, message: 'no such \
                 image'}}}]}",
                Some((Reason::ImageUnavailable, "no such image")),
            ),
            (
                "{containerStatuses: [{name: w, restartCount: 2, state: {waiting: {reason: CrashLoopBackOff}}, \
                 lastState: {terminated: {exitCode: 1, message: 'start\nmodel.digest is a; the files have b'}}}]}",
                Some((Reason::WeightsMissing, "model.digest is a")),
            ),
            (
                "{containerStatuses: [{name: w, restartCount: 2, state: {terminated: {exitCode: 137}}}]}",
                Some((Reason::WorkersFailing, "code 137 after 2 restarts")),
            ),
            (
                "{containerStatuses: [{name: w, state: {waiting: {reason: ContainerCreating}}}]}",
                Some((Reason::WorkersFailing, "waits for over a minute")),
            ),
        ];
        for (status, expected) in cases {
            let found = trouble(&[pod(status)], 100_000);
            match expected {
                None => assert_eq!(found, None, "{status}"),
                Some((reason, words)) => {
                    let found = found.expect(status);
                    assert_eq!(found.reason, reason, "{status}");
                    assert!(found.message.contains(words), "{status}: {}", found.message);
                }
            }
        }
    }

    #[test]
    fn a_pod_is_a_worker_in_a_state() {
        let ready =
            "{conditions: [{type: Ready, status: 'True', lastTransitionTime: '1970-01-01T00:00:30Z'}]}";
        let worker = reading(&pod(ready), None).unwrap();
        assert_eq!(
            (worker.state, worker.created_ms, worker.ready_ms),
            (WorkerState::Ready, 10_000, Some(30_000))
        );
        let worker = reading(&pod("{phase: Pending}"), None).unwrap();
        assert_eq!((worker.state, worker.ready_ms), (WorkerState::Starting, None));
        assert_eq!(reading(&pod("{phase: Failed}"), None), None);
    }
}
