//! Who runs in the next step: continuous batching with chunked prefill under one token budget.
//!
//! A step holds the decodes first, then prefill chunks of the sequences that run, then those of newly
//! admitted ones, until the token budget is spent. A waiting sequence is admitted, oldest first, when the
//! blocks that it may need fit beside those promised to the running ones. With `output_reserve` = 1 the
//! promise is the worst case and nothing is ever preempted; below 1 more sequences run at once, and when
//! blocks run out the youngest one gives its blocks back and is computed again later (its output does not
//! change by that: results do not depend on chunks or batch mates).
//!
//! A step may be decided while the one before is in flight: tokens of that one are then awaited. Its blocks may be
//! shared, given back and taken again at once, for steps run in the order in which they are decided.
//!
//! Invariants: a sequence is in exactly one of `waiting` and `running`; the oldest running sequence is never
//! preempted, so each one ends; blocks filled in a step are shared only by later steps. Pure.

use std::collections::VecDeque;

use super::blocks::{Blocks, Chain};
use super::request::Finish;
use super::sampler;
use super::sequence::Sequence;

/// Index of a sequence that waits or runs. Reused after it ended.
pub type Slot = u32;

/// Steps for which a sequence lets others finish computing a prefix that it shares. Enough for a prompt of
/// 32,000 tokens in chunks of 512; beyond it the sequence computes the prefix itself.
const DEFERRALS_MAX: u32 = 64;

/// Sequences that may be admitted before an older one when the window looks ahead. Bounds the wait that
/// reordering can add to one sequence.
const BYPASSES_MAX: u32 = 64;

/// Waiting sequences that are looked at in one step. Bounds the host's work when thousands wait.
const LOOK_AHEAD_MAX: usize = 64;

/// The scheduler's sizes and choices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerPolicy {
    /// Most sequences that run at once, at least 1.
    pub max_sequences: usize,
    /// Most tokens in a step, at least `max_sequences`.
    pub max_batch_tokens: usize,
    /// Share of the output that a sequence may still generate for which blocks are set aside, 0 to 1.
    /// At 1 no sequence is preempted.
    pub output_reserve: f32,
    /// Of this many waiting sequences the one with most output to come is admitted first; 1 is strictly
    /// first come, first served. Pays in bulk runs: the last steps then have fuller batches.
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
    waiting: VecDeque<Slot>,
    /// In the order of admission.
    running: Vec<Slot>,
    counters: Counters,
}

/// Whether a waiting sequence comes in now.
enum Admission {
    Admitted,
    /// Another sequence computes what it could share, or the step in flight its last token.
    Deferred,
    NoRoom,
}

impl Scheduler {
    /// A scheduler over a pool of blocks.
    ///
    /// # Panics
    /// When the policy's sizes contradict each other; the configuration is checked before.
    pub fn new(policy: SchedulerPolicy, blocks: Blocks) -> Self {
        assert!(policy.max_sequences >= 1 && policy.max_batch_tokens >= policy.max_sequences);
        assert!((0.0..=1.0).contains(&policy.output_reserve));
        assert!((1..=LOOK_AHEAD_MAX).contains(&policy.longest_first_window));
        let running = Vec::with_capacity(policy.max_sequences);
        Self {
            policy,
            blocks,
            slots: Vec::new(),
            free_slots: Vec::new(),
            waiting: VecDeque::new(),
            running,
            counters: Counters::default(),
        }
    }

    /// Puts a sequence at the end of the queue. It fits alone: `Limits::admit` has seen to it.
    pub fn submit(&mut self, sequence: Sequence) -> Slot {
        assert!(sequence.blocks_max(self.blocks.block_tokens()) <= self.blocks.total());
        let slot = match self.free_slots.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                (self.slots.len() - 1) as Slot
            }
        };
        self.slots[slot as usize] = Some(sequence);
        self.waiting.push_back(slot);
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
        self.slots[slot as usize].as_mut().expect("a running sequence").append(token, block_tokens)
    }

    /// The sequence in a slot.
    pub fn sequence(&self, slot: Slot) -> &Sequence {
        self.slots[slot as usize].as_ref().expect("the slot is in use")
    }

    /// Running sequences, in the order of admission.
    pub fn running(&self) -> &[Slot] {
        &self.running
    }

    /// Waiting sequences, next one first.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = Slot> + '_ {
        self.waiting.iter().copied()
    }

    /// The pool.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// What was counted.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Blocks that running and waiting sequences may hold at their ends.
    pub fn blocks_reserved(&self) -> usize {
        let block_tokens = self.blocks.block_tokens();
        self.slots.iter().flatten().map(|sequence| sequence.blocks_max(block_tokens)).sum()
    }

    fn push_chunk(&mut self, slot: Slot, budget: &mut usize, step: &mut Vec<Chunk>) {
        let sequence = self.sequence(slot);
        let rows = sequence.pending().min(*budget);
        let samples = rows == sequence.pending();
        step.push(Chunk { slot, start: sequence.computed, rows, samples });
        *budget -= rows;
    }

    /// Sees to it that a sequence has a block for each of its tokens, preempting younger ones if it must.
    /// False when it had to give way itself.
    fn grow(&mut self, slot: Slot) -> bool {
        let needed = self.sequence(slot).length().div_ceil(self.blocks.block_tokens());
        while self.sequence(slot).table.len() < needed {
            if let Some(id) = self.blocks.allocate() {
                self.slots[slot as usize].as_mut().expect("a running sequence").table.push(id);
                continue;
            }
            assert!(self.running.len() > 1, "a sequence that runs alone fits");
            let youngest = *self.running.last().expect("at least this one runs");
            self.preempt(youngest);
            if youngest == slot {
                return false;
            }
        }
        true
    }

    /// Puts the youngest running sequence back to the front of the queue, without blocks.
    fn preempt(&mut self, slot: Slot) {
        assert_eq!(self.running.pop(), Some(slot), "the youngest goes first");
        self.release_blocks(slot);
        self.waiting.push_front(slot);
        self.counters.preemptions += 1;
    }

    fn release_blocks(&mut self, slot: Slot) {
        let sequence = self.slots[slot as usize].as_mut().expect("the slot is in use");
        while let Some(id) = sequence.table.pop() {
            self.blocks.release(id);
        }
        (sequence.computed, sequence.registered, sequence.chain) = (0, 0, Some(Chain::ROOT));
    }

    fn admit(&mut self, budget: &mut usize, step: &mut Vec<Chunk>) {
        let mut index = 0;
        while *budget > 0
            && self.running.len() < self.policy.max_sequences
            && index < self.waiting.len().min(LOOK_AHEAD_MAX)
        {
            self.bring_longest_to(index);
            let slot = self.waiting[index];
            match self.try_admit(slot) {
                Admission::Admitted => {
                    self.waiting.remove(index);
                    for &older in self.waiting.iter().take(index) {
                        let older = self.slots[older as usize].as_mut().expect("a waiting sequence");
                        older.bypassed += 1;
                    }
                    self.push_chunk(slot, budget, step);
                }
                Admission::Deferred => index += 1,
                Admission::NoRoom => return,
            }
        }
    }

    /// Moves the sequence with most output to come, of the window that starts at `first`, to `first`. A
    /// sequence that was passed over often enough, or has run before, stays where it is.
    fn bring_longest_to(&mut self, first: usize) {
        let window = self.policy.longest_first_window.min(self.waiting.len() - first);
        let head = self.sequence(self.waiting[first]);
        if window < 2 || head.bypassed >= BYPASSES_MAX || head.admitted {
            return;
        }
        let mut best = (first, head.remaining());
        for index in first + 1..first + window {
            let remaining = self.sequence(self.waiting[index]).remaining();
            if remaining > best.1 {
                best = (index, remaining);
            }
        }
        let slot = self.waiting.remove(best.0).expect("an index inside the queue");
        for index in first..best.0 {
            let passed = self.waiting[index];
            self.slots[passed as usize].as_mut().expect("a waiting sequence").bypassed += 1;
        }
        self.waiting.insert(first, slot);
    }

    fn try_admit(&mut self, slot: Slot) -> Admission {
        let block_tokens = self.blocks.block_tokens();
        let sequence = self.sequence(slot);
        if sequence.pending() == 0 {
            // It was preempted, and ends with the token that it awaits.
            return Admission::Deferred;
        }
        let (hits, held) = self.prefix_hits(sequence);
        if self.computes_soon(sequence, hits) && sequence.deferred < DEFERRALS_MAX {
            self.slots[slot as usize].as_mut().expect("a waiting sequence").deferred += 1;
            return Admission::Deferred;
        }
        let promised = |s: &Sequence| s.blocks_promised(block_tokens, self.policy.output_reserve);
        let outstanding: usize = self
            .running
            .iter()
            .map(|&running| self.sequence(running))
            .map(|running| promised(running).saturating_sub(running.table.len()))
            .sum();
        if self.blocks.free() < outstanding + promised(sequence) - held {
            return Admission::NoRoom;
        }
        self.take_blocks(slot, hits);
        self.running.push(slot);
        Admission::Admitted
    }

    /// Blocks of a waiting sequence's prefix that are known, and how many of those some sequence holds.
    fn prefix_hits(&self, sequence: &Sequence) -> (usize, usize) {
        let block_tokens = self.blocks.block_tokens();
        let (mut hits, mut held, mut chain) = (0, 0, Chain::ROOT);
        while hits < sequence.blocks_matchable(block_tokens) {
            let tokens = sequence.block(hits, block_tokens);
            let Some((id, next)) = self.blocks.find(sequence.hashes[hits], chain, tokens) else { break };
            hits += 1;
            held += usize::from(!self.blocks.is_free(id));
            chain = next;
        }
        (hits, held)
    }

    /// Whether a running sequence is about to compute the first block that this one misses.
    fn computes_soon(&self, sequence: &Sequence, hits: usize) -> bool {
        let block_tokens = self.blocks.block_tokens();
        if !self.blocks.caching() || hits >= sequence.blocks_matchable(block_tokens) {
            return false;
        }
        let wanted = Some(&sequence.hashes[hits]);
        self.running.iter().map(|&slot| self.sequence(slot)).any(|running| {
            running.pending() > 1
                && running.chain.is_some()
                && running.registered <= hits
                && running.hashes.get(hits) == wanted
        })
    }

    /// Shares the known blocks of a prefix and takes new ones for the rest of the tokens.
    fn take_blocks(&mut self, slot: Slot, hits: usize) {
        let block_tokens = self.blocks.block_tokens();
        let sequence = self.slots[slot as usize].as_mut().expect("a waiting sequence");
        assert!(sequence.table.is_empty() && sequence.computed == 0);
        let mut chain = Chain::ROOT;
        for index in 0..hits {
            let tokens = sequence.block(index, block_tokens);
            let found = self.blocks.find(sequence.hashes[index], chain, tokens);
            let (id, next) = found.expect("the blocks were found a moment ago");
            self.blocks.share(id);
            sequence.table.push(id);
            chain = next;
        }
        (sequence.computed, sequence.registered, sequence.chain) = (hits * block_tokens, hits, Some(chain));
        while sequence.table.len() * block_tokens < sequence.length() {
            sequence.table.push(self.blocks.allocate().expect("admission has counted the blocks"));
        }
        if !sequence.admitted {
            sequence.admitted = true;
            sequence.cached = sequence.computed.min(sequence.prompt_len());
            sequence.prompt_counted = sequence.cached;
            self.counters.prompt_tokens += sequence.cached as u64;
            self.counters.cached_tokens += sequence.cached as u64;
        }
    }
}

#[cfg(test)]
mod tests;
