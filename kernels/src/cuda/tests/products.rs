//! Matrix products, alone and with the norms before and after, at all batch sizes.

use super::*;

/// A few rows in full: all features, all tiles of the batch.
fn check_rows(
    name: &str,
    found: &[f32],
    (rows, features): (usize, usize),
    limit: f64,
    expected: &dyn Fn(usize, usize) -> f64,
) {
    for row in (0..rows).step_by((rows / 7).max(1)) {
        let expected: Vec<f64> = (0..features).map(|feature| expected(row, feature)).collect();
        let error = distance(&found[row * features..][..features], &expected);
        assert!(error < limit, "{name} of {features} features, row {row} of {rows}: {error}");
    }
}

fn silu_of(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// GELU by its approximation with a hyperbolic tangent.
fn gelu_of(x: f64) -> f64 {
    let slope = (2.0 / std::f64::consts::PI).sqrt();
    0.5 * x * (1.0 + (slope * (x + 0.044715 * x.powi(3))).tanh())
}

/// Products of one shape at many batch sizes. Returns the bits of the values' product at the largest batch.
pub(super) fn check_products(
    cuda: &mut Cuda,
    (features, columns): (usize, usize),
    batches: &[usize],
) -> Vec<u32> {
    use BufferKind::{Operand, Values};
    let most = *batches.iter().max().unwrap();
    let [x, out, sums, gated, gelu] = [0, 1, 2, 3, 4].map(Buffer);
    let (values, operand) = ((features, Values), (features, Operand));
    let widths = [(columns, Operand), values, values, operand, operand];
    let weights = random(1, features * columns);
    let ups = random(4, features * columns);
    let w = matrix(cuda, features, columns, &weights);
    let (raw_gate, raw_up) = (bytes(&weights), bytes(&ups));
    let tensor = |raw| HostTensor::new(DType::F32, &[features, columns], raw).unwrap();
    let gate_up = cuda.gated_matrix(&tensor(&raw_gate), &tensor(&raw_up)).unwrap();
    let bias = random(3, features);
    let b = vector(cuda, &bias);
    cuda.allocate(plan(&widths, NO_KV, 1, most)).unwrap();
    let (input, before) = (random(2, most * columns), random(5, most * features));
    let dot = |row: usize, feature: usize, weights: &[f32]| -> f64 {
        let (row, feature) = (&input[row * columns..][..columns], &weights[feature * columns..][..columns]);
        row.iter().zip(feature).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let mut known: [Vec<u32>; 4] = Default::default();
    let mut batches = batches.to_vec();
    batches.sort_unstable_by(|a, b| b.cmp(a));
    for &rows in &batches {
        begin(cuda, rows);
        put(cuda, x, &input);
        put(cuda, sums, &before);
        for buffer in [out, gated, gelu] {
            put(cuda, buffer, &vec![f32::NAN; most * features]);
        }
        cuda.linear(&w, Some(&b), x, out);
        cuda.linear_add(&w, None, x, sums);
        cuda.linear_silu_mul(&gate_up, x, gated);
        cuda.linear_gelu_mul(&gate_up, x, gelu);
        let found = [out, sums, gated, gelu].map(|buffer| take(cuda, buffer, rows));
        if rows == most {
            let added = |r: usize, j: usize| f64::from(before[r * features + j]) + dot(r, j, &weights);
            check_rows("values", &found[0], (rows, features), 1e-5, &|r, j| {
                dot(r, j, &weights) + f64::from(bias[j])
            });
            check_rows("add", &found[1], (rows, features), 1e-5, &added);
            let gated = |r: usize, j: usize| silu_of(dot(r, j, &weights)) * dot(r, j, &ups);
            check_rows("silu_mul", &found[2], (rows, features), 4e-3, &gated);
            let gelu = |r: usize, j: usize| gelu_of(dot(r, j, &weights)) * dot(r, j, &ups);
            check_rows("gelu_mul", &found[3], (rows, features), 4e-3, &gelu);
        }
        for (kind, (found, known)) in found.iter().zip(&mut known).enumerate() {
            assert!(
                found.iter().all(|value| value.is_finite()),
                "product {kind} of {rows} rows is not written"
            );
            let bits: Vec<u32> = found.iter().map(|value| value.to_bits()).collect();
            if known.is_empty() {
                *known = bits;
            } else {
                let differ = bits.iter().zip(known.iter()).filter(|(a, b)| a != b).count();
                let sizes = format!("{features}x{columns}, {rows} rows");
                assert_eq!(differ, 0, "product {kind}, {sizes}: bytes depend on the batch");
            }
        }
    }
    known[0].clone()
}

const SHAPES: [(usize, usize); 7] =
    [(64, 64), (48, 104), (576, 576), (1024, 2048), (4096, 1024), (1024, 3072), (4096, 1536)];

#[test]
fn products_are_right_at_any_batch_size() {
    for shape in SHAPES {
        let mut bits = Vec::new();
        for set in [KernelSet::Own, KernelSet::Portable] {
            let Some(mut cuda) = open(set) else { return };
            let few = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 200, 256, 257, 300, 700];
            let many = [1, 64, 300, 5000];
            bits.push(check_products(&mut cuda, shape, &few));
            if shape.0 >= 1024 && set == KernelSet::Own {
                let Some(mut cuda) = open(set) else { return };
                check_products(&mut cuda, shape, &many);
            }
        }
        let differ = bits[0].iter().zip(&bits[1]).filter(|(a, b)| a != b).count();
        println!("{shape:?}: {differ} of {} values differ between wgmma and mma", bits[0].len());
    }
}

/// A product that adds, a norm of its result, and two products of that; the norm is a part of the products.
struct Normed {
    hidden: usize,
    columns: usize,
    input: Vec<f32>,
    before: Vec<f32>,
    first: Vec<f32>,
    bias: Vec<f32>,
    weight: Vec<f32>,
    second: Vec<f32>,
    ups: Vec<f32>,
}

/// Features of the two products behind the norm.
const FEATURES: usize = 200;
const EPS: f32 = 1e-3;

impl Normed {
    fn new((hidden, columns): (usize, usize), rows: usize) -> Self {
        Self {
            hidden,
            columns,
            input: random(6, rows * columns),
            before: random(7, rows * hidden),
            first: random(1, hidden * columns),
            bias: random(5, hidden),
            weight: random(4, hidden),
            second: random(2, FEATURES * hidden),
            ups: random(3, FEATURES * hidden),
        }
    }

    /// The results of a row: values, and gated ones.
    fn expected(&self, row: usize) -> [Vec<f64>; 2] {
        let (hidden, columns) = (self.hidden, self.columns);
        let dot = |a: &[f32], b: &[f64]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * b).sum() };
        let operand: Vec<f64> =
            self.input[row * columns..][..columns].iter().map(|&v| f64::from(v)).collect();
        let value = |j: usize| {
            let added = dot(&self.first[j * columns..][..columns], &operand) + f64::from(self.bias[j]);
            f64::from(self.before[row * hidden + j]) + added
        };
        let values: Vec<f64> = (0..hidden).map(value).collect();
        let square = values.iter().map(|v| v * v).sum::<f64>() / hidden as f64;
        let factor = 1.0 / (square + f64::from(EPS)).sqrt();
        let normed: Vec<f64> =
            values.iter().zip(&self.weight).map(|(v, &w)| v * f64::from(w) * factor).collect();
        let product = |weights: &[f32], j: usize| dot(&weights[j * hidden..][..hidden], &normed);
        let out = (0..FEATURES).map(|j| product(&self.second, j)).collect();
        [out, (0..FEATURES).map(|j| silu_of(product(&self.second, j)) * product(&self.ups, j)).collect()]
    }

    /// Against f64 and byte for byte, at many batch sizes.
    fn check(&self, cuda: &mut Cuda, batches: &[usize]) {
        use BufferKind::{Operand, Values};
        let (hidden, columns, most) = (self.hidden, self.columns, *batches.iter().max().unwrap());
        let [x, residual, normed, out, gated] = [0, 1, 2, 3, 4].map(Buffer);
        let widths = [
            (columns, Operand),
            (hidden, Values),
            (hidden, Operand),
            (FEATURES, Values),
            (FEATURES, Operand),
        ];
        let first = matrix(cuda, hidden, columns, &self.first);
        let second = matrix(cuda, FEATURES, hidden, &self.second);
        let (raw_gate, raw_up) = (bytes(&self.second), bytes(&self.ups));
        let tensor = |raw| HostTensor::new(DType::F32, &[FEATURES, hidden], raw).unwrap();
        let gate_up = cuda.gated_matrix(&tensor(&raw_gate), &tensor(&raw_up)).unwrap();
        let (weight, bias) = (vector(cuda, &self.weight), vector(cuda, &self.bias));
        cuda.allocate(plan(&widths, NO_KV, 1, most)).unwrap();
        let mut known: Option<[Vec<f32>; 3]> = None;
        let mut batches = batches.to_vec();
        batches.sort_unstable_by(|a, b| b.cmp(a));
        for &rows in &batches {
            begin(cuda, rows);
            put(cuda, x, &self.input);
            put(cuda, residual, &self.before);
            for (buffer, width) in [(normed, hidden), (out, FEATURES), (gated, FEATURES)] {
                put(cuda, buffer, &vec![f32::NAN; most * width]);
            }
            cuda.linear_add(&first, Some(&bias), x, residual);
            cuda.rms_norm(residual, &weight, EPS, normed);
            cuda.linear(&second, None, normed, out);
            cuda.linear_silu_mul(&gate_up, normed, gated);
            assert_eq!(cuda.step.recording.commands().len(), 3, "the norm is no kernel");
            let found = [out, gated, residual].map(|buffer| take(cuda, buffer, rows));
            for row in (0..rows).step_by((rows / 5).max(1)) {
                for (found, expected) in found.iter().zip(self.expected(row)) {
                    let error = distance(&found[row * FEATURES..][..FEATURES], &expected);
                    assert!(error < 6e-3, "{hidden}x{columns}, row {row} of {rows}: {error}");
                }
            }
            let known = known.get_or_insert_with(|| found.clone());
            for (kind, (found, known)) in found.iter().zip(known).enumerate() {
                let differ = found.iter().zip(known).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!(
                    differ, 0,
                    "result {kind}, {hidden}x{columns}, {rows} rows: bytes depend on the batch"
                );
            }
        }
    }
}

pub(super) fn check_normed_products(cuda: &mut Cuda, shape: (usize, usize), batches: &[usize]) {
    Normed::new(shape, *batches.iter().max().unwrap()).check(cuda, batches);
}

#[test]
fn norms_are_parts_of_their_products() {
    let few = [1, 2, 7, 8, 9, 17, 33, 64, 65, 127, 128, 129, 200, 256, 257, 300, 700];
    for shape in [(64, 72), (200, 104), (576, 576), (1024, 2048), (4096, 1536)] {
        for set in [KernelSet::Own, KernelSet::Portable] {
            let Some(mut cuda) = open(set) else { return };
            check_normed_products(&mut cuda, shape, &few);
        }
    }
    let Some(mut cuda) = open(KernelSet::Own) else { return };
    check_normed_products(&mut cuda, (1024, 3072), &[1, 300, 5000]);
    let Some(mut cuda) = open(KernelSet::Own) else { return };
    check_normed_products(&mut cuda, (4096, 1024), &[1, 300, 3000]);
}
