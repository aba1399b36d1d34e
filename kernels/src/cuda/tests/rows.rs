//! Ops on rows beyond the usual norm: factors, rounding, and what is added behind a branch.

use super::*;

const EPS: f32 = 1e-3;

#[test]
fn branches_are_normed_scaled_and_added() {
    use BufferKind::{Operand, Values};
    for width in [64, 100, 576, 4096] {
        let Some(mut cuda) = open(KernelSet::Own) else { return };
        let weight = random(2, width);
        let w = vector(&mut cuda, &weight);
        let [x, residual, rounded] = [0, 1, 2].map(Buffer);
        let widths = [(width, Values), (width, Values), (width, Operand)];
        cuda.allocate(plan(&widths, NO_KV, 1, 130)).unwrap();
        for rows in [1, 130] {
            let (branch, before) = (random(3, rows * width), random(4, rows * width));
            let started = |cuda: &mut Cuda| {
                begin(cuda, rows);
                put(cuda, x, &branch);
                put(cuda, residual, &before);
                put(cuda, rounded, &vec![f32::NAN; rows * width]);
            };
            started(&mut cuda);
            cuda.scaled_add(x, 0.22, residual);
            cuda.round(residual, rounded);
            let (scaled, operand) = (take(&mut cuda, residual, rows), take(&mut cuda, rounded, rows));
            for ((&found, &operand), (&x, &before)) in
                scaled.iter().zip(&operand).zip(branch.iter().zip(&before))
            {
                assert!((found - (before + 0.22 * x)).abs() <= 2e-7, "{found}: {before} + 0.22 * {x}");
                assert_eq!(operand, bf16::from_f32(found).to_f32());
            }
            started(&mut cuda);
            cuda.norm_add(x, &w, EPS, residual);
            let normed = take(&mut cuda, residual, rows);
            for row in 0..rows {
                let [branch, before, found] =
                    [&branch, &before, &normed].map(|all| &all[row * width..][..width]);
                let square: f64 = branch.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                let factor = 1.0 / (square + f64::from(EPS)).sqrt();
                let of =
                    |i: usize| f64::from(before[i]) + f64::from(branch[i]) * factor * f64::from(weight[i]);
                let error = distance(found, &(0..width).map(of).collect::<Vec<_>>());
                assert!(error < 1e-6, "row {row} of {width}: {error}");
            }
        }
    }
}

/// A factor on an embedding counts for the norm that is a part of its neighbours, too.
#[test]
fn embeddings_are_scaled_before_their_norm() {
    use BufferKind::{Operand, Values};
    const WIDTH: usize = 192;
    const FEATURES: usize = 64;
    let Some(mut cuda) = open(KernelSet::Own) else { return };
    let (table, weight, weights) = (random(1, 97 * WIDTH), random(2, WIDTH), random(3, FEATURES * WIDTH));
    let (t, w) = (matrix(&mut cuda, 97, WIDTH, &table), vector(&mut cuda, &weight));
    let m = matrix(&mut cuda, FEATURES, WIDTH, &weights);
    let [x, y, out] = [0, 1, 2].map(Buffer);
    cuda.allocate(plan(&[(WIDTH, Values), (WIDTH, Operand), (FEATURES, Values)], NO_KV, 1, 97)).unwrap();
    begin(&mut cuda, 97);
    cuda.embed(&t, x);
    cuda.scale(x, 12.0);
    cuda.rms_norm(x, &w, EPS, y);
    cuda.linear(&m, None, y, out);
    assert_eq!(cuda.step.recording.commands().len(), 2, "factor and norm are no kernels");
    let (embedded, found) = (take(&mut cuda, x, 97), take(&mut cuda, out, 97));
    for row in 0..97 {
        let scaled: Vec<f64> = table[row * WIDTH..][..WIDTH].iter().map(|&v| 12.0 * f64::from(v)).collect();
        let values: Vec<f64> = embedded[row * WIDTH..][..WIDTH].iter().map(|&v| f64::from(v)).collect();
        assert_eq!(values, scaled, "row {row}");
        let square: f64 = scaled.iter().map(|v| v * v).sum::<f64>() / WIDTH as f64;
        let factor = 1.0 / (square + f64::from(EPS)).sqrt();
        let product = |j: usize| -> f64 {
            let terms = scaled.iter().zip(&weight).zip(&weights[j * WIDTH..]);
            terms.map(|((v, &w), &m)| v * factor * f64::from(w) * f64::from(m)).sum()
        };
        let error =
            distance(&found[row * FEATURES..][..FEATURES], &(0..FEATURES).map(product).collect::<Vec<_>>());
        assert!(error < 6e-3, "row {row}: {error}");
    }
}
