//! Seeded random numbers for faults and tiny weights: SplitMix64 (Steele, Lea, Flood: "Fast splittable
//! pseudorandom number generators", 2014). Equal seeds give equal numbers on every machine.

use std::ops::Range;

/// A generator. Not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of this run: `MILLRACE_SEED`, or `default`. It is printed, so that a failure can be repeated.
    pub fn from_environment(what: &str, default: u64) -> Self {
        let seed = std::env::var("MILLRACE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
        eprintln!("{what}: seed {seed} (repeat with MILLRACE_SEED={seed})");
        Self::new(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number of the range, which must not be empty. The bias of the remainder does not matter here.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        assert!(range.start < range.end, "an empty range has no number");
        range.start + self.next_u64() % (range.end - range.start)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal, mean 0, variance 1: the sum of twelve uniform numbers.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_bounds() {
        // The reference implementation's first outputs for seed 0.
        let mut random = Random::new(0);
        assert_eq!(random.next_u64(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(random.next_u64(), 0x6E78_9E6A_A1B9_65F4);
        assert!((0..1000).all(|_| (3..9).contains(&random.within(3..9))));
        let mean = (0..4000).map(|_| random.normal()).sum::<f32>() / 4000.0;
        assert!(mean.abs() < 0.1, "mean {mean}");
    }
}
