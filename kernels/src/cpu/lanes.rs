//! Row arithmetic in portable Rust over sixteen lanes, compiled once per instruction set.
//!
//! Only exactly defined operations in a fixed order (fused where the source says so, nothing reassociated), so
//! all forms compute the same bytes. A value that is not a number stays one.

use crate::isa::Isa;

use super::tile::LANES;

/// Compiles a body for each instruction set and makes the function that chooses.
macro_rules! versions {
    ($(#[$doc:meta])* $public:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) = $body:ident;) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $public fn $name(isa: Isa, $($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($argument: $type),*) {
                    $body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($argument: $type),*) {
                    $body($($argument),*)
                }
                match isa {
                    Isa::Scalar => {}
                    // SAFETY: an `Isa` in use is one that the processor has.
                    Isa::Avx2 => return unsafe { avx2($($argument),*) },
                    // SAFETY: as above; the wider forms imply these features.
                    _ => return unsafe { avx512($($argument),*) },
                }
            }
            let _ = isa;
            $body($($argument),*)
        }
    };
}
pub(super) use versions;

/// Asks for memory to be brought near, to be read soon. Any place will do: nothing is read.
#[inline]
pub fn prefetch(start: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, bytes);
}

/// Nearest bf16, ties to even; a value that is not a number stays one.
#[inline(always)]
pub fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

/// The value of bf16 bits.
#[inline(always)]
pub fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Nearest f16, ties to even, infinity from 65,520 on; a value that is not a number stays one.
#[inline(always)]
pub fn f16_bits(value: f32) -> u16 {
    /// 2^-14: below it halves lie evenly apart.
    const LEAST_NORMAL: u32 = 113 << 23;
    /// 65,520.
    const OVER: u32 = 0x477F_F000;
    let bits = value.to_bits();
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7FFF_FFFF);
    // Adding 1/2, whose last place is 2^-24, rounds to a multiple of that and leaves it in the low bits.
    let even = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xFFF + (magnitude >> 13 & 1)) >> 13;
    let finite = if magnitude < LEAST_NORMAL { even } else { normal };
    let bounded = if magnitude < OVER { finite } else { 0x7C00 };
    (sign | if value.is_nan() { 0x7E00 } else { bounded }) as u16
}

/// The power of two that takes values to below `top`, itself one, and to half of it if that can be, with its inverse:
/// value = scaled * power. The power is no number if a value is none, or over 2^123.
#[inline(always)]
pub fn binary_scale(values: &[f32], top: f32) -> (f32, f32) {
    // As integers the bits of absolute values order like the values, with infinity and then everything that
    // is not a number on top.
    let greatest = values.iter().fold(0_u32, |greatest, value| greatest.max(value.to_bits() & 0x7FFF_FFFF));
    let power = |exponent: u32| f32::from_bits(exponent << 23);
    // Of the power of two above the greatest; of rows below 2^-100 it is that, whose inverse f32 still holds.
    let exponent = (greatest >> 23).max(26) + 1;
    if exponent > 250 { (f32::NAN, 0.0) } else { (power(exponent) / top, power(254 - exponent) * top) }
}

/// 2^x to 2 units in the last place; 0 below -126, infinity from 127.5 on. Range reduction to halves and a minimax
/// polynomial of degree 5 (Remez, relative error 7.5e-8).
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum.
    let clamped = if x > 128.0 { 128.0 } else { x };
    let shifted = clamped + ROUND;
    let r = clamped - (shifted - ROUND);
    let mut p = 1.327_647_2e-3_f32;
    p = p.mul_add(r, 9.675_541e-3);
    p = p.mul_add(r, 5.550_713e-2);
    p = p.mul_add(r, 2.402_212e-1);
    p = p.mul_add(r, 6.931_469_4e-1);
    p = p.mul_add(r, 1.0);
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -126.0 { 0.0 } else { p * power }
}

/// `lanes *= factor`.
#[inline(always)]
pub fn multiply(lanes: &mut [f32; LANES], factor: f32) {
    for lane in lanes {
        *lane *= factor;
    }
}

/// `cap * tanh(lane / cap)`, to 1.2e-7 of the cap; what is no number or infinite stays.
#[inline(always)]
pub fn cap(lanes: &mut [f32], cap: f32) {
    let rate = 2.0 * std::f32::consts::LOG2_E / cap;
    for lane in lanes {
        let capped = cap - 2.0 * cap / (1.0 + exp2(*lane * rate));
        *lane = if lane.is_infinite() { *lane } else { capped };
    }
}

/// Sum of lanes in a fixed tree.
#[inline(always)]
pub fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Greatest of lanes; ignores values that are not numbers.
#[inline(always)]
pub fn maximum(lanes: &[f32; LANES]) -> f32 {
    let mut greatest = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let (a, b) = (greatest[lane], greatest[lane + width]);
            greatest[lane] = if b > a { b } else { a };
        }
        width /= 2;
    }
    greatest[0]
}

#[inline(always)]
fn squares(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane] * chunk[lane];
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        sums[lane] += value * value;
    }
    sum(sums)
}

#[inline(always)]
fn norm_body(values: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = 1.0 / (squares(values) / values.len() as f32 + eps).sqrt();
    for ((out, value), weight) in out.iter_mut().zip(values).zip(weight) {
        *out = value * factor * weight;
    }
}

versions! {
    /// `out = values / sqrt(mean(values^2) + eps) * weight`.
    pub fn norm(values: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = norm_body;
}

#[inline(always)]
fn norm_in_place_body(values: &mut [f32], weight: &[f32], eps: f32) {
    let factor = 1.0 / (squares(values) / values.len() as f32 + eps).sqrt();
    for (value, weight) in values.iter_mut().zip(weight) {
        *value = *value * factor * weight;
    }
}

versions! {
    /// [`norm`] over the values themselves.
    pub fn norm_in_place(values: &mut [f32], weight: &[f32], eps: f32) = norm_in_place_body;
}

#[inline(always)]
fn norm_bf16_body(values: &[f32], weight: &[f32], eps: f32, out: &mut [u16]) {
    let factor = 1.0 / (squares(values) / values.len() as f32 + eps).sqrt();
    for ((out, value), weight) in out.iter_mut().zip(values).zip(weight) {
        *out = bf16_bits(value * factor * weight);
    }
}

versions! {
    /// [`norm`], rounded to bf16.
    pub fn norm_bf16(values: &[f32], weight: &[f32], eps: f32, out: &mut [u16]) = norm_bf16_body;
}

#[inline(always)]
fn to_bf16_body(values: &[f32], out: &mut [u16]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = bf16_bits(value);
    }
}

versions! {
    /// Rounds to bf16.
    pub fn to_bf16(values: &[f32], out: &mut [u16]) = to_bf16_body;
}

#[inline(always)]
fn quantise_body(values: &[f32], out: &mut [u8], scale: &mut f32) {
    // As integers the bits of absolute values order like the values, with infinity and then everything that
    // is not a number on top.
    let greatest = values.iter().fold(0_u32, |greatest, value| greatest.max(value.to_bits() & 0x7FFF_FFFF));
    let greatest = f32::from_bits(greatest);
    // A row that is not numbers must stay so: it fails alone, at sampling.
    *scale = if greatest.is_finite() { greatest / 127.0 } else { f32::NAN };
    let inverse = 127.0 / greatest;
    let inverse = if inverse.is_finite() && greatest.is_finite() { inverse } else { 0.0 };
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits; 128 is the offset.
    let code = |value: f32| (value * inverse + 12_582_912.0).to_bits().wrapping_add(128) as u8;
    for (out, &value) in out.iter_mut().zip(values) {
        *out = code(value);
    }
}

versions! {
    /// Quantises a row to codes around 128 and a scale.
    pub fn quantise(values: &[f32], out: &mut [u8], scale: &mut f32) = quantise_body;
}

#[inline(always)]
fn scale_to_f16_body(values: &[f32], (factor, out): (f32, &mut [u16])) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = f16_bits(value * factor);
    }
}

versions! {
    /// As [`scale_to_f16`], in portable Rust.
    fn scale_to_f16_portable(values: &[f32], out: (f32, &mut [u16])) = scale_to_f16_body;
}

/// Sixteen at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn scale_to_f16_avx512(values: &[f32], (factor, out): (f32, &mut [u16])) {
    use std::arch::x86_64::*;
    let (values, values_rest) = values.as_chunks::<LANES>();
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for (values, out) in values.iter().zip(out) {
        // SAFETY: the chunks have the size of what is loaded and stored.
        unsafe {
            let scaled = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), _mm512_set1_ps(factor));
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scaled);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), halves);
        }
    }
    scale_to_f16_body(values_rest, (factor, out_rest));
}

/// Products of values and a factor, rounded to f16.
pub fn scale_to_f16(isa: Isa, values: &[f32], factor: f32, out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: an `Isa` in use is one that the processor has.
        return unsafe { scale_to_f16_avx512(values, (factor, out)) };
    }
    scale_to_f16_portable(isa, values, (factor, out));
}

#[inline(always)]
fn binary_scale_body(values: &[f32], top: f32, scale: &mut (f32, f32)) {
    *scale = binary_scale(values, top);
}

versions! {
    /// The scale of [`binary_scale`], and its inverse.
    fn row_scale(values: &[f32], top: f32, scale: &mut (f32, f32)) = binary_scale_body;
}

/// Rounds a row to halves below `top` and a power of two, which makes values of them.
pub fn to_f16(isa: Isa, values: &[f32], top: f32, out: &mut [u16], scale: &mut f32) {
    let mut scales = (0.0, 0.0);
    row_scale(isa, values, top, &mut scales);
    *scale = scales.0;
    scale_to_f16(isa, values, scales.1, out);
}

#[inline(always)]
fn turn_body(head: &mut [f32], table: &[f32]) {
    let half = table.len() / 2;
    let (cosines, sines) = table.split_at(half);
    let (first, rest) = head.split_at_mut(half);
    let second = &mut rest[..half];
    for index in 0..half {
        let (a, b) = (first[index], second[index]);
        first[index] = a * cosines[index] - b * sines[index];
        second[index] = b * cosines[index] + a * sines[index];
    }
}

versions! {
    /// Rotary embedding of a head by a row of cosines and sines.
    pub fn turn(head: &mut [f32], table: &[f32]) = turn_body;
}

#[inline(always)]
fn scale_body(values: &mut [[f32; LANES]], factor: f32) {
    for values in values {
        multiply(values, factor);
    }
}

versions! {
    /// `values *= factor`.
    pub fn scale(values: &mut [[f32; LANES]], factor: f32) = scale_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_close() {
        let mut x = -126.0_f32;
        while x < 127.4 {
            let exact = f64::from(x).exp2();
            let error = (f64::from(exp2(x)) - exact).abs();
            assert!(error <= 2.4e-7 * exact, "2^{x}: relative error {}", error / exact);
            x += 0.0137;
        }
        for whole in -126..128 {
            assert_eq!(exp2(whole as f32), (whole as f32).exp2());
        }
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2(-126.1), 0.0);
        assert_eq!(exp2(128.0), f32::INFINITY);
        assert_eq!(exp2(1e30), f32::INFINITY);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_to_even() {
        for value in [0.0_f32, -0.0, 1.0, 1.003_906_3, 1.011_718_8, -2.5, 3.4e38, 1e-40, f32::INFINITY] {
            assert_eq!(bf16_bits(value), half::bf16::from_f32(value).to_bits(), "{value}");
        }
        assert!(bf16_value(bf16_bits(f32::NAN)).is_nan());
        assert!(bf16_value(bf16_bits(f32::from_bits(0x7F80_0001))).is_nan());
    }

    #[test]
    fn halves_are_the_nearest() {
        // Every half, its neighbours among the f32, and the points between two halves.
        for bits in 0..=u16::MAX {
            let value = half::f16::from_bits(bits).to_f32();
            let middle = (value + half::f16::from_bits(bits.wrapping_add(1)).to_f32()) / 2.0;
            for value in [value, middle] {
                for value in [value, value.next_up(), value.next_down()] {
                    let found = half::f16::from_bits(f16_bits(value));
                    let nearest = half::f16::from_f32(value);
                    assert!(found == nearest || found.is_nan() && value.is_nan(), "{found} for {value}");
                    assert!(value.is_nan() || found.is_sign_negative() == value.is_sign_negative());
                }
            }
        }
        for value in [f32::MAX, f32::INFINITY, 1e6, f32::MIN_POSITIVE, 1e-40, 65519.9, 65520.0] {
            for value in [value, -value] {
                assert_eq!(f16_bits(value), half::f16::from_f32(value).to_bits(), "{value}");
            }
        }
    }

    #[test]
    fn rows_of_halves_lie_below_the_top() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for exponent in -99..123 {
                let size = 2.0_f32.powi(exponent);
                let values: Vec<f32> = (0..70).map(|index| (index as f32 * 0.7).sin() * size).collect();
                let (mut halves, mut scale) = (vec![0; 70], 0.0);
                to_f16(isa, &values, 16.0, &mut halves, &mut scale);
                let found: Vec<f32> =
                    halves.iter().map(|&bits| half::f16::from_bits(bits).to_f32()).collect();
                let greatest = found.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
                assert!((8.0..=16.0).contains(&greatest), "{greatest} at 2^{exponent}");
                for (found, value) in found.iter().zip(&values) {
                    assert!(
                        (found * scale - value).abs() <= size * 5e-4,
                        "{isa} {found} * {scale} for {value}"
                    );
                }
            }
            let (mut halves, mut scale) = ([1; 2], f32::NAN);
            to_f16(isa, &[0.0, -0.0], 16.0, &mut halves, &mut scale);
            assert!(halves.map(|half| half & 0x7FFF) == [0; 2] && scale.is_finite());
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                to_f16(isa, &[1.0, poison], 16.0, &mut halves, &mut scale);
                assert!(scale.is_nan());
            }
        }
    }

    #[test]
    fn quantised_rows() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut values: Vec<f32> = (0..70).map(|index| (index as f32 * 0.7).sin() * 3.0).collect();
            let (mut codes, mut scale) = (vec![0; 70], 0.0);
            quantise(isa, &values, &mut codes, &mut scale);
            for (code, value) in codes.iter().zip(&values) {
                let back = (f32::from(*code) - 128.0) * scale;
                assert!((back - value).abs() <= scale * 0.501, "{back} for {value}");
            }
            quantise(isa, &[0.0; 70], &mut codes, &mut scale);
            assert!(scale == 0.0 && codes.iter().all(|&code| code == 128));
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[69] = poison;
                quantise(isa, &values, &mut codes, &mut scale);
                assert!(scale.is_nan());
            }
        }
    }
}
