//! What a step uploads: one block of words that the host writes and kernels read.
//!
//! Sections have fixed places for given capacities, so that a captured step finds new contents where the old were.
//! Rows that pad a step have no slot in the cache, spans and items beyond the counts are not read. The list of
//! attention work follows `attention.cuh`: a span of one row is cut into splits at absolute positions, longer spans
//! into tiles of packed rows. Pure: no device is needed to test it.

use crate::ops::{BLOCK_TOKENS, Batch, Span};

/// Positions per split of a context, `SPLIT_KEYS` in `attention.cuh`.
pub const SPLIT_KEYS: usize = 512;
/// Words of a row, a span, an item or tile, and of a row's sampling parameters.
const ROW_WORDS: usize = 4;
const SPAN_WORDS: usize = 4;
const ITEM_WORDS: usize = 2;
/// See `SampleParameters` in `sample.cu`.
pub const PARAMETER_WORDS: usize = 16;
/// Of a row without a place in the cache, and of a token that is known.
const NONE: u32 = u32::MAX;
/// Sections start on boundaries of this many words, 64 bytes.
const ALIGNMENT: usize = 16;

/// How the rows of longer spans are packed into tiles, as `attention.cuh` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Query heads per key-value head.
    pub group: usize,
    /// Rows times heads of a group in one tile.
    pub tile_rows: usize,
}

impl Packing {
    /// That of a model: `prefill_tile_rows` in `attention.cuh`.
    pub fn new(group: usize, head_dim: usize) -> Self {
        Self { group, tile_rows: if head_dim > 128 { 64 } else { 128 } }
    }

    /// Tiles of a span of this many rows.
    pub fn tiles(&self, rows: usize) -> usize {
        (rows * self.group).div_ceil(self.tile_rows)
    }
}

/// Room in each section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capacity {
    /// Rows.
    pub rows: usize,
    /// Spans.
    pub spans: usize,
    /// Splits of spans of one row.
    pub items: usize,
    /// Tiles of longer spans.
    pub tiles: usize,
    /// Rows that are sampled.
    pub logits_rows: usize,
}

impl Capacity {
    /// Exactly what a batch needs.
    pub fn of(batch: &Batch<'_>, packing: Packing) -> Self {
        let splits = |span: &Span| if span.rows == 1 { splits(span.context as usize) } else { 0 };
        let tiles = |span: &Span| if span.rows == 1 { 0 } else { packing.tiles(span.rows as usize) };
        Self {
            rows: batch.tokens.len(),
            spans: batch.spans.len(),
            items: batch.spans.iter().map(splits).sum(),
            tiles: batch.spans.iter().map(tiles).sum(),
            logits_rows: batch.logits_rows.len(),
        }
    }

    /// What any step of this many single rows needs, at contexts up to `positions_max`.
    pub fn of_decodes(rows: usize, positions_max: usize) -> Self {
        Self { rows, spans: rows, items: rows * splits(positions_max), tiles: 0, logits_rows: rows }
    }
}

/// Splits of a context.
pub fn splits(context: usize) -> usize {
    context.div_ceil(SPLIT_KEYS)
}

/// Where the sections start, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Room in each section.
    pub capacity: Capacity,
    /// `Row` each.
    pub rows: usize,
    /// `AttentionSpan` each.
    pub spans: usize,
    /// One `AttentionCounts`.
    pub counts: usize,
    /// `DecodeItem` each.
    pub items: usize,
    /// `PrefillTile` each.
    pub tiles: usize,
    /// Row of each sampled row.
    pub logits_rows: usize,
    /// `SampleParameters` each.
    pub parameters: usize,
    /// Block tables; as long as they are.
    pub tables: usize,
}

impl Layout {
    /// Sections of this room.
    pub fn new(capacity: Capacity) -> Self {
        let mut end = 0;
        let mut section = |words: usize| {
            let start = end;
            end += words.next_multiple_of(ALIGNMENT);
            start
        };
        Self {
            capacity,
            rows: section(capacity.rows * ROW_WORDS),
            spans: section(capacity.spans * SPAN_WORDS),
            counts: section(2),
            items: section(capacity.items * ITEM_WORDS),
            tiles: section(capacity.tiles * ITEM_WORDS),
            logits_rows: section(capacity.logits_rows),
            parameters: section(capacity.logits_rows * PARAMETER_WORDS),
            tables: section(0),
        }
    }

    /// Words with block tables of this length.
    pub fn words(&self, tables: usize) -> usize {
        self.tables + tables
    }

    /// Writes a checked batch; the parameters are left alone. `order` is scratch.
    ///
    /// # Panics
    /// When the batch exceeds the capacity or `into` is too short.
    pub fn write(
        &self,
        batch: &Batch<'_>,
        packing: Packing,
        into: &mut [u32],
        order: &mut Vec<(u32, u32, u32)>,
    ) {
        let needed = Capacity::of(batch, packing);
        let room = &self.capacity;
        assert!(needed.rows <= room.rows && needed.spans <= room.spans && needed.items <= room.items);
        assert!(needed.tiles <= room.tiles && needed.logits_rows <= room.logits_rows);
        self.write_rows(batch, into);
        let spans = into[self.spans..].chunks_exact_mut(SPAN_WORDS);
        for (span, words) in batch.spans.iter().zip(spans) {
            words.copy_from_slice(&[span.first_row, span.rows, span.context, span.table]);
        }
        into[self.counts..][..2].copy_from_slice(&[needed.items as u32, needed.tiles as u32]);
        let mut item = self.items;
        for (index, span) in batch.spans.iter().enumerate().filter(|(_, span)| span.rows == 1) {
            for split in 0..splits(span.context as usize) {
                into[item..][..ITEM_WORDS].copy_from_slice(&[index as u32, split as u32]);
                item += ITEM_WORDS;
            }
        }
        order.clear();
        for (index, span) in batch.spans.iter().enumerate().filter(|(_, span)| span.rows > 1) {
            for tile in 0..packing.tiles(span.rows as usize) {
                let end = ((tile + 1) * packing.tile_rows).div_ceil(packing.group);
                let last_row = end.min(span.rows as usize) as u32;
                order.push((span.first_position() + last_row, index as u32, tile as u32));
            }
        }
        // Those with the longest contexts first: the last ones to finish are then short.
        order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let tiles = into[self.tiles..].chunks_exact_mut(ITEM_WORDS);
        for (&(_, span, tile), words) in order.iter().zip(tiles) {
            words.copy_from_slice(&[span, tile]);
        }
        into[self.logits_rows..][..batch.logits_rows.len()].copy_from_slice(batch.logits_rows);
        into[self.tables..][..batch.block_tables.len()].copy_from_slice(batch.block_tables);
    }

    fn write_rows(&self, batch: &Batch<'_>, into: &mut [u32]) {
        let rows = &mut into[self.rows..][..self.capacity.rows * ROW_WORDS];
        for span in batch.spans {
            let table = &batch.block_tables[span.table as usize..];
            for row in 0..span.rows {
                let (at, position) = ((span.first_row + row) as usize, span.first_position() + row);
                let block = table[position as usize / BLOCK_TOKENS];
                let slot = block * BLOCK_TOKENS as u32 + position % BLOCK_TOKENS as u32;
                rows[at * ROW_WORDS..][..ROW_WORDS].copy_from_slice(&[
                    batch.tokens[at],
                    position,
                    slot,
                    NONE,
                ]);
            }
        }
        for feed in batch.feeds {
            rows[feed.row as usize * ROW_WORDS + 3] = feed.choice;
        }
        for padding in rows[batch.tokens.len() * ROW_WORDS..].chunks_exact_mut(ROW_WORDS) {
            padding.copy_from_slice(&[0, 0, NONE, NONE]);
        }
    }
}

/// The size at which a step of single rows is computed and captured, for up to [`GRAPH_ROWS_MAX`] rows.
pub fn padded(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=128 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

/// Most rows of a captured step.
pub const GRAPH_ROWS_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Feed;

    #[test]
    fn padding_is_small_and_monotone() {
        let mut last = 0;
        for rows in 1..=GRAPH_ROWS_MAX {
            let size = padded(rows);
            assert!(size >= rows && size >= last && padded(size) == size, "{rows} gives {size}");
            assert!(size - rows <= (rows / 3).max(7), "{rows} gives {size}");
            last = size;
        }
        assert_eq!(last, GRAPH_ROWS_MAX);
    }

    #[test]
    fn a_mixed_batch_is_written_where_the_layout_says() {
        let tokens: Vec<u32> = (100..140).collect();
        let spans = [
            Span { first_row: 0, rows: 1, context: 1025, table: 0 },
            Span { first_row: 1, rows: 38, context: 70, table: 65 },
            Span { first_row: 39, rows: 1, context: 1, table: 70 },
        ];
        let tables: Vec<u32> = (0..71).map(|i| 1000 + i).collect();
        let batch = Batch {
            tokens: &tokens,
            feeds: &[Feed { row: 38, choice: 5 }],
            spans: &spans,
            block_tables: &tables,
            logits_rows: &[0, 38, 39],
        };
        let packing = Packing::new(4, 128);
        let layout = Layout::new(Capacity { rows: 48, ..Capacity::of(&batch, packing) });
        assert_eq!((layout.capacity.items, layout.capacity.tiles), (4, 2));
        let mut words = vec![7; layout.words(tables.len())];
        layout.write(&batch, packing, &mut words, &mut Vec::new());
        assert_eq!(words[layout.rows..][..4], [100, 1024, (1000 + 64) * 16, NONE]);
        assert_eq!(words[layout.rows + 4..][..4], [101, 32, (1065 + 2) * 16, NONE]);
        assert_eq!(words[layout.rows + 38 * 4..][..4], [138, 69, (1065 + 4) * 16 + 5, 5], "its token is fed");
        assert_eq!(words[layout.rows + 47 * 4..][..4], [0, 0, NONE, NONE]);
        assert_eq!(words[layout.counts..][..2], [4, 2]);
        assert_eq!(words[layout.items..][..8], [0, 0, 0, 1, 0, 2, 2, 0]);
        assert_eq!(words[layout.tiles..][..4], [1, 1, 1, 0], "the longer context comes first");
        assert_eq!(words[layout.logits_rows..][..3], [0, 38, 39]);
        assert_eq!(words[layout.tables..], tables);
    }
}
