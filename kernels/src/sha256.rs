//! SHA-256 of many messages of one length: of the chunks of a file.
//!
//! A SHA-256 is one chain: each block of 64 bytes needs the state that the block before it left, and the processor's
//! instructions for it wait for each other. Sixteen messages are sixteen chains, one in each 32-bit lane of AVX-512
//! (Gueron and Krasnov, "Simultaneous hashing of multiple messages", 2012; the function itself is FIPS 180-4). On an
//! Intel Xeon of the fifth generation that takes 0.74 cycles of its time stamp counter a byte, where the SHA
//! instructions take 1.57 with one chain and 1.29 with two: 3.1, 1.5 and 1.8 GB/s at 2.3 GHz. They begin with one
//! chain every fourth cycle, with more every third. Two chains are for processors without AVX-512 and for what makes
//! no sixteen; the `sha2` crate is for the rest.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod pair;

use sha2::{Digest as _, Sha256};

/// The bytes of a SHA-256.
pub type Digest = [u8; 32];

/// What a message's blocks so far leave.
#[cfg(target_arch = "x86_64")]
type State = [u32; 8];

#[cfg(target_arch = "x86_64")]
const BLOCK_BYTES: usize = 64;
/// Bytes of a message's length at the end of its last block.
#[cfg(target_arch = "x86_64")]
const LENGTH_BYTES: usize = 8;

/// FIPS 180-4, 5.3.3.
#[cfg(target_arch = "x86_64")]
const INITIAL: [u32; 8] =
    [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];
/// FIPS 180-4, 4.2.2.
#[cfg(target_arch = "x86_64")]
const K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];

/// The SHA-256 of each `chunk_bytes` of `bytes`, in order; the last chunk may be shorter.
///
/// # Panics
/// When `chunk_bytes` is 0.
pub fn digests(bytes: &[u8], chunk_bytes: usize) -> Vec<Digest> {
    let mut found = Vec::with_capacity(bytes.len().div_ceil(chunk_bytes));
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the processor has what it needs.
            take(bytes, chunk_bytes, &mut found, |states, messages| unsafe {
                avx512::compress(states, messages);
            });
        }
        if is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1") {
            let rest = &bytes[found.len() * chunk_bytes..];
            // SAFETY: the processor has what it needs.
            take(rest, chunk_bytes, &mut found, |states, messages| unsafe {
                pair::compress(states, messages);
            });
        }
    }
    let rest = &bytes[found.len() * chunk_bytes..];
    found.extend(rest.chunks(chunk_bytes).map(|chunk| Digest::from(Sha256::digest(chunk))));
    found
}

/// Hashes as many chunks as make groups of `LANES`. The form takes whole blocks of a group into its states.
#[cfg(target_arch = "x86_64")]
fn take<const LANES: usize>(
    mut bytes: &[u8],
    chunk_bytes: usize,
    found: &mut Vec<Digest>,
    form: impl Fn(&mut [State; LANES], [&[u8]; LANES]),
) {
    let whole = chunk_bytes - chunk_bytes % BLOCK_BYTES;
    let last_bytes = (chunk_bytes - whole + 1 + LENGTH_BYTES).next_multiple_of(BLOCK_BYTES);
    while let Some((group, rest)) = bytes.split_at_checked(LANES * chunk_bytes) {
        let chunks: [&[u8]; LANES] = std::array::from_fn(|lane| &group[lane * chunk_bytes..][..chunk_bytes]);
        let mut states = [INITIAL; LANES];
        form(&mut states, chunks.map(|chunk| &chunk[..whole]));
        // The end of a message with its padding, of one block or two (FIPS 180-4, 5.1.1).
        let last = chunks.map(|chunk| {
            let mut last = [0; 2 * BLOCK_BYTES];
            last[..chunk_bytes - whole].copy_from_slice(&chunk[whole..]);
            last[chunk_bytes - whole] = 0x80;
            let length = 8 * chunk_bytes as u64;
            last[last_bytes - LENGTH_BYTES..last_bytes].copy_from_slice(&length.to_be_bytes());
            last
        });
        form(&mut states, std::array::from_fn(|lane| &last[lane][..last_bytes]));
        found.extend(states.map(|state| {
            let mut digest = Digest::default();
            for (bytes, word) in digest.chunks_exact_mut(4).zip(state) {
                bytes.copy_from_slice(&word.to_be_bytes());
            }
            digest
        }));
        bytes = rest;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_right(bytes: &[u8], chunk_bytes: usize) -> bool {
        let wanted: Vec<Digest> =
            bytes.chunks(chunk_bytes).map(|chunk| Digest::from(Sha256::digest(chunk))).collect();
        digests(bytes, chunk_bytes) == wanted
    }

    #[test]
    fn every_length_around_the_borders_of_blocks_and_padding() {
        let bytes: Vec<u8> = (0..20 * 200_u32).map(|n| (n * n / 7) as u8).collect();
        for chunk_bytes in 1..=200 {
            // A group of sixteen, a pair, a single one and a part of one.
            let bytes = &bytes[..19 * chunk_bytes + chunk_bytes / 2];
            assert!(is_right(bytes, chunk_bytes), "{chunk_bytes}");
        }
        assert!(digests(&[], 64).is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_number_of_chunks(
            bytes in prop::collection::vec(any::<u8>(), 0..10_000),
            chunk_bytes in 1_usize..1000,
        ) {
            prop_assert!(is_right(&bytes, chunk_bytes));
        }
    }
}
