//! Holds jobs back until their tenant's share lets them go, and tells the other gateways how things stand.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Client;
use futures::StreamExt;
use hex::ToHex;
use millrace_crds::names::ModelRef;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

use crate::http::caller::Caller;
use crate::http::error::{ApiCode, ApiError};
use crate::http::fair::{FairShare, Offer, ShareReport};

/// Pause between two reports.
const TICK: Duration = Duration::from_millis(250);
/// Longest time for which a job is held back.
const HOLD_TIME: Duration = Duration::from_secs(30);
/// Most models that are shared at once; more are not.
const MODELS_MAX: usize = 4096;
/// Hex digits of a tenant's name in a report: 64 bits.
const TENANT_DIGITS: usize = 16;
/// Largest report of another gateway, in bytes.
const REPORT_BYTES_MAX: usize = 64 << 10;

/// One model at this gateway.
#[derive(Debug)]
struct ModelDesk {
    share: FairShare,
    held: HashMap<u64, oneshot::Sender<FairPlace>>,
}

/// All models at this gateway.
#[derive(Debug)]
pub struct FairDesk {
    client: Client,
    gateway: String,
    began: Instant,
    models: Mutex<HashMap<ModelRef, ModelDesk>>,
}

/// A job's place among those that are published, until this is dropped.
#[derive(Debug)]
pub struct FairPlace {
    desk: Arc<FairDesk>,
    model: ModelRef,
    tenant: String,
    times_ms: Option<(f64, f64)>,
}

impl FairPlace {
    /// How long the job waited in the queue and ran, in milliseconds.
    pub fn took(&mut self, waited_ms: f64, ran_ms: f64) {
        self.times_ms = Some((waited_ms, ran_ms));
    }
}

impl Drop for FairPlace {
    fn drop(&mut self) {
        self.desk.with(&self.model, |desk, now| {
            desk.share.finished(now, &self.tenant, self.times_ms);
        });
        self.desk.release(&self.model);
    }
}

/// A job that is held back, until this is dropped.
struct Holding<'a> {
    desk: &'a FairDesk,
    model: &'a ModelRef,
    tenant: &'a str,
    number: u64,
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.desk.with(self.model, |desk, _| {
            // Gone already where it was let go.
            if desk.held.remove(&self.number).is_some() {
                desk.share.leave(self.tenant, self.number);
            }
        });
    }
}

/// The subject of the reports of a model.
fn subject(model: &ModelRef) -> String {
    format!("millrace.share.{}.{}", model.namespace, model.name)
}

fn model_of(subject: &str) -> Option<ModelRef> {
    let (namespace, name) = subject.strip_prefix("millrace.share.")?.split_once('.')?;
    ModelRef::new(namespace, name).ok()
}

impl FairDesk {
    /// Of a gateway with this id.
    pub fn new(client: Client, gateway: String) -> Arc<Self> {
        Arc::new(Self { client, gateway, began: Instant::now(), models: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ModelRef, ModelDesk>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, model: &ModelRef, work: impl FnOnce(&mut ModelDesk, Duration) -> T) -> Option<T> {
        let now = self.began.elapsed();
        let mut models = self.lock();
        if !models.contains_key(model) {
            if models.len() >= MODELS_MAX {
                return None;
            }
            let share = FairShare::new(&self.gateway);
            models.insert(model.clone(), ModelDesk { share, held: HashMap::new() });
        }
        models.get_mut(model).map(|desk| work(desk, now))
    }

    /// A place among the published jobs of a model, as soon as the caller's tenant may have one; `None` where nothing
    /// is shared, because everybody is the same to this gateway.
    ///
    /// # Errors
    /// [`ApiCode::RateLimitExceeded`] where the tenant has too many jobs held back, or one for too long.
    pub async fn join(
        self: &Arc<Self>,
        model: &ModelRef,
        caller: &Caller,
        time: Duration,
    ) -> Result<Option<FairPlace>, ApiError> {
        if caller.tenant.is_empty() {
            return Ok(None);
        }
        let digits: String = Sha256::digest(&caller.tenant).encode_hex();
        let tenant = &digits[..TENANT_DIGITS];
        let (sender, released) = oneshot::channel();
        let offered = self.with(model, |desk, now| {
            let offer = desk.share.offer(now, tenant, caller.weight);
            if let Offer::Hold(number) = offer {
                desk.held.insert(number, sender);
            }
            offer
        });
        let number = match offered {
            None => return Ok(None),
            Some(Offer::Go) => return Ok(Some(self.place(model, tenant))),
            Some(Offer::Full) => return Err(over_share(model, "too many of its requests wait already")),
            Some(Offer::Hold(number)) => number,
        };
        let _holding = Holding { desk: self, model, tenant, number };
        match tokio::time::timeout(time.min(HOLD_TIME), released).await {
            Ok(Ok(place)) => Ok(Some(place)),
            _ => Err(over_share(model, "this request waited too long for its turn")),
        }
    }

    fn place(self: &Arc<Self>, model: &ModelRef, tenant: &str) -> FairPlace {
        FairPlace { desk: self.clone(), model: model.clone(), tenant: tenant.to_owned(), times_ms: None }
    }

    /// Lets go what may go.
    fn release(self: &Arc<Self>, model: &ModelRef) {
        let released = self.with(model, |desk, _| {
            let released = desk.share.release();
            released
                .into_iter()
                .filter_map(|(tenant, number)| Some((tenant, desk.held.remove(&number)?)))
                .collect()
        });
        let released: Vec<(String, oneshot::Sender<FairPlace>)> = released.unwrap_or_default();
        for (tenant, sender) in released {
            // Where nobody waits any more the place is dropped, and free again.
            let _ = sender.send(self.place(model, &tenant));
        }
    }

    /// Jobs that are held back.
    pub fn held(&self) -> usize {
        self.lock().values().map(|desk| desk.held.len()).sum()
    }

    /// Tells and hears reports for as long as the process lives.
    ///
    /// # Errors
    /// When the subscription cannot be made.
    pub async fn run(self: Arc<Self>) -> Result<(), async_nats::SubscribeError> {
        let mut reports = self.client.subscribe("millrace.share.*.*").await?;
        let hearing = self.clone();
        tokio::spawn(async move {
            while let Some(message) = reports.next().await {
                hearing.hear(&message);
            }
        });
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(TICK);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.tick().await;
            }
        });
        Ok(())
    }

    fn hear(&self, message: &async_nats::Message) {
        if message.payload.len() > REPORT_BYTES_MAX {
            return;
        }
        let report = serde_json::from_slice::<ShareReport>(&message.payload).ok();
        if let (Some(model), Some(report)) = (model_of(&message.subject), report) {
            self.with(&model, |desk, now| desk.share.hear(now, report));
        }
    }

    async fn tick(self: &Arc<Self>) {
        let now = self.began.elapsed();
        let mut reports: Vec<(ModelRef, ShareReport)> = Vec::new();
        self.lock().retain(|model, desk| {
            let report = desk.share.tick(now);
            if !report.tenants.is_empty() {
                reports.push((model.clone(), report));
            }
            !desk.share.is_idle()
        });
        for (model, report) in reports {
            self.release(&model);
            let body = serde_json::to_vec(&report).expect("our own types are JSON");
            // Best effort: the next one says it again.
            let _ = self.client.publish(subject(&model), body.into()).await;
        }
    }
}

fn over_share(model: &ModelRef, why: &str) -> ApiError {
    let message = format!("this tenant asks for more than its share of model {}: {why}", model.name);
    ApiError::new(ApiCode::RateLimitExceeded, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_a_models() {
        let model = ModelRef::new("team-a", "m").unwrap();
        assert_eq!(model_of(&subject(&model)), Some(model));
        for other in ["millrace.share.a", "millrace.share.a.b.c", "millrace.load.a.b", ""] {
            assert_eq!(model_of(other), None, "{other}");
        }
    }
}
