//! Every form against plain arithmetic in f64, and batch invariance byte by byte.

mod attention;
mod grouped;
mod products;

use proptest::prelude::*;

use super::*;
use crate::e4m3;
use crate::ops::{BLOCK_TOKENS, BufferKind, BufferPlan, Feed, KvDtype, KvScales, QkNorm, RopePlan, RowSpan};
use crate::sampling::{greatest, uniform};
use crate::tensor::DType;

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Int8];
/// Each with a cache of its own type, and two with one of 8 bits.
const KINDS: [(Precision, KvDtype); 5] = [
    (Precision::F32, KvDtype::Operand),
    (Precision::Bf16, KvDtype::Operand),
    (Precision::Int8, KvDtype::Operand),
    (Precision::F32, KvDtype::Fp8E4m3),
    (Precision::Bf16, KvDtype::Fp8E4m3),
];

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// Reproducible numbers in `[-1, 1)` that bf16 holds exactly enough for the tolerances below.
fn random(seed: u64, len: usize) -> Vec<f32> {
    (0..len).map(|index| uniform(seed, index as u32) as f32 * 2.0 - 1.0).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn cpu(isa: Isa, precision: Precision) -> Cpu {
    Cpu::new(CpuOptions { precision, threads: NonZeroUsize::new(2), isa: Some(isa) }).unwrap()
}

fn load(cpu: &mut Cpu, rows: usize, columns: usize, values: &[f32]) -> Matrix {
    let raw = bytes(values);
    cpu.matrix(&[HostTensor::new(DType::F32, &[rows, columns], &raw).unwrap()]).unwrap()
}

fn vector(cpu: &mut Cpu, values: &[f32]) -> Vector {
    let raw = bytes(values);
    cpu.vector(&[HostTensor::new(DType::F32, &[values.len()], &raw).unwrap()]).unwrap()
}

fn plan(widths: &[(usize, BufferKind)], kv: KvPlan) -> ArenaPlan {
    ArenaPlan {
        rows_max: 80,
        logits_rows_max: 80,
        positions_max: 256,
        vocabulary: 97,
        heads: kv.kv_heads,
        buffers: widths.iter().map(|&(width, kind)| BufferPlan { width, kind }).collect(),
        kv,
        score_cap: None,
        logits_cap: None,
        rope: RopePlan { inverse_frequencies: vec![1.0, 0.3, 0.05, 0.01], amplitude: 1.0 },
    }
}

const NO_KV: KvPlan = KvPlan { layers: 1, kv_heads: 1, head_dim: 8, blocks: 64, dtype: KvDtype::Operand };

fn begin(cpu: &mut Cpu, rows: usize) {
    let tokens: Vec<u32> = (0..rows as u32).map(|row| row % 97).collect();
    let tables: Vec<u32> = (0..64).collect();
    let span = RowSpan { first_row: 0, rows: rows as u32, context: rows as u32, table: 0 };
    let logits_rows: Vec<u32> = (0..rows as u32).collect();
    cpu.begin(&Batch {
        tokens: &tokens,
        feeds: &[],
        spans: &[span],
        block_tables: &tables,
        logits_rows: &logits_rows,
    })
    .unwrap();
}

/// Queues and collects a step whose normed rows are in the second buffer.
fn sample(cpu: &mut Cpu, head: &Matrix, rows: &[SampleRow<'_>]) -> Vec<Sampled> {
    let mut out = Vec::new();
    cpu.sample(head, Buffer(1), rows).unwrap();
    cpu.collect(&mut out).unwrap();
    out
}

fn values(cpu: &mut Cpu, buffer: Buffer, row: usize) -> &mut [f32] {
    let activation = &mut cpu.arena.as_mut().unwrap().buffers[buffer.0];
    let (width, stride) = (activation.width, activation.stride);
    &mut activation.values_mut()[row * stride..][..width]
}

#[test]
fn embedding_rows_are_those_of_the_table() {
    for precision in PRECISIONS {
        let mut cpu = cpu(Isa::Scalar, precision);
        cpu.allocate(plan(&[(37, BufferKind::Values)], NO_KV)).unwrap();
        begin(&mut cpu, 40);
        let weights = random(5, 97 * 37);
        let table = load(&mut cpu, 97, 37, &weights);
        cpu.embed(&table, Buffer(0));
        for row in 0..40 {
            for (found, expected) in values(&mut cpu, Buffer(0), row).iter().zip(&weights[row * 37..]) {
                assert!((found - expected).abs() < 1e-2, "{found} for {expected}");
            }
        }
    }
}

/// A decoder of two layers on random weights.
struct Model {
    cpu: Cpu,
    table: Matrix,
    norm: Vector,
    head_norm: Vector,
    layers: Vec<[Matrix; 4]>,
    shape: AttentionShape,
}

const HIDDEN: usize = 48;
const FFN: usize = 40;
const KV: KvPlan = KvPlan { layers: 2, kv_heads: 2, head_dim: 8, blocks: 64, dtype: KvDtype::Operand };

impl Model {
    fn new(isa: Isa, (precision, dtype): (Precision, KvDtype), sliding_window: Option<u32>) -> Self {
        use BufferKind::{Operand, Values};
        let mut cpu = cpu(isa, precision);
        let heads = 6;
        let qkv = (heads + 4) * 8;
        let widths =
            [(HIDDEN, Values), (HIDDEN, Operand), (qkv, Values), (heads * 8, Operand), (FFN, Operand)];
        cpu.allocate(plan(&widths, KvPlan { dtype, ..KV })).unwrap();
        // What an earlier owner left in the cache must not matter.
        match &mut cpu.arena.as_mut().unwrap().cache.blocks {
            arena::CacheBlocks::F32(blocks) => blocks.fill(f32::NAN),
            arena::CacheBlocks::Bf16(blocks) => blocks.fill(0x7FC0),
            arena::CacheBlocks::F16(blocks) => blocks.fill(0x7E00),
            arena::CacheBlocks::E4m3(blocks) => blocks.fill(e4m3::NAN),
        }
        let table = load(&mut cpu, 97, HIDDEN, &random(11, 97 * HIDDEN));
        let norm = vector(&mut cpu, &random(12, HIDDEN));
        let head_norm = vector(&mut cpu, &random(13, 8));
        let layers = (0..2)
            .map(|layer| {
                let seed = 20 + 10 * layer;
                let raw = [bytes(&random(seed + 2, FFN * HIDDEN)), bytes(&random(seed + 3, FFN * HIDDEN))];
                let [gate, up] =
                    raw.each_ref().map(|raw| HostTensor::new(DType::F32, &[FFN, HIDDEN], raw).unwrap());
                [
                    load(&mut cpu, qkv, HIDDEN, &random(seed, qkv * HIDDEN)),
                    load(&mut cpu, HIDDEN, heads * 8, &random(seed + 1, HIDDEN * heads * 8)),
                    cpu.gated_matrix(&gate, &up).unwrap(),
                    load(&mut cpu, HIDDEN, FFN, &random(seed + 4, HIDDEN * FFN)),
                ]
            })
            .collect();
        let kv_scales = KvScales { key: 0.5, value: 0.25 };
        let shape =
            AttentionShape { heads, kv_heads: 2, head_dim: 8, scale: 0.35, sliding_window, kv_scales };
        Self { cpu, table, norm, head_norm, layers, shape }
    }

    /// Logits of the batch's logits rows.
    fn step(&mut self, batch: &Batch<'_>) -> Vec<f32> {
        let [x, normed, qkv, mixed, gated] = [0, 1, 2, 3, 4].map(Buffer);
        let cpu = &mut self.cpu;
        cpu.begin(batch).unwrap();
        cpu.embed(&self.table, x);
        for (layer, [qkv_weight, out, gate_up, down]) in self.layers.iter().enumerate() {
            cpu.rms_norm(x, &self.norm, 1e-5, normed);
            cpu.linear(qkv_weight, None, normed, qkv);
            let norms = QkNorm { q: &self.head_norm, k: &self.head_norm, eps: 1e-5 };
            cpu.rope_cache(layer, qkv, &self.shape, Some(norms));
            cpu.attention(layer, qkv, &self.shape, mixed);
            cpu.linear_add(out, None, mixed, x);
            cpu.rms_norm(x, &self.norm, 1e-5, normed);
            cpu.linear_silu_mul(gate_up, normed, gated);
            cpu.linear_add(down, None, gated, x);
        }
        cpu.narrow(&[x]);
        cpu.rms_norm(x, &self.norm, 1e-5, normed);
        let mut logits = vec![0.0; batch.logits_rows.len() * 97];
        cpu.logits(&self.table, normed, &mut logits).unwrap();
        logits
    }
}

/// Logits of every position of each sequence; all run together, in chunks of the given sizes.
fn run(model: &mut Model, sequences: &[Vec<u32>], chunks: &[usize], first_block: u32) -> Vec<Vec<u32>> {
    let mut done = vec![0; sequences.len()];
    let mut results = vec![Vec::new(); sequences.len()];
    let mut turn = 0;
    while done.iter().zip(sequences).any(|(&done, sequence)| done < sequence.len()) {
        let (mut tokens, mut spans, mut tables, mut owners) = (vec![], vec![], vec![], vec![]);
        for (index, sequence) in sequences.iter().enumerate() {
            let chunk = chunks[(turn + index) % chunks.len()];
            let rows = chunk.min(sequence.len() - done[index]).min(80 - tokens.len());
            if rows == 0 {
                continue;
            }
            let context = done[index] + rows;
            let (first_row, table) = (tokens.len() as u32, tables.len() as u32);
            spans.push(RowSpan { first_row, rows: rows as u32, context: context as u32, table });
            tokens.extend_from_slice(&sequence[done[index]..context]);
            // Blocks of a sequence lie scattered.
            tables.extend(
                (0..context.div_ceil(16)).map(|block| (first_block + (index * 8 + block * 3) as u32) % 64),
            );
            owners.extend(std::iter::repeat_n(index, rows));
            done[index] = context;
        }
        turn += 1;
        let logits_rows: Vec<u32> = (0..tokens.len() as u32).collect();
        let batch = Batch {
            tokens: &tokens,
            feeds: &[],
            spans: &spans,
            block_tables: &tables,
            logits_rows: &logits_rows,
        };
        let logits = model.step(&batch);
        for (owner, logits) in owners.into_iter().zip(logits.chunks_exact(97)) {
            results[owner].extend(logits.iter().map(|logit| logit.to_bits()));
        }
    }
    results
}

/// Blocks `first + index * 8 + block * 3` must not meet: at most this many blocks per sequence and sequences.
const SEQUENCES_MAX: usize = 4;
const LENGTH_MAX: usize = 36;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Each row's logits are the same bytes alone token by token, and in any batch with any chunks, on every
    /// instruction set and precision.
    #[test]
    fn rows_do_not_depend_on_their_batch(
        lengths in prop::collection::vec(1..LENGTH_MAX, 1..=SEQUENCES_MAX),
        chunks in prop::collection::vec(1_usize..20, 1..4),
        seed in 0_u64..1000,
        window in prop_oneof![Just(None), (1_u32..30).prop_map(Some)],
    ) {
        let sequences: Vec<Vec<u32>> = lengths
            .iter()
            .enumerate()
            .map(|(index, &len)| {
                (0..len).map(|at| (uniform(seed + index as u64, at as u32) * 97.0) as u32).collect()
            })
            .collect();
        for isa in isas() {
            for kind in KINDS {
                let mut model = Model::new(isa, kind, window);
                let together = run(&mut model, &sequences, &chunks, 1);
                for (index, sequence) in sequences.iter().enumerate() {
                    let alone = run(&mut model, std::slice::from_ref(sequence), &[1], 40);
                    prop_assert!(together[index] == alone[0], "{} {:?} sequence {}", isa, kind, index);
                    let finite = alone[0].iter().all(|&bits| f32::from_bits(bits).is_finite());
                    prop_assert!(finite, "stale blocks leaked");
                }
            }
        }
    }
}

/// All forms of one kind compute the same function, and each kind stays near f32. e4m3 has three bits of mantissa, a
/// mean error of 2.6 % of a value, beside the seven of bf16.
#[test]
fn forms_and_precisions_agree() {
    let sequence: Vec<u32> = (0..200).map(|at| (uniform(77, at) * 97.0) as u32).collect();
    let logits = |isa, kind| {
        let bits = run(&mut Model::new(isa, kind, None), std::slice::from_ref(&sequence), &[70], 0);
        bits[0].iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<f32>>()
    };
    let distance = |a: &[f32], b: &[f32]| {
        let difference: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let size: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
        (difference / size).sqrt()
    };
    let exact = logits(Isa::Scalar, KINDS[0]);
    for kind in KINDS {
        let scalar = logits(Isa::Scalar, kind);
        let error = distance(&scalar, &exact);
        let bound = match kind {
            (_, KvDtype::Fp8E4m3) => 0.04,
            (Precision::F32, _) => 0.0,
            (Precision::Bf16, _) => 0.02,
            (Precision::Int8, _) => 0.06,
        };
        println!("{kind:?}: relative distance {error} from f32");
        assert!(error <= bound, "{kind:?}: relative distance {error} from f32");
        for isa in isas() {
            let error = distance(&logits(isa, kind), &scalar);
            let bound = match kind {
                (Precision::F32, KvDtype::Operand) => 1e-5,
                // A sum that is rounded in another way may be rounded to another code.
                (_, KvDtype::Fp8E4m3) => 0.04,
                _ => 0.02,
            };
            assert!(error <= bound, "{isa} {kind:?}: relative distance {error} from scalar");
        }
    }
}

/// The same memory holds twice the blocks of bf16 and four times those of f32, whatever the head's size.
#[test]
fn a_block_of_codes_is_half_of_one_in_bf16() {
    for head_dim in [8, 16, 20, 64, 96, 128, 256] {
        let bytes = |precision, dtype| {
            cpu(Isa::Scalar, precision).kv_block_bytes(&KvPlan {
                layers: 3,
                kv_heads: 2,
                head_dim,
                blocks: 1,
                dtype,
            })
        };
        for precision in PRECISIONS {
            let wide = if precision == Precision::F32 { 4 } else { 2 };
            let (operand, fp8) = (bytes(precision, KvDtype::Operand), bytes(precision, KvDtype::Fp8E4m3));
            assert_eq!(operand, wide * fp8, "{precision:?}, heads of {head_dim}");
            assert_eq!(fp8, 3 * 2 * 2 * BLOCK_TOKENS * head_dim.next_multiple_of(16));
        }
    }
}

/// A sequence whose values are not numbers is reported, and its batch mates come out as if it were not there.
#[test]
fn poison_stays_in_its_row() {
    for precision in PRECISIONS {
        let mut cpu = cpu(Isa::detect(), precision);
        cpu.allocate(plan(&[(32, BufferKind::Values), (32, BufferKind::Operand)], NO_KV)).unwrap();
        begin(&mut cpu, 30);
        let head = load(&mut cpu, 97, 32, &random(3, 97 * 32));
        let ones = vector(&mut cpu, &[1.0; 32]);
        cpu.embed(&head, Buffer(0));
        cpu.rms_norm(Buffer(0), &ones, 1e-5, Buffer(1));
        let clean = sample(&mut cpu, &head, &[SampleRow::GREEDY; 30]);
        for (row, value) in [(0, f32::NAN), (13, f32::INFINITY), (29, f32::NEG_INFINITY)] {
            values(&mut cpu, Buffer(0), row)[7] = value;
        }
        cpu.rms_norm(Buffer(0), &ones, 1e-5, Buffer(1));
        // The greedy path, and the one that writes logits.
        let mut drawn = [SampleRow::GREEDY; 30];
        drawn[13].temperature = 1.0;
        for rows in [[SampleRow::GREEDY; 30], drawn] {
            let poisoned = sample(&mut cpu, &head, &rows);
            for row in 0..30 {
                let expected = if [0, 13, 29].contains(&row) { &Err(Poisoned) } else { &clean[row] };
                assert_eq!(&poisoned[row], expected, "{precision:?} row {row}");
            }
        }
    }
}

/// A step is queued before the one that feeds it is collected, and gives what it gives with the tokens known.
#[test]
fn a_row_is_fed_with_a_choice_of_the_step_before() {
    let mut cpu = cpu(Isa::detect(), Precision::F32);
    cpu.allocate(plan(&[(32, BufferKind::Values), (32, BufferKind::Operand)], NO_KV)).unwrap();
    let head = load(&mut cpu, 97, 32, &random(3, 97 * 32));
    let ones = vector(&mut cpu, &[1.0; 32]);
    let queue = |cpu: &mut Cpu, tokens: &[u32; 3], feeds: &[Feed]| {
        let spans = [RowSpan { first_row: 0, rows: 3, context: 3, table: 0 }];
        let batch = Batch { tokens, feeds, spans: &spans, block_tables: &[0], logits_rows: &[0, 1, 2] };
        cpu.begin(&batch).unwrap();
        cpu.embed(&head, Buffer(0));
        cpu.rms_norm(Buffer(0), &ones, 1e-5, Buffer(1));
        // So hot that a row's choice is not its own token.
        let rows = [0, 1, 2].map(|seed| SampleRow { temperature: 90.0, seed, ..SampleRow::GREEDY });
        cpu.sample(&head, Buffer(1), &rows).unwrap();
    };
    let collect = |cpu: &mut Cpu| {
        let mut out = Vec::new();
        cpu.collect(&mut out).unwrap();
        [0, 1, 2].map(|row: usize| out[row].as_ref().unwrap().token)
    };
    queue(&mut cpu, &[5, 6, 7], &[]);
    queue(&mut cpu, &[8, 0, 0], &[Feed { row: 1, choice: 2 }, Feed { row: 2, choice: 0 }]);
    let (before, fed) = (collect(&mut cpu), collect(&mut cpu));
    assert_ne!(before, [5, 6, 7]);
    queue(&mut cpu, &[8, before[2], before[0]], &[]);
    assert_eq!(collect(&mut cpu), fed);
    queue(&mut cpu, &[8, 0, 0], &[]);
    assert_ne!(collect(&mut cpu), fed, "tokens matter");
}

/// The greedy path, which writes no logits, chooses as the path that does: also among equals, and where every
/// logit is below the zero of the padding.
#[test]
fn greedy_rows_get_the_first_greatest_logit() {
    for isa in isas() {
        for precision in PRECISIONS {
            let mut cpu = cpu(isa, precision);
            cpu.allocate(plan(&[(32, BufferKind::Values), (32, BufferKind::Operand)], NO_KV)).unwrap();
            begin(&mut cpu, 30);
            // Rows 32 to 63 of the head repeat rows 0 to 31.
            let mut weights = random(3, 97 * 32);
            weights.copy_within(..32 * 32, 32 * 32);
            let head = load(&mut cpu, 97, 32, &weights);
            let downwards: Vec<f32> = weights.iter().map(|weight| -weight.abs()).collect();
            let negative = load(&mut cpu, 97, 32, &downwards);
            let ones = vector(&mut cpu, &[1.0; 32]);
            for row in 0..30 {
                let inputs = random(row as u64, 32);
                values(&mut cpu, Buffer(0), row).copy_from_slice(&inputs);
            }
            values(&mut cpu, Buffer(0), 4).fill(1.0);
            cpu.rms_norm(Buffer(0), &ones, 1e-5, Buffer(1));
            for head in [&head, &negative] {
                let mut logits = vec![0.0; 30 * 97];
                cpu.logits(head, Buffer(1), &mut logits).unwrap();
                let greedy = sample(&mut cpu, head, &[SampleRow::GREEDY; 30]);
                let mut rows = [SampleRow::GREEDY; 30];
                rows[29].temperature = 1.0;
                let mixed = sample(&mut cpu, head, &rows);
                let below_padding = logits[4 * 97..5 * 97].iter().all(|&logit| logit < 0.0);
                assert_eq!(below_padding, std::ptr::eq(head, &negative));
                for (row, logits) in logits.chunks_exact(97).enumerate() {
                    let token = greatest(logits).unwrap().0;
                    assert_eq!(greedy[row].as_ref().unwrap().token, token, "{isa} {precision:?} row {row}");
                    assert!(row == 29 || mixed[row] == greedy[row], "{isa} {precision:?} row {row}");
                }
            }
        }
    }
}
