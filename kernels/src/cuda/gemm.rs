//! Which kernel computes a matrix product, and on what grid.
//!
//! The choice looks at the number of rows for speed alone: all kernels compute the same chains (`gemm.cuh`), so that a
//! row's bytes do not depend on it. How K is cut into parts is decided by the matrix alone.

use super::device::{Device, DeviceError, Kernel, Launch};

/// How the sums leave, as in `gemm.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// Written.
    Values,
    /// Added to what is there.
    Add,
    /// Of gate and up rows: `silu(gate) * up`, as an operand.
    SiluMul,
}

const EPILOGUES: [(Epilogue, &str); 3] =
    [(Epilogue::Values, "values"), (Epilogue::Add, "add"), (Epilogue::SiluMul, "silu_mul")];
/// Rows of the batch per tile, and stages of the ring, as `gemm.cu` has them.
const WIDE: [(usize, u32); 4] = [(64, 8), (128, 6), (192, 5), (256, 4)];
const TOTALS: [(usize, u32); 2] = [(128, 6), (192, 5)];
const THIN: [(usize, u32); 4] = [(8, 11), (16, 10), (32, 8), (64, 6)];
/// Features of a block.
const WIDE_FEATURES: usize = 128;
const THIN_FEATURES: usize = 64;
/// Most rows for which a thin kernel is best whatever the matrix.
const THIN_ROWS_MAX: usize = 32;
/// Columns of K in a stage.
const STAGE_COLUMNS: usize = 64;
/// Most parts of K: with blocks in pairs these are the clusters that every chip can form.
const SPLITS_MAX: usize = 4;
/// Least columns of a part: a shorter one costs more to add than it saves.
const SPLIT_COLUMNS_MIN: usize = 256;
/// Blocks of 64 features that keep memory busy at one row. A constant, so that results depend on no chip.
const SPLIT_BLOCKS: usize = 64;

/// The result's side of a product, as `Output` in `gemm.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Where the rows start.
    pub out: u64,
    /// One value per feature, or 0.
    pub bias: u64,
    /// Elements from row to row.
    pub stride: i32,
    /// Rows of the batch.
    pub rows: i32,
    /// Rows of the matrix.
    pub features: i32,
    /// Columns of both.
    pub columns: i32,
    /// Parts of K.
    pub splits: i32,
    /// Tiles of the batch.
    pub batch_tiles: i32,
    /// Tiles of features, or pairs of them.
    pub feature_tiles: i32,
}

/// Which of the batch's tensor maps a kernel reads through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchMap {
    /// None: it reads by itself.
    None,
    /// That of boxes of 8 rows.
    Rows8,
    /// That of boxes of 32 rows.
    Rows32,
}

/// A kernel that computes a product.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// It.
    pub kernel: Kernel,
    /// Its grid.
    pub launch: Launch,
    /// Where it reads the batch.
    pub map: BatchMap,
    /// Tiles of the batch.
    pub batch_tiles: usize,
    /// Tiles of features, or pairs of them.
    pub feature_tiles: usize,
}

/// A kind of kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One block for 64 features.
    Thin,
    /// Two blocks for 256.
    Wide,
    /// As wide, all parts of K in turn.
    Totals,
}

/// One compiled kernel.
#[derive(Debug, Clone, Copy)]
struct Variant {
    kind: Kind,
    epilogue: Epilogue,
    batch: usize,
    shared_bytes: u32,
    kernel: Kernel,
}

/// The kernels of all products.
#[derive(Debug)]
pub struct Gemm {
    variants: Vec<Variant>,
    mma: Vec<(Epilogue, Kernel)>,
    hopper: bool,
    multiprocessors: usize,
}

/// Parts of K whose sums are added in order. Products that add to a narrow residual have few features, and at one row
/// too few blocks to keep memory busy: each part of K is then a block.
pub fn splits(epilogue: Epilogue, features: usize, columns: usize) -> usize {
    if epilogue != Epilogue::Add {
        return 1;
    }
    let blocks = features.div_ceil(THIN_FEATURES);
    let mut splits = 1;
    while splits < SPLITS_MAX
        && blocks * splits * 2 <= SPLIT_BLOCKS
        && columns / (splits * 2) >= SPLIT_COLUMNS_MIN
    {
        splits *= 2;
    }
    splits
}

impl Gemm {
    /// Finds the kernels and lets them take the memory of their rings. `portable` takes those that every chip runs.
    ///
    /// # Errors
    /// When one is missing.
    pub fn new(device: &Device, portable: bool) -> Result<Self, DeviceError> {
        let mut gemm = Self {
            variants: Vec::new(),
            mma: Vec::new(),
            hopper: device.hopper && !portable,
            multiprocessors: device.multiprocessors as usize,
        };
        for (epilogue, name) in EPILOGUES {
            gemm.mma.push((epilogue, device.kernel(&format!("gemm_mma_{name}"))?));
            if !gemm.hopper {
                continue;
            }
            let totals: &[(usize, u32)] = if epilogue == Epilogue::Add { &TOTALS } else { &[] };
            for (kind, word, features, tiles) in [
                (Kind::Wide, "wide", WIDE_FEATURES, &WIDE[..]),
                (Kind::Totals, "totals", WIDE_FEATURES, totals),
                (Kind::Thin, "thin", THIN_FEATURES, &THIN[..]),
            ] {
                for &(batch, stages) in tiles {
                    let kernel = device.kernel(&format!("gemm_{word}_{batch}_{name}"))?;
                    let shared_bytes = stages * ((features + batch) * STAGE_COLUMNS * 2) as u32 + 1024;
                    device.allow_shared(kernel, shared_bytes)?;
                    gemm.variants.push(Variant { kind, epilogue, batch, shared_bytes, kernel });
                }
            }
        }
        Ok(gemm)
    }

    /// The kernel for a product of this size.
    pub fn choose(&self, epilogue: Epilogue, rows: usize, (features, columns): (usize, usize)) -> Choice {
        if !self.hopper {
            let kernel = self.mma.iter().find(|entry| entry.0 == epilogue).expect("all epilogues").1;
            let (batch_tiles, feature_tiles) = (rows.div_ceil(64), features.div_ceil(64));
            let launch = Launch::grid([batch_tiles as u32, feature_tiles as u32, 1], 128);
            return Choice { kernel, launch, map: BatchMap::None, batch_tiles, feature_tiles };
        }
        let splits = splits(epilogue, features, columns);
        let work = Work { rows, features, columns, splits, multiprocessors: self.multiprocessors };
        let fitting = self.variants.iter().filter(|v| v.epilogue == epilogue && work.suits(v.kind, v.batch));
        let best = fitting.min_by_key(|v| work.cycles(v.kind, v.batch));
        let variant = best.expect("a kernel suits any number of rows");
        let (batch_tiles, feature_tiles) = work.tiles(variant.kind, variant.batch);
        let cluster = work.cluster(variant.kind);
        let threads = if variant.kind == Kind::Thin { 160 } else { 384 };
        let launch = Launch {
            shared_bytes: variant.shared_bytes,
            cluster: cluster as u32,
            ..Launch::grid([(cluster * batch_tiles * feature_tiles) as u32, 1, 1], threads)
        };
        let map = if variant.batch < 64 { BatchMap::Rows8 } else { BatchMap::Rows32 };
        Choice { kernel: variant.kernel, launch, map, batch_tiles, feature_tiles }
    }
}

/// A product's size, for choosing.
#[derive(Debug, Clone, Copy)]
struct Work {
    rows: usize,
    features: usize,
    columns: usize,
    splits: usize,
    multiprocessors: usize,
}

impl Work {
    fn suits(&self, kind: Kind, batch: usize) -> bool {
        match kind {
            Kind::Thin if self.rows > 64 => false,
            // The smallest tile that holds all rows.
            Kind::Thin => batch >= self.rows && (batch == 8 || batch / 2 < self.rows),
            Kind::Wide => self.rows > THIN_ROWS_MAX && (self.splits == 1 || batch < 256),
            Kind::Totals => self.splits > 1 && self.rows > 64,
        }
    }

    fn tiles(&self, kind: Kind, batch: usize) -> (usize, usize) {
        let features = if kind == Kind::Thin { THIN_FEATURES } else { 2 * WIDE_FEATURES };
        (self.rows.div_ceil(batch), self.features.div_ceil(features))
    }

    /// Blocks that work together.
    fn cluster(&self, kind: Kind) -> usize {
        match kind {
            Kind::Thin => self.splits,
            Kind::Wide => 2 * self.splits,
            Kind::Totals => 2,
        }
    }

    /// About how many cycles a kernel takes: what a stage costs to multiply, to fetch from the cache that all share,
    /// and to take in, whichever is most; and what a block costs besides. Fitted to an H100.
    fn cycles(&self, kind: Kind, batch: usize) -> usize {
        const FETCH: usize = 32;
        const TAKE_IN: usize = 60;
        const BLOCK: usize = 2500;
        let (batch_tiles, feature_tiles) = self.tiles(kind, batch);
        let blocks = self.cluster(kind) * batch_tiles * feature_tiles;
        let parts = if kind == Kind::Totals { 1 } else { self.splits };
        let stages = self.columns.div_ceil(STAGE_COLUMNS).div_ceil(parts);
        let (features, shared) = if kind == Kind::Thin { (THIN_FEATURES, 1) } else { (WIDE_FEATURES, 2) };
        let row_bytes = STAGE_COLUMNS * 2;
        let multiply = features * batch / 32;
        let busy = blocks.min(self.multiprocessors);
        let fetch = (features + batch / shared) * row_bytes * busy / (FETCH * self.multiprocessors);
        let take_in = (features + batch) * row_bytes / TAKE_IN;
        let block = stages * multiply.max(fetch).max(take_in) + BLOCK;
        block * blocks.max(self.multiprocessors) / self.multiprocessors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_depend_on_the_matrix_alone_and_are_long_enough() {
        assert_eq!(splits(Epilogue::Values, 1024, 4096), 1);
        assert_eq!(splits(Epilogue::Add, 1024, 2048), 4);
        assert_eq!(splits(Epilogue::Add, 1024, 3072), 4);
        assert_eq!(splits(Epilogue::Add, 4096, 14336), 1);
        assert_eq!(splits(Epilogue::Add, 576, 576), 2);
        assert_eq!(splits(Epilogue::Add, 8, 8), 1);
    }

    #[test]
    fn tiles_follow_the_number_of_rows() {
        let best = |rows, (features, columns), splits| {
            let work = Work { rows, features, columns, splits, multiprocessors: 132 };
            let all = WIDE.iter().map(|tile| (Kind::Wide, tile.0));
            let all = all.chain(THIN.iter().map(|tile| (Kind::Thin, tile.0)));
            let all = all.chain(TOTALS.iter().map(|tile| (Kind::Totals, tile.0)));
            all.filter(|&(kind, batch)| work.suits(kind, batch))
                .min_by_key(|&(k, b)| work.cycles(k, b))
                .unwrap()
        };
        assert_eq!(best(1, (4096, 1024), 1), (Kind::Thin, 8));
        assert_eq!(best(24, (4096, 1024), 1), (Kind::Thin, 32));
        assert_eq!(best(8192, (28672, 4096), 1), (Kind::Wide, 256));
        assert_eq!(best(136, (28672, 4096), 1), (Kind::Wide, 192));
        assert_eq!(best(8192, (1024, 3072), 4).0, Kind::Totals);
        assert_eq!(best(256, (1024, 3072), 4).0, Kind::Wide);
    }
}
