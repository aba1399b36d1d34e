//! The states against a model of the broker that refuses, delays, duplicates and reorders, while workers die.

use bytes::Bytes;
use millrace_crds::attempts::Company;

use super::*;

/// Actions in all; the bar is that a million of them break nothing.
const STEPS: u64 = 1_000_000;
/// Steps of one world at most, before it calms down and must come to its end.
const STORM: u64 = 2_000;
/// Steps in which a world that calmed down must have ended every job.
const CALM_MAX: u64 = 20_000;
const WORKERS: u64 = 3;
const MAX_DELIVER: u32 = 3;
/// The id and the body of each message; one id comes with two bodies, one twice with the same.
const MESSAGES: [(usize, u8); 8] = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (5, 0), (5, 0)];
const IDS: usize = 6;

/// SplitMix64: every run of a seed is the same one.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }
}

/// What the broker has under one id, or under the id of a message that was renamed.
#[derive(Default)]
struct Records {
    outcome: Option<StoredOutcome>,
    ledger: Option<(AttemptRecord, u64)>,
    buried: bool,
    cancelled: bool,
    /// Starts that may be counted: they ended, or a process died in them, or lost the delivery, that nobody else is
    /// suspected of.
    charged: u32,
    /// Starts that may be counted because the broker was away when they had to be taken back.
    excused: u32,
}

struct Delivered {
    message: usize,
    worker: u64,
    facts: JobFacts,
    state: JobState,
    action: Action,
}

struct World {
    random: Random,
    calm: bool,
    sequence: u64,
    ids: Vec<Records>,
    renamed: Vec<Records>,
    /// Of each message: whether it lies in the queue, and how often it was delivered.
    queue: Vec<(bool, u32)>,
    held: Vec<Delivered>,
    /// Actions carried out.
    actions: u64,
}

/// Whether the attempt that runs is one that speaks against its job if the process dies.
fn accuses(held: &Delivered) -> bool {
    let company = held.state.ledger.as_ref().and_then(|ledger| ledger.record.company);
    company.is_some_and(Company::accuses)
}

fn worker(number: u64) -> SubjectToken {
    format!("w-{number}").parse().unwrap()
}

fn digest(body: u8) -> String {
    format!("sha256:{body}")
}

impl World {
    fn new(seed: u64) -> Self {
        let records = |count| (0..count).map(|_| Records::default()).collect();
        let mut world = Self {
            random: Random(seed),
            calm: false,
            sequence: 0,
            ids: records(IDS),
            renamed: records(MESSAGES.len()),
            queue: vec![(true, 0); MESSAGES.len()],
            held: Vec::new(),
            actions: 0,
        };
        world.ids[3].cancelled = world.random.percent(50);
        world
    }

    fn is_over(&self) -> bool {
        self.held.is_empty() && self.queue.iter().all(|(queued, _)| !queued)
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..25 => self.deliver(),
            25..96 => self.perform(),
            _ if !self.calm => self.crash(),
            _ => {}
        }
    }

    fn deliver(&mut self) {
        let message = self.random.below(MESSAGES.len() as u64) as usize;
        let worker_number = self.random.below(WORKERS);
        let ((id, body), (queued, delivered)) = (MESSAGES[message], self.queue[message]);
        let beside = |held: &&Delivered| MESSAGES[held.message].0 == id;
        let again = self.held.iter().any(|held| held.message == message);
        let here = self.held.iter().filter(beside).any(|held| held.worker == worker_number);
        // A delivery that is held comes again only if its lease ran out; on one worker it joins the first.
        if !queued || here || (again && (self.calm || !self.random.percent(5))) {
            return;
        }
        self.queue[message].1 = delivered + 1;
        let facts = JobFacts {
            id: format!("id-{id}").parse().unwrap(),
            worker: worker(worker_number),
            delivered: delivered + 1,
            max_deliver: MAX_DELIVER,
            body_digest: digest(body),
        };
        let (state, action) = JobState::begin();
        self.held.push(Delivered { message, worker: worker_number, facts, state, action });
    }

    fn crash(&mut self) {
        let worker = self.random.below(WORKERS);
        for held in self.held.extract_if(.., |held| held.worker == worker) {
            let records = &mut self.ids[MESSAGES[held.message].0];
            records.charged += u32::from(accuses(&held));
        }
    }

    /// Carries out what one delivery asks for; the broker may refuse it, or do it and lose the answer.
    fn perform(&mut self) {
        if self.held.is_empty() {
            return;
        }
        self.actions += 1;
        let index = self.random.below(self.held.len() as u64) as usize;
        let mut held = self.held.swap_remove(index);
        let action = std::mem::replace(&mut held.action, Action::End);
        let storm = !self.calm;
        let (refuses, forgets) = (storm && self.random.percent(6), storm && self.random.percent(6));
        let away = || JobEvent::Failed(Fault::Broker { message: String::new() });
        let remote = !matches!(action, Action::Turn(_) | Action::Run);
        let event = if remote && refuses { away() } else { self.carry_out(&held, &action) };
        let event = if remote && forgets { away() } else { event };
        self.excuse(&held, &action, &event);
        let (state, next) = held.state.next(&held.facts, event);
        (held.state, held.action) = (state, next);
        if held.action != Action::End {
            self.held.push(held);
        }
    }

    /// What nobody could write down while the broker was away.
    fn excuse(&mut self, held: &Delivered, action: &Action, event: &JobEvent) {
        let failed = matches!(event, JobEvent::Failed(_));
        let unread = matches!(held.state.state, State::Rereading(_)) && failed;
        let unwritten = matches!(action, Action::Record { .. }) && failed;
        self.ids[MESSAGES[held.message].0].excused += u32::from(unread || unwritten);
    }

    fn records(&mut self, held: &Delivered, action: &Action) -> &mut Records {
        match held.state.renamed || *action == Action::Rename {
            true => &mut self.renamed[held.message],
            false => &mut self.ids[MESSAGES[held.message].0],
        }
    }

    fn carry_out(&mut self, held: &Delivered, action: &Action) -> JobEvent {
        match action {
            Action::LookUp | Action::Rename => {
                // A start that another delivery of the id has open is taken for a death.
                let id = MESSAGES[held.message].0;
                let open = self.held.iter().filter(|other| MESSAGES[other.message].0 == id && accuses(other));
                self.ids[id].charged += open.count() as u32;
                let records = self.records(held, action);
                let (outcome, ledger) = (records.outcome.clone(), records.ledger.clone());
                let cancelled = records.cancelled;
                let refused = cancelled.then_some(Fault::Cancelled);
                JobEvent::Known(Known { outcome, cancelled, ledger }, refused)
            }
            Action::Record { record, after } | Action::Start { record, after } => {
                self.record(held, action, record, *after)
            }
            Action::Turn(_) if !self.calm && self.random.percent(3) => JobEvent::Failed(Fault::Draining),
            Action::Turn(Suspicion { alone: true, .. }) => JobEvent::Turn(Company::Alone),
            Action::Turn(Suspicion { deaths: 1.., .. }) if self.random.percent(50) => {
                JobEvent::Turn(Company::OnlySuspect)
            }
            Action::Turn(_) => JobEvent::Turn(Company::Crowd),
            Action::Run => self.run(held),
            Action::Store(verdict) => self.store(held, verdict),
            Action::Bury(_) => {
                self.records(held, action).buried = true;
                JobEvent::Done
            }
            Action::Ack => {
                let stored =
                    self.records(held, action).outcome.clone().expect("acknowledged without an outcome");
                assert!(
                    stored.of.is_of_body(&held.facts.body_digest),
                    "acknowledged with another one's outcome"
                );
                let buried = self.records(held, action).buried;
                assert!(stored.kind != OutcomeKind::Dead || buried, "acknowledged without its copy");
                self.queue[held.message].0 = false;
                JobEvent::Done
            }
            Action::Release | Action::HandBack(_) | Action::End => JobEvent::Done,
        }
    }

    fn record(&mut self, held: &Delivered, action: &Action, record: &AttemptRecord, after: u64) -> JobEvent {
        self.sequence += 1;
        let sequence = self.sequence;
        let ledger = &mut self.records(held, action).ledger;
        if ledger.as_ref().map_or(0, |(_, sequence)| *sequence) != after {
            return JobEvent::Recorded(Created::Lost);
        }
        *ledger = Some((record.clone(), sequence));
        JobEvent::Recorded(Created::Stored(sequence))
    }

    fn run(&mut self, held: &Delivered) -> JobEvent {
        let records = &mut self.ids[MESSAGES[held.message].0];
        assert!(records.outcome.as_ref().is_none_or(|stored| stored.attempt > 0));
        let trouble = if self.calm { 100 } else { self.random.below(100) };
        let text = String::new;
        match trouble {
            0..14 => {
                records.charged += 1;
                JobEvent::Failed(Fault::Inference { message: text() })
            }
            14..20 => JobEvent::Failed(Fault::Store { message: text() }),
            20..22 => JobEvent::Failed(Fault::Draining),
            22..23 => {
                records.charged += u32::from(accuses(held));
                JobEvent::Failed(Fault::EngineStopped { cause: text() })
            }
            23..25 => JobEvent::Failed(Fault::Invalid { message: text() }),
            _ => JobEvent::Answered(Outcome::completed(Bytes::from_static(b"answer"), Vec::new())),
        }
    }

    fn store(&mut self, held: &Delivered, verdict: &JobVerdict) -> JobEvent {
        if matches!(verdict, JobVerdict::Answer(_)) && !self.calm && self.random.percent(2) {
            return JobEvent::Failed(Fault::Invalid { message: "too large".into() });
        }
        let stored = held.state.stored(&held.facts, verdict);
        let delivered = held.facts.delivered;
        let counted = held.state.ledger.as_ref().map_or(0, |ledger| ledger.record.counted());
        let records = self.records(held, &Action::End);
        if records.outcome.is_some() {
            return JobEvent::Created(Created::Lost);
        }
        if let JobVerdict::Failed(OutcomeKind::Dead, ErrorCode::WorkerLost | ErrorCode::InferenceError, _) =
            verdict
        {
            let may = records.charged + records.excused;
            let given_up = delivered > (MAX_DELIVER * DELIVERIES_PER_ATTEMPT_MAX).max(DELIVERIES_MIN);
            assert!(given_up || counted <= may, "dead after {counted} attempts of which {may} were one");
        }
        records.outcome = Some(stored);
        JobEvent::Created(Created::Stored(1))
    }
}

#[test]
fn a_million_steps_lose_nothing_and_charge_no_outage() {
    let (mut completed, mut dead, mut renamed, mut handed) = (0, 0, 0, 0);
    let mut actions = 0;
    for seed in 0.. {
        let mut world = World::new(seed);
        let mut steps = 0;
        while !world.is_over() {
            world.calm = steps > STORM;
            world.step();
            steps += 1;
            assert!(steps < STORM + CALM_MAX, "seed {seed}: no end");
        }
        for (message, (id, body)) in MESSAGES.into_iter().enumerate() {
            let own = world.renamed[message].outcome.as_ref();
            let stored = own.or(world.ids[id].outcome.as_ref()).expect("every job has its outcome");
            assert!(stored.of.is_of_body(&digest(body)), "seed {seed}: message {message} has another one's");
            completed += u32::from(stored.kind == OutcomeKind::Completed);
            dead += u32::from(stored.kind == OutcomeKind::Dead && own.is_none());
            renamed += u32::from(own.is_some());
            handed += world.queue[message].1 - 1;
        }
        actions += world.actions;
        if actions >= STEPS {
            break;
        }
    }
    // What the test is for did happen.
    let seen = format!("{completed} completed, {dead} dead, {renamed} renamed, {handed} delivered again");
    assert!(completed > 10_000 && dead > 500 && renamed > 1_000 && handed > 10_000, "{seen}");
}

#[test]
fn an_event_that_nobody_asked_for_gives_the_job_back() {
    let facts = JobFacts {
        id: "a".parse().unwrap(),
        worker: worker(0),
        delivered: 1,
        max_deliver: 1,
        body_digest: digest(0),
    };
    let (state, action) = JobState::begin();
    assert_eq!(action, Action::LookUp);
    let (state, action) = state.next(&facts, JobEvent::Turn(Company::Crowd));
    assert_eq!(action, Action::HandBack(Fault::Contended));
    let (state, action) = state.next(&facts, JobEvent::Done);
    assert_eq!((state.end(), action), (Some(&JobEnd::HandedBack(Fault::Contended)), Action::End));
}

/// What killed its workers must not lose one of its starts because its outcome could not be stored.
#[test]
fn a_death_that_cannot_be_stored_stays_counted() {
    let facts = JobFacts {
        id: "a".parse().unwrap(),
        worker: worker(0),
        delivered: MAX_DELIVER + 1,
        max_deliver: MAX_DELIVER,
        body_digest: digest(0),
    };
    let record = AttemptRecord { starts: MAX_DELIVER, ..AttemptRecord::unstarted(worker(1)) };
    let known = Known { outcome: None, cancelled: false, ledger: Some((record, 7)) };
    let (state, _) = JobState::begin();
    let (state, action) = state.next(&facts, JobEvent::Known(known, None));
    assert!(matches!(action, Action::Store(JobVerdict::Failed(OutcomeKind::Dead, ..))), "{action:?}");
    let (_, action) = state.next(&facts, JobEvent::Failed(Fault::Draining));
    assert_eq!(action, Action::HandBack(Fault::Draining));
}
