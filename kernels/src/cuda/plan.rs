//! What a step uploads: one block of words that the host writes and kernels read.
//!
//! Sections have fixed places for given capacities, so that a captured step finds new contents where the old were.
//! Rows that pad a step have no slot in the cache, spans and items beyond the counts are not read. The list of
//! attention work follows `attention.cuh`: a span of one row is cut into splits at absolute positions, longer spans
//! into tiles of packed rows. Pure: no device is needed to test it.

use crate::ops::{BLOCK_TOKENS, Batch, RowSpan};

/// Positions per split of a context, `SPLIT_KEYS` in `attention.cuh`.
pub const SPLIT_KEYS: usize = 512;
/// Words of a row, a span, an item or tile, and of a row's sampling parameters.
const ROW_WORDS: usize = 4;
const SPAN_WORDS: usize = 4;
const ITEM_WORDS: usize = 2;
const COUNTS_WORDS: usize = 4;
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
    /// Tiles of a span of this many rows.
    pub fn tiles(&self, rows: usize) -> usize {
        (rows * self.group).div_ceil(self.tile_rows)
    }
}

/// Room in each section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanCapacity {
    /// Rows.
    pub rows: usize,
    /// Spans.
    pub spans: usize,
    /// Spans of one row.
    pub decodes: usize,
    /// Their splits.
    pub items: usize,
    /// Tiles of longer spans.
    pub tiles: usize,
    /// Rows that are sampled.
    pub logits_rows: usize,
}

impl PlanCapacity {
    /// Exactly what a batch needs.
    pub fn of(batch: &Batch<'_>, packing: Packing) -> Self {
        let splits = |span: &RowSpan| if span.rows == 1 { splits(span.context as usize) } else { 0 };
        let tiles = |span: &RowSpan| if span.rows == 1 { 0 } else { packing.tiles(span.rows as usize) };
        Self {
            rows: batch.tokens.len(),
            spans: batch.spans.len(),
            decodes: batch.spans.iter().filter(|span| span.rows == 1).count(),
            items: batch.spans.iter().map(splits).sum(),
            tiles: batch.spans.iter().map(tiles).sum(),
            logits_rows: batch.logits_rows.len(),
        }
    }

    /// What any step of this many single rows needs, at contexts up to `positions_max`.
    pub fn of_decodes(rows: usize, positions_max: usize) -> Self {
        let items = rows * splits(positions_max);
        Self { rows, spans: rows, decodes: rows, items, tiles: 0, logits_rows: rows }
    }
}

/// Splits of a context.
pub fn splits(context: usize) -> usize {
    context.div_ceil(SPLIT_KEYS)
}

/// Warps of a multiprocessor that walk runs, `RUN_WARPS` in `attention.cuh`.
pub const RUN_WARPS: usize = 8;

/// Splits of a run for this many spans of one row, or none where the CTAs had better share each split: from a sixth of
/// a run per warp on runs are faster, and the more of them a warp has, the fewer results it should leave in memory (the
/// figures are in `TUNING-attention.md`). A choice of speed alone, by what a captured step knows.
pub fn run_splits(decodes: usize, kv_heads: usize, multiprocessors: usize) -> Option<usize> {
    let (heads, warps) = (decodes * kv_heads, multiprocessors * RUN_WARPS);
    if heads * 3 >= warps * 4 {
        Some(4)
    } else if heads * 3 >= warps * 2 {
        Some(2)
    } else {
        (heads * 6 >= warps).then_some(1)
    }
}

/// Where the sections start, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionLayout {
    /// Room in each section.
    pub capacity: PlanCapacity,
    /// As [`run_splits`] gives them; without, the step has no list of runs.
    pub run_splits: Option<usize>,
    /// `Row` each.
    pub rows: usize,
    /// `AttentionSpan` each.
    pub spans: usize,
    /// One `AttentionCounts`.
    pub counts: usize,
    /// `DecodeItem` each.
    pub items: usize,
    /// The item at which each run begins.
    pub runs: usize,
    /// `PrefillTile` each.
    pub tiles: usize,
    /// Row of each sampled row.
    pub logits_rows: usize,
    /// `SampleParameters` each.
    pub parameters: usize,
    /// Block tables; as long as they are.
    pub tables: usize,
}

impl SectionLayout {
    /// Sections of this room, with runs of so many splits.
    pub fn new(capacity: PlanCapacity, run_splits: Option<usize>) -> Self {
        let mut end = 0;
        let mut section = |words: usize| {
            let start = end;
            end += words.next_multiple_of(ALIGNMENT);
            start
        };
        Self {
            capacity,
            run_splits,
            rows: section(capacity.rows * ROW_WORDS),
            spans: section(capacity.spans * SPAN_WORDS),
            counts: section(COUNTS_WORDS),
            items: section(capacity.items * ITEM_WORDS),
            runs: section(if run_splits.is_some() { capacity.items } else { 0 }),
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
        let needed = PlanCapacity::of(batch, packing);
        let room = &self.capacity;
        assert!(needed.rows <= room.rows && needed.spans <= room.spans && needed.items <= room.items);
        assert!(needed.tiles <= room.tiles && needed.logits_rows <= room.logits_rows);
        self.write_rows(batch, into);
        let spans = into[self.spans..].chunks_exact_mut(SPAN_WORDS);
        for (span, words) in batch.spans.iter().zip(spans) {
            words.copy_from_slice(&[span.first_row, span.rows, span.context, span.table]);
        }
        let runs = self.write_decodes(batch, into, order);
        let counts = [needed.items, needed.tiles, runs, self.run_splits.unwrap_or(0)];
        into[self.counts..][..COUNTS_WORDS].copy_from_slice(&counts.map(|count| count as u32));
        self.write_tiles(batch, packing, into, order);
        into[self.logits_rows..][..batch.logits_rows.len()].copy_from_slice(batch.logits_rows);
        into[self.tables..][..batch.block_tables.len()].copy_from_slice(batch.block_tables);
    }

    /// Writes the splits of spans of one row, and the runs that they make. The number of runs.
    fn write_decodes(&self, batch: &Batch<'_>, into: &mut [u32], order: &mut Vec<(u32, u32, u32)>) -> usize {
        order.clear();
        let mut item = 0;
        for (index, span) in batch.spans.iter().enumerate().filter(|(_, span)| span.rows == 1) {
            for split in 0..splits(span.context as usize) {
                into[self.items + item * ITEM_WORDS..][..ITEM_WORDS]
                    .copy_from_slice(&[index as u32, split as u32]);
                // Split 0 stands for the first run, which a split below its length belongs to.
                if let Some(length) = self.run_splits.filter(|&length| split == 0 || split >= length) {
                    let end = SPLIT_KEYS * if split == 0 { length } else { split + 1 };
                    let keys = (span.context as usize).min(end) - split * SPLIT_KEYS;
                    order.push((keys as u32, item as u32, 0));
                }
                item += 1;
            }
        }
        longest_first(order);
        for (&(_, item, _), word) in order.iter().zip(&mut into[self.runs..]) {
            *word = item;
        }
        order.len()
    }

    fn write_tiles(
        &self,
        batch: &Batch<'_>,
        packing: Packing,
        into: &mut [u32],
        order: &mut Vec<(u32, u32, u32)>,
    ) {
        order.clear();
        for (index, span) in batch.spans.iter().enumerate().filter(|(_, span)| span.rows > 1) {
            for tile in 0..packing.tiles(span.rows as usize) {
                let end = ((tile + 1) * packing.tile_rows).div_ceil(packing.group);
                let last_row = end.min(span.rows as usize) as u32;
                order.push((span.first_position() + last_row, index as u32, tile as u32));
            }
        }
        longest_first(order);
        let tiles = into[self.tiles..].chunks_exact_mut(ITEM_WORDS);
        for (&(_, span, tile), words) in order.iter().zip(tiles) {
            words.copy_from_slice(&[span, tile]);
        }
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

/// Sorts what is to be dealt out by its length: the last to finish are then short.
fn longest_first(order: &mut [(u32, u32, u32)]) {
    order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
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
            RowSpan { first_row: 0, rows: 1, context: 1025, table: 0 },
            RowSpan { first_row: 1, rows: 38, context: 70, table: 65 },
            RowSpan { first_row: 39, rows: 1, context: 1, table: 70 },
        ];
        let tables: Vec<u32> = (0..71).map(|i| 1000 + i).collect();
        let batch = Batch {
            tokens: &tokens,
            feeds: &[Feed { row: 38, choice: 5 }],
            spans: &spans,
            block_tables: &tables,
            logits_rows: &[0, 38, 39],
        };
        let packing = Packing { group: 4, tile_rows: 128 };
        let capacity = PlanCapacity { rows: 48, ..PlanCapacity::of(&batch, packing) };
        assert_eq!((capacity.decodes, capacity.items, capacity.tiles), (2, 4, 2));
        let layout = SectionLayout::new(capacity, None);
        let mut words = vec![7; layout.words(tables.len())];
        layout.write(&batch, packing, &mut words, &mut Vec::new());
        assert_eq!(words[layout.rows..][..4], [100, 1024, (1000 + 64) * 16, NONE]);
        assert_eq!(words[layout.rows + 4..][..4], [101, 32, (1065 + 2) * 16, NONE]);
        assert_eq!(words[layout.rows + 38 * 4..][..4], [138, 69, (1065 + 4) * 16 + 5, 5], "its token is fed");
        assert_eq!(words[layout.rows + 47 * 4..][..4], [0, 0, NONE, NONE]);
        assert_eq!(words[layout.counts..][..4], [4, 2, 0, 0]);
        assert_eq!(layout.runs, layout.tiles, "without runs there is no room for any");
        assert_eq!(words[layout.items..][..8], [0, 0, 0, 1, 0, 2, 2, 0]);
        assert_eq!(words[layout.tiles..][..4], [1, 1, 1, 0], "the longer context comes first");
        assert_eq!(words[layout.logits_rows..][..3], [0, 38, 39]);
        assert_eq!(words[layout.tables..], tables);
    }

    /// Which splits a run computes, as `look_up_run` in `attention_decode_runs.cuh` does.
    fn splits_of_run(layout: &SectionLayout, words: &[u32], run: usize) -> Vec<(u32, u32)> {
        let item = words[layout.runs + run] as usize * ITEM_WORDS;
        let (span, split) = (words[layout.items + item], words[layout.items + item + 1]);
        let context = words[layout.spans + span as usize * SPAN_WORDS + 2] as usize;
        let head = words[layout.counts + 3].min(splits(context) as u32);
        (split..if split == 0 { head } else { split + 1 }).map(|split| (span, split)).collect()
    }

    #[test]
    fn runs_hold_each_split_once_and_the_longest_come_first() {
        let contexts = [1, 512, 513, 1024, 1025, 2048, 2049, 5000, 700];
        let tables: Vec<u32> = (0..400).collect();
        let span = |(row, context)| RowSpan { first_row: row as u32, rows: 1, context, table: 0 };
        let spans: Vec<RowSpan> = contexts.into_iter().enumerate().map(span).collect();
        let batch =
            Batch { tokens: &[0; 9], feeds: &[], spans: &spans, block_tables: &tables, logits_rows: &[] };
        let packing = Packing { group: 2, tile_rows: 128 };
        for length in [1, 2, 4] {
            let layout = SectionLayout::new(PlanCapacity::of(&batch, packing), Some(length));
            let mut words = vec![u32::MAX; layout.words(tables.len())];
            layout.write(&batch, packing, &mut words, &mut Vec::new());
            let [items, tiles, runs, written] = words[layout.counts..][..4] else { panic!() };
            assert_eq!((items, tiles, written as usize), (layout.capacity.items as u32, 0, length));
            let all: Vec<Vec<(u32, u32)>> =
                (0..runs as usize).map(|run| splits_of_run(&layout, &words, run)).collect();
            let keys = |run: &Vec<(u32, u32)>| -> usize {
                let of = |&(span, split): &(u32, u32)| {
                    (contexts[span as usize] as usize - split as usize * SPLIT_KEYS).min(SPLIT_KEYS)
                };
                run.iter().map(of).sum()
            };
            assert!(all.windows(2).all(|pair| keys(&pair[0]) >= keys(&pair[1])), "{all:?}");
            let mut held: Vec<(u32, u32)> = all.concat();
            held.sort_unstable();
            let expected: Vec<(u32, u32)> = (0..contexts.len())
                .flat_map(|span| (0..splits(contexts[span] as usize)).map(move |s| (span as u32, s as u32)))
                .collect();
            assert_eq!(held, expected, "runs of {length}");
        }
    }

    #[test]
    fn the_more_spans_the_longer_the_runs() {
        let of = |rows: usize| run_splits(padded(rows), 8, 132);
        for (rows, expected) in [
            (1, None),
            (16, None),
            (17, Some(1)),
            (64, Some(1)),
            (81, Some(2)),
            (128, Some(2)),
            (161, Some(4)),
        ] {
            assert_eq!(of(rows), expected, "{rows} rows");
        }
        assert!((1..GRAPH_ROWS_MAX).all(|rows| of(rows) <= of(rows + 1)));
        assert_eq!(run_splits(256, 3, 132), Some(2), "fewer heads make fewer runs");
    }
}
