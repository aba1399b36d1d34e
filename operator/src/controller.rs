//! Drives the line fetch -> validate -> scale -> build -> apply -> status for each model: on every change of the
//! model or its objects, when a job wakes it, and by the clock.
//!
//! Two reconciles of one model never run at once, and a bounded number of models runs at once, in the order in which
//! they became due: none is overtaken while the operator is busy. A model that fails is tried again later and later,
//! and holds up no other.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use kube::{Client, Resource, ResourceExt};
use kube_runtime::controller::{Action, Config as RunnerConfig, Error as RunError, applier};
use kube_runtime::reflector::ObjectRef;
use millrace_crds::model::InferenceModel;
use millrace_crds::model::reason::Reason;
use millrace_crds::names::ModelRef;
use tokio::sync::{Semaphore, mpsc};

use crate::apply::{Applier, ApplyError};
use crate::build;
use crate::caches::{Caches, Guarded, ModelKey};
use crate::config::Config;
use crate::error::Error;
use crate::fetch::{self, Facts};
use crate::finalize::{self, End, FinalizeError, Finalizer};
use crate::load::LoadBook;
use crate::metrics::OperatorMetrics;
use crate::queue::{QueueClient, QueueError};
use crate::scaling::{ScalingState, Sized};
use crate::status::{self, StatusView, StatusWriter, Written};
use crate::validate::{self, Plan, Sizing, SpecRefusal};
use crate::wake::Wakes;
use crate::workers;

/// Pause until a model whose job has come, and whose stream still looks empty, is looked at again.
const WOKEN_PAUSE: Duration = Duration::from_millis(100);
/// How long one reconcile may take: a server that hangs must not hold the few that run at once for ever.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after the first failure; doubled for each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause after a failure: a model that cannot be applied is still one that may have to be scaled.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Pause between two looks at a spec that was refused: only a change of it can help.
const REFUSED_PAUSE: Duration = Duration::from_secs(300);
/// Pause between two tries to make streams that the broker refused.
const QUEUE_RETRY: Duration = Duration::from_secs(5);
/// Pause between two looks at workers that drain before their model ends.
const DRAIN_PAUSE: Duration = Duration::from_secs(1);

/// What all reconciles share.
pub struct Context {
    /// Options.
    pub config: Config,
    /// The API server.
    pub client: Client,
    /// What the API server holds.
    pub caches: Caches,
    /// The broker.
    pub queue: QueueClient,
    /// Load reports.
    pub load: LoadBook,
    /// Subscriptions of sleeping models.
    pub wakes: Wakes,
    /// Writes objects.
    pub applier: Applier,
    /// Writes statuses and events.
    pub status: StatusWriter,
    /// Counters.
    pub metrics: Arc<OperatorMetrics>,
    /// Permits for the models that are reconciled at once. They are given in the order in which they were asked for;
    /// the controller's own limit takes any of those that wait, and left some behind for seconds.
    pub turns: Semaphore,
    /// What is remembered of each model.
    pub states: Mutex<HashMap<ModelKey, ModelState>>,
}

/// What is remembered of one model between reconciles. All of it can be lost.
#[derive(Debug, Default)]
pub struct ModelState {
    uid: String,
    scaling: ScalingState,
    queue: QueueState,
    written: Written,
    failures: u32,
}

/// When streams and consumers were compared last, for which settings, and how it went.
#[derive(Debug, Default)]
struct QueueState {
    checked: Option<(Instant, String)>,
    made: bool,
    result: Option<Result<(), QueueError>>,
}

impl QueueState {
    /// Whether it is time to compare again.
    fn due(&self, settings: &str, pause: Duration) -> bool {
        let Some((at, of)) = &self.checked else { return true };
        let pause = if matches!(self.result, Some(Ok(()))) { pause } else { QUEUE_RETRY };
        of != settings || at.elapsed() >= pause
    }
}

/// Reconciles until `shutdown`; what is under way is finished.
pub async fn run(
    context: Arc<Context>,
    changes: mpsc::Receiver<ModelKey>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let queue = stream::unfold(changes, |mut changes| async {
        changes.recv().await.map(|key| (Ok::<_, std::convert::Infallible>(key), changes))
    });
    let store = context.caches.models.clone();
    let closing = context.clone();
    let shutdown = async move {
        shutdown.await;
        // Who still waits for its turn ends without one.
        closing.turns.close();
    };
    let results = applier(
        |object, context| reconcile(object, context).boxed(),
        error_policy,
        context,
        store,
        Box::pin(queue.take_until(shutdown)),
        // No limit: the turns are one.
        RunnerConfig::default(),
    );
    results
        .for_each(|result| async move {
            match result {
                Ok(_) | Err(RunError::ObjectNotFound(_)) => {}
                Err(RunError::ReconcilerFailed(error, model)) => {
                    tracing::warn!(%model, %error, "a reconcile failed; trying again");
                }
                Err(error) => tracing::warn!(%error, "the queue of reconciles"),
            }
        })
        .await;
}

fn error_policy(object: Arc<Guarded>, error: &Error, context: Arc<Context>) -> Action {
    context.metrics.errors.with_label_values(&[error.category()]).inc();
    let mut states = context.states.lock().unwrap_or_else(PoisonError::into_inner);
    let state = states.entry(ObjectRef::from_obj(object.as_ref())).or_default();
    state.failures = state.failures.saturating_add(1);
    let pause = RETRY_FIRST.saturating_mul(1 << state.failures.saturating_sub(1).min(10));
    Action::requeue(pause.min(RETRY_MAX))
}

async fn reconcile(guarded: Arc<Guarded>, context: Arc<Context>) -> Result<Action, Error> {
    let key = ObjectRef::from_obj(guarded.as_ref());
    let Ok(_turn) = context.turns.acquire().await else { return Ok(Action::await_change()) };
    // What came while it waited is seen too.
    let Some(guarded) = context.caches.models.get(&key) else { return Ok(Action::await_change()) };
    let began = Instant::now();
    context.metrics.reconciles.inc();
    let object = match &guarded.0 {
        Ok(object) => object,
        Err(invalid) => {
            context.status.write_unreadable(&guarded.object_ref(&()), &invalid.error).await?;
            return Err(Error::Unreadable(invalid.error.clone()));
        }
    };
    let mut state = context.take(&key, object);
    let running = Reconcile { context: &context, object, state: &mut state }.run();
    let ended = tokio::time::timeout(RECONCILE_TIMEOUT, running).await;
    let result = ended.unwrap_or(Err(Error::TimedOut(RECONCILE_TIMEOUT)));
    if result.is_ok() {
        state.failures = 0;
    }
    context.put(key, state);
    context.metrics.duration.observe(began.elapsed().as_secs_f64());
    result
}

impl Context {
    /// Takes a model's memory out. No other reconcile of the same model runs meanwhile.
    fn take(&self, key: &ModelKey, object: &InferenceModel) -> ModelState {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = object.uid().unwrap_or_default();
        let failures = states.get(key).map_or(0, |state| state.failures);
        match states.remove(key) {
            Some(state) if state.uid == uid => state,
            // A new object of an old name has nothing to do with the old one.
            _ => {
                let scaling = ScalingState::resume(object.status.as_ref());
                ModelState { uid, scaling, failures, ..ModelState::default() }
            }
        }
    }

    fn put(&self, key: ModelKey, state: ModelState) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.insert(key, state);
        self.metrics.count(states.len());
    }

    /// Forgets the models that are no longer there.
    pub fn forget_gone(&self) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.retain(|key, _| {
            let there = self.caches.models.get(key).is_some();
            if !there && let Ok(model) = model_of(key) {
                self.wakes.disarm(&model);
                self.load.forget(&model);
                self.metrics.forget(&model);
                self.applier.forget(model.namespace.as_str(), &crate::names::objects(model.name.as_str()));
            }
            there
        });
        self.metrics.count(states.len());
    }
}

fn model_of(key: &ModelKey) -> Result<ModelRef, millrace_crds::names::NameError> {
    ModelRef::new(key.namespace.as_deref().unwrap_or_default(), &key.name)
}

/// The key of a model that was woken.
pub fn key_of(model: &ModelRef) -> ModelKey {
    ObjectRef::<DeserializeGuard<InferenceModel>>::new(model.name.as_str()).within(model.namespace.as_str())
}

/// One reconcile of one model.
struct Reconcile<'a> {
    context: &'a Context,
    object: &'a InferenceModel,
    state: &'a mut ModelState,
}

impl Reconcile<'_> {
    async fn run(mut self) -> Result<Action, Error> {
        let (context, object) = (self.context, self.object);
        let plan = validate::plan(object, &context.config);
        if object.meta().deletion_timestamp.is_some() {
            return self.end(plan.as_ref()).await;
        }
        let plan = match plan {
            Ok(plan) => plan,
            Err(refusal) => return self.refused(&refusal).await,
        };
        if !plan.paused {
            let writes = finalize::ensure(&context.applier, &context.client, object).await?;
            context.metrics.writes.with_label_values(&["finalizer"]).inc_by(writes.into());
            self.provision(&plan).await;
        }
        self.arm(&plan).await;
        let facts = fetch::facts(&context.caches, &context.queue, &context.load, &plan.model).await;
        if matches!(facts.queue, Err(QueueError::Missing(_))) {
            // Somebody deleted it: made again at the next reconcile, which is soon.
            self.state.queue.checked = None;
        }
        let mut sized = self.state.scaling.size(&plan.sizing, &facts);
        if plan.paused {
            sized.replicas = sized.before;
        }
        let applied = if plan.paused { Ok(()) } else { self.apply(&plan, &facts, &sized).await };
        self.report(&plan, &facts, &sized, applied.as_ref().err()).await?;
        applied?;
        Ok(Action::requeue(self.pause(&plan, &facts, &sized)))
    }

    /// How long until the next look, if nothing happens.
    fn pause(&self, plan: &Plan, facts: &Facts, sized: &Sized) -> Duration {
        let idle = facts.queue.as_ref().is_ok_and(|reading| reading.left() == 0) && sized.replicas == 0;
        let follows = matches!(plan.sizing, Sizing::Follow(_));
        let pods = !facts.pods.is_empty();
        if idle && self.context.wakes.just_heard(&plan.model) {
            return WOKEN_PAUSE;
        }
        match (follows, idle, pods) {
            (true, false, _) | (_, _, true) => self.context.config.poll_active.0,
            _ => self.context.config.poll_idle.0,
        }
    }

    /// One step of the end. The status says what it waits for: workers that drain, or the broker.
    async fn end(&mut self, plan: Result<&Plan, &SpecRefusal>) -> Result<Action, Error> {
        let context = self.context;
        let Ok(model) = model_of(&ObjectRef::from_obj(&DeserializeGuard(Ok(self.object.clone())))) else {
            return Ok(Action::await_change());
        };
        context.wakes.disarm(&model);
        let finalizer = Finalizer {
            client: &context.client,
            applier: &context.applier,
            caches: &context.caches,
            queue: &context.queue,
        };
        let deleted = match finalizer.end(self.object, &model).await {
            Ok(End::Done) => return Ok(Action::await_change()),
            Ok(End::Draining) => Ok(()),
            Err(FinalizeError::Queue(error)) => Err(error),
            Err(error) => return Err(error.into()),
        };
        let facts = fetch::facts(&context.caches, &context.queue, &context.load, &model).await;
        let former = status::former(self.object, &self.state.written);
        self.write(&view_status(&StatusView {
            object: self.object,
            former: &former,
            plan,
            facts: Some(&facts),
            sized: None,
            queue: Some(&deleted),
            unapplied: None,
            scaling: &self.state.scaling,
        }))
        .await?;
        deleted.map_err(FinalizeError::Queue)?;
        Ok(Action::requeue(DRAIN_PAUSE))
    }

    async fn refused(&mut self, refusal: &SpecRefusal) -> Result<Action, Error> {
        let former = status::former(self.object, &self.state.written);
        let view = StatusView {
            object: self.object,
            former: &former,
            plan: Err(refusal),
            facts: None,
            sized: None,
            queue: None,
            unapplied: None,
            scaling: &self.state.scaling,
        };
        self.write(&view_status(&view)).await?;
        Ok(Action::requeue(REFUSED_PAUSE))
    }

    /// Compares streams and consumers with what they should be, when it is time. A failure is a condition,
    /// not an error: the workers that are there go on.
    async fn provision(&mut self, plan: &Plan) {
        let pods = fetch::pods(&self.context.caches, &plan.model);
        let rolled = workers::rolled(&pods, &build::revision(plan));
        let settings = build::hash(&(&plan.queue, &plan.results, rolled));
        if !self.state.queue.due(&settings, self.context.config.poll_queue.0) {
            return;
        }
        let repairs = self.context.queue.provision(&plan.model, &plan.queue, &plan.results, rolled).await;
        let known = self.state.queue.checked.as_ref().is_some_and(|(_, of)| *of == settings);
        for repair in repairs.iter().flatten() {
            tracing::info!(model = %plan.model, name = repair.name, what = repair.what, "the queue was put right");
            // A change of the spec is no drift; anything else that differs was somebody else's doing.
            if self.state.queue.made && (known || !repair.existed) {
                self.context.metrics.repairs.inc();
                let note = format!("{} {}", repair.name, repair.what);
                self.context.status.event(self.object, Reason::QueueRepaired, note, true).await;
            }
        }
        self.state.queue.made |= repairs.is_ok();
        self.state.queue.checked = Some((Instant::now(), settings));
        self.state.queue.result = Some(repairs.map(drop));
    }

    /// Listens for jobs of a sleeping model, before its queue is read.
    async fn arm(&self, plan: &Plan) {
        let existing = fetch::existing(&self.context.caches, &plan.model);
        let replicas = existing.deployment.and_then(|found| found.spec.as_ref()?.replicas).unwrap_or(0);
        match (&plan.sizing, replicas) {
            (Sizing::Follow(_), 0) => self.context.wakes.arm(&plan.model).await,
            _ => self.context.wakes.disarm(&plan.model),
        }
    }

    async fn apply(&mut self, plan: &Plan, facts: &Facts, sized: &Sized) -> Result<(), ApplyError> {
        let context = self.context;
        let count =
            |what: &str, writes: u32| context.metrics.writes.with_label_values(&[what]).inc_by(writes.into());
        if sized.replicas < sized.before
            && let Some(decision) = &sized.decision
        {
            count("mark", context.applier.mark(&facts.pods, &decision.delete_first).await?);
        }
        let mut resources = build::build(plan, sized.replicas);
        let monitor = resources.pod_monitor.take().filter(|_| !facts.pod_monitors_undefined);
        let version = facts.existing.deployment.as_ref().and_then(|found| found.resource_version());
        count("objects", context.applier.apply(resources, &facts.existing, &plan.uid).await?);
        if sized.replicas != sized.before {
            self.resized(plan, sized, version, facts.at_ms).await;
        }
        let owner = (plan.model.namespace.as_str(), plan.uid.as_str());
        count("objects", context.applier.monitor(monitor.as_ref(), &facts.existing, owner).await?);
        Ok(())
    }

    /// Notes and tells that the number of workers was changed, over a version of the Deployment.
    async fn resized(&mut self, plan: &Plan, sized: &Sized, version: Option<String>, at_ms: u64) {
        self.state.scaling.made(sized.replicas, version, at_ms);
        let Some(decision) = &sized.decision else { return };
        tracing::info!(model = %plan.model, sentence = decision.sentence, "the number of workers changes");
        self.context.metrics.decided(decision);
        let up = sized.replicas > sized.before;
        let reason = if up { Reason::ScalingUp } else { Reason::ScalingDown };
        self.context.status.event(self.object, reason, decision.sentence.clone(), false).await;
    }

    async fn report(
        &mut self,
        plan: &Plan,
        facts: &Facts,
        sized: &Sized,
        unapplied: Option<&ApplyError>,
    ) -> Result<(), Error> {
        let former = status::former(self.object, &self.state.written);
        let view = StatusView {
            object: self.object,
            former: &former,
            plan: Ok(plan),
            facts: Some(facts),
            sized: Some(sized),
            queue: self.state.queue.result.as_ref(),
            unapplied,
            scaling: &self.state.scaling,
        };
        let status = view_status(&view);
        let reading = facts.queue.as_ref().ok();
        self.context.metrics.show(&plan.model, sized.replicas, status.ready_replicas, reading);
        let warning = |status: &millrace_crds::model::status::InferenceModelStatus| {
            status.scaling.as_ref().and_then(|scaling| scaling.warning.clone())
        };
        if let Some(text) = warning(&status)
            && warning(&former).is_none()
        {
            self.context.status.event(self.object, Reason::ShortIdle, text, true).await;
        }
        self.write(&status).await
    }

    async fn write(
        &mut self,
        status: &millrace_crds::model::status::InferenceModelStatus,
    ) -> Result<(), Error> {
        let writes = self.context.status.write(self.object, status.clone(), &mut self.state.written).await?;
        self.context.metrics.writes.with_label_values(&["status"]).inc_by(writes.into());
        Ok(())
    }
}

fn view_status(view: &StatusView<'_>) -> millrace_crds::model::status::InferenceModelStatus {
    status::status(view, Timestamp::now())
}
