//! How much a key and a tenant may: requests and tokens in any minute, requests at once, tokens of batches.
//!
//! What was let in is counted in the broker, for all gateways together ([`window`], [`book`], [`subject`]). Tokens are
//! reserved by an [`estimate`] and corrected by what the outcome says. Where a caller has no limit nothing is counted.

pub mod book;
pub mod enqueued;
pub mod estimate;
pub mod set;
pub mod subject;
pub mod window;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::stream::{DiscardPolicy, StorageType};
use axum::http::{HeaderMap, HeaderValue, header};
use hex::ToHex;
use millrace_crds::names::ModelRef;
use sha2::{Digest, Sha256};

use crate::http::caller::Caller;
use crate::http::error::{ApiCode, ApiError};
use crate::http::limits::book::Claim;
use crate::http::limits::enqueued::EnqueuedTokens;
use crate::http::limits::set::{LimitSet, Limited};
use crate::http::limits::subject::{LimitSubject, TakenClaim};
use crate::http::limits::window::{Amounts, Shortage};
use crate::http::meters::GatewayMetrics;
use crate::http::state::{BucketForm, StateBucket, StateWrite};

/// Windows and enqueued tokens. In memory: a broker that starts anew begins a new minute.
const BUCKET: BucketForm = BucketForm {
    name: "MILLRACE_LIMITS",
    description: "What keys and tenants were let do, by all gateways",
    bytes_max: 16 << 20,
    discard: DiscardPolicy::New,
    storage: StorageType::Memory,
};
/// Most keys and tenants that are in use at one gateway within a minute.
const SUBJECTS_MAX: usize = 20_000;
/// Hex digits of a key's or tenant's name in the bucket: 128 bits.
const NAME_DIGITS: usize = 32;
/// How long the tokens of a batch are remembered after they were last set.
const ENQUEUED_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long the broker may take to count the tokens of a batch.
const ENQUEUE_TIMEOUT: Duration = Duration::from_secs(5);
/// Most tries to count them: each that fails means that another gateway counted.
const ENQUEUE_TRIES_MAX: u32 = 64;

/// The limits of all callers at one gateway.
#[derive(Debug)]
pub struct RateLimits {
    bucket: StateBucket,
    gateway: String,
    /// Those of a key that has none of its own.
    of_keys: LimitSet,
    /// Those of a tenant of which the key says none.
    of_tenants: LimitSet,
    subjects: Mutex<HashMap<String, Arc<LimitSubject>>>,
}

/// A request that its caller's limits let in.
#[derive(Debug, Default)]
pub struct RateTicket {
    taken: Vec<TakenClaim>,
}

impl RateTicket {
    /// What the request came to.
    pub fn settle(&mut self, actual: impl FnOnce() -> Amounts) {
        if self.taken.is_empty() {
            return;
        }
        let actual = actual();
        self.taken.iter_mut().for_each(|taken| taken.settle(actual));
    }
}

/// How a caller's limits stand, for the headers of an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RateStanding {
    /// Limit, what remains of it, and the seconds until all of it does.
    rates: [Option<(u64, u64, u64)>; 3],
    /// When to come again, where the request was refused.
    pub retry_after_s: Option<u64>,
}

impl RateStanding {
    fn add(&mut self, limits: &LimitSet, (used, reset_s): (Amounts, u64)) {
        for (index, limited) in Limited::RATES.into_iter().enumerate() {
            let Some(limit) = limits.get(limited) else { continue };
            let left = limit.saturating_sub(used[index]);
            // Of two limits the one that is nearer to its end is shown.
            if self.rates[index].is_none_or(|(_, least, _)| left < least) {
                self.rates[index] = Some((limit, left, if used[index] > 0 { reset_s } else { 0 }));
            }
        }
    }

    /// Writes OpenAI's headers; `tokens` are those of prompts or of answers, whichever is nearer to its end.
    pub fn write(&self, headers: &mut HeaderMap) {
        let [requests, input, output] = self.rates;
        let share = |(limit, left, _): (u64, u64, u64)| left as f64 / limit.max(1) as f64;
        let tokens = match (input, output) {
            (Some(input), Some(output)) if share(output) < share(input) => Some(output),
            (input, output) => input.or(output),
        };
        let all =
            [("requests", requests), ("tokens", tokens), ("input-tokens", input), ("output-tokens", output)];
        for (what, rate) in all {
            let Some((limit, left, reset_s)) = rate else { continue };
            let values = [
                ("limit", limit.to_string()),
                ("remaining", left.to_string()),
                ("reset", format!("{reset_s}s")),
            ];
            for (kind, value) in values {
                let name = header::HeaderName::try_from(format!("x-ratelimit-{kind}-{what}"));
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
        }
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
    }
}

/// A key or tenant of a caller, with its limits and its name in the bucket.
struct Limit {
    limits: LimitSet,
    name: String,
    /// In words.
    of: &'static str,
}

impl RateLimits {
    /// `gateway` is this gateway's id; the limits are those of keys and tenants that have none of their own.
    pub fn new(
        jetstream: Context,
        (gateway, replicas): (String, usize),
        (of_keys, of_tenants): (LimitSet, LimitSet),
    ) -> Self {
        let bucket = StateBucket::new(jetstream, BUCKET, replicas);
        Self { bucket, gateway, of_keys, of_tenants, subjects: Mutex::default() }
    }

    /// A caller's key and tenant.
    fn of(&self, caller: &Caller) -> [Limit; 2] {
        let name = |kind: &str, text: &str| {
            let digits: String = Sha256::digest(text).encode_hex();
            format!("{kind}.{}", &digits[..NAME_DIGITS])
        };
        let (key, tenant) = (caller.limits.or(self.of_keys), caller.tenant_limits.or(self.of_tenants));
        [
            Limit { limits: key, name: name("key", &caller.key), of: "this key" },
            Limit { limits: tenant, name: name("tenant", &caller.tenant), of: "this tenant" },
        ]
    }

    fn subject(&self, name: &str) -> Option<Arc<LimitSubject>> {
        let mut subjects = self.subjects.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(subject) = subjects.get(name) {
            return Some(subject.clone());
        }
        if subjects.len() >= SUBJECTS_MAX {
            subjects.retain(|_, subject| Arc::strong_count(subject) > 1 || !subject.is_idle());
        }
        if subjects.len() >= SUBJECTS_MAX {
            return None;
        }
        let subject = LimitSubject::new(name.to_owned(), self.bucket.clone(), &self.gateway);
        subjects.insert(name.to_owned(), subject.clone());
        Some(subject)
    }

    /// Lets a request in, which runs until its ticket is dropped. `standing` gets how the limits stand.
    ///
    /// # Errors
    /// [`ApiCode::RateLimitExceeded`]; [`ApiCode::Overloaded`] where more keys are in use than can be counted.
    pub async fn admit(
        &self,
        caller: &Caller,
        amounts: impl FnOnce() -> Amounts,
        (standing, metrics): (&mut RateStanding, &GatewayMetrics),
    ) -> Result<RateTicket, ApiError> {
        let limits = self.of(caller);
        let mut ticket = RateTicket::default();
        if !limits.iter().any(|limit| limit.limits.limits_requests()) {
            return Ok(ticket);
        }
        let amounts = amounts();
        for limit in limits.iter().filter(|limit| limit.limits.limits_requests()) {
            let Some(subject) = self.subject(&limit.name) else {
                let message = format!("more than {SUBJECTS_MAX} keys and tenants are in use at this gateway");
                return Err(ApiError::new(ApiCode::Overloaded, message));
            };
            let taken = subject.take(Claim::new(limit.limits, amounts)).await;
            standing.add(&limit.limits, subject.standing());
            match taken {
                Ok(taken) => ticket.taken.push(taken),
                Err(short) => {
                    // What another limit had let in does not count.
                    ticket.settle(|| [0; 3]);
                    metrics.limited(Some(short.limited));
                    standing.retry_after_s = Some(short.retry_after_s);
                    return Err(refused(limit.of, &short));
                }
            }
        }
        Ok(ticket)
    }

    /// Sets how many tokens a batch of a caller still has to come to; see [`EnqueuedTokens::set`].
    ///
    /// # Errors
    /// [`ApiCode::RateLimitExceeded`], [`ApiCode::BrokerUnavailable`].
    pub async fn enqueue(
        &self,
        caller: &Caller,
        model: &ModelRef,
        (batch, tokens): (&str, u64),
    ) -> Result<(), ApiError> {
        let [key, tenant] = self.of(caller);
        let limits: Vec<&Limit> =
            [&key, &tenant].into_iter().filter(|limit| limit.limits.batch_tokens.is_some()).collect();
        for (index, limit) in limits.iter().enumerate() {
            let counted = self.count(limit, model, (batch, tokens)).await;
            if let Err(error) = counted {
                // What another limit had let in does not count.
                for earlier in &limits[..index] {
                    self.count(earlier, model, (batch, 0)).await?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Gives back all tokens that a batch of a caller still had to come to.
    ///
    /// # Errors
    /// [`ApiCode::BrokerUnavailable`].
    pub async fn refund(&self, caller: &Caller, model: &ModelRef, batch: &str) -> Result<(), ApiError> {
        self.enqueue(caller, model, (batch, 0)).await
    }

    async fn count(
        &self,
        limit: &Limit,
        model: &ModelRef,
        (batch, tokens): (&str, u64),
    ) -> Result<(), ApiError> {
        let name = format!("batches.{}.{}.{}", limit.name, model.namespace, model.name);
        let away = |reason: String| {
            tracing::warn!(%reason, "the tokens of a batch cannot be counted");
            ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
        };
        let counting = async {
            for _ in 0..ENQUEUE_TRIES_MAX {
                let (mut enqueued, revision): (EnqueuedTokens, u64) =
                    self.bucket.read(&name).await.map_err(away)?;
                let before = enqueued.clone();
                let set = enqueued.set(batch, tokens, limit.limits.batch_tokens);
                set.map_err(|short| refused(limit.of, &short))?;
                if enqueued == before {
                    return Ok(());
                }
                let written = self.bucket.write(&name, &enqueued, revision, ENQUEUED_TTL).await;
                if let StateWrite::At(_) = written.map_err(away)? {
                    return Ok(());
                }
            }
            Err(away(format!("others wrote first {ENQUEUE_TRIES_MAX} times")))
        };
        let late = |_| Err(away("no answer in time".to_owned()));
        tokio::time::timeout(ENQUEUE_TIMEOUT, counting).await.unwrap_or_else(late)
    }
}

/// The refusal of a request that a limit does not let in.
fn refused(of: &str, short: &Shortage) -> ApiError {
    let Shortage { limited, limit, retry_after_s } = short;
    let what = match limited {
        Limited::Requests => format!("{limit} requests in a minute"),
        Limited::InputTokens => format!("{limit} tokens of prompts in a minute"),
        Limited::OutputTokens => format!("{limit} tokens of answers in a minute"),
        Limited::Concurrent => format!("{limit} requests at once"),
        Limited::BatchTokens => format!("{limit} tokens of batches of one model that are not done"),
    };
    let message = format!("{of} may have {what}; try again in {retry_after_s} s");
    ApiError::new(ApiCode::RateLimitExceeded, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_are_openais() {
        let limits = |requests, output_tokens| LimitSet {
            requests: Some(requests),
            input_tokens: Some(1_000),
            output_tokens,
            ..LimitSet::default()
        };
        let mut standing = RateStanding::default();
        standing.add(&limits(100, None), ([10, 0, 7], 31));
        standing.add(&limits(50, Some(400)), ([10, 100, 390], 61));
        standing.retry_after_s = Some(5);
        let mut headers = HeaderMap::new();
        standing.write(&mut headers);
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let three = |what: &str| {
            ["limit", "remaining", "reset"].map(|kind| text(&format!("x-ratelimit-{kind}-{what}")).to_owned())
        };
        assert_eq!(three("requests"), ["50", "40", "61s"]);
        assert_eq!(three("tokens"), ["400", "10", "61s"], "nearer to its end than 900 of 1000");
        assert_eq!(three("input-tokens"), ["1000", "900", "61s"]);
        assert_eq!(text("retry-after"), "5");
        let mut none = HeaderMap::new();
        RateStanding::default().write(&mut none);
        assert!(none.is_empty());
    }
}
