//! Times the ops of SmolLM2-135M on random weights: `cargo run --release -p millrace-kernels --example decoder
//! -- bf16 64 [context [threads [fp8]]]` runs decode steps of 64 sequences and a prefill step, and prints the best of
//! several beside the limit that is measured in the same run. With one thread the clock is the thread's
//! processor time, which other load on the machine disturbs least.

use std::num::NonZeroUsize;

use millrace_kernels::bounds::{ModelShape, StepWork};
use millrace_kernels::cpu::{Cpu, CpuOptions, Matrix, Precision, Vector};
use millrace_kernels::ops::{
    ArenaPlan, AttentionShape, Batch, Buffer, BufferKind, BufferPlan, KvDtype, KvPlan, KvScales, Ops,
    RopePlan, RowSpan,
};
use millrace_kernels::sampling::{SampleRow, Sampled};
use millrace_kernels::tensor::{DType, HostTensor};

const SHAPE: ModelShape =
    ModelShape { layers: 30, hidden: 576, heads: 9, kv_heads: 3, head_dim: 64, ffn: 1536, vocabulary: 49152 };
const OPS: [&str; 10] =
    ["embed", "norm", "qkv", "rope", "attention", "out", "gate-up", "down", "sample", "total"];

/// Seconds of processor time of this thread if it works alone, else of the wall clock.
fn now(alone: bool) -> f64 {
    let clock = if alone { libc::CLOCK_THREAD_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

struct Model {
    cpu: Cpu,
    table: Matrix,
    norm: Vector,
    layers: Vec<[Matrix; 4]>,
    seconds: [f64; OPS.len()],
}

fn random(elements: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let values = (0..elements).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.08
    });
    values.flat_map(f32::to_le_bytes).collect()
}

fn matrix(cpu: &mut Cpu, rows: usize, columns: usize) -> Matrix {
    let raw = random(rows * columns, (rows + columns) as u32);
    let tensor = HostTensor::new(DType::F32, &[rows, columns], &raw).expect("right length");
    cpu.matrix(&[tensor]).expect("a matrix")
}

impl Model {
    fn new(options: CpuOptions, rows_max: usize, kv: KvPlan) -> Self {
        let mut cpu = Cpu::new(options).expect("widest instructions");
        let (hidden, ffn) = (SHAPE.hidden, SHAPE.ffn);
        let qkv = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
        let buffers = [
            (hidden, BufferKind::Values),
            (hidden, BufferKind::Operand),
            (qkv, BufferKind::Values),
            (hidden, BufferKind::Operand),
            (ffn, BufferKind::Operand),
        ];
        cpu.allocate(ArenaPlan {
            rows_max,
            logits_rows_max: rows_max.min(256),
            positions_max: 8192,
            vocabulary: SHAPE.vocabulary,
            heads: SHAPE.heads,
            buffers: buffers.map(|(width, kind)| BufferPlan { width, kind }).to_vec(),
            kv,
            score_cap: None,
            logits_cap: None,
            rope: RopePlan {
                inverse_frequencies: (0..32).map(|i| 1e5_f32.powf(-i as f32 / 32.0)).collect(),
                amplitude: 1.0,
            },
        })
        .expect("sizes in bounds");
        let table = matrix(&mut cpu, SHAPE.vocabulary, hidden);
        let ones: Vec<u8> = (0..hidden).flat_map(|_| 1.0_f32.to_le_bytes()).collect();
        let norm = cpu.vector(&[HostTensor::new(DType::F32, &[hidden], &ones).expect("length")]);
        let layers = (0..SHAPE.layers)
            .map(|_| {
                let raw = random(ffn * hidden, 9);
                let half = HostTensor::new(DType::F32, &[ffn, hidden], &raw).expect("length");
                [
                    matrix(&mut cpu, qkv, hidden),
                    matrix(&mut cpu, hidden, hidden),
                    cpu.gated_matrix(&half, &half).expect("equal shapes"),
                    matrix(&mut cpu, hidden, ffn),
                ]
            })
            .collect();
        Self { cpu, table, norm: norm.expect("a vector"), layers, seconds: [0.0; OPS.len()] }
    }

    fn step(&mut self, batch: &Batch<'_>, out: &mut Vec<Sampled>) {
        let [x, normed, qkv, mixed, gated] = [0, 1, 2, 3, 4].map(Buffer);
        let shape = AttentionShape {
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            scale: 0.125,
            sliding_window: None,
            kv_scales: KvScales::ONE,
        };
        let Self { cpu, seconds, .. } = self;
        cpu.begin(batch).expect("batch in bounds");
        let alone = cpu.threads() == 1;
        let start = now(alone);
        let mut last = start;
        let mut lap = |op: usize, seconds: &mut [f64]| {
            let now = now(alone);
            seconds[op] += now - last;
            last = now;
        };
        cpu.embed(&self.table, x);
        lap(0, seconds);
        for (layer, [qkv_weight, out, gate_up, down]) in self.layers.iter().enumerate() {
            cpu.rms_norm(x, &self.norm, 1e-5, normed);
            lap(1, seconds);
            cpu.linear(qkv_weight, None, normed, qkv);
            lap(2, seconds);
            cpu.rope_cache(layer, qkv, &shape, None);
            lap(3, seconds);
            cpu.attention(layer, qkv, &shape, mixed);
            lap(4, seconds);
            cpu.linear_add(out, None, mixed, x);
            lap(5, seconds);
            cpu.rms_norm(x, &self.norm, 1e-5, normed);
            lap(1, seconds);
            cpu.linear_silu_mul(gate_up, normed, gated);
            lap(6, seconds);
            cpu.linear_add(down, None, gated, x);
            lap(7, seconds);
        }
        if !batch.logits_rows.is_empty() {
            cpu.narrow(&[x]);
            cpu.rms_norm(x, &self.norm, 1e-5, normed);
            let rows = vec![SampleRow::GREEDY; batch.logits_rows.len()];
            cpu.sample(&self.table, normed, &rows).expect("the CPU does not fail");
            cpu.collect(out).expect("the CPU does not fail");
            lap(8, seconds);
        }
        seconds[9] += now(alone) - start;
    }
}

/// Runs steps of one kind and prints the best step.
fn time(model: &mut Model, name: &str, spans: &[RowSpan], logits: bool, types: (Precision, KvDtype)) {
    let rows = spans.iter().map(|span| span.rows).sum::<u32>();
    let tokens: Vec<u32> = (0..rows).map(|row| row * 97 % 49152).collect();
    let blocks: Vec<u32> = (0..spans.iter().map(|span| span.context.div_ceil(16)).sum()).collect();
    let logits_rows: Vec<u32> = if logits { (0..rows).collect() } else { Vec::new() };
    let batch =
        Batch { tokens: &tokens, feeds: &[], spans, block_tables: &blocks, logits_rows: &logits_rows };
    let mut out = Vec::new();
    let mut best = [f64::MAX; OPS.len()];
    for _ in 0..15 {
        model.seconds = [0.0; OPS.len()];
        model.step(&batch, &mut out);
        if model.seconds[9] < best[9] {
            best = model.seconds;
        }
    }
    let attended = |span: &RowSpan| (span.first_position() + 1..=span.context).map(f64::from).sum::<f64>();
    let work = StepWork {
        steps: 1.0,
        rows: f64::from(rows),
        logits_rows: logits_rows.len() as f64,
        attended: spans.iter().map(attended).sum(),
        cached: spans.iter().map(|span| f64::from(span.context)).sum(),
    };
    let bounds = model.cpu.measure();
    let cost = SHAPE.cost(&work, types.0, types.1);
    let share = bounds.least_s(&cost) / best[9];
    println!(
        "{name} {types:?}: {:.2} ms, {:.0} tok/s, {:.0} G/s; limits {:.0} G/s, {:.1} GB/s; share {share:.2}",
        best[9] * 1e3,
        f64::from(rows) / best[9],
        cost.operations / best[9] / 1e9,
        bounds.operations_per_s / 1e9,
        bounds.read_bytes_per_s / 1e9,
    );
    for (op, seconds) in OPS.iter().zip(best) {
        print!("  {op} {:.2}", seconds * 1e3);
    }
    println!();
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let precision = match arguments.get(1).map(String::as_str) {
        Some("f32") => Precision::F32,
        Some("int8") => Precision::Int8,
        _ => Precision::Bf16,
    };
    let rows: u32 = arguments.get(2).and_then(|rows| rows.parse().ok()).unwrap_or(64);
    let context: u32 = arguments.get(3).and_then(|context| context.parse().ok()).unwrap_or(166);
    let blocks = (rows * context.div_ceil(16)).max(64) as usize;
    let threads = arguments.get(4).and_then(|threads| threads.parse().ok()).and_then(NonZeroUsize::new);
    let options = CpuOptions { threads, ..CpuOptions::new(precision) };
    let dtype = if arguments.get(5).is_some() { KvDtype::Fp8E4m3 } else { KvDtype::Operand };
    let kv = KvPlan { layers: 30, kv_heads: 3, head_dim: 64, blocks, dtype };
    let mut model = Model::new(options, rows.max(512) as usize, kv);
    let mut table = 0;
    let decodes: Vec<RowSpan> = (0..rows)
        .map(|row| {
            let span = RowSpan { first_row: row, rows: 1, context, table };
            table += context.div_ceil(16);
            span
        })
        .collect();
    time(&mut model, &format!("decode {rows}"), &decodes, true, (precision, dtype));
    let prefill = RowSpan { first_row: 0, rows: 512, context: 512, table: 0 };
    time(&mut model, "prefill 512", &[prefill], false, (precision, dtype));
}
