//! Who runs in the next step: continuous batching with chunked prefill under one token budget.
//!
//! A step holds the decodes first, then prefill chunks of the sequences that run, then those of newly
//! admitted ones, until the token budget is spent. Sequences wait and run in the order of their turns: by class, by
//! deadline, then as they came. The first one that waits is admitted when the blocks that it may need fit beside those
//! promised to the running ones ([`OutputReserve`]). When blocks run out all the same, the last of the running ones
//! gives its blocks back and is computed again later (its output does not change by that: results do not depend on
//! chunks or batch mates). It also gives way where a sequence of a higher class has no place.
//!
//! None starves: once `ADMISSIONS_AHEAD_MAX` sequences were admitted beyond those that were there when it came, a
//! sequence's turn comes before all others, and it gives way to none.
//!
//! A step may be decided while the one before is in flight: tokens of that one are then awaited. Its blocks may be
//! shared, given back and taken again at once, for steps run in the order in which they are decided.
//!
//! Invariants: a sequence is in exactly one of `waiting` and `running`, and each of them is in the order of turns; the
//! first running sequence is never preempted for blocks, so each one ends; blocks filled in a step are shared only by
//! later steps. Pure.

mod admission;

use std::collections::VecDeque;

use millrace_crds::config::OutputReserve;
use millrace_crds::names::Class;

use admission::LOOK_AHEAD_MAX;

use super::blocks::{Blocks, Chain};
use super::lengths::OutputLengths;
use super::request::{Finish, Urgency};
use super::sampler;
use super::sequence::{Sequence, Turn};

/// Index of a sequence that waits or runs. Reused after it ended.
pub type Slot = u32;

/// Sequences that came later, or were preempted, and may be admitted before one that waits, because they are more
/// urgent.
pub const ADMISSIONS_AHEAD_MAX: u64 = 512;

/// The scheduler's sizes and choices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerPolicy {
    /// Most sequences that run at once, at least 1.
    pub max_sequences: usize,
    /// Most tokens in a step, at least `max_sequences`.
    pub max_batch_tokens: usize,
    /// For how much output blocks are set aside when a sequence is admitted.
    pub output_reserve: OutputReserve,
    /// Of this many waiting sequences of the same turn the one with most output to come is admitted first; 1 is
    /// strictly first come, first served. Pays in bulk runs: the last steps then have fuller batches.
    pub longest_first_window: usize,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub slot: Slot,
    /// Index of its first token in the step.
    pub start: usize,
    /// Tokens in the step, at least 1.
    pub rows: usize,
    /// Whether its next token is wanted: the chunk ends with the sequence's last token.
    pub samples: bool,
}

/// What the scheduler has counted since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Prompt tokens computed or found in the cache, each once.
    pub prompt_tokens: u64,
    /// Those of them found in the prefix cache.
    pub cached_tokens: u64,
    /// Sequences preempted.
    pub preemptions: u64,
}

/// Sequences, their blocks, and their order.
#[derive(Debug)]
pub struct Scheduler {
    policy: SchedulerPolicy,
    blocks: Blocks,
    slots: Vec<Option<Sequence>>,
    free_slots: Vec<Slot>,
    /// In the order of turns; within a turn those that were preempted first.
    waiting: VecDeque<Slot>,
    /// In the order of turns; within a turn in that of admission.
    running: Vec<Slot>,
    lengths: OutputLengths,
    /// Admissions in all.
    admissions: u64,
    counters: Counters,
}

impl Scheduler {
    /// A scheduler over a pool of blocks.
    ///
    /// # Panics
    /// When the policy's sizes contradict each other; the configuration is checked before.
    pub fn new(policy: SchedulerPolicy, blocks: Blocks) -> Self {
        assert!(policy.max_sequences >= 1 && policy.max_batch_tokens >= policy.max_sequences);
        assert!((1..=LOOK_AHEAD_MAX).contains(&policy.longest_first_window));
        let running = Vec::with_capacity(policy.max_sequences);
        Self {
            policy,
            blocks,
            slots: Vec::new(),
            free_slots: Vec::new(),
            waiting: VecDeque::new(),
            running,
            lengths: OutputLengths::default(),
            admissions: 0,
            counters: Counters::default(),
        }
    }

    /// Queues a sequence behind those that are as urgent. It fits alone: `Limits::admit` has seen to it.
    pub fn submit(&mut self, mut sequence: Sequence, urgency: Urgency) -> Slot {
        let turn = Turn::By(urgency);
        sequence.turn = turn;
        sequence.due_at = self.admissions + self.waiting.len() as u64 + ADMISSIONS_AHEAD_MAX;
        assert!(sequence.blocks_max(self.blocks.block_tokens()) <= self.blocks.total());
        let slot = match self.free_slots.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                (self.slots.len() - 1) as Slot
            }
        };
        self.slots[slot as usize] = Some(sequence);
        let behind = self.waiting.partition_point(|&other| self.sequence(other).turn <= turn);
        self.waiting.insert(behind, slot);
        slot
    }

    /// Takes a sequence out, finished or cancelled, and gives its blocks back.
    pub fn remove(&mut self, slot: Slot) -> Sequence {
        self.release_blocks(slot);
        match self.running.iter().position(|&running| running == slot) {
            Some(index) => {
                self.running.remove(index);
            }
            None => self.waiting.retain(|&waiting| waiting != slot),
        }
        self.free_slots.push(slot);
        self.slots[slot as usize].take().expect("the slot is in use")
    }

    /// Fills `step` with the next step's chunks; none when nothing is to do.
    pub fn schedule(&mut self, step: &mut Vec<Chunk>) {
        step.clear();
        self.call_due();
        self.make_way();
        let mut budget = self.policy.max_batch_tokens;
        let mut index = 0;
        while index < self.running.len() {
            let slot = self.running[index];
            if self.sequence(slot).pending() == 1 && self.grow(slot) {
                self.push_chunk(slot, &mut budget, step);
            }
            // A preemption takes sequences off the end only, so that the index stays right.
            index += 1;
        }
        for index in 0..self.running.len() {
            let slot = self.running[index];
            if budget > 0 && self.sequence(slot).pending() > 1 {
                self.push_chunk(slot, &mut budget, step);
            }
        }
        self.admit(&mut budget, step);
        let idle = self.running.is_empty() && self.waiting.is_empty();
        assert!(
            !step.is_empty()
                || idle
                || self.slots.iter().flatten().any(|sequence| sequence.awaited.is_some()),
            "work makes progress in every step"
        );
    }

    /// Counts a queued step as computed, offers the blocks that it fills to the prefix cache, and awaits its tokens.
    /// Every token of the step before is known by now, and sequences that ended with one are passed over.
    pub fn advance(&mut self, step: &[Chunk]) {
        let block_tokens = self.blocks.block_tokens();
        let mut sampled = 0..;
        for chunk in step {
            let row = if chunk.samples { sampled.next() } else { None };
            let Some(sequence) = self.slots[chunk.slot as usize].as_mut() else { continue };
            assert_eq!((sequence.computed, sequence.awaited), (chunk.start, None));
            sequence.computed += chunk.rows;
            let prompt_done = sequence.computed.min(sequence.prompt_len());
            let newly = prompt_done.saturating_sub(sequence.prompt_counted);
            sequence.prompt_counted += newly;
            self.counters.prompt_tokens += newly as u64;
            while let Some(parent) = sequence.chain
                && (sequence.registered + 1) * block_tokens <= sequence.computed
            {
                let index = sequence.registered;
                let (id, hash) = (sequence.table[index], sequence.hashes[index]);
                sequence.chain = self.blocks.register(id, hash, parent, sequence.block(index, block_tokens));
                sequence.registered += 1;
            }
            sequence.awaited = row;
        }
    }

    /// Whether the tokens of the step in flight must be known before the next one is decided: a penalty looks at them.
    pub fn needs_tokens(&self, step: &[Chunk]) -> bool {
        let live = step.iter().filter_map(|chunk| self.slots[chunk.slot as usize].as_ref());
        live.filter(|sequence| sequence.awaited.is_some() && sequence.pending() > 0)
            .any(sampler::needs_tokens)
    }

    /// Whether the choice of a sampled row of the step in flight is a sequence's next token. It is not when the
    /// sequence ended or was cancelled after the step was decided: the row was then computed in vain.
    pub fn awaits(&self, slot: Slot, row: u32) -> bool {
        self.slots[slot as usize].as_ref().is_some_and(|sequence| sequence.awaited == Some(row))
    }

    /// Adds a generated token to a sequence; says whether the sequence ends with it.
    pub fn append(&mut self, slot: Slot, token: u32) -> Option<Finish> {
        let block_tokens = self.blocks.block_tokens();
        let sequence = self.slots[slot as usize].as_mut().expect("a running sequence");
        let finish = sequence.append(token, block_tokens);
        if finish.is_some() {
            self.lengths.record(sequence.output().len());
        }
        finish
    }

    /// The sequence in a slot.
    pub fn sequence(&self, slot: Slot) -> &Sequence {
        self.slots[slot as usize].as_ref().expect("the slot is in use")
    }

    /// Running sequences, in the order of their turns.
    pub fn running(&self) -> &[Slot] {
        &self.running
    }

    /// Waiting sequences, next one first.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = Slot> + '_ {
        self.waiting.iter().copied()
    }

    /// Waiting sequences by class, in the order of [`Class::ALL`]; one whose turn has come counts as of the first.
    pub fn waiting_by_class(&self) -> [usize; Class::ALL.len()] {
        let mut before = 0;
        Class::ALL.map(|class| {
            let up_to = self.waiting.partition_point(|&slot| match self.sequence(slot).turn {
                Turn::Due => true,
                Turn::By(urgency) => urgency.class <= class,
            });
            up_to - std::mem::replace(&mut before, up_to)
        })
    }

    /// The pool.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// What was counted.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn push_chunk(&mut self, slot: Slot, budget: &mut usize, step: &mut Vec<Chunk>) {
        let sequence = self.sequence(slot);
        let rows = sequence.pending().min(*budget);
        let samples = rows == sequence.pending();
        step.push(Chunk { slot, start: sequence.computed, rows, samples });
        *budget -= rows;
    }

    /// Sees to it that a sequence has a block for each of its tokens, preempting those behind it if it must.
    /// False when it had to give way itself.
    fn grow(&mut self, slot: Slot) -> bool {
        let needed = self.sequence(slot).length().div_ceil(self.blocks.block_tokens());
        while self.sequence(slot).table.len() < needed {
            if let Some(id) = self.blocks.allocate() {
                self.slots[slot as usize].as_mut().expect("a running sequence").table.push(id);
                continue;
            }
            assert!(self.running.len() > 1, "a sequence that runs alone fits");
            if self.preempt_last() == slot {
                return false;
            }
        }
        true
    }

    /// Puts the last running sequence back to the queue, before those that are as urgent, without blocks.
    fn preempt_last(&mut self) -> Slot {
        let slot = self.running.pop().expect("at least one runs");
        self.release_blocks(slot);
        let turn = self.sequence(slot).turn;
        let before = self.waiting.partition_point(|&other| self.sequence(other).turn < turn);
        self.waiting.insert(before, slot);
        self.counters.preemptions += 1;
        slot
    }

    fn release_blocks(&mut self, slot: Slot) {
        let sequence = self.slots[slot as usize].as_mut().expect("the slot is in use");
        while let Some(id) = sequence.table.pop() {
            self.blocks.release(id);
        }
        (sequence.computed, sequence.registered, sequence.chain) = (0, 0, Some(Chain::ROOT));
    }
}

#[cfg(test)]
mod tests;
