//! Random weights of the right shapes, for benchmarks: the work of a step does not depend on the weights.
//!
//! All matrices are slices of one pool of normal numbers (mean 0, deviation 0.02) as large as the largest of
//! them, so that a model of any size needs no more than that on the host. Norms are ones. Never for answers.

use half::bf16;

use super::binding::{names, shape_of};
use super::config::DecoderConfig;
use super::source::{SourceError, StoredDtype, StoredTensor, TensorSource};

/// Deviation of the weights, as models are initialised.
const DEVIATION: f32 = 0.02;

/// Elements by which the slices of two tensors may be shifted against each other.
const SHIFT_MAX: usize = 1 << 16;

/// The source of random weights.
#[derive(Debug)]
pub struct RandomSource {
    config: DecoderConfig,
    normal: Vec<u8>,
    ones: Vec<u8>,
}

impl RandomSource {
    /// Draws the pool. Equal seeds give equal weights.
    pub fn new(config: &DecoderConfig, seed: u64) -> Self {
        let sizes = names(config).into_iter().filter_map(|name| shape_of(config, &name));
        let most = sizes.map(|shape| shape.iter().product::<usize>()).max().unwrap_or(0);
        let mut state = seed;
        let mut normal = Vec::with_capacity((most + SHIFT_MAX) * 2);
        for _ in 0..most + SHIFT_MAX {
            // The sum of four uniform numbers of 16 bits is close to a normal one.
            let bits = splitmix64(&mut state);
            let sum: u32 = (0..4).map(|part| (bits >> (16 * part)) as u32 & 0xffff).sum();
            let centred = (sum as f32 / 65_536.0 - 2.0) / (1.0_f32 / 3.0).sqrt();
            normal.extend(bf16::from_f32(centred * DEVIATION).to_le_bytes());
        }
        let widest = config.hidden.max(config.head_dim);
        let ones = (0..widest).flat_map(|_| bf16::ONE.to_le_bytes()).collect();
        Self { config: config.clone(), normal, ones }
    }
}

impl TensorSource for RandomSource {
    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, SourceError> {
        let missing = || SourceError::Missing(name.to_owned());
        let shape = shape_of(&self.config, name).ok_or_else(missing)?;
        let bytes = shape.iter().product::<usize>() * 2;
        let data = if name.ends_with("norm.weight") {
            &self.ones[..bytes]
        } else {
            let mut state = name.bytes().fold(0, |hash: u64, byte| hash.wrapping_mul(31) + u64::from(byte));
            let shift = splitmix64(&mut state) as usize % SHIFT_MAX * 2;
            &self.normal[shift..shift + bytes]
        };
        Ok(StoredTensor { dtype: StoredDtype::Bf16, shape, data })
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
