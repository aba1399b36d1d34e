//! The 8-bit float e4m3 of the Open Compute Project (OCP 8-bit floating point, revision 1.0; also called e4m3fn).
//!
//! One sign, four exponent bits with bias 7, three mantissa bits. The greatest value is 448; there is no infinity,
//! and 0x7f and 0xff are not numbers. Rounding is to nearest, ties to even, and saturates, as `cvt.rn.satfinite` of
//! PTX does. Both directions are branch-free, so that loops over them become vector instructions.

/// The greatest finite value.
pub const GREATEST: f32 = 448.0;
/// The code of what is not a number, without its sign.
pub const NAN: u8 = 0x7F;
/// Least value with a full mantissa, 2^-6. Below it, codes are multiples of 2^-9.
const LEAST_NORMAL: f32 = 0.015_625;
/// Adding 2^14 leaves a multiple of 2^-9 in the low bits of the sum, rounded to nearest even.
const ROUND_TO_STEP: f32 = 16_384.0;
/// Mantissa bits of f32 that e4m3 lacks.
const DROPPED_BITS: u32 = 23 - 3;
/// Difference of the exponents' biases.
const BIAS: u32 = 127 - 7;

/// The code nearest to a value. Beyond 448, infinity included, it is that of 448; what is not a number stays so.
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    let magnitude = value.abs();
    let clamped = if magnitude > GREATEST { GREATEST } else { magnitude };
    let bits = clamped.to_bits();
    let half = (1 << (DROPPED_BITS - 1)) - 1 + ((bits >> DROPPED_BITS) & 1);
    let normal = (bits.wrapping_add(half) >> DROPPED_BITS).wrapping_sub(BIAS << 3);
    let subnormal = (clamped + ROUND_TO_STEP).to_bits() & 0xF;
    let code = if clamped < LEAST_NORMAL { subnormal } else { normal };
    let code = if magnitude.is_nan() { u32::from(NAN) } else { code };
    (code | (value.to_bits() >> 24 & 0x80)) as u8
}

/// The value of a code, exactly.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7F));
    // A subnormal m is 2^-6 * (1 + m / 8) less 2^-6: no subnormal of f32 is touched, which some processors are slow at.
    let subnormal = magnitude < 8;
    let exponent = BIAS + u32::from(subnormal);
    let normal = f32::from_bits((magnitude << DROPPED_BITS) + (exponent << 23));
    let value = normal - if subnormal { LEAST_NORMAL } else { 0.0 };
    let value = if magnitude == u32::from(NAN) { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: `(-1)^s * 2^(e - 7) * (1 + m / 8)`, or `2^-6 * m / 8` where e is 0.
    fn defined(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 0xF), f64::from(code & 7));
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => mantissa / 8.0 * 2_f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2_f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// The nearest code by search, the even one of two that are equally near.
    fn nearest(value: f32) -> u8 {
        if value.is_nan() {
            return NAN | (value.to_bits() >> 24 & 0x80) as u8;
        }
        let distance = |code: u8| (defined(code) - f64::from(value.abs()).min(f64::from(GREATEST))).abs();
        let better = |a: u8, b: u8| {
            let (near, far) = (distance(a), distance(b));
            if near < far || (near == far && a.is_multiple_of(2)) { a } else { b }
        };
        (0..NAN).reduce(better).unwrap() | (value.to_bits() >> 24 & 0x80) as u8
    }

    #[test]
    fn all_codes_have_their_values() {
        for code in 0..=u8::MAX {
            let (found, expected) = (decode(code), defined(code));
            if expected.is_nan() {
                assert!(found.is_nan(), "{code:#04x}");
            } else {
                assert_eq!(f64::from(found), expected, "{code:#04x}");
                assert_eq!(found.is_sign_negative(), code & 0x80 != 0, "{code:#04x}");
                assert_eq!(encode(found), code, "the value of a code rounds to it");
            }
        }
        assert_eq!((decode(0x7E), decode(0x01), decode(0x08)), (GREATEST, 1.0 / 512.0, LEAST_NORMAL));
    }

    /// Every value of 16 bits, and around each border between two codes the values next to it.
    #[test]
    fn rounding_is_to_the_nearest_code_ties_to_even() {
        let wide = (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16));
        let borders = (0..NAN - 1).map(|code| ((defined(code) + defined(code + 1)) / 2.0) as f32);
        let beside = borders.flat_map(|border| [border, border.next_up(), border.next_down()]);
        let beside = beside.flat_map(|value| [value, -value]);
        for value in wide.chain(beside).chain([447.9, 448.1, 463.9, 464.0, 465.0, 1e30, f32::INFINITY]) {
            assert_eq!(encode(value), nearest(value), "{value:e}");
        }
        assert_eq!((encode(f32::INFINITY), encode(f32::NEG_INFINITY)), (0x7E, 0xFE));
        assert_eq!((encode(1e-30), encode(-0.0)), (0, 0x80));
    }
}
