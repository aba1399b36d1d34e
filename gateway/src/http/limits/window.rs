//! The minute of one key or tenant, as all gateways share it. Pure: time comes in as an argument.
//!
//! A sliding window of one-second slots: what was let in during a second counts until 60 s after its end, so no 60 s
//! ever hold more than the limit, and nothing is let in twice at the turn of a minute. Beside the slots each gateway
//! has a part: the requests that it runs, and a credit that it may spend without asking, which counts as spent. A
//! gateway that was not heard of for [`LIVE_S`] has no part any more.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::http::limits::set::{LimitSet, Limited};

/// Seconds of the window.
pub const WINDOW_S: u64 = 60;
/// How long a gateway's part counts after it was last heard of, in seconds.
pub const LIVE_S: u64 = 10;
/// Of what is left, all gateways together hold this part as credit at most.
const CREDIT_PART: u64 = 8;

/// Requests, input tokens, output tokens: in the order of [`Limited::RATES`].
pub type Amounts = [u64; 3];

/// A request that a limit does not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Which limit.
    pub limited: Limited,
    /// The limit.
    pub limit: u64,
    /// When there may be room, in seconds: 1 to 60.
    pub retry_after_s: u64,
}

/// What one gateway has of the window.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayPart {
    /// When it was last heard of, in Unix seconds.
    pub seen: u64,
    /// Requests that it runs.
    pub running: u64,
    /// What it may let in without asking.
    pub credit: Amounts,
    /// Requests that it may run more without asking.
    pub places: u64,
}

/// The window; the broker keeps it as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedWindow {
    /// What was let in, by Unix second, oldest first.
    slots: VecDeque<(u64, Amounts)>,
    /// The gateways by their ids.
    gateways: BTreeMap<String, GatewayPart>,
}

impl SharedWindow {
    /// Forgets what no longer counts.
    pub fn expire(&mut self, now: u64) {
        // What lies far ahead was written by a clock that is wrong.
        self.slots.retain(|(second, _)| second + WINDOW_S >= now && *second <= now + WINDOW_S);
        self.gateways.retain(|_, part| part.seen + LIVE_S >= now);
    }

    /// Adds to a second; nothing where it no longer counts.
    pub fn charge(&mut self, now: u64, second: u64, amounts: Amounts) {
        if second + WINDOW_S < now || amounts == [0; 3] {
            return;
        }
        let at = self.slots.partition_point(|(known, _)| *known < second);
        if self.slots.get(at).is_none_or(|(known, _)| *known != second) {
            self.slots.insert(at, (second, [0; 3]));
        }
        let slot = &mut self.slots[at].1;
        for (sum, amount) in slot.iter_mut().zip(amounts) {
            *sum = sum.saturating_add(amount);
        }
    }

    /// Replaces what was let in at a second by what it came to.
    pub fn correct(&mut self, second: u64, reserved: Amounts, actual: Amounts) {
        let Some((_, slot)) = self.slots.iter_mut().find(|(known, _)| *known == second) else { return };
        for (sum, (reserved, actual)) in slot.iter_mut().zip(reserved.into_iter().zip(actual)) {
            *sum = sum.saturating_sub(reserved).saturating_add(actual);
        }
    }

    /// A gateway's own part.
    pub fn part(&self, gateway: &str) -> GatewayPart {
        self.gateways.get(gateway).cloned().unwrap_or_default()
    }

    /// Sets a gateway's own part.
    pub fn set_part(&mut self, gateway: &str, part: GatewayPart) {
        self.gateways.insert(gateway.to_owned(), part);
    }

    /// How many gateways use it.
    pub fn gateways(&self) -> u64 {
        self.gateways.len() as u64
    }

    /// What was let in, without credits.
    pub fn used(&self) -> Amounts {
        let mut used = [0u64; 3];
        for (_, amounts) in &self.slots {
            for (sum, amount) in used.iter_mut().zip(amounts) {
                *sum = sum.saturating_add(*amount);
            }
        }
        used
    }

    /// Seconds until nothing that counts now does so any more.
    pub fn reset_s(&self, now: u64) -> u64 {
        self.slots.back().map_or(0, |(second, _)| (second + WINDOW_S + 1).saturating_sub(now))
    }

    /// Requests that run, or may without asking.
    pub fn running(&self) -> u64 {
        self.gateways.values().map(|part| part.running.saturating_add(part.places)).sum()
    }

    fn taken(&self) -> Amounts {
        let mut taken = self.used();
        for part in self.gateways.values() {
            for (sum, credit) in taken.iter_mut().zip(part.credit) {
                *sum = sum.saturating_add(credit);
            }
        }
        taken
    }

    /// Lets a request of a gateway in that runs from now on, or says what is short. Expired parts are gone before.
    ///
    /// # Errors
    /// [`Shortage`], of the limit that lasts longest.
    pub fn take(
        &mut self,
        now: u64,
        limits: &LimitSet,
        gateway: &str,
        amounts: Amounts,
    ) -> Result<(), Shortage> {
        let taken = self.taken();
        let mut short: Option<Shortage> = None;
        for (index, limited) in Limited::RATES.into_iter().enumerate() {
            let Some(limit) = limits.get(limited) else { continue };
            let wanted = taken[index].saturating_add(amounts[index]);
            if wanted > limit {
                let retry_after_s = self.room_after(now, index, wanted - limit);
                let longer = short.is_none_or(|short| short.retry_after_s < retry_after_s);
                short = if longer { Some(Shortage { limited, limit, retry_after_s }) } else { short };
            }
        }
        if let Some(limit) = limits.concurrent
            && short.is_none()
            && self.running() >= limit
        {
            short = Some(Shortage { limited: Limited::Concurrent, limit, retry_after_s: 1 });
        }
        match short {
            Some(short) => Err(short),
            None => {
                self.charge(now, now, amounts);
                let part = self.gateways.entry(gateway.to_owned()).or_default();
                part.seen = now;
                part.running += 1;
                Ok(())
            }
        }
    }

    /// Seconds until the oldest slots that hold `missing` of a rate are over.
    fn room_after(&self, now: u64, index: usize, missing: u64) -> u64 {
        let mut freed = 0u64;
        let mut after = 1;
        for (second, amounts) in &self.slots {
            freed = freed.saturating_add(amounts[index]);
            after = (second + WINDOW_S + 1).saturating_sub(now);
            if freed >= missing {
                break;
            }
        }
        after.clamp(1, WINDOW_S)
    }

    /// Lends a gateway credit for what it spent lately, once more; nothing where little is left.
    pub fn lend(&mut self, limits: &LimitSet, gateway: &str, lately: Amounts) {
        let (taken, running, gateways) = (self.taken(), self.running(), self.gateways().max(1));
        let small = |left: u64, limit: u64| {
            if left > limit / 4 { left / (CREDIT_PART * gateways) } else { 0 }
        };
        let mut credit = [0; 3];
        for (index, limited) in Limited::RATES.into_iter().enumerate() {
            if let Some(limit) = limits.get(limited) {
                let left = limit.saturating_sub(taken[index]);
                credit[index] = small(left, limit).min(lately[index].saturating_mul(2));
            }
        }
        let places = limits.concurrent.map_or(0, |limit| small(limit.saturating_sub(running), limit));
        let part = self.gateways.entry(gateway.to_owned()).or_default();
        part.credit = credit;
        part.places = if lately[0] > 0 { places.min(lately[0].saturating_mul(2)) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests: u64, concurrent: Option<u64>) -> LimitSet {
        LimitSet { requests: Some(requests), concurrent, ..LimitSet::default() }
    }

    fn short(limited: Limited, limit: u64, retry_after_s: u64) -> Result<(), Shortage> {
        Err(Shortage { limited, limit, retry_after_s })
    }

    #[test]
    fn what_was_let_in_counts_for_a_minute() {
        let (mut window, limits) = (SharedWindow::default(), limits(2, None));
        let mut at = |now: u64| {
            window.expire(now);
            window.take(now, &limits, "g", [1, 0, 0])
        };
        assert_eq!((at(100), at(130)), (Ok(()), Ok(())));
        assert_eq!(at(130), short(Limited::Requests, 2, 31));
        assert_eq!(at(160), short(Limited::Requests, 2, 1), "the second 100 ended at 101");
        assert_eq!(at(161), Ok(()));
        assert_eq!(at(161), short(Limited::Requests, 2, 30));
    }

    #[test]
    fn the_limit_that_lasts_longest_is_told() {
        let limits = LimitSet { output_tokens: Some(100), ..limits(1, None) };
        let mut window = SharedWindow::default();
        window.charge(100, 60, [0, 0, 100]);
        window.take(100, &limits, "g", [1, 0, 0]).unwrap();
        let refused = window.take(100, &limits, "g", [1, 0, 10]);
        assert_eq!(refused, short(Limited::Requests, 1, 60));
        // Once corrected there is room for its tokens.
        window.correct(60, [0, 0, 100], [0, 0, 20]);
        assert_eq!(window.used(), [1, 0, 20]);
        window.correct(59, [0, 0, 9], [0, 0, 99]);
        assert_eq!(window.used(), [1, 0, 20], "what is over stays over");
    }

    #[test]
    fn places_of_a_gateway_that_died_are_free_again() {
        let (mut window, limits) = (SharedWindow::default(), limits(100, Some(2)));
        assert_eq!(window.take(100, &limits, "a", [1, 0, 0]), Ok(()));
        assert_eq!(window.take(100, &limits, "b", [1, 0, 0]), Ok(()));
        assert_eq!(window.take(101, &limits, "b", [1, 0, 0]), short(Limited::Concurrent, 2, 1));
        window.expire(100 + LIVE_S);
        assert_eq!(window.running(), 2);
        window.expire(101 + LIVE_S);
        assert_eq!((window.running(), window.used()), (0, [2, 0, 0]));
    }

    #[test]
    fn credit_is_small_and_counts_as_spent() {
        let (mut window, limits) = (SharedWindow::default(), limits(100, None));
        window.charge(100, 100, [20, 0, 0]);
        for gateway in ["a", "b"] {
            window.set_part(gateway, GatewayPart { seen: 100, ..GatewayPart::default() });
        }
        window.lend(&limits, "a", [50, 0, 0]);
        // 80 are left, two gateways: a sixteenth of it.
        assert_eq!(window.part("a").credit, [5, 0, 0]);
        assert_eq!(window.take(100, &limits, "b", [76, 0, 0]), short(Limited::Requests, 100, 60));
        assert_eq!(window.take(100, &limits, "b", [75, 0, 0]), Ok(()));
        window.lend(&limits, "a", [50, 0, 0]);
        assert_eq!(window.part("a").credit, [0; 3], "little is left");
        window.lend(&limits, "b", [0, 0, 0]);
        assert_eq!(window.part("b").credit, [0; 3], "it spent nothing");
    }

    #[test]
    fn a_clock_that_is_far_ahead_keeps_nobody_out() {
        let mut window = SharedWindow::default();
        window.charge(100, 100_000, [50, 0, 0]);
        window.expire(100);
        assert_eq!(window.used(), [0; 3]);
    }
}
