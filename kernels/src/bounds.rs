//! What this machine could do at best, measured on the spot, and what a step asks of it.
//!
//! A speed is only worth something beside its limit, and limits differ from machine to machine and, on a
//! shared host, from minute to minute. [`Cpu::measure`](crate::cpu::Cpu::measure) takes the read bandwidth of
//! memory and the rate of the tile product on operands in the first-level cache, on all threads; a step's cost
//! over these rates is the least time it could take.

use crate::ops::KvDtype;
use crate::precision::Precision;

/// Rates of this machine with all threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Bytes read from memory per second, from a range too large for the caches.
    pub read_bytes_per_s: f64,
    /// Operations (multiplications and additions) per second of the tile product.
    pub operations_per_s: f64,
}

/// Sizes of a decoder, as far as its cost depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers.
    pub layers: usize,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements between gate-up and down.
    pub ffn: usize,
    /// Rows of the head.
    pub vocabulary: usize,
}

/// Work of one or several steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepWork {
    /// Steps; each reads the weights once.
    pub steps: f64,
    /// Rows that went through the layers.
    pub rows: f64,
    /// Rows that got logits.
    pub logits_rows: f64,
    /// Sum over rows of the positions that each attended to.
    pub attended: f64,
    /// Sum over steps and sequences of the positions in the cache that were read.
    pub cached: f64,
}

/// What work costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Multiplications and additions.
    pub operations: f64,
    /// Bytes of weights, keys and values read.
    pub bytes: f64,
}

impl ModelShape {
    /// Weights of all layers.
    pub fn layer_weights(&self) -> f64 {
        let attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden;
        (self.layers * (attention + 3 * self.ffn * self.hidden)) as f64
    }

    /// Weights of the head.
    pub fn head_weights(&self) -> f64 {
        (self.vocabulary * self.hidden) as f64
    }

    /// Cost of some work, with weights and a cache of these types.
    pub fn cost(&self, work: &StepWork, precision: Precision, kv: KvDtype) -> Cost {
        let (weight_bytes, operand_bytes) = match precision {
            Precision::F32 => (4.0, 4.0),
            Precision::Bf16 => (2.0, 2.0),
            Precision::Int8 => (1.0, 2.0),
        };
        let cache_bytes = if kv == KvDtype::Fp8E4m3 { 1.0 } else { operand_bytes };
        let weights = self.layer_weights() + self.head_weights();
        let attention = (4 * self.layers * self.heads * self.head_dim) as f64;
        let position = (2 * self.layers * self.kv_heads * self.head_dim) as f64;
        Cost {
            operations: 2.0 * self.layer_weights() * work.rows
                + 2.0 * self.head_weights() * work.logits_rows
                + attention * work.attended,
            bytes: weights * weight_bytes * work.steps + position * cache_bytes * work.cached,
        }
    }
}

impl Bounds {
    /// Least seconds that a cost can take when computing and reading overlap fully.
    pub fn least_s(&self, cost: &Cost) -> f64 {
        (cost.operations / self.operations_per_s).max(cost.bytes / self.read_bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, CpuOptions};

    const SMOLLM2: ModelShape = ModelShape {
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocabulary: 49152,
    };

    #[test]
    fn counts_of_a_known_model() {
        assert_eq!(SMOLLM2.layer_weights(), 106_168_320.0);
        assert_eq!(SMOLLM2.head_weights(), 28_311_552.0);
        let work = StepWork { steps: 1.0, rows: 1.0, logits_rows: 1.0, attended: 100.0, cached: 100.0 };
        let cost = SMOLLM2.cost(&work, Precision::Bf16, KvDtype::Operand);
        assert_eq!(cost.bytes, 2.0 * 134_479_872.0 + 23_040.0 * 100.0);
        let fp8 = SMOLLM2.cost(&work, Precision::Bf16, KvDtype::Fp8E4m3);
        assert_eq!(fp8, Cost { bytes: 2.0 * 134_479_872.0 + 11_520.0 * 100.0, ..cost });
        assert_eq!(cost.operations, 2.0 * 134_479_872.0 + 69_120.0 * 100.0);
    }

    #[test]
    fn rates_are_plausible() {
        let bounds = Cpu::new(CpuOptions::new(Precision::F32)).unwrap().measure();
        assert!(bounds.read_bytes_per_s > 1e8 && bounds.read_bytes_per_s < 1e13, "{bounds:?}");
        assert!(bounds.operations_per_s > 1e8 && bounds.operations_per_s < 1e15, "{bounds:?}");
    }
}
