//! Weighted fair share of a model's workers between tenants. Pure: time comes in as an argument.
//!
//! The queue is first in, first out: who comes behind another tenant's backlog waits for all of it. So while several
//! tenants use a model, its gateways hold jobs back, so that no more are published than keep the workers busy, and a
//! job that is published starts soon. How many that is follows from what outcomes say: of the jobs in the queue and at
//! the workers, the part `run / (wait + run)` runs (Little's law). They are divided among tenants by max-min fairness:
//! nobody gets more than it asks for, and what is left goes to those who ask for more, by weight. Within a gateway
//! the tenants that are below their part take turns, each as often as its weight says (deficit round robin over jobs).
//!
//! The gateways tell each other four times a second what each tenant has and asks for. One tenant alone is never held
//! back: its backlog is in the queue, where the autoscaler sees it.

pub mod desk;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long a tenant counts after its last job.
const ACTIVE_TIME: Duration = Duration::from_secs(60);
/// How long another gateway's report counts.
const REPORT_TIME: Duration = Duration::from_secs(3);
/// Fewest jobs of all gateways that are published.
const WINDOW_MIN: f64 = 4.0;
/// Most of them.
const WINDOW_MAX: f64 = 1e6;
/// A wait in the queue that is not worth holding jobs back for, in milliseconds.
const WAIT_MIN_MS: f64 = 2.0;
/// The part of a job's run that it may wait in the queue.
const WAIT_PART: f64 = 0.03;
/// By how much the window grows in a tick at most.
const GROWTH: f64 = 1.03;
/// How much of what was measured in a tick counts.
const BUSY_PART: f64 = 0.25;
/// Most jobs of one model that one gateway holds back, and of one tenant.
const HELD_MAX: usize = 2048;
const HELD_OF_TENANT_MAX: usize = 1024;
/// Most tenants in a report: those with the most jobs.
const TENANTS_MAX: usize = 256;

/// What a tenant has and asks for at one gateway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct TenantDemand {
    /// Jobs that are published and have no outcome yet.
    pub published: u64,
    /// Jobs that are held back.
    pub held: u64,
    /// Its weight.
    pub weight: u32,
}

/// What a gateway tells the others of one model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShareReport {
    /// Which gateway.
    pub gateway: String,
    /// By the hash of their names.
    pub tenants: BTreeMap<String, TenantDemand>,
    /// The most jobs that were published at once since the last report.
    #[serde(default)]
    pub published: u64,
    /// Outcomes since the last report.
    pub finished: u64,
    /// The sum of their waits in the queue, in milliseconds.
    pub waited_ms: f64,
    /// The sum of their runs, in milliseconds.
    pub ran_ms: f64,
}

/// What is to be done with a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// Publish it.
    Go,
    /// Hold it back, under this number.
    Hold(u64),
    /// There is no room for it, not even here.
    Full,
}

#[derive(Debug, Default)]
struct Tenant {
    weight: u32,
    published: u64,
    held: VecDeque<u64>,
    /// Jobs that it may publish in this turn.
    deficit: u32,
    last_job: Duration,
}

/// The share of one model at one gateway.
#[derive(Debug)]
pub struct FairShare {
    gateway: String,
    tenants: BTreeMap<String, Tenant>,
    others: BTreeMap<String, (Duration, ShareReport)>,
    window: f64,
    /// Jobs that a tenant of weight 1 may have published; infinite where there are no two.
    level: f64,
    /// Jobs that one of weight 1 may have published whatever the others have.
    floor: f64,
    /// Jobs that are published: here, and at the other gateways as they said last.
    published: u64,
    published_elsewhere: u64,
    /// The most that were published since the window was last changed.
    peak: u64,
    /// Jobs that ran at once lately, at all workers, by what outcomes say.
    busy: f64,
    adapted_at: Duration,
    next_number: u64,
    finished: u64,
    waited_ms: f64,
    ran_ms: f64,
    /// What was measured since the window was last changed, of all gateways.
    seen: (u64, f64, f64),
    /// Whose turn it is.
    turn: Option<String>,
}

impl FairShare {
    /// Of a gateway that has published nothing yet.
    pub fn new(gateway: &str) -> Self {
        Self {
            gateway: gateway.to_owned(),
            tenants: BTreeMap::new(),
            others: BTreeMap::new(),
            window: WINDOW_MAX,
            level: f64::INFINITY,
            floor: f64::INFINITY,
            published: 0,
            published_elsewhere: 0,
            peak: 0,
            busy: 0.0,
            adapted_at: Duration::ZERO,
            next_number: 0,
            finished: 0,
            waited_ms: 0.0,
            ran_ms: 0.0,
            seen: (0, 0.0, 0.0),
            turn: None,
        }
    }

    /// A job comes.
    pub fn offer(&mut self, now: Duration, tenant: &str, weight: u32) -> Offer {
        let all_held = self.held();
        let own = self.tenants.entry(tenant.to_owned()).or_default();
        (own.weight, own.last_job) = (weight.max(1), now);
        let held = own.held.len();
        if held == 0 && self.may_publish(tenant, 1) {
            self.tenant(tenant).published += 1;
            self.count();
            return Offer::Go;
        }
        if all_held >= HELD_MAX || held >= HELD_OF_TENANT_MAX {
            return Offer::Full;
        }
        self.next_number += 1;
        let number = self.next_number;
        self.tenant(tenant).held.push_back(number);
        Offer::Hold(number)
    }

    fn count(&mut self) {
        self.published += 1;
        self.peak = self.peak.max(self.published);
    }

    fn tenant(&mut self, tenant: &str) -> &mut Tenant {
        self.tenants.entry(tenant.to_owned()).or_default()
    }

    /// A job that was held back is not wanted any more.
    pub fn leave(&mut self, tenant: &str, number: u64) {
        self.tenant(tenant).held.retain(|held| *held != number);
    }

    /// A job that was published is over; how long it waited and ran, where its outcome says so.
    pub fn finished(&mut self, now: Duration, tenant: &str, times_ms: Option<(f64, f64)>) {
        self.published = self.published.saturating_sub(1);
        let own = self.tenant(tenant);
        own.published = own.published.saturating_sub(1);
        own.last_job = now;
        if let Some((waited, ran)) = times_ms
            && waited.is_finite()
            && ran.is_finite()
        {
            self.finished += 1;
            self.waited_ms += waited.max(0.0);
            self.ran_ms += ran.max(0.0);
        }
    }

    /// Another gateway reports.
    pub fn hear(&mut self, now: Duration, report: ShareReport) {
        if report.gateway == self.gateway {
            return;
        }
        self.measure(report.finished, report.waited_ms, report.ran_ms);
        self.others.insert(report.gateway.clone(), (now, report));
        self.sum_up();
    }

    fn sum_up(&mut self) {
        let reports = self.others.values();
        self.published_elsewhere = reports.fold(0, |sum, (_, report)| sum.saturating_add(report.published));
    }

    fn measure(&mut self, finished: u64, waited_ms: f64, ran_ms: f64) {
        let (count, waited, ran) = &mut self.seen;
        (*count, *waited, *ran) = (*count + finished, *waited + waited_ms, *ran + ran_ms);
    }

    /// Time passes: the window follows what was measured. Gives the report for the others.
    pub fn tick(&mut self, now: Duration) -> ShareReport {
        self.others.retain(|_, (heard, _)| *heard + REPORT_TIME >= now);
        self.sum_up();
        self.tenants.retain(|_, tenant| {
            tenant.published > 0 || !tenant.held.is_empty() || tenant.last_job + ACTIVE_TIME >= now
        });
        let mut tenants: Vec<(String, TenantDemand)> = self
            .tenants
            .iter()
            .map(|(name, tenant)| {
                let (published, held) = (tenant.published, tenant.held.len() as u64);
                (name.clone(), TenantDemand { published, held, weight: tenant.weight })
            })
            .collect();
        tenants.sort_by_key(|(_, demand)| std::cmp::Reverse(demand.published + demand.held));
        tenants.truncate(TENANTS_MAX);
        let (finished, waited_ms, ran_ms) = (
            std::mem::take(&mut self.finished),
            std::mem::take(&mut self.waited_ms),
            std::mem::take(&mut self.ran_ms),
        );
        self.measure(finished, waited_ms, ran_ms);
        let peak = self.peak.max(self.published);
        self.adapt(now);
        let gateway = self.gateway.clone();
        let tenants = tenants.into_iter().collect();
        ShareReport { gateway, tenants, published: peak, finished, waited_ms, ran_ms }
    }

    /// The window that keeps the workers busy, and no more, and how it is divided.
    fn adapt(&mut self, now: Duration) {
        let (count, waited, ran) = std::mem::take(&mut self.seen);
        let elapsed = now.saturating_sub(self.adapted_at).as_secs_f64() * 1e3;
        self.adapted_at = now;
        let busy = ran / elapsed.max(1.0);
        let peak = std::mem::replace(&mut self.peak, self.published);
        self.busy += (busy - self.busy) * BUSY_PART;
        let demands = self.demands();
        if demands.len() < 2 {
            (self.window, self.level, self.floor) = (WINDOW_MAX, f64::INFINITY, f64::INFINITY);
            return;
        }
        let held: u64 = demands.values().map(|demand| demand.held).sum();
        // Nobody was held back until now.
        let mut window =
            if self.level.is_finite() { self.window } else { (peak + self.published_elsewhere + 1) as f64 };
        if count > 0 {
            let (wait, run) = (waited / count as f64, ran / count as f64);
            let goal = (run * WAIT_PART).max(WAIT_MIN_MS);
            if wait > goal {
                window = window.min(self.busy * (run + goal) / run.max(1.0) + 0.5);
            } else if held > 0 {
                window = window * GROWTH + 0.25;
            }
        }
        let window = window.clamp(WINDOW_MIN, WINDOW_MAX);
        let weights: f64 = demands.values().map(|demand| f64::from(demand.weight.max(1))).sum();
        (self.level, self.floor, self.window) = (level_of(&demands, window), window / weights, window);
    }

    /// What each tenant has and asks for, at all gateways.
    fn demands(&self) -> BTreeMap<&str, TenantDemand> {
        let mut demands: BTreeMap<&str, TenantDemand> = BTreeMap::new();
        for (name, tenant) in &self.tenants {
            let demand = demands.entry(name).or_default();
            demand.published += tenant.published;
            demand.held += tenant.held.len() as u64;
            demand.weight = demand.weight.max(tenant.weight);
        }
        for (_, report) in self.others.values() {
            for (name, other) in &report.tenants {
                let demand = demands.entry(name).or_default();
                demand.published = demand.published.saturating_add(other.published);
                demand.held = demand.held.saturating_add(other.held);
                demand.weight = demand.weight.max(other.weight);
            }
        }
        demands
    }

    /// Whether a tenant may publish a job here; `more` jobs of its demand are not held yet.
    fn may_publish(&self, tenant: &str, more: u64) -> bool {
        let Some(own) = self.tenants.get(tenant).filter(|_| self.level.is_finite()) else { return true };
        let here = own.published + own.held.len() as u64 + more;
        let reports = self.others.values().filter_map(|(_, report)| report.tenants.get(tenant));
        let elsewhere: u64 = reports.map(|other| other.published.saturating_add(other.held)).sum();
        // Of its share the part that is asked for here.
        let part = here as f64 / here.saturating_add(elsewhere).max(1) as f64;
        let (wanted, weight) = ((own.published + 1) as f64, f64::from(own.weight) * part);
        let all = self.published.saturating_add(self.published_elsewhere);
        wanted <= (self.floor * weight).max(1.0)
            || (wanted <= self.level * weight + 0.5 && (all as f64) < self.window)
    }

    /// The jobs that may go now, each with its tenant.
    pub fn release(&mut self) -> Vec<(String, u64)> {
        let mut released = Vec::new();
        let mut names: Vec<String> =
            self.tenants.iter().filter(|(_, t)| !t.held.is_empty()).map(|(name, _)| name.clone()).collect();
        // The turn goes on where it ended.
        if let Some(turn) = &self.turn {
            let at = names.partition_point(|name| name <= turn);
            names.rotate_left(at);
        }
        while !names.is_empty() {
            names.retain(|name| {
                let weight = self.tenants.get(name).map_or(1, |tenant| tenant.weight);
                self.tenant(name).deficit = weight;
                while self.tenant(name).deficit > 0 && self.may_publish(name, 0) {
                    let own = self.tenant(name);
                    let Some(number) = own.held.pop_front() else { return false };
                    own.deficit -= 1;
                    own.published += 1;
                    self.count();
                    released.push((name.clone(), number));
                    self.turn = Some(name.clone());
                }
                let own = self.tenant(name);
                own.deficit == 0 && !own.held.is_empty()
            });
        }
        released
    }

    /// Jobs that are held back here.
    pub fn held(&self) -> usize {
        self.tenants.values().map(|tenant| tenant.held.len()).sum()
    }

    /// Whether nothing is known of any tenant.
    pub fn is_idle(&self) -> bool {
        self.tenants.is_empty() && self.others.is_empty()
    }
}

/// Weighted max-min fairness: how many jobs a tenant of weight 1 may have published. Those who ask for less get what
/// they ask for, and the rest is divided among the others.
fn level_of(demands: &BTreeMap<&str, TenantDemand>, window: f64) -> f64 {
    let need = |demand: &TenantDemand| demand.published.saturating_add(demand.held) as f64;
    let mut needs: Vec<(f64, f64)> =
        demands.values().map(|demand| (need(demand), f64::from(demand.weight.max(1)))).collect();
    needs.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let mut weights: f64 = needs.iter().map(|(_, weight)| weight).sum();
    let mut left = window;
    let mut level = window;
    for (need, weight) in needs {
        level = left / weights;
        if need > level * weight {
            break;
        }
        left -= need;
        weights -= weight;
    }
    level
}

#[cfg(test)]
mod tests;
