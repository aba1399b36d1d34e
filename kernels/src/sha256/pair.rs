//! Two messages side by side with the SHA instructions, of which each alone waits for the one before it.

use std::arch::x86_64::*;

use super::{BLOCK_BYTES, K, State};

/// Messages at once.
const LANES: usize = 2;
/// The two registers of a state, or one of each message.
type Pair = [__m128i; LANES];

/// Takes whole blocks of messages of one length into their states (FIPS 180-4, 6.2.2).
#[target_feature(enable = "sha,sse4.1")]
pub fn compress(states: &mut [State; LANES], messages: [&[u8]; LANES]) {
    // The bytes of big-endian words.
    let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let (mut abef, mut cdgh) = ([_mm_setzero_si128(); LANES], [_mm_setzero_si128(); LANES]);
    for lane in 0..LANES {
        [abef[lane], cdgh[lane]] = loaded(&states[lane]);
    }
    // Indices that are constants keep the words in registers.
    macro_rules! rounds {
        ($from:expr, $w:ident, $next:expr; $($i:literal)*) => { $(
            $next(&mut $w, $i);
            four_rounds(&mut abef, &mut cdgh, [$w[0][$i], $w[1][$i]], $from + 4 * $i);
        )* };
    }
    for at in (0..messages[0].len()).step_by(BLOCK_BYTES) {
        let (abef_before, cdgh_before) = (abef, cdgh);
        let mut w = [[_mm_setzero_si128(); 4]; LANES];
        for (words, message) in w.iter_mut().zip(messages) {
            for (words, bytes) in words.iter_mut().zip(message[at..][..BLOCK_BYTES].chunks_exact(16)) {
                // SAFETY: the slice has the register's 16 bytes.
                *words = _mm_shuffle_epi8(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }, swap);
            }
        }
        rounds!(0, w, |_: &mut [[__m128i; 4]; LANES], _: usize| (); 0 1 2 3);
        for from in [16, 32, 48] {
            rounds!(from, w, |w: &mut [[__m128i; 4]; LANES], i| schedule(w, i); 0 1 2 3);
        }
        for lane in 0..LANES {
            abef[lane] = _mm_add_epi32(abef[lane], abef_before[lane]);
            cdgh[lane] = _mm_add_epi32(cdgh[lane], cdgh_before[lane]);
        }
    }
    for lane in 0..LANES {
        store(&mut states[lane], abef[lane], cdgh[lane]);
    }
}

/// Four rounds with the words of the message schedule from `first` on.
#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn four_rounds(abef: &mut Pair, cdgh: &mut Pair, words: Pair, first: usize) {
    let constants = &K[first..][..4];
    // SAFETY: the slice has the register's 16 bytes.
    let constants = unsafe { _mm_loadu_si128(constants.as_ptr().cast()) };
    for lane in 0..LANES {
        let sum = _mm_add_epi32(words[lane], constants);
        cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], sum);
        abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32(sum, 0x0e));
    }
}

/// The next four words of the message schedule, in the place of those that are sixteen words older.
#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn schedule(w: &mut [[__m128i; 4]; LANES], i: usize) {
    for w in w {
        let (w16, w12, w8, w4) = (w[i], w[(i + 1) % 4], w[(i + 2) % 4], w[(i + 3) % 4]);
        let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w16, w12), _mm_alignr_epi8(w4, w8, 4));
        w[i] = _mm_sha256msg2_epu32(sum, w4);
    }
}

/// A state as the instructions want it: words a, b, e, f and c, d, g, h, the first one highest.
#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn loaded([a, b, c, d, e, f, g, h]: &State) -> Pair {
    let four = |a: u32, b: u32, c: u32, d: u32| _mm_set_epi32(a as i32, b as i32, c as i32, d as i32);
    [four(*a, *b, *e, *f), four(*c, *d, *g, *h)]
}

#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn store(state: &mut State, abef: __m128i, cdgh: __m128i) {
    let words = |four: __m128i| {
        let words = [
            _mm_extract_epi32(four, 3),
            _mm_extract_epi32(four, 2),
            _mm_extract_epi32(four, 1),
            _mm_extract_epi32(four, 0),
        ];
        words.map(|word| word as u32)
    };
    let ([a, b, e, f], [c, d, g, h]) = (words(abef), words(cdgh));
    *state = [a, b, c, d, e, f, g, h];
}
