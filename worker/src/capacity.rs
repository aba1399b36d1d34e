//! How many more jobs the worker may hold: a guess at what the free KV blocks can take. Pure.
//!
//! What a job needs is only known once it is pulled and tokenized, so the guess is a running mean of what
//! recent jobs took. The engine corrects it: while sequences wait for room there, nothing
//! is pulled beyond a small reserve that hides the broker's round trip.
//!
//! Jobs of lower classes keep no job of a higher one out: a class that holds less than the reserve gets up to that many
//! beyond what fits, whatever sequences of lower classes wait, for the engine lets the higher class go first. What
//! comes beyond that goes by the classes' weights.

use millrace_crds::names::Class;
use millrace_engine::schedule::handle::Limits;
use millrace_queue::classes::PerClass;

/// Most jobs held at once, whatever the engine's size: bounds tasks and memory.
pub const JOBS_HELD_MAX: usize = 2048;
/// Share of the newest job in the running means.
const NEWEST: f64 = 0.1;
/// Tokens that a job is taken to need before any was seen, and never more than a quarter of the model's length.
const FIRST_TOKENS: f64 = 256.0;
/// Jobs held beyond what runs, as a share of the batch: they replace finished ones without a round trip.
const RESERVE_SHARE: usize = 8;
/// At least this many.
const RESERVE_MIN: usize = 2;

/// What jobs took so far.
#[derive(Debug, Clone)]
pub struct Capacity {
    limits: Limits,
    blocks_mean: f64,
    sequences_mean: f64,
}

/// What a finished job took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Tokens of prompts and outputs.
    pub tokens: u64,
    /// Sequences.
    pub sequences: u64,
}

impl Capacity {
    /// No job was seen yet.
    pub fn new(limits: Limits) -> Self {
        let tokens = FIRST_TOKENS.min(f64::from(limits.max_model_len) / 4.0);
        let blocks = tokens / f64::from(limits.block_tokens.max(1));
        Self { limits, blocks_mean: blocks.max(1.0), sequences_mean: 1.0 }
    }

    /// Learns from a finished job.
    pub fn learn(&mut self, taken: Taken) {
        let sequences = taken.sequences.max(1) as f64;
        // A sequence's last block is half empty on average.
        let blocks = taken.tokens as f64 / f64::from(self.limits.block_tokens.max(1)) + 0.5 * sequences;
        self.blocks_mean += NEWEST * (blocks.max(1.0) - self.blocks_mean);
        self.sequences_mean += NEWEST * (sequences - self.sequences_mean);
    }

    /// How many more jobs of each class may be pulled, when so many are held and so many sequences wait in the engine.
    /// Never more of a lower class than of a higher one.
    pub fn free(&self, held: PerClass<usize>, waiting: PerClass<u64>) -> PerClass<usize> {
        let fits = self.fits();
        let reserve = (fits / RESERVE_SHARE).max(RESERVE_MIN);
        let waiting_max = (reserve as f64 * self.sequences_mean) as u64;
        let all: usize = held.iter().sum();
        Class::ALL.map(|class| {
            let ahead = ..=class as usize;
            let own: usize = held[ahead].iter().sum();
            let lower = (all - own).min(reserve);
            if all > 0 && waiting[ahead].iter().sum::<u64>() > waiting_max {
                return 0;
            }
            (fits + reserve + lower.saturating_sub(own)).min(JOBS_HELD_MAX).saturating_sub(all)
        })
    }

    /// How many jobs of the mean size run at once.
    fn fits(&self) -> usize {
        let by_blocks = f64::from(self.limits.kv_blocks) / self.blocks_mean;
        let by_sequences = f64::from(self.limits.max_sequences) / self.sequences_mean.max(1.0);
        (by_blocks.min(by_sequences) as usize).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { max_model_len: 4096, max_sequences: 64, block_tokens: 16, kv_blocks: 1024, vocabulary: 9 }
    }

    #[test]
    fn small_jobs_first_then_as_learnt() {
        let mut capacity = Capacity::new(limits());
        let free = |capacity: &Capacity, held| capacity.free([0, held, 0], [0; 3])[Class::Normal as usize];
        assert_eq!(free(&capacity, 0), 64 + 8, "256 tokens are 16 blocks; as many fit as run at once");
        for _ in 0..100 {
            capacity.learn(Taken { tokens: 40, sequences: 1 });
        }
        assert_eq!(free(&capacity, 0), 64 + 8, "small jobs: as many as run at once, and the reserve");
        assert_eq!(free(&capacity, 70), 2);
        assert_eq!(free(&capacity, 80), 0);
        for _ in 0..100 {
            capacity.learn(Taken { tokens: 100_000, sequences: 1000 });
        }
        assert_eq!(free(&capacity, 0), 1 + RESERVE_MIN, "jobs larger than the engine: one and the reserve");
    }

    #[test]
    fn the_engine_corrects_the_guess() {
        let mut capacity = Capacity::new(limits());
        for _ in 0..100 {
            capacity.learn(Taken { tokens: 4096, sequences: 1 });
        }
        assert!(capacity.free([0, 3, 0], [0; 3])[1] > 0);
        assert_eq!(capacity.free([0, 3, 0], [0, 3, 0])[1], 0, "three sequences wait already");
        assert!(capacity.free([0; 3], [0, 3, 0])[1] > 0, "a worker that holds nothing always pulls");
    }

    #[test]
    fn lower_classes_keep_no_higher_one_out() {
        let capacity = Capacity::new(limits());
        assert_eq!(capacity.free([0, 0, 72], [0, 0, 500]), [8, 8, 0], "it is full of low jobs");
        assert_eq!(capacity.free([8, 0, 72], [0; 3]), [0, 0, 0], "and of the reserve");
        assert_eq!(
            capacity.free([9, 0, 62], [0; 3]),
            [1, 1, 1],
            "there are enough high ones: the weights decide"
        );
        assert_eq!(capacity.free([0, 72, 0], [0, 9, 0]), [8, 0, 0], "normal ones wait");
        assert_eq!(capacity.free([1, 0, 0], [9, 0, 0]), [0, 0, 0], "high ones wait: nobody else gets in");
    }
}
