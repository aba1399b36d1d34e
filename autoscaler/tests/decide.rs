//! The autoscaler's rules, each by an example: a table of whole decisions, and single ones that need more words.

use millrace_autoscaler::{
    ClassReading, Decision, Limit, Memory, QueueReading, Reading, Term, WorkerLoad, WorkerReading,
    WorkerState, decide,
};
use millrace_crds::names::Class;
use millrace_crds::scaling::{OnSignalLost, ScalingSpec, Stabilization};
use millrace_crds::units::Span;
use proptest::prelude::*;

fn queue(published: u64, pending: u64, unacked: u64, age_s: u64) -> Option<QueueReading> {
    let oldest_age_ms = (pending > 0).then_some(age_s * 1000);
    let class = ClassReading { class: Class::Normal, pending, unacked, oldest_age_ms };
    Some(QueueReading { published, classes: vec![class] })
}

fn worker(name: u32, state: WorkerState, created_ms: u64, load: Option<WorkerLoad>) -> WorkerReading {
    let ready_ms = (state != WorkerState::Starting).then_some(created_ms + 30_000);
    WorkerReading { name: format!("w{name}"), state, created_ms, ready_ms, load }
}

fn held(jobs_held: u32) -> Option<WorkerLoad> {
    let (kv_blocks_used, kv_blocks_total) = (u64::from(jobs_held) * 50, 1000);
    Some(WorkerLoad { jobs_held, kv_blocks_used, kv_blocks_total, ..WorkerLoad::default() })
}

/// A memory that has seen a worker finish two jobs a second, hold 16 at once, and start in 30 s.
fn learned(arrival_rate: f64, idle_since_ms: u64) -> Memory {
    Memory {
        arrival_rate,
        jobs_finished: 1200.0,
        busy_s: 600.0,
        jobs_held_full: 16.0,
        cold_starts_ms: vec![30_000],
        work_seen_ms: Some(idle_since_ms),
        ..Memory::default()
    }
}

/// One row of the table: what is there, and what is decided.
struct Example {
    name: &'static str,
    memory: Memory,
    replicas: u32,
    ready: u32,
    queue: Option<QueueReading>,
    becomes: u32,
    won: Term,
}

/// The moment of all examples; late enough for each window before it.
const NOW_MS: u64 = 10_000_000;

#[rustfmt::skip]
fn examples() -> Vec<Example> {
    let busy = NOW_MS - 2_000;
    let row = |name, memory, (replicas, ready), queue, becomes, won| {
        Example { name, memory, replicas, ready, queue, becomes, won }
    };
    vec![
        row("an idle model at zero stays there",
            Memory::default(), (0, 0), queue(0, 0, 0, 0), 0, Term::Idle),
        row("one job wakes it, whatever is known",
            Memory::default(), (0, 0), queue(1, 1, 0, 0), 1, Term::Held),
        row("a job that a lost worker held wakes it too",
            learned(0.0, busy), (0, 0), queue(9, 0, 1, 0), 1, Term::Held),
        // 60 s x 2 jobs/s = 120 jobs is what one worker starts within the target.
        row("a backlog that one worker starts in time is let stand",
            learned(1.0, busy), (1, 1), queue(500, 100, 16, 0), 1, Term::Keep),
        // In 60 s a worker starts 120 jobs, a new one, ordered 4 s later, 16 + 2 x 26 = 68: 180 / 68 = 2.6.
        row("one that needs three more orders three",
            learned(0.0, busy), (1, 1), queue(500, 300, 16, 0), 4, Term::QueueWait),
        row("the fourth fits no longer into the step of four",
            learned(0.0, busy), (1, 1), queue(5000, 3000, 16, 0), 5, Term::QueueWait),
        // They are 50 s old, so they start late anyway: within 30 + 20 s, 100 by the one, 16 + 2 x 16 by a new one.
        row("an old backlog asks for the same, sooner",
            learned(0.0, busy), (1, 1), queue(500, 150, 16, 50), 2, Term::QueueWait),
        row("nothing is stopped while jobs are pending",
            learned(0.1, busy), (5, 5), queue(500, 1, 0, 0), 5, Term::Keep),
        // 5 jobs/s keep two and a half workers busy: the half one's work is saved up. The two that go hold jobs, which
        // is no promise: `scale_histories` has it among those that do not hold yet.
        row("without backlog the whole busy workers stay",
            learned(5.0, busy), (4, 4), queue(500, 0, 40, 0), 2, Term::Keep),
        row("the last worker stays while it idles less than its start takes",
            learned(0.01, NOW_MS - 29_000), (1, 1), queue(500, 0, 0, 0), 1, Term::Keep),
        row("and goes then",
            learned(0.01, NOW_MS - 30_000), (1, 1), queue(500, 0, 0, 0), 0, Term::Idle),
        row("an unreadable queue holds",
            learned(9.0, NOW_MS - 900_000), (3, 3), None, 3, Term::SignalLost),
    ]
}

fn decide_example(example: &Example) -> Decision {
    let mut memory = example.memory.clone();
    // What is decided was wanted long enough.
    let spec = ScalingSpec {
        stabilization: Stabilization { up: Span::seconds(0), down: Span::seconds(0) },
        ..ScalingSpec::default()
    };
    memory.wanted.clear();
    let workers = (0..example.ready).map(|i| worker(i, WorkerState::Ready, 0, held(16))).collect();
    let reading =
        Reading { at_ms: NOW_MS, replicas: example.replicas, queue: example.queue.clone(), workers };
    decide(&spec, &memory, &reading).0
}

#[test]
fn the_worked_examples_hold() {
    for example in examples() {
        let decision = decide_example(&example);
        assert_eq!(
            (decision.replicas, decision.won),
            (example.becomes, example.won),
            "{}: {}",
            example.name,
            decision.sentence
        );
    }
}

#[test]
fn sentences_say_what_was_seen_and_why() {
    let all = examples();
    let sentence = |name: &str| {
        decide_example(all.iter().find(|example| example.name == name).expect("a row of the table")).sentence
    };
    assert_eq!(
        sentence("one that needs three more orders three"),
        "Goes up from 1 to 4: the wait target; 300 pending and 16 in flight, the oldest 0.0 s old; \
         2.00 jobs/s a worker, 0.00 jobs/s arrive, a start takes 30.0 s."
    );
    assert_eq!(
        sentence("the last worker stays while it idles less than its start takes"),
        "Stays at 1: what is worth keeping; 0 pending and 0 in flight; 2.00 jobs/s a worker, 0.01 jobs/s \
         arrive, a start takes 30.0 s; limited by idleAfter."
    );
    assert!(sentence("an unreadable queue holds").ends_with("limited by onSignalLost."));
}

#[test]
fn kv_pressure_asks_for_workers_and_keeps_them_until_they_can_have_helped() {
    let spec = ScalingSpec::default();
    let full = |waiting| WorkerLoad {
        jobs_held: 16,
        sequences_waiting: waiting,
        kv_blocks_used: 1000,
        kv_blocks_total: 1000,
        jobs_finished: 9,
    };
    let reading = |at_ms, waiting| Reading {
        at_ms,
        replicas: 2,
        queue: queue(100, 0, 32, 0),
        workers: (0..2).map(|i| worker(i, WorkerState::Ready, 0, Some(full(waiting)))).collect(),
    };
    let quiet = decide(&spec, &learned(3.0, NOW_MS), &reading(NOW_MS, 0)).0;
    assert_eq!((quiet.terms.kv, quiet.replicas), (0, 2), "a full cache without waiting is a busy worker");
    let (pressed, memory) = decide(&spec, &learned(3.0, NOW_MS), &reading(NOW_MS, 5));
    assert_eq!((pressed.terms.kv, pressed.replicas, pressed.won), (3, 3, Term::Kv));
    let (later, memory) = decide(&spec, &memory, &reading(NOW_MS + 59_000, 0));
    assert_eq!(later.terms.kv, 3);
    assert_eq!(decide(&spec, &memory, &reading(NOW_MS + 60_000, 0)).0.terms.kv, 0);
}

#[test]
fn workers_on_their_way_count_before_their_pods_exist() {
    let spec = ScalingSpec::default();
    let ready = vec![worker(0, WorkerState::Ready, 0, held(16))];
    let reading =
        |at_ms, replicas| Reading { at_ms, replicas, queue: queue(500, 300, 16, 0), workers: ready.clone() };
    let (first, memory) = decide(&spec, &learned(0.0, NOW_MS), &reading(NOW_MS, 1));
    assert_eq!(first.replicas, 4);
    let (second, _) = decide(&spec, &memory, &reading(NOW_MS + 2_000, 4));
    assert_eq!(second.replicas, 4, "{}", second.sentence);
}

#[test]
fn a_start_is_learned_once_though_pods_tell_whole_seconds() {
    let spec = ScalingSpec::default();
    let reading = |at_ms, state| {
        let mut pod = worker(0, state, 10_000, None);
        pod.ready_ms = pod.ready_ms.map(|_| 15_000);
        Reading { at_ms, replicas: 1, queue: queue(9, 0, 1, 0), workers: vec![pod] }
    };
    // Ready at 15.4 s, which the pod tells as 15: before the reading at 15.2 s that did not show it.
    let moments =
        [(15_200, WorkerState::Starting), (15_700, WorkerState::Ready), (16_700, WorkerState::Ready)];
    let mut memory = Memory::default();
    for (at_ms, state) in moments {
        memory = decide(&spec, &memory, &reading(at_ms, state)).1;
    }
    assert_eq!(memory.cold_starts_ms, [5_000]);
}

#[test]
fn arrivals_alone_order_nothing_while_no_job_waits() {
    let spec = ScalingSpec::default();
    let memory = Memory { cold_starts_ms: vec![120_000], ..learned(9.0, NOW_MS - 600_000) };
    let reading = |replicas, pending| Reading {
        at_ms: NOW_MS,
        replicas,
        queue: queue(500, pending, 0, 0),
        workers: (0..replicas).map(|i| worker(i, WorkerState::Ready, 0, held(0))).collect(),
    };
    for replicas in [0, 2] {
        let decision = decide(&spec, &memory, &reading(replicas, 0)).0;
        assert_eq!((decision.terms.queue_wait, decision.replicas), (0, replicas), "{}", decision.sentence);
    }
    // With one that waits, what comes during a start counts: nine jobs a second keep more than two workers busy.
    let decision = decide(&spec, &memory, &reading(2, 1)).0;
    assert!(decision.terms.queue_wait > 2, "{}", decision.sentence);
}

#[test]
fn a_start_that_never_ends_is_replaced() {
    let spec = ScalingSpec::default();
    let mut reading = Reading {
        at_ms: NOW_MS,
        replicas: 1,
        queue: queue(500, 300, 0, 200),
        workers: vec![worker(0, WorkerState::Starting, NOW_MS - 89_000, None)],
    };
    let ordered_before_lost = decide(&spec, &learned(0.0, NOW_MS), &reading).0.terms.queue_wait;
    reading.workers[0].created_ms = NOW_MS - 91_000;
    let ordered_after = decide(&spec, &learned(0.0, NOW_MS), &reading).0.terms.queue_wait;
    assert!(ordered_after > ordered_before_lost, "{ordered_after} after, {ordered_before_lost} before");
}

#[test]
fn the_least_loaded_and_the_youngest_go_first() {
    let spec = ScalingSpec {
        stabilization: Stabilization { up: Span::seconds(0), down: Span::seconds(0) },
        ..ScalingSpec::default()
    };
    let workers = vec![
        worker(0, WorkerState::Ready, 0, held(9)),
        worker(1, WorkerState::Ready, 1, held(2)),
        worker(2, WorkerState::Starting, NOW_MS - 9_000, None),
        worker(3, WorkerState::Draining, 2, held(1)),
        worker(4, WorkerState::Ready, 3, held(2)),
    ];
    let reading = Reading { at_ms: NOW_MS, replicas: 4, queue: queue(500, 0, 14, 0), workers };
    let decision = decide(&spec, &learned(2.5, NOW_MS), &reading).0;
    assert_eq!(decision.replicas, 1);
    assert_eq!(decision.delete_first, ["w2", "w4", "w1"]);
}

#[test]
fn losing_the_signal_may_go_to_the_maximum_by_steps() {
    let spec = ScalingSpec { on_signal_lost: OnSignalLost::Max, ..ScalingSpec::default() };
    let reading = Reading { at_ms: NOW_MS, replicas: 1, queue: None, workers: Vec::new() };
    let (decision, _) = decide(&spec, &Memory::default(), &reading);
    assert_eq!(decision.replicas, 5);
    assert_eq!(decision.limits, [Limit::SignalLost, Limit::Step]);
}

#[test]
fn a_backlog_that_only_grows_does_not_grow_the_memory() {
    let spec = ScalingSpec { max_replicas: 1, ..ScalingSpec::default() };
    let mut memory = Memory::default();
    for i in 0..2_000u64 {
        let (at_ms, queue) = (NOW_MS + i * 2_000, queue(i * 10, i * 10, 0, i * 2));
        let reading = Reading { at_ms, replicas: 1, queue, workers: Vec::new() };
        memory = decide(&spec, &memory, &reading).1;
    }
    assert!(memory.arrivals.len() <= 64, "{} steps", memory.arrivals.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// More jobs pending, all else equal, never means fewer workers.
    #[test]
    fn more_backlog_never_means_fewer_workers(
        arrival_rate in 0.0f64..20.0,
        (replicas, ready) in (0u32..20).prop_flat_map(|all| (Just(all), 0..=all)),
        (fewer, more) in (0u64..2_000, 0u64..2_000),
        age_s in 0u64..120,
    ) {
        let spec = ScalingSpec { max_replicas: 1024, max_step: 1024, ..ScalingSpec::default() };
        let memory = learned(arrival_rate, NOW_MS);
        let starting = |i: u32| worker(i, WorkerState::Starting, NOW_MS - 10_000, None);
        let workers: Vec<WorkerReading> = (0..replicas)
            .map(|i| if i < ready { worker(i, WorkerState::Ready, 0, None) } else { starting(i) })
            .collect();
        let with = |pending| {
            let queue = queue(10_000, pending, 16, age_s);
            let reading = Reading { at_ms: NOW_MS, replicas, queue, workers: workers.clone() };
            decide(&spec, &memory, &reading).0
        };
        prop_assert!(with(fewer).replicas <= with(fewer + more).replicas);
    }
}
