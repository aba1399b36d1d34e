//! What becomes of a matrix product's sums: the arguments of its kernels, laid out as in `epilogue.cuh`.

/// How the sums leave, as in `epilogue.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// Written.
    Values,
    /// Added to what is there.
    Add,
    /// Of gate and up rows: `silu(gate) * up`, or GELU, as an operand.
    SiluMul,
    /// Of a QKV matrix: queries as operands, keys and values into the cache. Hopper alone.
    Rope,
}

/// The norm before a product, as in `epilogue.cuh`; all zero without one.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct NormBefore {
    /// Sums of squares of a row's groups.
    pub squares: u64,
    /// From row to row.
    pub stride: i32,
    /// Added to the mean square.
    pub eps: f32,
}

/// The norm after a product that adds, as in `epilogue.cuh`; all zero without one.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct NormAfter {
    /// One per feature.
    pub weight: u64,
    /// Values times weight.
    pub out: u64,
    /// Sums of squares of a row's groups.
    pub squares: u64,
    /// Elements from row to row of `out`.
    pub out_stride: i32,
    /// The same of the squares.
    pub squares_stride: i32,
}

/// What becomes of queries, keys and values, as in `epilogue.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Heads {
    /// `Row` each.
    pub rows: u64,
    /// Cosines, then sines, of each position.
    pub table: u64,
    /// Weights of the norm of queries, or 0.
    pub q_norm: u64,
    /// The same of keys.
    pub k_norm: u64,
    /// Where queries go.
    pub queries: u64,
    /// The layer's pages.
    pub cache: u64,
    /// Query heads.
    pub heads: i32,
    /// Key-value heads.
    pub kv_heads: i32,
    /// Elements of a head.
    pub head_dim: i32,
    /// Elements from row to row of the queries.
    pub query_stride: i32,
    /// Added to the mean square of a head.
    pub eps: f32,
    /// One over the scale of keys of 8 bits.
    pub key_factor: f32,
    /// The same of values.
    pub value_factor: f32,
    /// Whether the cache has 8 bits.
    pub fp8: i32,
}

/// Where blocks that share a tile meet, as in `epilogue.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Meeting {
    /// Room for the sums of all blocks that run at once.
    pub sums: u64,
    /// Zero between kernels.
    pub counters: u64,
}

/// The result's side of a product, as in `epilogue.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
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
    /// Whether gates go through GELU; else through SiLU.
    pub gelu: i32,
    /// What the batch's rows lack.
    pub before: NormBefore,
    /// What the next product needs.
    pub after: NormAfter,
    /// Of [`Epilogue::Rope`].
    pub heads: Heads,
    /// Of kernels whose blocks are apart.
    pub meeting: Meeting,
}
