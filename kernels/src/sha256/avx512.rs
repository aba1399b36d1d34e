//! One message in each 32-bit lane of AVX-512.

use std::arch::x86_64::*;

use super::{BLOCK_BYTES, K, State};

/// Messages at once.
pub const LANES: usize = 16;

/// Takes whole blocks of messages of one length into their states (FIPS 180-4, 6.2.2).
#[target_feature(enable = "avx512f,avx512bw")]
pub fn compress(states: &mut [State; LANES], messages: [&[u8]; LANES]) {
    let mut words = [_mm512_setzero_si512(); 8];
    for (at, words) in words.iter_mut().enumerate() {
        let column: [u32; LANES] = std::array::from_fn(|lane| states[lane][at]);
        // SAFETY: the array has the register's 64 bytes.
        *words = unsafe { _mm512_loadu_si512(column.as_ptr().cast()) };
    }
    blocks(&mut words, messages);
    for (at, words) in words.into_iter().enumerate() {
        let mut column = [0; LANES];
        // SAFETY: the array has the register's 64 bytes.
        unsafe { _mm512_storeu_si512(column.as_mut_ptr().cast(), words) };
        for (state, word) in states.iter_mut().zip(column) {
            state[at] = word;
        }
    }
}

/// The same with one register for each word of the states.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn blocks(state: &mut [__m512i; 8], messages: [&[u8]; LANES]) {
    // The bytes of big-endian words.
    let swap = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203));
    // Indices that are constants keep the words in registers.
    macro_rules! rounds {
        ($from:expr, $state:ident, $w:ident, $next:expr; $($i:literal)*) => { $(
            $w[$i] = $next([$w[$i], $w[($i + 1) % 16], $w[($i + 9) % 16], $w[($i + 14) % 16]]);
            let constant = _mm512_set1_epi32(K[$from + $i] as i32);
            $state = round($state, _mm512_add_epi32($w[$i], constant));
        )* };
    }
    for at in (0..messages[0].len()).step_by(BLOCK_BYTES) {
        let mut w = [_mm512_setzero_si512(); LANES];
        for (row, message) in w.iter_mut().zip(messages) {
            let block = &message[at..][..BLOCK_BYTES];
            // SAFETY: the block has the register's 64 bytes.
            *row = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        }
        transpose(&mut w);
        for words in &mut w {
            *words = _mm512_shuffle_epi8(*words, swap);
        }
        let mut next = *state;
        rounds!(0, next, w, |[word, ..]: [__m512i; 4]| word; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        for from in [16, 32, 48] {
            rounds!(from, next, w, |words| scheduled(words); 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        }
        for (word, next) in state.iter_mut().zip(next) {
            *word = _mm512_add_epi32(*word, next);
        }
    }
}

/// A word of the message schedule, from those 16, 15, 7 and 2 words before it.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn scheduled([w16, w15, w7, w2]: [__m512i; 4]) -> __m512i {
    let low = xor(_mm512_ror_epi32(w15, 7), _mm512_ror_epi32(w15, 18), _mm512_srli_epi32(w15, 3));
    let high = xor(_mm512_ror_epi32(w2, 17), _mm512_ror_epi32(w2, 19), _mm512_srli_epi32(w2, 10));
    _mm512_add_epi32(_mm512_add_epi32(w16, w7), _mm512_add_epi32(low, high))
}

/// One round, with the sum of the round's constant and word.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn round([a, b, c, d, e, f, g, h]: [__m512i; 8], constant_and_word: __m512i) -> [__m512i; 8] {
    let upper = xor(_mm512_ror_epi32(e, 6), _mm512_ror_epi32(e, 11), _mm512_ror_epi32(e, 25));
    // Truth tables: f where e is set, else g; what two of a, b, c have.
    let choice = _mm512_ternarylogic_epi32(e, f, g, 0xca);
    let majority = _mm512_ternarylogic_epi32(a, b, c, 0xe8);
    let lower = xor(_mm512_ror_epi32(a, 2), _mm512_ror_epi32(a, 13), _mm512_ror_epi32(a, 22));
    // The next round waits for the upper sum: it comes last.
    let first = _mm512_add_epi32(_mm512_add_epi32(_mm512_add_epi32(h, constant_and_word), choice), upper);
    let second = _mm512_add_epi32(lower, majority);
    [_mm512_add_epi32(first, second), a, b, c, _mm512_add_epi32(d, first), e, f, g]
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn xor(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32(a, b, c, 0x96)
}

/// From one row a message to one row a word: in pairs of rows, in fours, and then by the quarters of registers.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn transpose(rows: &mut [__m512i; 16]) {
    let mut pairs = *rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Of rows `i` to `i + 3`, quarter `q` of register `i + j` gets the word `4 q + j`.
    let mut fours = pairs;
    for i in (0..16).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for j in 0..4 {
        let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
        // Quarters 0 and 2 of two registers, then 1 and 3.
        let (ab, cd) = (_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(c, d, 0x88));
        rows[j] = _mm512_shuffle_i32x4(ab, cd, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
        let (ab, cd) = (_mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0xdd));
        rows[4 + j] = _mm512_shuffle_i32x4(ab, cd, 0x88);
        rows[12 + j] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
    }
}
