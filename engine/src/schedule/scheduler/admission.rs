//! Who comes in: turns, places, blocks, and who gives way.

use millrace_crds::config::OutputReserve;

use super::{Chunk, Scheduler, Slot};
use crate::schedule::blocks::Chain;
use crate::schedule::sequence::{Sequence, Turn};

/// Steps for which a sequence lets others finish computing a prefix that it shares. Enough for a prompt of
/// 32,000 tokens in chunks of 512; beyond it the sequence computes the prefix itself.
const DEFERRALS_MAX: u32 = 64;

/// Sequences that may be admitted before an older one when the window looks ahead. Bounds the wait that
/// reordering can add to one sequence.
const BYPASSES_MAX: u32 = 64;

/// Waiting sequences that are looked at in one step. Bounds the host's work when thousands wait.
pub(super) const LOOK_AHEAD_MAX: usize = 64;

/// Whether a waiting sequence comes in now.
enum Admission {
    Admitted,
    /// Another sequence computes what it could share, or the step in flight its last token.
    Deferred,
    NoRoom,
}

impl Scheduler {
    /// Moves the sequences whose turn has come to the front.
    pub(super) fn call_due(&mut self) {
        // With equal turns the queue is in the order of arrival, but for a window that bounds itself.
        let ends = (self.waiting.front(), self.waiting.back());
        let (Some(&first), Some(&last)) = ends else { return };
        if self.sequence(first).turn == self.sequence(last).turn {
            return;
        }
        for index in 0..self.waiting.len() {
            let slot = self.waiting[index];
            let admissions = self.admissions;
            let sequence = self.slots[slot as usize].as_mut().expect("a waiting sequence");
            if sequence.turn != Turn::Due && sequence.due_at <= admissions {
                sequence.turn = Turn::Due;
                self.waiting.remove(index);
                let behind = self.waiting.partition_point(|&other| self.sequence(other).turn <= Turn::Due);
                self.waiting.insert(behind, slot);
            }
        }
    }

    /// Admits the first sequences of the queue in place of running ones of lower classes, last ones first.
    pub(super) fn make_way(&mut self) {
        while let Some(&slot) = self.waiting.front()
            && self.gives_way_to(slot)
        {
            while self.running.len() >= self.policy.max_sequences {
                self.preempt_last();
            }
            loop {
                match self.try_admit(slot) {
                    Admission::Admitted => {
                        self.waiting.retain(|&waiting| waiting != slot);
                        break;
                    }
                    Admission::Deferred => return,
                    Admission::NoRoom if self.last_is_below(slot) => {
                        self.preempt_last();
                    }
                    Admission::NoRoom => return,
                }
            }
        }
    }

    pub(super) fn admit(&mut self, budget: &mut usize, step: &mut Vec<Chunk>) {
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

    /// Whether a waiting sequence lacks what running ones of classes below its own hold.
    fn gives_way_to(&self, slot: Slot) -> bool {
        let sequence = self.sequence(slot);
        let (hits, shared) = self.prefix_hits(sequence);
        let (mut owed, mut owed_above, mut held) = (0, 0, 0);
        for running in self.running.iter().map(|&running| self.sequence(running)) {
            let more = self.promised(running).saturating_sub(running.table.len());
            owed += more;
            match is_below(running.turn, sequence.turn) {
                true => held += running.table.iter().filter(|&&id| self.blocks.references(id) == 1).count(),
                false => owed_above += more,
            }
        }
        let full = self.running.len() >= self.policy.max_sequences;
        let (free, needed) = (self.blocks.free(), self.promised(sequence) - shared);
        self.last_is_below(slot)
            && (full || free < owed + needed)
            && free + held >= owed_above + needed
            && !self.defers(sequence, hits)
    }

    fn last_is_below(&self, slot: Slot) -> bool {
        let last = self.running.last();
        last.is_some_and(|&last| is_below(self.sequence(last).turn, self.sequence(slot).turn))
    }

    /// Moves the sequence with most output to come, of the window of equal turns that starts at `first`, to `first`.
    /// A sequence that was passed over often enough, or has run before, stays where it is.
    fn bring_longest_to(&mut self, first: usize) {
        let head = self.sequence(self.waiting[first]);
        let equals = self.waiting.range(first..).take(self.policy.longest_first_window);
        let window = equals.take_while(|&&slot| self.sequence(slot).turn == head.turn).count();
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
        let sequence = self.sequence(slot);
        let (hits, held) = self.prefix_hits(sequence);
        if self.defers(sequence, hits) {
            self.slots[slot as usize].as_mut().expect("a waiting sequence").deferred += 1;
            return Admission::Deferred;
        }
        let outstanding: usize = self
            .running
            .iter()
            .map(|&running| self.sequence(running))
            .map(|running| self.promised(running).saturating_sub(running.table.len()))
            .sum();
        if self.blocks.free() < outstanding + self.promised(sequence) - held {
            return Admission::NoRoom;
        }
        let turn = sequence.turn;
        self.take_blocks(slot, hits);
        let behind = self.running.partition_point(|&other| self.sequence(other).turn <= turn);
        self.running.insert(behind, slot);
        self.admissions += 1;
        Admission::Admitted
    }

    /// Blocks that a sequence is expected to hold at its end.
    fn promised(&self, sequence: &Sequence) -> usize {
        let tokens = match self.policy.output_reserve {
            OutputReserve::Learned => self.lengths.expected_after(sequence.generated()),
            OutputReserve::Full => sequence.remaining(),
            OutputReserve::None => 1,
        };
        sequence.blocks_after(tokens, self.blocks.block_tokens())
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

    /// Whether a waiting sequence lets others go first: it was preempted and ends with the token that it awaits, or
    /// another one computes what it could share.
    fn defers(&self, sequence: &Sequence, hits: usize) -> bool {
        sequence.pending() == 0 || (sequence.deferred < DEFERRALS_MAX && self.computes_soon(sequence, hits))
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

/// Whether a sequence may be preempted so that another one runs: it is of a lower class.
fn is_below(running: Turn, waiting: Turn) -> bool {
    match (running, waiting) {
        (Turn::By(running), Turn::By(waiting)) => running.class > waiting.class,
        _ => false,
    }
}
