//! One gateway's side of a shared minute. Pure: time comes in as an argument, and what is exchanged with the broker is
//! a [`LimitRound`] that was applied or was not.
//!
//! A gateway lets in what its credit covers, and asks for the rest in a round: it reads the window, reports what it let
//! in and what that came to, takes what is asked for, and writes the window back if nobody else wrote in between. While
//! no round succeeds it lets in its own share alone: the limit divided by the gateways that were last seen. So a slow
//! broker neither opens the door nor closes it.

use std::collections::BTreeMap;

use crate::http::limits::set::{LimitSet, Limited};
use crate::http::limits::window::{Amounts, GatewayPart, SharedWindow, Shortage, WINDOW_S};

/// What was let in at a second, and what it came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correction {
    /// When it was let in, in Unix seconds.
    pub second: u64,
    /// As what.
    pub reserved: Amounts,
    /// What it was.
    pub actual: Amounts,
}

/// One request that waits for a round.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    /// Under these limits.
    pub limits: LimitSet,
    /// This much.
    pub amounts: Amounts,
}

impl Claim {
    /// A claim that an empty minute can grant: each amount is at most the limit.
    pub fn new(limits: LimitSet, amounts: Amounts) -> Self {
        let mut capped = amounts;
        for (amount, limited) in capped.iter_mut().zip(Limited::RATES) {
            *amount = (*amount).min(limits.get(limited).unwrap_or(u64::MAX));
        }
        Self { limits, amounts: capped }
    }
}

/// What one exchange with the broker carries.
#[derive(Debug, Default)]
pub struct LimitRound {
    spent: BTreeMap<u64, Amounts>,
    corrections: Vec<Correction>,
    running: u64,
    lately: Amounts,
}

/// What a round brought.
#[derive(Debug)]
pub struct LimitRoundEnd {
    /// The window to be written.
    pub window: SharedWindow,
    /// What became of the claims, in their order.
    pub taken: Vec<Result<(), Shortage>>,
}

/// The book of one gateway about one key or tenant.
#[derive(Debug)]
pub struct GatewayBook {
    gateway: String,
    limits: LimitSet,
    credit: Amounts,
    places: u64,
    spent: BTreeMap<u64, Amounts>,
    /// What the round that is under way reports.
    reporting: BTreeMap<u64, Amounts>,
    corrections: Vec<Correction>,
    running: u64,
    reported_running: u64,
    own: SharedWindow,
    seen: SharedWindow,
    active_at: u64,
}

impl GatewayBook {
    /// Of a gateway that has let nothing in yet.
    pub fn new(gateway: &str, now: u64) -> Self {
        Self {
            gateway: gateway.to_owned(),
            limits: LimitSet::default(),
            credit: [0; 3],
            places: 0,
            spent: BTreeMap::new(),
            reporting: BTreeMap::new(),
            corrections: Vec::new(),
            running: 0,
            reported_running: 0,
            own: SharedWindow::default(),
            seen: SharedWindow::default(),
            active_at: now,
        }
    }

    /// Lets a request in that the credit covers; `false` where a round is needed.
    pub fn spend(&mut self, now: u64, claim: &Claim) -> bool {
        let covered = claim.limits == self.limits
            && (claim.limits.concurrent.is_none() || self.places > 0)
            && Limited::RATES
                .into_iter()
                .enumerate()
                .all(|(i, one)| claim.limits.get(one).is_none() || self.credit[i] >= claim.amounts[i]);
        if covered {
            for (credit, amount) in self.credit.iter_mut().zip(claim.amounts) {
                *credit = credit.saturating_sub(amount);
            }
            self.places = self.places.saturating_sub(1);
            self.let_in(now, claim.amounts);
        }
        covered
    }

    /// Lets a request in, or not, without the broker: within this gateway's share of the limit.
    ///
    /// # Errors
    /// [`Shortage`], with the whole limit.
    pub fn alone(&mut self, now: u64, claim: &Claim) -> Result<(), Shortage> {
        self.own.expire(now);
        let share = claim.limits.part(self.seen.gateways());
        let amounts = Claim::new(share, claim.amounts).amounts;
        let mut own = self.own.clone();
        let running = GatewayPart { seen: now, running: self.running, ..GatewayPart::default() };
        own.set_part(&self.gateway, running);
        own.take(now, &share, &self.gateway, amounts).map_err(|short| Shortage {
            limit: claim.limits.get(short.limited).unwrap_or(short.limit),
            ..short
        })?;
        self.let_in(now, claim.amounts);
        Ok(())
    }

    fn let_in(&mut self, now: u64, amounts: Amounts) {
        // While no round succeeds, what no longer counts need not be reported either.
        self.spent.retain(|second, _| second + WINDOW_S >= now);
        self.corrections.retain(|correction| correction.second + WINDOW_S >= now);
        add(&mut self.spent, now, amounts);
        self.own.charge(now, now, amounts);
        self.running += 1;
        self.active_at = now;
    }

    /// A request that was let in is over.
    pub fn end(&mut self, now: u64) {
        self.running = self.running.saturating_sub(1);
        self.active_at = now;
    }

    /// What a request that was let in came to.
    pub fn correct(&mut self, now: u64, correction: Correction) {
        if correction.reserved == correction.actual {
            return;
        }
        self.active_at = now;
        self.own.correct(correction.second, correction.reserved, correction.actual);
        match self.spent.get_mut(&correction.second) {
            // Not reported yet.
            Some(spent) => {
                for (i, sum) in spent.iter_mut().enumerate() {
                    *sum = sum.saturating_sub(correction.reserved[i]).saturating_add(correction.actual[i]);
                }
            }
            None => self.corrections.push(correction),
        }
    }

    /// Whether there is something that the others should know soon.
    pub fn is_due(&self) -> bool {
        !self.spent.is_empty()
            || !self.corrections.is_empty()
            || self.credit != [0; 3]
            || self.places > 0
            || self.running != self.reported_running
    }

    /// Whether the book may be forgotten: nothing runs and nothing was let in for a minute.
    pub fn is_idle(&self, now: u64) -> bool {
        !self.is_due() && self.running == 0 && self.active_at + WINDOW_S < now
    }

    /// Whether requests run, of which the others must hear now and then.
    pub fn runs(&self) -> bool {
        self.running > 0
    }

    /// Begins a round: the credit is given back, and all that was not reported goes with it.
    pub fn begin(&mut self) -> LimitRound {
        let spent = std::mem::take(&mut self.spent);
        self.reporting.clone_from(&spent);
        (self.credit, self.places) = ([0; 3], 0);
        let mut lately = [0; 3];
        for amounts in spent.values() {
            for (sum, amount) in lately.iter_mut().zip(amounts) {
                *sum += amount;
            }
        }
        LimitRound {
            spent,
            corrections: std::mem::take(&mut self.corrections),
            running: self.running,
            lately,
        }
    }

    /// What the window becomes by a round in which these claims are made.
    pub fn apply(
        &self,
        round: &LimitRound,
        mut window: SharedWindow,
        now: u64,
        claims: &[Claim],
    ) -> LimitRoundEnd {
        window.expire(now);
        for (second, amounts) in &round.spent {
            window.charge(now, *second, *amounts);
        }
        for correction in &round.corrections {
            window.correct(correction.second, correction.reserved, correction.actual);
        }
        let part = GatewayPart { seen: now, running: round.running, ..GatewayPart::default() };
        window.set_part(&self.gateway, part);
        let mut lately = round.lately;
        let mut taken = Vec::with_capacity(claims.len());
        for claim in claims {
            let one = window.take(now, &claim.limits, &self.gateway, claim.amounts);
            if one.is_ok() {
                for (sum, amount) in lately.iter_mut().zip(claim.amounts) {
                    *sum += amount;
                }
            }
            taken.push(one);
        }
        let limits = claims.last().map_or(self.limits, |claim| claim.limits);
        window.lend(&limits, &self.gateway, lately);
        LimitRoundEnd { window, taken }
    }

    /// The round is in the broker.
    pub fn commit(&mut self, now: u64, claims: &[Claim], end: &LimitRoundEnd) {
        let granted = claims.iter().zip(&end.taken).filter(|(_, taken)| taken.is_ok());
        for (claim, _) in granted {
            self.own.charge(now, now, claim.amounts);
            self.running += 1;
            self.active_at = now;
        }
        self.own.expire(now);
        let part = end.window.part(&self.gateway);
        (self.credit, self.places) = (part.credit, part.places);
        self.reported_running = part.running;
        self.limits = claims.last().map_or(self.limits, |claim| claim.limits);
        self.seen = end.window.clone();
        self.reporting.clear();
    }

    /// The round was not written: all that it carried is still to be reported. The credit is lost, and whoever took it
    /// away by not answering is asked for a new one.
    pub fn undo(&mut self, round: LimitRound) {
        self.reporting.clear();
        for (second, amounts) in round.spent {
            add(&mut self.spent, second, amounts);
        }
        self.corrections.splice(0..0, round.corrections);
    }

    /// How the minute stands: what was let in by all as far as is known, and the seconds until none of it counts.
    pub fn standing(&self, now: u64) -> (Amounts, u64) {
        let mut window = self.seen.clone();
        for (second, amounts) in self.spent.iter().chain(&self.reporting) {
            window.charge(now, *second, *amounts);
        }
        window.expire(now);
        (window.used(), window.reset_s(now))
    }
}

fn add(spent: &mut BTreeMap<u64, Amounts>, second: u64, amounts: Amounts) {
    let sums = spent.entry(second).or_default();
    for (sum, amount) in sums.iter_mut().zip(amounts) {
        *sum = sum.saturating_add(amount);
    }
}

#[cfg(test)]
mod tests;
