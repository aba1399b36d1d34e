//! Who may run beside whom: jobs during which a process died run in cohorts, until it is known which of them did it.
//!
//! Suspected jobs wait here. A cohort is the half of those that saw most deaths; the next one begins when it has
//! ended, or does not end soon. Where a process dies in it, its jobs come again, and half of them are the next
//! cohort: the killer is the only suspect after as many deaths as the number of jobs has halves. Jobs that nobody
//! suspects run beside all that. Which jobs are a cohort is decided by [`Gate`], which is pure.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millrace_crds::attempts::Company;
use tokio::sync::{Notify, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::time::Instant;

/// Those that died together come again together: a cohort begins this long after the last of them came.
const GATHERING: Duration = Duration::from_millis(300);
/// And this long after the first of them at the latest.
const GATHERING_MAX: Duration = Duration::from_secs(2);
/// A cohort that runs for this long keeps the next one waiting no more: most killers kill soon.
const COHORT_MAX: Duration = Duration::from_secs(30);

/// How a job waits for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspicion {
    /// Processes that died while it ran.
    pub deaths: u32,
    /// Beside no other job.
    pub alone: bool,
}

/// The place of a running job, until dropped.
#[derive(Debug)]
pub struct Place<'a> {
    /// Beside what it runs.
    pub company: Company,
    _beside: Beside<'a>,
    _member: Option<Member<'a>>,
}

#[derive(Debug)]
enum Beside<'a> {
    Others { _guard: RwLockReadGuard<'a, ()> },
    Nobody { _guard: RwLockWriteGuard<'a, ()> },
}

/// A suspected job that waits or runs; forgotten when dropped.
#[derive(Debug)]
struct Member<'a> {
    cohorts: &'a Cohorts,
    ticket: u64,
}

/// The jobs of a worker that run, as far as it matters beside whom.
#[derive(Debug, Default)]
pub struct Cohorts {
    alone: RwLock<()>,
    gate: Mutex<Gate>,
    changed: Notify,
}

impl Cohorts {
    /// Waits for the turn of a job.
    pub async fn enter(&self, suspicion: Suspicion) -> Place<'_> {
        if suspicion.alone {
            let _beside = Beside::Nobody { _guard: self.alone.write().await };
            return Place { company: Company::Alone, _beside, _member: None };
        }
        let (company, _member) = if suspicion.deaths > 0 {
            let (company, member) = self.cohort(suspicion.deaths).await;
            (company, Some(member))
        } else {
            (Company::Crowd, None)
        };
        Place { company, _beside: Beside::Others { _guard: self.alone.read().await }, _member }
    }

    async fn cohort(&self, deaths: u32) -> (Company, Member<'_>) {
        let member = Member { cohorts: self, ticket: self.gate().come(deaths, Instant::now()) };
        self.changed.notify_waiters();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (company, look_again) = {
                let (mut gate, now) = (self.gate(), Instant::now());
                if gate.open(now) {
                    self.changed.notify_waiters();
                }
                (gate.company(member.ticket), gate.look_again(now))
            };
            if let Some(company) = company {
                return (company, member);
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(look_again) => {}
            }
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.cohorts.gate().leave(self.ticket);
        self.cohorts.changed.notify_waiters();
    }
}

/// Which of the suspected jobs run. Pure.
#[derive(Debug, Default)]
struct Gate {
    tickets: u64,
    /// Ticket and deaths of each that waits, in the order of coming.
    waiting: Vec<(u64, u32)>,
    /// Ticket and company of each that runs.
    running: Vec<(u64, Company)>,
    began: Option<Instant>,
    /// When the first and the last of those that wait came.
    came: Option<(Instant, Instant)>,
}

impl Gate {
    fn come(&mut self, deaths: u32, now: Instant) -> u64 {
        self.tickets += 1;
        self.waiting.push((self.tickets, deaths));
        self.came = Some((self.came.map_or(now, |(first, _)| first), now));
        self.tickets
    }

    fn leave(&mut self, ticket: u64) {
        self.waiting.retain(|(waits, _)| *waits != ticket);
        self.running.retain(|(runs, _)| *runs != ticket);
    }

    fn company(&self, ticket: u64) -> Option<Company> {
        self.running.iter().find(|(runs, _)| *runs == ticket).map(|(_, company)| *company)
    }

    /// When a cohort may begin: those that came are gathered, and the one before is over or takes long.
    fn begins(&self) -> Option<Instant> {
        let (first, last) = self.came?;
        let gathered = (last + GATHERING).min(first + GATHERING_MAX);
        let free = self.began.filter(|_| !self.running.is_empty()).map(|began| began + COHORT_MAX);
        Some(free.map_or(gathered, |free| gathered.max(free)))
    }

    /// When it is worth to look again.
    fn look_again(&self, now: Instant) -> Instant {
        self.begins().map_or(now + COHORT_MAX, |begins| begins.max(now + Duration::from_millis(1)))
    }

    /// Begins a cohort, if it is time: half of those that saw most deaths, in the order of coming.
    fn open(&mut self, now: Instant) -> bool {
        let Some(deaths) = self.waiting.iter().map(|(_, deaths)| *deaths).max() else { return false };
        if self.begins().is_none_or(|begins| begins > now) {
            return false;
        }
        let most = self.waiting.iter().filter(|(_, of)| *of == deaths).count().div_ceil(2);
        // Beside a cohort that takes long nobody is the only suspect.
        let only = most == 1 && self.running.is_empty();
        let company = if only { Company::OnlySuspect } else { Company::Crowd };
        let chosen = self.waiting.extract_if(.., |(_, of)| *of == deaths).collect::<Vec<_>>();
        let (run, wait) = chosen.split_at(most);
        self.running.extend(run.iter().map(|(ticket, _)| (*ticket, company)));
        self.waiting.extend(wait);
        self.waiting.sort_unstable();
        self.began = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// One killer among so many jobs of a worker: how many of its processes die until it is the only suspect, and how
    /// often each of the others was begun.
    fn hunt(jobs: u32, killer: u32) -> (u32, u32) {
        let mut deaths: BTreeMap<u32, u32> = (0..jobs).map(|job| (job, 1)).collect();
        let (mut died, mut begun_most) = (1, BTreeMap::<u32, u32>::new());
        loop {
            let (mut gate, mut now) = (Gate::default(), Instant::now());
            let tickets: BTreeMap<u64, u32> =
                deaths.iter().map(|(&job, &seen)| (gate.come(seen, now), job)).collect();
            let alive = loop {
                now += GATHERING_MAX;
                if !gate.open(now) {
                    break true;
                }
                let cohort: Vec<(u64, Company)> = gate.running.clone();
                for (ticket, company) in &cohort {
                    let job = tickets[ticket];
                    *begun_most.entry(job).or_default() += 1;
                    if job == killer && *company == Company::OnlySuspect {
                        return (died, begun_most.values().copied().max().unwrap_or_default());
                    }
                }
                if cohort.iter().any(|(ticket, _)| tickets[ticket] == killer) {
                    died += 1;
                    cohort.iter().for_each(|(ticket, _)| *deaths.entry(tickets[ticket]).or_default() += 1);
                    break false;
                }
                for (ticket, _) in cohort {
                    gate.leave(ticket);
                    deaths.remove(&tickets[&ticket]);
                }
            };
            assert!(!alive, "the killer of {jobs} was not found");
        }
    }

    #[test]
    fn a_killer_is_the_only_suspect_after_as_many_deaths_as_there_are_halves() {
        for jobs in [1, 2, 3, 7, 8, 64, 100, 256] {
            for killer in 0..jobs {
                let (died, begun) = hunt(jobs, killer);
                let halves = jobs.next_power_of_two().ilog2();
                assert!(died <= halves + 1, "{jobs} jobs, killer {killer}: {died} deaths");
                assert!(begun <= halves + 1, "{jobs} jobs, killer {killer}: begun {begun} times");
            }
        }
    }

    #[test]
    fn a_cohort_that_takes_long_keeps_nobody_waiting() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        let tickets = [gate.come(1, start), gate.come(1, start), gate.come(2, start)];
        assert!(!gate.open(start), "not gathered yet");
        let soon = start + GATHERING;
        assert!(gate.open(soon));
        assert_eq!(gate.company(tickets[2]), Some(Company::OnlySuspect), "it saw most deaths");
        assert!(!gate.open(soon + GATHERING), "one at a time");
        assert_eq!(gate.look_again(soon + GATHERING), soon + COHORT_MAX);
        assert!(gate.open(soon + COHORT_MAX));
        assert_eq!(gate.company(tickets[0]), Some(Company::Crowd), "not the only one");
        gate.leave(tickets[2]);
        gate.leave(tickets[0]);
        assert!(gate.open(soon + COHORT_MAX + GATHERING), "the one before is over");
        assert_eq!(gate.company(tickets[1]), Some(Company::OnlySuspect));
        assert!(!gate.open(soon + COHORT_MAX * 3), "nobody is left");
    }

    #[tokio::test(start_paused = true)]
    async fn fresh_jobs_wait_only_for_one_that_runs_alone() {
        let cohorts = Cohorts::default();
        let suspect = |deaths| Suspicion { deaths, alone: false };
        let (one, two, fresh) =
            tokio::join!(cohorts.enter(suspect(1)), cohorts.enter(suspect(1)), cohorts.enter(suspect(0)));
        assert_eq!(fresh.company, Company::Crowd);
        let mut companies = [one.company, two.company];
        companies.sort_by_key(|company| company.accuses());
        assert_eq!(companies, [Company::Crowd, Company::OnlySuspect], "one after the other");
        drop((one, two, fresh));
        let alone = cohorts.enter(Suspicion { deaths: 2, alone: true }).await;
        assert_eq!(alone.company, Company::Alone);
        let waits = tokio::time::timeout(COHORT_MAX, cohorts.enter(suspect(0))).await;
        assert!(waits.is_err(), "beside one that runs alone");
        drop(alone);
        cohorts.enter(suspect(0)).await;
    }
}
