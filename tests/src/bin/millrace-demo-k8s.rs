//! The demo on Kubernetes: a real control plane, our chart, `examples/smollm2.yaml`, and 200 jobs that wake the model
//! from zero; then 200 more while its revision changes.
//!
//! It starts everything on loopback with stores in temporary folders: etcd, kube-apiserver, kube-controller-manager,
//! kube-scheduler, nats-server, an S3 server, and a node that runs pods as processes. It installs the chart with
//! helm and prints what `kubectl get imodel -w` would show, with seconds, and the autoscaler's decisions. The last
//! line of standard output is one JSON object. Nothing of it is left afterwards, also after Ctrl-C.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use millrace_crds::job::header;
use millrace_crds::names::ModelRef;
use millrace_tests::demo::{self, say};
use millrace_tests::jobs::{NewJob, OutcomeLog, Pipeline};
use millrace_tests::kube::cluster::ready_reason;
use millrace_tests::kube::platform::{BUCKET, NAMESPACE, Platform};
use millrace_tests::kube::timeline::Timeline;
use millrace_tests::model;
use serde_json::{Value, json};

/// The prefix of the weights, as the manifest names it.
const PREFIX: &str = "smollm2-135m-instruct";
/// Tokens of an answer: enough to read, few enough for two cores.
const ANSWER_TOKENS: u32 = 24;
/// So that the way back to zero can be watched.
const IDLE_AFTER: &str = "10s";
/// All jobs of a step are done within this time on two cores.
const STEP_LIMIT: Duration = Duration::from_secs(600);
/// From the last result back to zero.
const REST_LIMIT: Duration = Duration::from_secs(240);
/// Jobs that are done when the revision changes.
const CHANGE_AFTER: usize = 20;

/// Runs jobs through the whole product on a real control plane.
#[derive(Debug, Parser)]
#[command(name = "millrace-demo-k8s")]
struct Args {
    /// The InferenceModel
    #[arg(long, default_value = "examples/smollm2.yaml")]
    manifest: PathBuf,
    /// OpenAI batch lines whose prompts are used in turn
    #[arg(long, default_value = "examples/prompts.jsonl")]
    prompts: PathBuf,
    /// Jobs of each step
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    jobs: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    demo::show(run(&args))
}

async fn run(args: &Args) -> Result<Value> {
    let start = Instant::now();
    let prompts = prompts(&args.prompts)?;
    let folder = tokio::task::spawn_blocking(model::smollm2).await??;
    let platform = Platform::start().await?;
    let ready = platform.cluster.plane.started_in();
    say(start, &format!("control plane (API server ready in {ready:.1?}), broker, S3 and node are up"));
    platform.upload(&folder, PREFIX).await?;
    platform.install(&json!({})).await?;
    say(start, "helm has installed the chart; the operator is ready");
    let demo = Demo { platform, spec: spec(&args.manifest)?, prompts, jobs: args.jobs };
    let summary = demo.go(start).await;
    summary.with_context(|| demo.platform.why())
}

/// The bodies of the prompts, with short answers.
fn prompts(file: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("--prompts {}", file.display()))?;
    let body = |line: &str| -> Result<Value> {
        let mut line: Value = serde_json::from_str(line)?;
        let mut body = line["body"].take();
        body["max_tokens"] = json!(ANSWER_TOKENS);
        Ok(body)
    };
    let bodies: Vec<Value> = text.lines().map(body).collect::<Result<_>>()?;
    ensure!(!bodies.is_empty(), "--prompts {}: no line", file.display());
    Ok(bodies)
}

fn spec(manifest: &Path) -> Result<Value> {
    let text =
        std::fs::read_to_string(manifest).with_context(|| format!("--manifest {}", manifest.display()))?;
    let object: Value = serde_yaml::from_str(&text)?;
    ensure!(object["kind"] == "InferenceModel", "--manifest {}: no InferenceModel", manifest.display());
    Ok(object["spec"].clone())
}

struct Demo {
    platform: Platform,
    spec: Value,
    prompts: Vec<Value>,
    jobs: u32,
}

/// What one step counted.
struct Step {
    published: usize,
    completed: usize,
    wake: Duration,
    replicas_max: u32,
    back_to_zero: Duration,
    revisions: BTreeSet<String>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Step { published, completed, wake, back_to_zero, .. } = self;
        write!(
            f,
            "{completed} of {published} jobs completed; awake {:.0} ms after the first, asleep {:.1} s after the last",
            wake.as_secs_f64() * 1e3,
            back_to_zero.as_secs_f64()
        )
    }
}

impl Demo {
    const NAME: &str = "smollm2";

    async fn go(&self, start: Instant) -> Result<Value> {
        let mut spec = self.spec.clone();
        // The store of this machine, and a rest that can be watched; all else is as the example says.
        spec["model"]["uri"] = json!(format!("s3://{BUCKET}/{PREFIX}"));
        spec["model"]["endpoint"] = json!(self.platform.s3.endpoint());
        spec["scaling"]["idleAfter"] = json!(IDLE_AFTER);
        spec["scaling"]["stabilization"] = json!({"down": "5s"});
        self.platform.cluster.apply(NAMESPACE, Self::NAME, &spec).await?;
        let client = self.platform.cluster.client();
        let timeline = Timeline::start(&client, NAMESPACE, Self::NAME, true);
        timeline.wait("asleep at zero", REST_LIMIT, |seen| asleep(seen.asked, &seen.status)).await?;
        say(start, &format!("the model sleeps; {} jobs come", self.jobs));
        let first = self.step("first", &timeline, None).await?;
        say(start, &first.to_string());
        spec["model"]["revision"] = json!("v2");
        say(start, &format!("{} more jobs; the revision changes while they run", self.jobs));
        let second = self.step("second", &timeline, Some(&spec)).await?;
        say(start, &second.to_string());
        for step in [&first, &second] {
            ensure!(
                step.completed == step.published,
                "{} jobs of {} completed",
                step.completed,
                step.published
            );
        }
        ensure!(first.revisions.len() == 1, "before the change: {:?}", first.revisions);
        ensure!(second.revisions.len() == 2, "the change took no effect under load: {:?}", second.revisions);
        Ok(json!({
            "published": first.published,
            "completed": first.completed,
            "wake_ms": first.wake.as_millis() as u64,
            "replicas_max": first.replicas_max.max(second.replicas_max),
            "back_to_zero": true,
            "back_to_zero_s": (first.back_to_zero.as_secs_f64() * 10.0).round() / 10.0,
            "rollout_published": second.published,
            "rollout_completed": second.completed,
        }))
    }

    /// Publishes the jobs at zero, changes the spec under load if told to, and waits for all results and for rest.
    async fn step(&self, name: &str, timeline: &Timeline, change: Option<&Value>) -> Result<Step> {
        let queue =
            Pipeline::connect(&self.platform.cluster.nats, &ModelRef::new(NAMESPACE, Self::NAME)?).await?;
        let jobs: Vec<NewJob> = (0..self.jobs as usize)
            .map(|at| NewJob::new(&format!("{name}-{at}"), &self.prompts[at % self.prompts.len()]))
            .collect();
        let mut record = OutcomeLog::default();
        record.follow(&queue).await?;
        let before = record.outcomes.len();
        let published = Instant::now();
        queue.publish_all(&jobs).await?;
        let woken = |seen: &millrace_tests::kube::timeline::TimelineSeen| {
            seen.woken.is_some_and(|at| at >= published)
        };
        let seen = timeline.wait("awake", STEP_LIMIT, woken).await?;
        if let Some(spec) = change {
            record.wait(&queue, before + CHANGE_AFTER.min(jobs.len()), STEP_LIMIT).await?;
            self.platform.cluster.apply(NAMESPACE, Self::NAME, spec).await?;
        }
        record.wait(&queue, before + jobs.len(), STEP_LIMIT).await?;
        let done = Instant::now();
        timeline.wait("back at zero", REST_LIMIT, |seen| asleep(seen.asked, &seen.status)).await?;
        ensure!(record.rewritten.is_empty(), "jobs with two outcomes: {:?}", record.rewritten);
        let completed = |job: &&NewJob| {
            record
                .outcomes
                .get(&job.id)
                .is_some_and(|outcome| outcome.kind == millrace_crds::result::OutcomeKind::Completed)
        };
        let workers = jobs.iter().filter_map(|job| record.outcomes.get(&job.id));
        let workers = workers.filter_map(|outcome| outcome.headers.get(header::WORKER));
        // A pod's name is its ReplicaSet's and a random part; each revision has a ReplicaSet of its own.
        let revisions =
            workers.filter_map(|name| Some(name.as_str().rsplit_once('-')?.0.to_owned())).collect();
        Ok(Step {
            revisions,
            published: jobs.len(),
            completed: jobs.iter().filter(completed).count(),
            wake: seen.woken.map_or(Duration::MAX, |at| at - published),
            replicas_max: timeline.seen().ready_max,
            back_to_zero: done.elapsed(),
        })
    }
}

/// No worker is asked for and none is there, and that is as it should be.
fn asleep(asked: i32, status: &millrace_crds::model::status::InferenceModelStatus) -> bool {
    asked == 0 && status.replicas == 0 && ready_reason(status).as_deref() == Some("ScaledToZero")
}
