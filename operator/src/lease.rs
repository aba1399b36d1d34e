//! Leader election by a Lease: one operator works, the others wait.
//!
//! The holder renews every 2 s and gives up when it could not for 10 s; others take over when they saw no
//! renewal for 15 s by their own clock. So there is never a moment with two holders, unless a process is frozen
//! for longer than the difference; server-side apply with fixed names makes even that harmless. The Lease is
//! given back on exit, so that the next one starts at once.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};

/// After this time without a renewal others take over.
const DURATION: Duration = Duration::from_secs(15);
/// After this time without a renewal the holder gives up.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two tries.
const RETRY: Duration = Duration::from_secs(2);
/// How long one request may take: well within the deadline.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);

/// The Lease, as one candidate sees it.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The version seen last, and when it was seen first.
    seen: Option<(Option<String>, Instant)>,
}

impl Election {
    /// A candidate.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            seen: None,
        }
    }

    /// Waits until the Lease is held.
    pub async fn acquire(&mut self) {
        loop {
            match self.try_once().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(lease = self.name, %error, "the Lease cannot be taken; trying again")
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Renews until that fails for too long.
    pub async fn hold(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < RENEW_DEADLINE {
            tokio::time::sleep(RETRY).await;
            match self.try_once().await {
                Ok(true) => renewed = Instant::now(),
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(lease = self.name, %error, "the Lease is not renewed; trying again")
                }
            }
        }
    }

    /// Gives the Lease back, if it is held.
    pub async fn release(&mut self) {
        let released = async {
            let Some(mut lease) = self.api.get_opt(&self.name).await? else { return Ok(()) };
            if holder(&lease) != Some(self.identity.as_str()) {
                return Ok(());
            }
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = None;
                spec.lease_duration_seconds = Some(1);
                spec.renew_time = Some(MicroTime(Timestamp::now()));
            }
            self.api.replace(&self.name, &PostParams::default(), &lease).await.map(drop)
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, released).await {
            Ok(Ok(())) => tracing::info!("the Lease is given back"),
            Ok(Err(error)) => tracing::warn!(%error, "the Lease is not given back; it runs out by itself"),
            Err(_) => {
                tracing::warn!("the Lease is not given back, for want of an answer; it runs out by itself")
            }
        }
    }

    async fn try_once(&mut self) -> anyhow::Result<bool> {
        let trying = async {
            let Some(lease) = self.api.get_opt(&self.name).await? else { return self.create().await };
            let version = lease.resource_version();
            if self.seen.as_ref().is_none_or(|(seen, _)| *seen != version) {
                self.seen = Some((version, Instant::now()));
            }
            let age = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
            if !may_take(&lease, &self.identity, age) {
                return Ok(false);
            }
            self.take(lease).await
        };
        tokio::time::timeout(REQUEST_TIMEOUT, trying).await?
    }

    async fn create(&self) -> anyhow::Result<bool> {
        let lease = Lease {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
            spec: Some(self.spec(None)),
        };
        match self.api.create(&PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the Lease over the version that was read; another one who was faster wins.
    async fn take(&self, mut lease: Lease) -> anyhow::Result<bool> {
        let before = lease.spec.take();
        lease.spec = Some(self.spec(before.as_ref()));
        match self.api.replace(&self.name, &PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let mine = before.is_some_and(|spec| spec.holder_identity.as_deref() == Some(&self.identity));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: if mine { before.and_then(|s| s.acquire_time.clone()) } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(if mine { transitions } else { transitions.saturating_add(1) }),
            ..LeaseSpec::default()
        }
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|name| !name.is_empty())
}

/// Whether a candidate may write a Lease whose version it has seen for `age`.
fn may_take(lease: &Lease, identity: &str, age: Duration) -> bool {
    let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or(0);
    let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    match holder(lease) {
        None => true,
        Some(name) => name == identity || age > duration,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_only_when_it_is_free_or_silent() {
        let lease = |holder: &str| Lease {
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.into()),
                lease_duration_seconds: Some(15),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        };
        let (young, old) = (Duration::from_secs(14), Duration::from_secs(16));
        assert!(may_take(&lease(""), "a", young));
        assert!(may_take(&Lease::default(), "a", young));
        assert!(may_take(&lease("a"), "a", young));
        assert!(!may_take(&lease("b"), "a", young));
        assert!(may_take(&lease("b"), "a", old));
    }
}
