//! Which kernel computes a matrix product, and on what grid.
//!
//! The choice looks at the number of rows for speed alone: all kernels compute the same chains (`gemm.cuh`), so that a
//! row's bytes do not depend on it. How K is cut into parts is decided by the matrix alone.

use std::sync::Arc;

use super::KernelSet;
use super::device::{CudaDevice, DeviceError, DeviceMemory, Kernel, Launch};
use super::output::{Epilogue, Meeting, Output};

const EPILOGUES: [(Epilogue, &str); 4] = [
    (Epilogue::Values, "values"),
    (Epilogue::Add, "add"),
    (Epilogue::SiluMul, "silu_mul"),
    (Epilogue::Rope, "rope"),
];
/// Rows of the batch per tile, and stages of the ring.
type Tile = (usize, u32);
/// As `gemm.cu` has them.
const THIN: [Tile; 4] = [(8, 11), (16, 10), (32, 8), (64, 6)];
const WIDE: [Tile; 3] = [(64, 8), (128, 6), (192, 5)];
const APART: [Tile; 2] = [(128, 6), (192, 5)];
const NARROW: [Tile; 2] = [(128, 8), (192, 6)];
const WALK: [Tile; 3] = [(128, 6), (192, 5), (256, 4)];
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
const SPLIT_BLOCKS: usize = 128;
/// What reads get of the rate that memory is clocked for.
const READ_SHARE: f64 = 0.9;
/// Features of a group whose squares are added before those of other groups.
pub const GROUP_FEATURES: usize = 64;

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
pub struct KernelChoice {
    /// The kernel.
    pub kernel: Kernel,
    /// Its grid.
    pub launch: Launch,
    /// Where it reads the batch.
    pub map: BatchMap,
    /// Tiles of the batch.
    batch_tiles: usize,
    /// Tiles of features, or pairs of them.
    feature_tiles: usize,
    /// Where its blocks may meet.
    meeting: Meeting,
}

/// A product's size, for choosing.
#[derive(Debug, Clone, Copy)]
pub struct ProductSize {
    /// How the sums leave.
    pub epilogue: Epilogue,
    /// Rows of the batch.
    pub rows: usize,
    /// Rows of the matrix.
    pub features: usize,
    /// Columns of both.
    pub columns: usize,
    /// Parts of K.
    pub splits: usize,
    /// Whether a thin kernel's blocks work in twos, each with half of a head that is normed.
    pub halves: bool,
}

/// A kind of kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One block for 64 features.
    Thin,
    /// Two blocks for 256.
    Wide,
    /// As wide, the parts of K in pairs of blocks that meet in memory.
    Apart,
    /// As apart, with two blocks for 128 features.
    Narrow,
    /// As wide, in pairs that take tile after tile, and all parts of K in turn.
    Walk,
}

impl Kind {
    const ALL: [(Self, &str, &'static [Tile]); 5] = [
        (Self::Thin, "thin", &THIN),
        (Self::Wide, "wide", &WIDE),
        (Self::Apart, "apart", &APART),
        (Self::Narrow, "narrow", &NARROW),
        (Self::Walk, "walk", &WALK),
    ];

    /// Features of a block.
    fn features(self) -> usize {
        if matches!(self, Self::Thin | Self::Narrow) { THIN_FEATURES } else { WIDE_FEATURES }
    }

    /// Whether `gemm.cu` has it with tiles of this many rows for sums that leave like this: it has the best ones.
    fn has(self, batch: usize, epilogue: Epilogue) -> bool {
        use Epilogue::{Add, SiluMul, Values};
        match (self, batch) {
            (Self::Thin, _) | (Self::Wide, 64) => true,
            (Self::Wide, _) => epilogue == SiluMul,
            (Self::Apart | Self::Narrow, _) => epilogue == Add,
            (Self::Walk, 256) => matches!(epilogue, Values | SiluMul),
            (Self::Walk, _) => epilogue != SiluMul,
        }
    }

    /// All kernels for sums that leave like this: kind, its name, and tile.
    fn kernels(epilogue: Epilogue) -> impl Iterator<Item = (Self, &'static str, Tile)> {
        let tiles_of = |(kind, name, tiles): (Self, &'static str, &'static [Tile])| {
            tiles.iter().map(move |&tile| (kind, name, tile))
        };
        let all = Self::ALL.into_iter().flat_map(tiles_of);
        all.filter(move |&(kind, _, (batch, _))| kind.has(batch, epilogue))
    }

    /// Blocks that a multiprocessor has at once.
    fn blocks(self) -> usize {
        if self == Self::Thin { 2 } else { 1 }
    }

    fn threads(self) -> u32 {
        if self.features() == THIN_FEATURES { 160 } else { 384 }
    }

    /// Whether the parts of K go to pairs of blocks, which must all run at once.
    fn meets_in_memory(self) -> bool {
        matches!(self, Self::Apart | Self::Narrow)
    }
}

/// One compiled kernel.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    kind: Kind,
    epilogue: Epilogue,
    batch: usize,
    shared_bytes: u32,
    kernel: Kernel,
    room: Room,
}

/// What there is to run in.
#[derive(Debug, Clone, Copy)]
struct Room {
    multiprocessors: usize,
    /// Bytes that memory gives in a microsecond.
    read: f64,
    meeting: Meeting,
}

/// The kernels of all products.
#[derive(Debug)]
pub struct Gemm {
    variants: Vec<Variant>,
    mma: Vec<(Epilogue, Kernel)>,
    /// Whether the kernels are those of Hopper.
    pub hopper: bool,
    room: Room,
    /// What `Meeting` points to.
    _meeting: Option<DeviceMemory>,
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
    /// Finds the kernels and lets them take the memory of their rings.
    ///
    /// # Errors
    /// When one is missing.
    pub fn new(device: &Arc<CudaDevice>, kernels: KernelSet) -> Result<Self, DeviceError> {
        let hopper = device.hopper && kernels == KernelSet::Own;
        let multiprocessors = device.multiprocessors as usize;
        let meeting_kinds = Kind::kernels(Epilogue::Add).filter(|kernel| kernel.0.meets_in_memory());
        let largest_tile =
            meeting_kinds.map(|(kind, _, (batch, _))| batch * kind.features()).max().unwrap_or(0);
        let sums_bytes = multiprocessors * largest_tile * 4;
        let meeting =
            hopper.then(|| DeviceMemory::zeroed(device, sums_bytes + multiprocessors * 4)).transpose()?;
        let pointers = meeting.as_ref().map_or_else(Meeting::default, |memory| Meeting {
            sums: memory.pointer(),
            counters: memory.pointer() + sums_bytes as u64,
        });
        let read = device.memory_bytes_per_s * READ_SHARE / 1e6;
        let room = Room { multiprocessors, read, meeting: pointers };
        let mut gemm = Self { variants: Vec::new(), mma: Vec::new(), hopper, room, _meeting: meeting };
        for (epilogue, name) in EPILOGUES {
            if epilogue != Epilogue::Rope {
                gemm.mma.push((epilogue, device.kernel(&format!("gemm_mma_{name}"))?));
            }
            for (kind, word, (batch, stages)) in Kind::kernels(epilogue).filter(|_| hopper) {
                let kernel = device.kernel(&format!("gemm_{word}_{batch}_{name}"))?;
                let stage_bytes = (kind.features() + batch) * STAGE_COLUMNS * 2;
                let shared_bytes = stages * stage_bytes as u32 + 1024;
                device.allow_shared(kernel, shared_bytes)?;
                gemm.variants.push(Variant { kind, epilogue, batch, shared_bytes, kernel, room });
            }
        }
        Ok(gemm)
    }

    /// The kernel for a product of this size.
    pub fn choose(&self, work: &ProductSize) -> KernelChoice {
        if !self.hopper {
            let kernel = self.mma.iter().find(|entry| entry.0 == work.epilogue).expect("all but one").1;
            let (batch_tiles, feature_tiles) = (work.rows.div_ceil(64), work.features.div_ceil(64));
            let launch = Launch::grid([batch_tiles as u32, feature_tiles as u32, 1], 128);
            let meeting = Meeting::default();
            return KernelChoice { kernel, launch, map: BatchMap::None, batch_tiles, feature_tiles, meeting };
        }
        let time = |variant: &&Variant| work.microseconds(variant.kind, variant.batch, &self.room);
        let best = self.suitable(work).min_by(|a, b| time(a).total_cmp(&time(b)));
        best.expect("a kernel suits any number of rows").choice(work)
    }

    /// The Hopper kernels that can compute a product.
    pub fn suitable<'a>(&'a self, work: &'a ProductSize) -> impl Iterator<Item = &'a Variant> {
        self.variants
            .iter()
            .filter(|v| v.epilogue == work.epilogue && work.suits(v.kind, v.batch, self.room.multiprocessors))
    }
}

impl Variant {
    /// For people.
    pub fn name(&self) -> String {
        format!("{:?}-{}", self.kind, self.batch).to_lowercase()
    }

    /// Its launch for a product.
    pub fn choice(&self, work: &ProductSize) -> KernelChoice {
        let (batch_tiles, feature_tiles) = work.tiles(self.kind, self.batch);
        let clusters = work.clusters(self.kind, self.batch);
        let walkers = self.room.multiprocessors / 2;
        let clusters = if self.kind == Kind::Walk { clusters.min(walkers) } else { clusters };
        let blocks = work.cluster(self.kind) * clusters;
        // Two thin blocks with a head each are neighbours, not parts of one tile.
        let halves = work.halves && self.kind == Kind::Thin;
        let launch = Launch {
            shared_bytes: self.shared_bytes,
            cluster: if halves { 2 } else { work.cluster(self.kind) as u32 },
            ..Launch::grid([blocks as u32, 1, 1], self.kind.threads())
        };
        let map = if self.batch < 64 { BatchMap::Rows8 } else { BatchMap::Rows32 };
        KernelChoice {
            kernel: self.kernel,
            launch,
            map,
            batch_tiles,
            feature_tiles,
            meeting: self.room.meeting,
        }
    }
}

impl KernelChoice {
    /// The result's side of a product of this size, with this kernel's tiles.
    pub fn output(&self, work: &ProductSize, output: Output) -> Output {
        let int = |value: usize| i32::try_from(value).expect("sizes were checked when the arena was made");
        Output {
            rows: int(work.rows),
            features: int(work.features),
            columns: int(work.columns),
            splits: int(work.splits),
            batch_tiles: int(self.batch_tiles),
            feature_tiles: int(self.feature_tiles),
            meeting: self.meeting,
            ..output
        }
    }
}

impl ProductSize {
    /// A product of `rows` rows with a matrix of `features` rows and `columns` columns.
    pub fn new(epilogue: Epilogue, rows: usize, (features, columns): (usize, usize)) -> Self {
        let splits = splits(epilogue, features, columns);
        Self { epilogue, rows, features, columns, splits, halves: false }
    }

    fn suits(&self, kind: Kind, batch: usize, multiprocessors: usize) -> bool {
        match kind {
            // The smallest tile that holds all rows.
            Kind::Thin => batch >= self.rows && (batch == THIN[0].0 || batch / 2 < self.rows),
            Kind::Wide => self.rows > THIN_ROWS_MAX,
            Kind::Walk => self.rows > 64,
            Kind::Apart | Kind::Narrow => {
                self.splits > 1 && self.rows > 64 && 2 * self.clusters(kind, batch) <= multiprocessors
            }
        }
    }

    fn tiles(&self, kind: Kind, batch: usize) -> (usize, usize) {
        let features = if kind == Kind::Thin { THIN_FEATURES } else { 2 * kind.features() };
        (self.rows.div_ceil(batch), self.features.div_ceil(features))
    }

    /// Clusters that the product falls into.
    fn clusters(&self, kind: Kind, batch: usize) -> usize {
        let (batch_tiles, feature_tiles) = self.tiles(kind, batch);
        batch_tiles * feature_tiles * if kind.meets_in_memory() { self.splits } else { 1 }
    }

    /// Blocks that work together.
    fn cluster(&self, kind: Kind) -> usize {
        match kind {
            Kind::Thin => self.splits,
            Kind::Wide => 2 * self.splits,
            Kind::Apart | Kind::Narrow | Kind::Walk => 2,
        }
    }

    /// About how long a kernel takes, to compare it with others. Blocks come in rounds; a block takes what its stages
    /// take to multiply, to fetch from the cache that all share, to take in, or to come from memory, whichever is most,
    /// and what its sums take to leave. Fitted to what the example `products` measured on an H200 (TUNING.md).
    fn microseconds(&self, kind: Kind, batch: usize, room: &Room) -> f64 {
        /// Products of 64 columns that a multiprocessor does in a microsecond, per row and feature.
        const MULTIPLY: f64 = 52e3;
        /// Bytes per microsecond: out of the shared cache, into a multiprocessor.
        const FETCH: f64 = 10.3e6;
        const TAKE_IN: f64 = 97e3;
        let batch_tiles = self.tiles(kind, batch).0;
        let (cluster, clusters) = (self.cluster(kind), self.clusters(kind, batch));
        // Clusters of more than two blocks leave some multiprocessors over.
        let fitting = room.multiprocessors / cluster - if cluster > 2 { 2 } else { 0 };
        let slots = fitting * kind.blocks();
        let parts = if kind == Kind::Walk { 1 } else { self.splits };
        let stages = self.columns.div_ceil(STAGE_COLUMNS).div_ceil(parts);
        let row_bytes = (STAGE_COLUMNS * 2) as f64;
        let (features, rows) = (kind.features() as f64, batch as f64);
        let beside = if 2 * clusters > slots { kind.blocks() } else { 1 };
        let busy = (clusters.min(slots) * cluster) as f64;
        let sharing = if kind == Kind::Thin { 1.0 } else { 2.0 };
        let stage = (features * rows / MULTIPLY * beside as f64)
            .max((features + rows / sharing) * row_bytes * busy / FETCH)
            .max((features + rows) * row_bytes / TAKE_IN)
            .max(features * row_bytes * busy / batch_tiles as f64 / room.read);
        (stages as f64 * stage + self.leave_microseconds(kind, rows)) * clusters.div_ceil(slots) as f64
    }

    /// About how long the sums of a tile of so many rows take to leave.
    fn leave_microseconds(&self, kind: Kind, rows: f64) -> f64 {
        /// In any case, and per row.
        const LEAVE: f64 = 1.5;
        const LEAVE_THIN: f64 = 1.7;
        const LEAVE_ROW: f64 = 0.014;
        /// Per row that ROPE turns, or that is added; a narrow tile's has half of the features.
        const ROPE_ROW: f64 = 0.046;
        const ROPE_ROW_THIN: f64 = 0.13;
        const ADD_ROW: f64 = 0.037;
        const ADD_ROW_NARROW: f64 = 0.0185;
        /// For blocks to meet in memory.
        const MEET: f64 = 3.0;
        let row = match (self.epilogue, kind) {
            (Epilogue::Rope, Kind::Thin) => ROPE_ROW_THIN,
            (Epilogue::Rope, _) => ROPE_ROW,
            (Epilogue::Add, Kind::Narrow) => ADD_ROW_NARROW,
            (Epilogue::Add, _) => ADD_ROW,
            (Epilogue::Values | Epilogue::SiluMul, _) => LEAVE_ROW,
        };
        let start = match kind {
            Kind::Thin => LEAVE_THIN,
            Kind::Apart | Kind::Narrow => LEAVE + MEET,
            Kind::Wide | Kind::Walk => LEAVE,
        };
        start + row * rows
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
        assert_eq!(splits(Epilogue::Add, 4096, 14336), 2);
        assert_eq!(splits(Epilogue::Add, 576, 576), 2);
        assert_eq!(splits(Epilogue::Add, 8, 8), 1);
    }

    /// Kinds and tiles that a product takes, by rows, on a chip with memory as fast as an H200's.
    fn best(rows: usize, matrix: (usize, usize), epilogue: Epilogue) -> (Kind, usize) {
        let room = Room { multiprocessors: 132, read: 4.425e6, meeting: Meeting::default() };
        let work = ProductSize::new(epilogue, rows, matrix);
        let all = Kind::kernels(epilogue).map(|(kind, _, (batch, _))| (kind, batch));
        all.filter(|&(kind, batch)| work.suits(kind, batch, 132))
            .min_by(|a, b| work.microseconds(a.0, a.1, &room).total_cmp(&work.microseconds(b.0, b.1, &room)))
            .unwrap()
    }

    #[test]
    fn tiles_follow_the_number_of_rows() {
        assert_eq!(best(1, (4096, 1024), Epilogue::Rope), (Kind::Thin, 8));
        assert_eq!(best(24, (4096, 1024), Epilogue::Values), (Kind::Thin, 32));
        assert_eq!(best(64, (4096, 14336), Epilogue::Add), (Kind::Thin, 64));
        assert_eq!(best(128, (4096, 4096), Epilogue::Add), (Kind::Narrow, 128));
        assert_eq!(best(192, (4096, 14336), Epilogue::Add), (Kind::Narrow, 192));
        assert_eq!(best(256, (4096, 14336), Epilogue::Add), (Kind::Apart, 128));
        assert_eq!(best(512, (1024, 3072), Epilogue::Add), (Kind::Apart, 128));
        assert_eq!(best(2048, (4096, 14336), Epilogue::Add), (Kind::Walk, 128));
        assert_eq!(best(8192, (4096, 14336), Epilogue::Add), (Kind::Walk, 192));
        assert_eq!(best(128, (28672, 4096), Epilogue::SiluMul), (Kind::Wide, 128));
        assert_eq!(best(192, (28672, 4096), Epilogue::SiluMul), (Kind::Wide, 192));
        assert_eq!(best(64, (6144, 4096), Epilogue::Rope), (Kind::Wide, 64));
        assert_eq!(best(8192, (28672, 4096), Epilogue::SiluMul), (Kind::Walk, 256));
        assert_eq!(best(256, (151_936, 1024), Epilogue::Values), (Kind::Walk, 256));
    }

    #[test]
    fn some_kernel_suits_any_product() {
        for (epilogue, _) in EPILOGUES {
            for rows in [1, 8, 9, 32, 33, 64, 65, 128, 8192] {
                best(rows, (64, 64), epilogue);
                best(rows, (28672, 4096), epilogue);
            }
        }
    }
}
