//! The scheduler under random work, checked after every step against a model of the cache's content, with the tokens
//! of a step known before the next one is decided, or only after.

mod classes;

use super::*;
use crate::schedule::blocks::{PREFIX_ROOT, PrefixHash, extend_hash};
use crate::schedule::request::{Request, Sampling};

const BLOCK_TOKENS: usize = 4;

/// A small generator, so that hundreds of thousands of steps take moments: xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

/// A scheduler, and what a device would have in its blocks.
struct World {
    scheduler: Scheduler,
    /// For each position of each block: the hash of all tokens up to it, once written.
    content: Vec<[Option<PrefixHash>; BLOCK_TOKENS]>,
    step: Vec<Chunk>,
    /// Whether a step is decided while the one before is in flight.
    overlap: bool,
    /// Whether sequences differ in class and deadline.
    classes: bool,
    in_flight: Vec<Chunk>,
    /// Tokens that the step in flight gives, which the device knows before the scheduler.
    chosen: Vec<u32>,
    /// Tokens that nobody awaited any more.
    in_vain: usize,
    live: Vec<Slot>,
    /// Steps that each live slot has seen.
    ages: Vec<u32>,
    random: Random,
    ended: usize,
}

fn policy() -> SchedulerPolicy {
    SchedulerPolicy {
        max_sequences: 6,
        max_batch_tokens: 13,
        output_reserve: OutputReserve::Full,
        longest_first_window: 1,
    }
}

fn request(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request { prompt, max_tokens, stop_tokens: vec![9], sampling: Sampling::default(), seed: 0 }
}

impl World {
    fn new(policy: SchedulerPolicy, blocks: usize, caching: bool, seed: u64) -> Self {
        Self {
            scheduler: Scheduler::new(policy, Blocks::new(blocks, BLOCK_TOKENS, caching)),
            content: vec![[None; BLOCK_TOKENS]; blocks],
            step: Vec::new(),
            overlap: false,
            classes: false,
            in_flight: Vec::new(),
            chosen: Vec::new(),
            in_vain: 0,
            live: Vec::new(),
            ages: Vec::new(),
            random: Random(seed * 2 + 1),
            ended: 0,
        }
    }

    /// Submits a sequence that fits alone. Few tokens and few lengths: prefixes are often equal.
    fn submit(&mut self) {
        let room = self.scheduler.blocks().total() * BLOCK_TOKENS;
        let prompt_len = 1 + self.random.below((room - 2).min(40));
        let max_tokens = 1 + self.random.below((room - prompt_len).min(30));
        let family = self.random.below(3) as u32;
        let fork = self.random.below(prompt_len + 1);
        let tail = self.random.below(3) as u32;
        let prompt = (0..prompt_len).map(|at| if at < fork { family } else { tail }).collect();
        let sequence = Sequence::new(request(prompt, max_tokens as u32), BLOCK_TOKENS);
        let urgency = if self.classes { self.urgency() } else { Urgency::default() };
        let slot = self.scheduler.submit(sequence, urgency);
        self.live.push(slot);
        self.ages.push(0);
    }

    fn urgency(&mut self) -> Urgency {
        let class = Class::ALL[self.random.below(3)];
        let deadline_ms = [5, 9, i64::MAX][self.random.below(3)];
        Urgency { class, deadline_ms }
    }

    fn remove(&mut self, slot: Slot) {
        let at = self.live.iter().position(|&live| live == slot).expect("a live slot");
        self.live.swap_remove(at);
        self.ages.swap_remove(at);
        self.scheduler.remove(slot);
    }

    /// Does what a device does with a chunk: reads everything before it, writes its own rows.
    fn compute(&mut self, chunk: Chunk) {
        let sequence = self.scheduler.sequence(chunk.slot);
        let mut hash = PREFIX_ROOT;
        for position in 0..chunk.start + chunk.rows {
            let fed = || self.chosen[sequence.awaited().expect("known or awaited") as usize];
            let token = sequence.tokens().get(position).copied().unwrap_or_else(fed);
            hash = extend_hash(hash, &[token]);
            let block = sequence.table()[position / BLOCK_TOKENS] as usize;
            let cell = &mut self.content[block][position % BLOCK_TOKENS];
            if position < chunk.start {
                assert_eq!(*cell, Some(hash), "position {position} holds what this sequence computed");
            } else {
                assert_eq!(
                    self.scheduler.blocks().references(block as u32),
                    1,
                    "shared blocks are not written"
                );
                *cell = Some(hash);
            }
        }
    }

    fn step(&mut self) {
        let mut step = std::mem::take(&mut self.step);
        self.scheduler.schedule(&mut step);
        self.check_step(&step);
        for &chunk in &step {
            self.compute(chunk);
        }
        self.collect();
        self.step = std::mem::replace(&mut self.in_flight, step);
        let sampled = self.in_flight.iter().filter(|chunk| chunk.samples).count();
        self.chosen = (0..sampled).map(|_| self.random.below(10) as u32).collect();
        self.scheduler.advance(&self.in_flight);
        if !self.overlap {
            self.collect();
        }
        self.check();
    }

    fn collect(&mut self) {
        let slots: Vec<Slot> =
            self.in_flight.drain(..).filter(|chunk| chunk.samples).map(|chunk| chunk.slot).collect();
        for (row, slot) in slots.into_iter().enumerate() {
            if !self.scheduler.awaits(slot, row as u32) {
                self.in_vain += 1;
            } else if self.scheduler.append(slot, self.chosen[row]).is_some() {
                self.remove(slot);
                self.ended += 1;
            }
        }
    }

    fn check_step(&self, step: &[Chunk]) {
        let policy = &self.scheduler.policy;
        assert!(step.iter().map(|chunk| chunk.rows).sum::<usize>() <= policy.max_batch_tokens);
        assert!(step.len() <= policy.max_sequences);
        for (index, chunk) in step.iter().enumerate() {
            let sequence = self.scheduler.sequence(chunk.slot);
            assert!(self.scheduler.running().contains(&chunk.slot));
            assert!(step[..index].iter().all(|other| other.slot != chunk.slot), "once per step");
            assert_eq!(chunk.start, sequence.length() - sequence.pending());
            assert_eq!(chunk.samples, chunk.rows == sequence.pending());
            assert!((chunk.start + chunk.rows) <= sequence.table().len() * BLOCK_TOKENS);
        }
        // Sequences with one pending row come before the others while there is budget, so no decode waits.
        for &slot in self.scheduler.running() {
            if self.scheduler.sequence(slot).pending() == 1 {
                assert!(step.iter().any(|chunk| chunk.slot == slot), "every decode runs in every step");
            }
        }
    }

    fn check(&mut self) {
        let blocks = self.scheduler.blocks();
        blocks.check();
        let mut references = vec![0; blocks.total()];
        for &slot in self.scheduler.running() {
            for &id in self.scheduler.sequence(slot).table() {
                references[id as usize] += 1;
            }
        }
        for (id, &count) in references.iter().enumerate() {
            assert_eq!(blocks.references(id as u32), count, "block {id}: count equals tables");
        }
        let used = references.iter().filter(|&&count| count > 0).count();
        assert_eq!(used + blocks.free(), blocks.total());
        let turns = |slots: &mut dyn Iterator<Item = Slot>| -> Vec<Turn> {
            slots.map(|slot| self.scheduler.sequence(slot).turn).collect()
        };
        assert!(turns(&mut self.scheduler.running().iter().copied()).is_sorted());
        assert!(turns(&mut self.scheduler.waiting()).is_sorted());
        let (running, waiting) = (self.scheduler.running().len(), self.scheduler.waiting().len());
        assert_eq!(running + waiting, self.live.len());
        for age in &mut self.ages {
            *age += 1;
            assert!(*age < 4_000, "no sequence starves");
        }
    }

    /// Random work for a number of steps, then none until everything has ended.
    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.live.len() < 24 && self.random.below(3) == 0 {
                self.submit();
            }
            if !self.live.is_empty() && self.random.below(16) == 0 {
                let slot = self.live[self.random.below(self.live.len())];
                self.remove(slot);
            }
            self.step();
        }
        let mut left = 20_000;
        while !self.live.is_empty() {
            self.step();
            left -= 1;
            assert!(left > 0, "every sequence ends");
        }
        assert_eq!(self.scheduler.blocks().free(), self.scheduler.blocks().total());
    }
}

/// Every combination that changes a branch; 160 worlds of 5,000 steps each.
#[test]
fn random_work_keeps_every_invariant() {
    let mut preemptions = 0;
    let mut cached = 0;
    let mut in_vain = 0;
    for seed in 0..160 {
        let policy = SchedulerPolicy {
            max_sequences: [1, 3, 6][seed as usize % 3],
            max_batch_tokens: [6, 13, 64][seed as usize / 3 % 3],
            output_reserve: [OutputReserve::Full, OutputReserve::None, OutputReserve::Learned]
                [seed as usize / 2 % 3],
            longest_first_window: [1, 4][seed as usize / 4 % 2],
        };
        let caching = seed % 5 != 0;
        let mut world = World::new(policy, 18 + seed as usize % 7, caching, seed);
        world.overlap = seed / 8 % 2 == 1;
        world.classes = seed / 16 % 2 == 1;
        world.run(5_000);
        assert!(world.overlap || world.in_vain == 0, "every token is taken");
        let counters = world.scheduler.counters();
        assert!(world.ended > 100, "the world does real work");
        if policy.output_reserve == OutputReserve::Full && !world.classes {
            assert_eq!(counters.preemptions, 0, "worst cases are reserved");
        }
        if !caching {
            assert_eq!(counters.cached_tokens, 0);
        }
        preemptions += counters.preemptions;
        cached += counters.cached_tokens;
        in_vain += world.in_vain;
    }
    assert!(preemptions > 1_000, "preemption was exercised: {preemptions}");
    assert!(cached > 10_000, "prefix reuse was exercised: {cached}");
    assert!(in_vain > 10_000, "sequences ended while their next step ran: {in_vain}");
}

/// Runs what was submitted to the end; the slots in the order in which they ended.
fn finish(world: &mut World) -> Vec<Slot> {
    let mut order = Vec::new();
    while !world.live.is_empty() {
        let before = world.live.clone();
        world.step();
        order.extend(before.iter().filter(|slot| !world.live.contains(slot)));
    }
    order
}

fn submit(world: &mut World, prompt: Vec<u32>, max_tokens: u32) -> Slot {
    queue_up(world, Urgency::default(), request(prompt, max_tokens))
}

/// Of this urgency, and as long as it may be.
fn submit_as(world: &mut World, urgency: Urgency, prompt: Vec<u32>, max_tokens: u32) -> Slot {
    queue_up(world, urgency, Request { stop_tokens: Vec::new(), ..request(prompt, max_tokens) })
}

fn queue_up(world: &mut World, urgency: Urgency, request: Request) -> Slot {
    let slot = world.scheduler.submit(Sequence::new(request, BLOCK_TOKENS), urgency);
    world.live.push(slot);
    world.ages.push(0);
    slot
}

fn of(class: Class) -> Urgency {
    Urgency { class, ..Urgency::default() }
}

#[test]
fn decodes_come_first_and_prefill_fills_the_budget() {
    let mut world = World::new(policy(), 32, false, 1);
    let a = submit(&mut world, vec![1; 5], 8);
    world.step();
    let b = submit(&mut world, vec![2; 30], 1);
    let mut step = Vec::new();
    world.scheduler.schedule(&mut step);
    assert_eq!(step[0], Chunk { slot: a, start: 5, rows: 1, samples: true });
    assert_eq!(step[1], Chunk { slot: b, start: 0, rows: 12, samples: false });
}

#[test]
fn a_known_prefix_is_shared_but_its_last_token_is_computed() {
    let mut world = World::new(policy(), 32, true, 1);
    submit(&mut world, vec![1; 8], 1);
    finish(&mut world);
    let slot = submit(&mut world, vec![1; 8], 1);
    let mut step = Vec::new();
    world.scheduler.schedule(&mut step);
    assert_eq!(step, [Chunk { slot, start: 4, rows: 4, samples: true }], "one block of two is shared");
}

#[test]
fn a_prefix_in_the_making_is_waited_for() {
    let mut world = World::new(policy(), 32, true, 1);
    let first = submit(&mut world, vec![1; 9], 2);
    let second = submit(&mut world, vec![1; 9], 2);
    let other = submit(&mut world, vec![2; 3], 2);
    world.step();
    assert_eq!(world.scheduler.running(), [first, other], "the others do not wait behind it");
    world.step();
    let usage = world.scheduler.sequence(second).usage();
    assert_eq!(usage.cached_tokens, 8);
}

#[test]
fn a_sequence_that_does_not_fit_yet_is_not_overtaken() {
    let mut world = World::new(policy(), 10, false, 1);
    let running = submit(&mut world, vec![1; 4], 16);
    world.step();
    let large = submit(&mut world, vec![2; 20], 12);
    let small = submit(&mut world, vec![3; 1], 1);
    world.step();
    assert_eq!(world.scheduler.running(), [running]);
    assert_eq!(world.scheduler.waiting().collect::<Vec<_>>(), [large, small]);
}

#[test]
fn the_window_admits_the_longest_output_first_and_bounds_the_wait() {
    let policy =
        SchedulerPolicy { max_sequences: 1, max_batch_tokens: 64, longest_first_window: 4, ..policy() };
    let mut world = World::new(policy, 32, false, 1);
    let short = submit(&mut world, vec![1; 2], 1);
    let long = submit(&mut world, vec![1; 2], 20);
    world.step();
    assert_eq!(world.scheduler.running(), [long]);
    // Long ones keep coming; the short one still gets its turn.
    let mut rounds = 0;
    while world.live.contains(&short) && !world.scheduler.running().contains(&short) {
        if world.live.len() < 4 {
            submit(&mut world, vec![1; 2], 20);
        }
        world.step();
        rounds += 1;
        assert!(rounds < 2_000, "passed over for ever");
    }
}

#[test]
fn the_youngest_gives_way_and_is_computed_again() {
    let policy = SchedulerPolicy { output_reserve: OutputReserve::None, ..policy() };
    let mut world = World::new(policy, 4, false, 1);
    let old = submit(&mut world, vec![1; 7], 9);
    let young = submit(&mut world, vec![2; 7], 9);
    world.step();
    assert_eq!(world.scheduler.running(), [old, young]);
    for _ in 0..3 {
        let mut step = Vec::new();
        world.scheduler.schedule(&mut step);
        world.scheduler.advance(&step);
        for chunk in step.iter().filter(|chunk| chunk.samples) {
            assert_eq!(world.scheduler.append(chunk.slot, 5), None);
        }
    }
    assert_eq!(world.scheduler.running(), [old]);
    assert_eq!(world.scheduler.counters().preemptions, 1);
    assert_eq!(world.scheduler.sequence(young).pending(), world.scheduler.sequence(young).tokens().len());
}

/// Decides a step and counts it as queued.
fn queue(scheduler: &mut Scheduler) -> Vec<Chunk> {
    let mut step = Vec::new();
    scheduler.schedule(&mut step);
    scheduler.advance(&step);
    step
}

#[test]
fn an_awaited_token_is_computed_and_the_last_one_is_not() {
    let mut world = World::new(policy(), 32, false, 1);
    let slot = submit(&mut world, vec![1; 3], 2);
    let scheduler = &mut world.scheduler;
    assert_eq!(queue(scheduler), [Chunk { slot, start: 0, rows: 3, samples: true }]);
    let mut next = Vec::new();
    scheduler.schedule(&mut next);
    assert_eq!(next, [Chunk { slot, start: 3, rows: 1, samples: true }]);
    let sequence = scheduler.sequence(slot);
    assert_eq!((sequence.awaited(), sequence.tokens(), sequence.length()), (Some(0), &[1; 3][..], 4));
    assert_eq!(scheduler.append(slot, 5), None);
    scheduler.advance(&next);
    assert_eq!(queue(scheduler), [], "the second token, which is awaited, is the last one");
    assert_eq!(scheduler.append(slot, 6), Some(Finish::Length));
}

#[test]
fn a_token_goes_to_no_other_sequence_in_the_slot() {
    let mut world = World::new(policy(), 32, false, 1);
    let scheduler = &mut world.scheduler;
    let sequence = || Sequence::new(request(vec![1; 3], 9), BLOCK_TOKENS);
    let slot = scheduler.submit(sequence(), Urgency::default());
    queue(scheduler);
    let mut next = Vec::new();
    scheduler.schedule(&mut next);
    assert_eq!(scheduler.append(slot, 9), Some(Finish::Stop));
    scheduler.remove(slot);
    scheduler.advance(&next);
    assert_eq!(next, [Chunk { slot, start: 3, rows: 1, samples: true }], "computed in vain");
    assert_eq!(scheduler.submit(sequence(), Urgency::default()), slot);
    assert!(!scheduler.awaits(slot, 0));
    queue(scheduler);
    assert!(scheduler.awaits(slot, 0) && !scheduler.awaits(slot, 1));
}

#[test]
fn a_penalty_needs_the_tokens_so_far() {
    let penalties = Sampling { presence_penalty: 1.0, ..Sampling::default() };
    let bias = Sampling { logit_bias: vec![(1, 1.0)], ..Sampling::default() };
    for (sampling, max_tokens, needed) in
        [(penalties.clone(), 9, true), (penalties, 1, false), (bias, 9, false)]
    {
        let mut world = World::new(policy(), 32, false, 1);
        let scheduler = &mut world.scheduler;
        let request = Request { sampling, ..request(vec![1; 3], max_tokens) };
        let slot = scheduler.submit(Sequence::new(request, BLOCK_TOKENS), Urgency::default());
        let step = queue(scheduler);
        assert_eq!(scheduler.needs_tokens(&step), needed);
        scheduler.append(slot, 5);
        assert!(!scheduler.needs_tokens(&step), "it is known");
    }
}

#[test]
fn a_preempted_sequence_still_gets_its_token() {
    let policy = SchedulerPolicy { output_reserve: OutputReserve::None, ..policy() };
    let mut world = World::new(policy, 4, false, 1);
    let old = submit(&mut world, vec![1; 7], 9);
    let young = submit(&mut world, vec![2; 7], 2);
    let scheduler = &mut world.scheduler;
    queue(scheduler);
    scheduler.append(old, 5);
    scheduler.append(young, 5);
    queue(scheduler);
    let mut next = Vec::new();
    scheduler.schedule(&mut next);
    assert_eq!(next, [Chunk { slot: old, start: 8, rows: 1, samples: true }]);
    assert_eq!((scheduler.running(), scheduler.counters().preemptions), (&[old][..], 1));
    assert!(scheduler.awaits(young, 1));
    assert_eq!(scheduler.append(young, 6), Some(Finish::Length), "without being computed again");
}
