//! Keys and values in 8 bits: from values into a block's slot, and from a block into what attention multiplies.
//!
//! The elements lie in the order of the wide forms, a byte each, so that a block is widened front to back. Invariant:
//! every form gives the bits of [`e4m3::encode`] and [`e4m3::decode`], so the bytes of a row depend on no form.

use super::lanes::{bf16_bits, versions};
use crate::e4m3;
use crate::isa::Isa;
use crate::ops::BLOCK_TOKENS;

#[inline(always)]
fn to_f32_body(codes: &[u8], out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = e4m3::decode(code);
    }
}

versions! {
    /// Values of codes.
    pub fn to_f32(codes: &[u8], out: &mut [f32]) = to_f32_body;
}

#[inline(always)]
fn to_bf16_body(codes: &[u8], out: &mut [u16]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = bf16_bits(e4m3::decode(code));
    }
}

versions! {
    /// Values of codes as bf16, in portable Rust; bf16 holds each of them exactly.
    fn to_bf16_portable(codes: &[u8], out: &mut [u16]) = to_bf16_body;
}

/// Values of codes as bf16, which holds each of them exactly.
pub fn to_bf16(isa: Isa, codes: &[u8], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: an `Isa` in use is one that the processor has.
        return unsafe { avx512::to_bf16(codes, out) };
    }
    to_bf16_portable(isa, codes, out);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::to_bf16_body;

    /// Codes of one register of bf16.
    const CODES: usize = 32;

    /// bf16 of the codes -1 to 7, the subnormals and, as code -1 (0x7f plus one is 0 in seven bits), what is not a
    /// number.
    const SPECIAL: [i16; CODES] = {
        let mut table = [0; CODES];
        table[0] = 0x7FC0;
        table[2] = 0x3B00;
        table[3] = 0x3B80;
        table[4] = 0x3BC0;
        table[5] = 0x3C00;
        table[6] = 0x3C20;
        table[7] = 0x3C40;
        table[8] = 0x3C60;
        table
    };

    /// Thirty-two at a time: exponent and mantissa move into place and the bias is added; the nine magnitudes for
    /// which that is wrong come out of a table.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub fn to_bf16(codes: &[u8], out: &mut [u16]) {
        let (codes, codes_rest) = codes.as_chunks::<CODES>();
        let (out, out_rest) = out.as_chunks_mut::<CODES>();
        // SAFETY: the table and the chunks have the size of what is loaded and stored.
        unsafe {
            let special = _mm512_loadu_si512(SPECIAL.as_ptr().cast());
            for (codes, out) in codes.iter().zip(out) {
                let code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.as_ptr().cast()));
                let magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7F));
                let place =
                    _mm512_and_si512(_mm512_add_epi16(code, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7F));
                let is_special = _mm512_cmple_epu16_mask(place, _mm512_set1_epi16(8));
                let normal = _mm512_add_epi16(_mm512_slli_epi16::<4>(magnitude), _mm512_set1_epi16(120 << 7));
                let value = _mm512_mask_permutexvar_epi16(normal, is_special, place, special);
                let sign = _mm512_slli_epi16::<8>(_mm512_andnot_si512(_mm512_set1_epi16(0x7F), code));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(value, sign));
            }
        }
        to_bf16_body(codes_rest, out_rest);
    }
}

/// A key and a value on their way into the slot of a block.
#[derive(Clone, Copy)]
pub struct KvEntry<'a> {
    /// `head_dim` elements.
    pub key: &'a [f32],
    /// `head_dim` elements.
    pub value: &'a [f32],
    /// One over the scales of keys and values.
    pub inverse_scales: (f32, f32),
    /// 0 to 15.
    pub slot: usize,
}

/// Writes an entry in the order of f32 blocks: keys `[dim][16]`, and of the values `[dim]` of the slot.
#[inline(always)]
fn write_single_body(entry: KvEntry<'_>, keys: &mut [u8], values: &mut [u8]) {
    for (&key, group) in entry.key.iter().zip(keys.as_chunks_mut::<BLOCK_TOKENS>().0) {
        group[entry.slot] = e4m3::encode(key * entry.inverse_scales.0);
    }
    for (&value, out) in entry.value.iter().zip(values) {
        *out = e4m3::encode(value * entry.inverse_scales.1);
    }
}

versions! {
    /// Rounds a key and a value into their slot, in the order of blocks in f32: of the keys `[dim][16]` of a block,
    /// and of the values `[dim]` of the slot.
    pub fn write_single(entry: KvEntry<'_>, keys: &mut [u8], values: &mut [u8]) = write_single_body;
}

#[inline(always)]
fn write_paired_body(entry: KvEntry<'_>, keys: &mut [u8], values: &mut [u8]) {
    let (slot, (key_factor, value_factor)) = (entry.slot, entry.inverse_scales);
    let groups = keys.as_chunks_mut::<{ 2 * BLOCK_TOKENS }>().0;
    for (pair, group) in entry.key.as_chunks::<2>().0.iter().zip(groups) {
        group[2 * slot] = e4m3::encode(pair[0] * key_factor);
        group[2 * slot + 1] = e4m3::encode(pair[1] * key_factor);
    }
    for (&value, pair) in entry.value.iter().zip(values.as_chunks_mut::<2>().0) {
        pair[slot % 2] = e4m3::encode(value * value_factor);
    }
}

versions! {
    /// The same in the order of blocks in bf16: of the keys `[dim / 2][16][2]` of a block, and of the values
    /// `[dim][2]` of the slot and its neighbour.
    pub fn write_paired(entry: KvEntry<'_>, keys: &mut [u8], values: &mut [u8]) = write_paired_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_widens_every_code_exactly() {
        // An odd length, so that each form has a rest.
        let codes: Vec<u8> = (0..=u8::MAX).chain(0..=u8::MAX).skip(3).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let (mut wide, mut narrow) = (vec![0.0; codes.len()], vec![0; codes.len()]);
            to_f32(isa, &codes, &mut wide);
            to_bf16(isa, &codes, &mut narrow);
            for ((&code, wide), narrow) in codes.iter().zip(wide).zip(narrow) {
                let expected = e4m3::decode(code);
                assert_eq!(wide.to_bits(), expected.to_bits(), "{isa}: {code:#04x} in f32");
                assert_eq!(narrow, half::bf16::from_f32(expected).to_bits(), "{isa}: {code:#04x} in bf16");
            }
        }
    }

    #[test]
    fn every_form_writes_the_same_slot() {
        let key: Vec<f32> = (0..70).map(|at| (at as f32 - 35.0).powi(3) * 0.01).collect();
        let value: Vec<f32> = key.iter().map(|value| 1.0 / (value + 0.7)).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for slot in [0, 1, 7, 15] {
                let entry = KvEntry { key: &key, value: &value, inverse_scales: (0.5, 4.0), slot };
                let (mut keys, mut values) = (vec![0x55; 80 * BLOCK_TOKENS], vec![0x55; 80]);
                write_single(isa, entry, &mut keys, &mut values);
                for at in 0..70 {
                    assert_eq!(keys[at * BLOCK_TOKENS + slot], e4m3::encode(key[at] * 0.5));
                    assert_eq!(values[at], e4m3::encode(value[at] * 4.0));
                }
                assert_eq!(
                    keys.iter().filter(|&&code| code != 0x55).count(),
                    70,
                    "other slots are left alone"
                );
                let (mut keys, mut values) = (vec![0x55; 80 * BLOCK_TOKENS], vec![0x55; 160]);
                write_paired(isa, entry, &mut keys, &mut values);
                for at in 0..70 {
                    let place = at / 2 * 2 * BLOCK_TOKENS + 2 * slot + at % 2;
                    assert_eq!(keys[place], e4m3::encode(key[at] * 0.5));
                    assert_eq!(values[2 * at + slot % 2], e4m3::encode(value[at] * 4.0));
                    assert_eq!(values[2 * at + 1 - slot % 2], 0x55);
                }
            }
        }
    }
}
