//! How a matrix product is cut: tasks of rows and panels, tiles of these, and the sums of a finished tile.

use super::tile::LANES;

/// Rows of a task: their operands (240 rows of 2,048 bytes) fill half of a second-level cache of 1 MiB.
pub const TASK_ROWS: usize = 240;
/// Where a tile lies in a product.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// First row.
    pub row: usize,
    /// Rows.
    pub rows: usize,
    /// First panel.
    pub panel: usize,
    /// Panels.
    pub panels: usize,
}

/// The sums of a tile, `[rows][panels]` of lanes, and what makes values of them.
pub struct Finished<'a> {
    pub sums: &'a [[f32; LANES]],
    pub panels: usize,
    /// Of scaled operands.
    pub scales: Option<Scales<'a>>,
}

/// value = (sum - offset of the feature) * (scale of the feature * scale of the row)
pub struct Scales<'a> {
    /// Of int8 operands, whose sums are integers as bits.
    pub offsets: Option<&'a [[i32; LANES]]>,
    pub features: &'a [[f32; LANES]],
    pub rows: &'a [f32],
}

impl Finished<'_> {
    /// Rows of the tile.
    pub fn rows(&self) -> usize {
        self.sums.len() / self.panels
    }

    /// Panels of the tile.
    #[inline(always)]
    pub fn panels(&self) -> usize {
        self.panels
    }

    /// Values of a row in a panel.
    #[inline(always)]
    pub fn values(&self, row: usize, panel: usize) -> [f32; LANES] {
        let mut values = self.sums[row * self.panels + panel];
        if let Some(Scales { offsets, features, rows }) = &self.scales {
            if let Some(offsets) = offsets {
                for lane in 0..LANES {
                    values[lane] = (values[lane].to_bits().cast_signed() - offsets[panel][lane]) as f32;
                }
            }
            for lane in 0..LANES {
                values[lane] *= features[panel][lane] * rows[row];
            }
        }
        values
    }
}

/// Start and length of one of `parts` nearly equal parts of `total`, the larger ones first.
pub fn share(total: usize, parts: usize, index: usize) -> (usize, usize) {
    let (size, larger) = (total / parts, total % parts);
    (index * size + index.min(larger), size + usize::from(index < larger))
}

/// Rows and panels of a task, each as start and end.
pub struct Block {
    pub rows: (usize, usize),
    pub panels: (usize, usize),
}
