//! Matrix products in every form.

use super::*;

/// Relative error that a precision may have against exact arithmetic, on random operands.
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-5,
        Precision::Bf16 => 1e-2,
        Precision::Int8 => 3e-2,
    }
}

/// Products of all shapes around the edges of tiles, poisoned outputs, bias and addition.
fn check_linear(isa: Isa, precision: Precision, (rows, columns, features): (usize, usize, usize)) {
    use BufferKind::{Operand, Values};
    let mut cpu = cpu(isa, precision);
    let (x, operand, out) = (Buffer(0), Buffer(1), Buffer(2));
    cpu.allocate(plan(&[(columns, Values), (columns, Operand), (features, Values)], NO_KV)).unwrap();
    begin(&mut cpu, rows);
    let weights = random(1, features * columns);
    let matrix = load(&mut cpu, features, columns, &weights);
    let (ones, bias) = (vec![1.0; columns], random(3, features));
    let (ones, bias_vector) = (vector(&mut cpu, &ones), vector(&mut cpu, &bias));
    let inputs = random(2, rows * columns);
    for row in 0..rows {
        values(&mut cpu, x, row).copy_from_slice(&inputs[row * columns..][..columns]);
        values(&mut cpu, out, row).fill(f32::NAN);
    }
    cpu.rms_norm(x, &ones, 1e-6, operand);
    cpu.linear(&matrix, Some(&bias_vector), operand, out);
    cpu.linear_add(&matrix, None, operand, out);
    for row in 0..rows {
        let input = &inputs[row * columns..][..columns];
        let square: f64 = input.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / columns as f64;
        for feature in 0..features {
            let weights = &weights[feature * columns..][..columns];
            let products = input.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let expected = 2.0 * products.sum::<f64>() / (square + 1e-6).sqrt() + f64::from(bias[feature]);
            let found = f64::from(values(&mut cpu, out, row)[feature]);
            let bound = tolerance(precision) * (columns as f64).sqrt() * 2.0;
            assert!(
                (found - expected).abs() <= bound,
                "{isa} {precision:?} {rows}x{columns}x{features} at ({row}, {feature}): {found} for {expected}"
            );
        }
    }
}

#[test]
fn products_are_right() {
    for isa in isas() {
        for precision in PRECISIONS {
            for rows in [1, 2, 5, 6, 7, 12, 13, 25, 64] {
                check_linear(isa, precision, (rows, 50, 49));
            }
            for (columns, features) in [(1, 1), (3, 16), (64, 33), (576, 80), (101, 130)] {
                check_linear(isa, precision, (3, columns, features));
            }
        }
    }
}

/// A row's product has the same bytes alone and among many, with every number of rows in a tile.
#[test]
fn products_do_not_depend_on_the_number_of_rows() {
    use BufferKind::{Operand, Values};
    let (columns, features, rows) = (700, 49, 80);
    for isa in isas() {
        for precision in PRECISIONS {
            let mut cpu = cpu(isa, precision);
            cpu.allocate(plan(&[(columns, Values), (columns, Operand), (features, Values)], NO_KV)).unwrap();
            let matrix = load(&mut cpu, features, columns, &random(1, features * columns));
            let ones = vector(&mut cpu, &vec![1.0; columns]);
            let inputs = random(2, rows * columns);
            let mut product = |inputs: &[f32]| {
                begin(&mut cpu, inputs.len() / columns);
                for (row, input) in inputs.chunks_exact(columns).enumerate() {
                    values(&mut cpu, Buffer(0), row).copy_from_slice(input);
                }
                cpu.rms_norm(Buffer(0), &ones, 1e-6, Buffer(1));
                cpu.linear(&matrix, None, Buffer(1), Buffer(2));
                let rows = 0..inputs.len() / columns;
                rows.map(|row| values(&mut cpu, Buffer(2), row).to_vec()).collect::<Vec<_>>()
            };
            let together = product(&inputs);
            for (row, together) in together.iter().enumerate() {
                let alone = product(&inputs[row * columns..][..columns]);
                assert_eq!(&alone[0], together, "{isa} {precision:?} row {row}");
            }
        }
    }
}
