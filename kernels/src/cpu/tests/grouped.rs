//! Matrices of codes: their products against the weights that the codes stand for, and against themselves.

use std::borrow::Cow;

use super::*;
use crate::coded::{CodeKind, Coded, Zeros};

/// Random codes of a kind with scales for groups of this many columns.
fn coded(seed: u64, kind: CodeKind, (rows, columns): (usize, usize), group: usize) -> Coded<'static> {
    let row_bytes = kind.row_bytes(columns);
    let byte = |at| (uniform(seed, at as u32) * 256.0) as u8;
    let groups = columns.div_ceil(group);
    let mut codes: Vec<u8> = (0..rows * row_bytes).map(byte).collect();
    if kind == CodeKind::E4m3 {
        // None that is not a number.
        codes.iter_mut().for_each(|code| *code = if *code & 0x7F == 0x7F { 0x38 } else { *code });
    }
    let sized = |at| 0.001 + uniform(seed + 1, at as u32) as f32 * 0.01;
    let zeros = match kind {
        CodeKind::Uint4 => {
            Zeros::Each((0..rows * groups).map(|at| (uniform(seed + 2, at as u32) * 17.0) as i16).collect())
        }
        CodeKind::Uint8 => Zeros::Same(128),
        _ => Zeros::Same(0),
    };
    Coded {
        kind,
        rows,
        columns,
        codes: Cow::Owned(codes),
        row_bytes,
        block: (1, group),
        scales: (0..rows * groups).map(sized).collect(),
        zeros,
        order: Vec::new(),
    }
}

/// Kinds with sizes of groups; the last two are not kept, but packed by their values.
const CASES: [(CodeKind, usize); 9] = [
    (CodeKind::Uint4, 128),
    (CodeKind::Uint4, 32),
    (CodeKind::Uint4, 640),
    (CodeKind::E2m1, 16),
    (CodeKind::E2m1, 32),
    (CodeKind::Int8, 640),
    (CodeKind::Uint8, 640),
    (CodeKind::Uint8, 128),
    (CodeKind::E4m3, 128),
];

const COLUMNS: usize = 640;

/// Loads, allocates and multiplies rows; gives each row's values.
fn products(cpu: &mut Cpu, matrix: &Matrix, inputs: &[f32]) -> Vec<Vec<f32>> {
    let rows = inputs.len() / COLUMNS;
    begin(cpu, rows);
    for (row, input) in inputs.chunks_exact(COLUMNS).enumerate() {
        values(cpu, Buffer(0), row).copy_from_slice(input);
    }
    cpu.round(Buffer(0), Buffer(1));
    cpu.linear(matrix, None, Buffer(1), Buffer(2));
    (0..rows).map(|row| values(cpu, Buffer(2), row).to_vec()).collect()
}

fn allocated(cpu: &mut Cpu, features: usize) {
    use BufferKind::{Operand, Values};
    cpu.allocate(plan(&[(COLUMNS, Values), (COLUMNS, Operand), (features, Values)], NO_KV)).unwrap();
}

#[test]
fn products_of_codes_are_right_and_do_not_depend_on_the_number_of_rows() {
    let (features, rows) = (83, 40);
    let inputs = random(7, rows * COLUMNS);
    for isa in isas() {
        for precision in [Precision::Bf16, Precision::Int8] {
            for (kind, group) in CASES {
                // Two parts, as queries and keys are stacked.
                let parts = [(51, 3), (32, 9)].map(|(rows, seed)| coded(seed, kind, (rows, COLUMNS), group));
                let tensors = parts.clone().map(|part| HostTensor::coded(part).unwrap());
                let mut cpu = cpu(isa, precision);
                let matrix = cpu.matrix(&tensors).unwrap();
                allocated(&mut cpu, features);
                let together = products(&mut cpu, &matrix, &inputs);
                let mut weights = vec![0.0; COLUMNS];
                for feature in 0..features {
                    let (part, row) =
                        if feature < 51 { (&parts[0], feature) } else { (&parts[1], feature - 51) };
                    part.read(row, 0, &mut weights);
                    let size: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
                    for (row, together) in together.iter().enumerate() {
                        let input = &inputs[row * COLUMNS..][..COLUMNS];
                        let expected: f64 =
                            input.iter().zip(&weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                        let found = f64::from(together[feature]);
                        // Rows in 8 bits are off by up to 1/254 of their greatest each.
                        assert!(
                            (found - expected).abs() <= size * 0.04,
                            "{isa} {precision:?} {kind:?} {group} ({row}, {feature}): {found} for {expected}"
                        );
                    }
                }
                for some in [1, 2, 3, 4, 5, 12, 17] {
                    let alone = products(&mut cpu, &matrix, &inputs[..some * COLUMNS]);
                    assert_eq!(
                        alone[..],
                        together[..some],
                        "{isa} {precision:?} {kind:?} {group} {some} rows"
                    );
                }
                let mut read = vec![0.0; COLUMNS];
                matrix.read_row(60, &mut read);
                parts[1].read(9, 0, &mut weights);
                let greatest = weights.iter().fold(0.0_f32, |greatest, weight| greatest.max(weight.abs()));
                let far = |(a, b): (&f32, &f32)| (a - b).abs() > 5e-3 * greatest;
                assert!(!read.iter().zip(&weights).any(far), "{isa} {kind:?} row");
            }
        }
    }
}

/// All instruction sets give the same bytes, for sums are whole numbers within a group and added in one order.
#[test]
fn products_of_kept_codes_are_the_same_with_all_instructions() {
    let inputs = random(11, 6 * COLUMNS);
    for (kind, group) in &CASES[..7] {
        let mut seen: Option<Vec<Vec<f32>>> = None;
        for isa in isas() {
            let mut cpu = cpu(isa, Precision::Int8);
            let matrix =
                cpu.matrix(&[HostTensor::coded(coded(5, *kind, (40, COLUMNS), *group)).unwrap()]).unwrap();
            allocated(&mut cpu, 40);
            let found = products(&mut cpu, &matrix, &inputs);
            assert_eq!(seen.get_or_insert_with(|| found.clone()), &found, "{isa} {kind:?} {group}");
        }
    }
}

/// Gate and up in 4 bits, gated into an operand that both a matrix of codes and one of floats read.
#[test]
fn gated_products_of_codes_feed_matrices_of_any_form() {
    use BufferKind::{Operand, Values};
    let (width, rows) = (40, 9);
    let gate = coded(1, CodeKind::Uint4, (width, COLUMNS), 128);
    let up = coded(2, CodeKind::Uint4, (width, COLUMNS), 128);
    let down = coded(3, CodeKind::Uint4, (COLUMNS, width), 8);
    let dense = random(4, 30 * width);
    let inputs = random(5, rows * COLUMNS);
    for isa in isas() {
        let mut cpu = cpu(isa, Precision::Bf16);
        let tensor = |coded: &Coded<'static>| HostTensor::coded(coded.clone()).unwrap();
        let gate_up = cpu.gated_matrix(&tensor(&gate), &tensor(&up)).unwrap();
        let codes = cpu.matrix(&[tensor(&down)]).unwrap();
        let floats = load(&mut cpu, 30, width, &dense);
        let widths =
            [(COLUMNS, Values), (COLUMNS, Operand), (width, Operand), (COLUMNS, Values), (30, Values)];
        cpu.allocate(plan(&widths, NO_KV)).unwrap();
        begin(&mut cpu, rows);
        for row in 0..rows {
            values(&mut cpu, Buffer(0), row).copy_from_slice(&inputs[row * COLUMNS..][..COLUMNS]);
        }
        cpu.round(Buffer(0), Buffer(1));
        cpu.linear_silu_mul(&gate_up, Buffer(1), Buffer(2));
        cpu.linear(&codes, None, Buffer(2), Buffer(3));
        cpu.linear(&floats, None, Buffer(2), Buffer(4));
        let dot = |coded: &Coded<'_>, row: usize, x: &[f64]| -> f64 {
            let mut weights = vec![0.0; coded.columns];
            coded.read(row, 0, &mut weights);
            weights.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()
        };
        for row in 0..rows {
            let x: Vec<f64> = inputs[row * COLUMNS..][..COLUMNS].iter().map(|&x| f64::from(x)).collect();
            let gated: Vec<f64> = (0..width)
                .map(|feature| {
                    let gate = dot(&gate, feature, &x);
                    gate / (1.0 + (-gate).exp()) * dot(&up, feature, &x)
                })
                .collect();
            let size = gated.iter().map(|x| x * x).sum::<f64>().sqrt();
            for feature in 0..30 {
                let weights = &dense[feature * width..][..width];
                let expected: f64 = weights.iter().zip(&gated).map(|(&w, x)| f64::from(w) * x).sum();
                let found = f64::from(values(&mut cpu, Buffer(4), row)[feature]);
                assert!((found - expected).abs() < 0.1 * size + 1e-4, "{isa} floats: {found} for {expected}");
                let expected = dot(&down, feature, &gated);
                let found = f64::from(values(&mut cpu, Buffer(3), row)[feature]);
                assert!((found - expected).abs() < 0.02 * size + 1e-4, "{isa} codes: {found} for {expected}");
            }
        }
    }
}
