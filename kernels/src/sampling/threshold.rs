//! The set of tokens that `top_k`, `top_p` and `min_p` leave, found without sorting the vocabulary.
//!
//! Weights are positive, so their bits order like their values: a histogram over the upper bits finds the
//! bucket in which the cut lies, and only that bucket's tokens are sorted. Tokens are kept in the order of
//! weight, then of id, and drawn in the order of id.

/// Where to cut the tokens, taken in the order of falling weight.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cut {
    /// After this many.
    Count(usize),
    /// After the one that brings this share of the mass.
    Mass(f64),
}

/// Weights are at most 1, whose upper bits are `0x3F80_0000 >> SHIFT`.
const SHIFT: u32 = 20;
const BUCKETS: usize = (0x3F80_0000 >> SHIFT) as usize + 1;
/// Tokens per partial sum of a draw.
const BLOCK: usize = 256;

/// The least weight kept, and at that weight the greatest id kept.
#[derive(Debug, Clone, Copy)]
struct Threshold {
    weight: f32,
    id: u32,
}

impl Threshold {
    fn keeps(self, weight: f32, id: usize) -> bool {
        weight > self.weight || (weight == self.weight && id as u32 <= self.id)
    }
}

/// The tokens left.
#[derive(Debug)]
pub(super) struct Survivors {
    threshold: Threshold,
    mass: Vec<f64>,
    count: Vec<usize>,
    bucket: Vec<(f32, u32)>,
}

impl Survivors {
    pub(super) fn new(vocabulary: usize) -> Self {
        Self {
            threshold: Threshold { weight: 0.0, id: u32::MAX },
            mass: vec![0.0; BUCKETS],
            count: vec![0; BUCKETS],
            bucket: Vec::with_capacity(vocabulary),
        }
    }

    pub(super) fn keep_all(&mut self) {
        self.threshold = Threshold { weight: 0.0, id: u32::MAX };
    }

    /// Drops tokens lighter than `least`; the heaviest weighs 1.
    pub(super) fn keep_at_least(&mut self, least: f32) {
        self.threshold = Threshold { weight: least.min(1.0), id: u32::MAX };
    }

    /// Cuts the survivors. At least one stays.
    pub(super) fn cut(&mut self, weights: &[f32], cut: Cut) {
        self.mass.fill(0.0);
        self.count.fill(0);
        let threshold = self.threshold;
        for (id, &weight) in weights.iter().enumerate() {
            if threshold.keeps(weight, id) {
                let bucket = (weight.to_bits() >> SHIFT) as usize;
                self.mass[bucket] += f64::from(weight);
                self.count[bucket] += 1;
            }
        }
        let (count_wanted, mass_wanted) = match cut {
            Cut::Count(count) => (count.max(1), f64::INFINITY),
            Cut::Mass(share) => (usize::MAX, share * self.mass.iter().sum::<f64>()),
        };
        let (mut count, mut mass) = (0, 0.0);
        for bucket in (0..BUCKETS).rev() {
            let reaches =
                count + self.count[bucket] >= count_wanted || mass + self.mass[bucket] >= mass_wanted;
            if reaches && self.count[bucket] > 0 {
                self.threshold = self.within(weights, bucket, (count, mass), (count_wanted, mass_wanted));
                return;
            }
            count += self.count[bucket];
            mass += self.mass[bucket];
        }
    }

    /// Finds the cut inside a bucket, given what lies above it.
    fn within(
        &mut self,
        weights: &[f32],
        bucket: usize,
        above: (usize, f64),
        wanted: (usize, f64),
    ) -> Threshold {
        self.bucket.clear();
        for (id, &weight) in weights.iter().enumerate() {
            if (weight.to_bits() >> SHIFT) as usize == bucket && self.threshold.keeps(weight, id) {
                self.bucket.push((weight, id as u32));
            }
        }
        self.bucket.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let (mut count, mut mass) = above;
        for &(weight, id) in &self.bucket {
            count += 1;
            mass += f64::from(weight);
            if count >= wanted.0 || mass >= wanted.1 {
                return Threshold { weight, id };
            }
        }
        let &(weight, id) = self.bucket.last().expect("the bucket has a token");
        Threshold { weight, id }
    }

    /// The survivor at this share (in `[0, 1)`) of their mass, counted in the order of id.
    pub(super) fn draw(&mut self, weights: &[f32], share: f64) -> u32 {
        let threshold = self.threshold;
        let kept = |first: usize, block: &[f32]| {
            let kept = block.iter().enumerate().filter(|&(i, &weight)| threshold.keeps(weight, first + i));
            kept.map(|(_, &weight)| f64::from(weight)).sum::<f64>()
        };
        let blocks = || weights.chunks(BLOCK).enumerate().map(|(index, block)| (index * BLOCK, block));
        let mut left = share * blocks().map(|(first, block)| kept(first, block)).sum::<f64>();
        let mut last = 0;
        for (first, block) in blocks() {
            let mass = kept(first, block);
            if mass == 0.0 {
                continue;
            }
            if left >= mass {
                left -= mass;
                last = first;
                continue;
            }
            return Self::draw_in(threshold, first, block, left);
        }
        // Rounding may leave a little; it belongs to the last block that has mass.
        let end = (last + BLOCK).min(weights.len());
        Self::draw_in(threshold, last, &weights[last..end], f64::INFINITY)
    }

    fn draw_in(threshold: Threshold, first: usize, block: &[f32], mut left: f64) -> u32 {
        let mut token = first as u32;
        for (offset, &weight) in block.iter().enumerate() {
            if weight > 0.0 && threshold.keeps(weight, first + offset) {
                token = (first + offset) as u32;
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        token
    }
}
