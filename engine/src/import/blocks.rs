//! Number formats of GGUF tensors and their dequantisation to f32, as ggml defines it.
//!
//! Pure functions on byte slices of whole blocks. The arithmetic (operations and their order in f32) is that of
//! `dequantize_row_*` in ggml's `ggml-quants.c`, so results are bit-equal to it; tests compare with candle.

use half::{bf16, f16};

/// Elements of a K-quant block.
const K_ELEMENTS: usize = 256;

/// How a tensor's numbers are stored: blocks of `elements()` numbers in `bytes()` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names are ggml's")]
pub enum BlockFormat {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    BF16,
    /// 4 bits and a scale per 32.
    Q4_0,
    /// 4 bits, a scale and a minimum per 32.
    Q4_1,
    /// 5 bits and a scale per 32.
    Q5_0,
    /// 5 bits, a scale and a minimum per 32.
    Q5_1,
    /// 8 bits and a scale per 32.
    Q8_0,
    /// 2 bits, with 4-bit scales and minima per 16.
    Q2_K,
    /// 3 bits, with 6-bit scales per 16.
    Q3_K,
    /// 4 bits, with 6-bit scales and minima per 32.
    Q4_K,
    /// 5 bits, with 6-bit scales and minima per 32.
    Q5_K,
    /// 6 bits, with 8-bit scales per 16.
    Q6_K,
}

impl BlockFormat {
    /// The format of a `ggml_type` number, if it is read here.
    pub fn from_ggml(kind: u32) -> Option<Self> {
        Some(match kind {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Numbers in one block.
    pub const fn elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => K_ELEMENTS,
        }
    }

    /// Bytes of one block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Turns whole blocks into f32.
    ///
    /// # Panics
    /// When `input` is not a whole number of blocks or `output` has another number of elements.
    pub fn dequantize(self, input: &[u8], output: &mut [f32]) {
        let blocks = input.len() / self.bytes();
        assert_eq!(input.len(), blocks * self.bytes(), "whole blocks of {self:?}");
        assert_eq!(output.len(), blocks * self.elements(), "one f32 per element of {self:?}");
        let block: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => |x, y| y[0] = f32::from_le_bytes([x[0], x[1], x[2], x[3]]),
            Self::F16 => |x, y| y[0] = half_at(x, 0),
            Self::BF16 => |x, y| y[0] = bf16::from_le_bytes([x[0], x[1]]).to_f32(),
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q2_K => q2_k,
            Self::Q3_K => q3_k,
            Self::Q4_K => q4_k,
            Self::Q5_K => q5_k,
            Self::Q6_K => q6_k,
        };
        for (x, y) in input.chunks_exact(self.bytes()).zip(output.chunks_exact_mut(self.elements())) {
            block(x, y);
        }
    }
}

/// The f16 at byte `at`, widened.
fn half_at(x: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([x[at], x[at + 1]]).to_f32()
}

fn q4_0(x: &[u8], y: &mut [f32]) {
    let d = half_at(x, 0);
    for (j, q) in x[2..18].iter().enumerate() {
        y[j] = f32::from((q & 15) as i8 - 8) * d;
        y[j + 16] = f32::from((q >> 4) as i8 - 8) * d;
    }
}

fn q4_1(x: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(x, 0), half_at(x, 2));
    for (j, q) in x[4..20].iter().enumerate() {
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn q5_0(x: &[u8], y: &mut [f32]) {
    let d = half_at(x, 0);
    let high = u32::from_le_bytes([x[2], x[3], x[4], x[5]]);
    for (j, q) in x[6..22].iter().enumerate() {
        let (h0, h1) = ((high >> j) as u8 & 1, (high >> (j + 16)) as u8 & 1);
        y[j] = f32::from((q & 15 | h0 << 4) as i8 - 16) * d;
        y[j + 16] = f32::from((q >> 4 | h1 << 4) as i8 - 16) * d;
    }
}

fn q5_1(x: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(x, 0), half_at(x, 2));
    let high = u32::from_le_bytes([x[4], x[5], x[6], x[7]]);
    for (j, q) in x[8..24].iter().enumerate() {
        let (h0, h1) = ((high >> j) as u8 & 1, (high >> (j + 16)) as u8 & 1);
        y[j] = f32::from(q & 15 | h0 << 4) * d + m;
        y[j + 16] = f32::from(q >> 4 | h1 << 4) * d + m;
    }
}

fn q8_0(x: &[u8], y: &mut [f32]) {
    let d = half_at(x, 0);
    for (y, q) in y.iter_mut().zip(&x[2..34]) {
        *y = f32::from(*q as i8) * d;
    }
}

fn q2_k(x: &[u8], y: &mut [f32]) {
    let (scales, quants) = (&x[..16], &x[16..80]);
    let (d, min) = (half_at(x, 80), half_at(x, 82));
    // Sixteen groups of 16 numbers: halves of 128, then 2-bit planes, then halves of 32 bytes.
    for (group, (y, scale)) in y.chunks_exact_mut(16).zip(scales).enumerate() {
        let (half, plane, side) = (group / 8, group % 8 / 2, group % 2);
        let (scale, offset) = (d * f32::from(scale & 15), min * f32::from(scale >> 4));
        for (y, q) in y.iter_mut().zip(&quants[half * 32 + side * 16..]) {
            *y = scale * f32::from(q >> (2 * plane) & 3) - offset;
        }
    }
}

fn q3_k(x: &[u8], y: &mut [f32]) {
    let (mask, quants) = (&x[..32], &x[32..96]);
    let d = half_at(x, 108);
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let (half, plane, side) = (group / 8, group % 8 / 2, group % 2);
        let scale = d * f32::from(q3_scale(&x[96..108], group) as i8 - 32);
        for (l, y) in y.iter_mut().enumerate() {
            let low = quants[half * 32 + side * 16 + l] >> (2 * plane) & 3;
            let high = mask[side * 16 + l] >> (half * 4 + plane) & 1;
            *y = scale * f32::from(low as i8 - if high == 1 { 0 } else { 4 });
        }
    }
}

/// Six-bit scale `group` of a Q3_K block: four low bits in the first 8 bytes, two high bits in the last 4.
fn q3_scale(scales: &[u8], group: usize) -> u8 {
    let low = scales[group % 8] >> (group / 8 * 4) & 15;
    let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    low | high << 4
}

/// Six-bit scale and minimum `group` of a Q4_K or Q5_K block.
fn k4_scale_min(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (scales[group] & 63, scales[group + 4] & 63)
    } else {
        (
            scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
            scales[group + 4] >> 4 | scales[group] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(x: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(x, 0), half_at(x, 2));
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = k4_scale_min(&x[4..16], group);
        let (scale, min) = (d * scale, dmin * min);
        for (y, q) in y.iter_mut().zip(&x[16 + group / 2 * 32..]) {
            *y = scale * f32::from(q >> (group % 2 * 4) & 15) - min;
        }
    }
}

fn q5_k(x: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(x, 0), half_at(x, 2));
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = k4_scale_min(&x[4..16], group);
        let (scale, min) = (d * scale, dmin * min);
        let quants = x[48 + group / 2 * 32..].iter().zip(&x[16..48]);
        for (y, (q, high)) in y.iter_mut().zip(quants) {
            let q = q >> (group % 2 * 4) & 15 | (high >> group & 1) << 4;
            *y = scale * f32::from(q) - min;
        }
    }
}

fn q6_k(x: &[u8], y: &mut [f32]) {
    let (low, high, scales) = (&x[..128], &x[128..192], &x[192..208]);
    let d = half_at(x, 208);
    // Eight groups of 32 numbers: halves of 128, then quarters.
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (half, quarter) = (group / 4, group % 4);
        for (l, y) in y.iter_mut().enumerate() {
            let nibble = low[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
            let top = high[half * 32 + l] >> (quarter * 2) & 3;
            let scale = scales[half * 8 + quarter * 2 + l / 16] as i8;
            *y = d * f32::from(scale) * f32::from((nibble | top << 4) as i8 - 32);
        }
    }
}
