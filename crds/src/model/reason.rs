//! Conditions and their reasons: one closed list, from which status, events and the runbook are made.
//!
//! A reason that is not here cannot be written, and one without an explanation does not compile.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($variant:ident: $($text:literal)+;)+ }) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
        )]
        pub enum $name {
            $(#[doc = concat!($($text),+)] $variant,)+
        }

        impl $name {
            /// All of them, in the order of the runbook.
            pub const ALL: &[$name] = &[$($name::$variant),+];

            /// As it is written in a status.
            pub fn as_str(self) -> &'static str {
                match self {
                    $($name::$variant => stringify!($variant),)+
                }
            }

            /// What it means.
            pub fn meaning(self) -> &'static str {
                match self {
                    $($name::$variant => concat!($($text),+),)+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

named! {
    /// The type of a condition.
    ConditionType {
        Ready: "Jobs are served: workers take them, or the model sleeps at zero replicas and any job wakes it.";
        Progressing: "The workers are being changed: started, stopped or replaced by ones of a new spec.";
        Degraded: "Something needs a person; jobs may still be served.";
        WeightsAvailable: "The files of the model were found, were those that the spec names, and fit.";
        QueueReady: "The streams and consumers exist with the settings that the spec asks for.";
        WorkersAvailable: "As many workers take jobs as were asked for.";
        ScalingActive: "The number of workers follows the queue.";
    }
}

named! {
    /// Why a condition is as it is.
    Reason {
        AsExpected: "Nothing is wrong.";
        WorkersReady: "All workers that were asked for take jobs.";
        ScaledToZero: "There is no work, so there is no worker. The next job starts one.";
        WorkersStarting: "Workers are on their way: scheduled, pulling weights or warming up.";
        WorkersDraining: "Workers finish what they hold and go.";
        RollingOut: "Workers are replaced by ones of the present spec.";
        WorkersFailing: "Workers end again and again before they take jobs. \
            The message holds the last words of one.";
        Unschedulable: "No node has what the workers need.";
        ImageUnavailable: "The image of the workers cannot be pulled.";
        PodsRefused: "The API server refuses the pods, for want of quota or by a policy of the namespace.";
        WeightsReady: "A worker has verified and loaded the files.";
        WeightsPulling: "A worker pulls the files.";
        WeightsUnknown: "No worker has looked at the files yet.";
        WeightsMissing: "The worker could not have the files, or they are not what the spec says.";
        QueueProvisioned: "Streams and consumers are as the spec asks.";
        QueueUnreachable: "The broker does not answer the operator.";
        QueueRefused: "The broker refuses the streams or consumers that the spec asks for.";
        ConsumerPaused: "Somebody paused a consumer: its jobs wait, and no worker gets them.";
        JobsUndeliverable: "Jobs lie in the queue that no consumer will deliver, because one had a delivery limit of \
            its own.";
        FollowingQueue: "The autoscaler reads the queue and sets the number of workers.";
        FixedReplicas: "spec.replicas sets the number of workers, by hand or through /scale.";
        SignalLost: "The queue cannot be read. The number of workers is held, or goes to the maximum, as \
            spec.scaling.onSignalLost says.";
        InvalidSpec: "The spec cannot be carried out. What runs is left as it is.";
        NameConflict: "An object with a name that the model needs belongs to somebody else.";
        Paused: "The annotation millrace.dev/paused is true: the operator only looks.";
        Deleting: "The model is being deleted.";
        ApiRefused: "The API server refuses an object of the model.";
        ScalingUp: "Workers were added.";
        ScalingDown: "Workers were removed.";
        QueueRepaired: "A stream or consumer was missing or differed, and was put right.";
        PodMonitorsUndefined: "PodMonitors were asked for and the API server does not know them. \
            Jobs are served; Prometheus does not find the workers.";
        ShortIdle: "spec.scaling.idleAfter is shorter than a start of this model takes. The last worker idles \
            as long as a start takes instead.";
    }
}

/// Why workers end before they take jobs, most often.
const WORKERS_FAILING_REMEDY: &str = "\
    Read the message and `kubectl logs --previous` of a worker. Common causes: a model that does not \
    fit the memory (lower engine.maxModelLen or engine.kvCacheFraction, or give it more), a model \
    architecture that is not supported, a broker that refuses the worker's credentials.";

/// Why a broker refuses, most often.
const QUEUE_REFUSED_REMEDY: &str = "\
    Read the message, which is the broker's. Common causes: too little storage for \
    spec.queue.maxBytes, fewer servers than spec.queue.replicas, missing rights, or a setting that an \
    existing stream cannot change; then drain it and delete it.";

/// How a pause ends.
const CONSUMER_PAUSED_REMEDY: &str = "\
    Find out who paused it. `nats consumer resume JOBS_<namespace>_<model> workers-<class>` ends the pause.";

/// How jobs that a limited consumer left behind come back.
const JOBS_UNDELIVERABLE_REMEDY: &str = "\
    Delete the consumers (`nats consumer rm JOBS_<namespace>_<model> workers-<class>`): the operator makes \
    them anew, and they deliver all that lies in the stream. Jobs that run come again and find their outcome.";

/// What a deletion waits for, and what it leaves.
const DELETING_REMEDY: &str = "\
    Wait until the workers have drained. With queue.onDelete: Delete the streams go last; while the \
    broker does not answer, deletion waits. To leave the streams behind, set queue.onDelete: Retain: \
    they stay, with their consumers and jobs, until a model of the same name goes on with them or \
    `nats stream rm` removes JOBS_, RESULTS_ and DEAD_<namespace>_<model>.";

impl ConditionType {
    /// The status that a healthy model has.
    pub fn healthy(self) -> &'static str {
        match self {
            ConditionType::Degraded => "False",
            ConditionType::Progressing => "True or False",
            ConditionType::ScalingActive => "True, or False with FixedReplicas",
            ConditionType::WeightsAvailable => "True, or Unknown before the first worker",
            _ => "True",
        }
    }
}

impl Reason {
    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Reason::AsExpected
            | Reason::WorkersReady
            | Reason::ScaledToZero
            | Reason::WeightsReady
            | Reason::WeightsUnknown
            | Reason::QueueProvisioned
            | Reason::FollowingQueue
            | Reason::ScalingUp
            | Reason::ScalingDown
            | Reason::WorkersDraining => "Nothing.",
            Reason::WorkersStarting | Reason::WeightsPulling => {
                "Wait. status.coldStart says how long starts of this model took. If it takes much longer, look \
                 at the events of the pods, then at the log of a worker."
            }
            Reason::RollingOut => {
                "Wait. Jobs in flight finish within spec.drain.timeout or are handed back. With GPUs, one worker \
                 is stopped before its successor starts, because a spare GPU is rarely there."
            }
            Reason::WorkersFailing => WORKERS_FAILING_REMEDY,
            Reason::Unschedulable => {
                "Read the message, which is the scheduler's. Add nodes, or correct resources, nodeSelector or \
                 tolerations. Jobs stay queued meanwhile."
            }
            Reason::ImageUnavailable => {
                "Correct spec.template.image, or name the registry's Secret in spec.template.imagePullSecrets."
            }
            Reason::PodsRefused => {
                "Read the message, which is the API server's. Raise the namespace's quota, or lower \
                 spec.scaling.maxReplicas."
            }
            Reason::WeightsMissing => {
                "Read the message. Check spec.model.uri, endpoint, region, the Secret of credentialsSecretRef and \
                 its keys, and that the digest is that of the files (`millrace doctor` prints it)."
            }
            Reason::QueueUnreachable | Reason::SignalLost => {
                "Check that the broker runs and that the operator's --nats-servers and credentials are right. \
                 Workers that hold jobs go on by themselves, and nothing is scaled down meanwhile."
            }
            Reason::QueueRefused => QUEUE_REFUSED_REMEDY,
            Reason::ConsumerPaused => CONSUMER_PAUSED_REMEDY,
            Reason::JobsUndeliverable => JOBS_UNDELIVERABLE_REMEDY,
            Reason::FixedReplicas => "Nothing, or replace spec.replicas by spec.scaling to follow the queue.",
            Reason::InvalidSpec => "Correct the field that the message names.",
            Reason::NameConflict => {
                "Rename the model, or delete or rename the object that the message names. The operator never \
                 takes over what it did not create."
            }
            Reason::Paused => "Remove the annotation to go on.",
            Reason::Deleting => DELETING_REMEDY,
            Reason::ApiRefused => {
                "Read the message. Missing rights of the operator are a matter of the chart's version; an \
                 admission policy may have to make room."
            }
            Reason::QueueRepaired => {
                "Find out who changed it: only the operator should. Jobs in a stream that was deleted are gone."
            }
            Reason::PodMonitorsUndefined => {
                "Install the definitions of the Prometheus operator: the operator finds them within seconds and \
                 makes the PodMonitors. Or install the chart with monitoring.podMonitors: false."
            }
            Reason::ShortIdle => {
                "Nothing, or raise spec.scaling.idleAfter. If jobs may not wait for a start, set \
                 spec.scaling.minReplicas to 1."
            }
        }
    }
}
