//! The tile product with Intel AMX: up to sixteen rows and two panels per call of the tile unit.
//!
//! Stable Rust has no AMX intrinsics, so the product is one block of assembly. Its text is a constant that the
//! tests interpret on a model of the tile registers; that, not a run on such a processor, is what shows that
//! packing, strides and edge tiles are right. Before it is used on a processor, [`permit`] asks the kernel for
//! the tile registers, and compares a set of products with the portable form: any difference refuses it.
//!
//! `tdpbf16ps` adds the two halves of a pair in an order of its own, so with AMX every product of bf16 weights
//! goes through it, whatever the number of rows; attention widens bf16 to f32 with AVX-512 instead.

use std::arch::asm;
use std::cell::Cell;
use std::sync::OnceLock;

use super::tile::{LANES, TILE_PANELS, TILE_SEGMENTS, Tile, TileFn};
use super::tile_portable;
use crate::precision::Precision;

/// Rows of a tile register.
pub const AMX_ROWS: usize = 16;
/// Groups of 32 bits in a row of a tile register.
const STEP: usize = 16;

/// Two panels (`$dot` is the dot product). tmm0 and tmm1 are the sums; tmm4, tmm5 and tmm3 the left and both
/// right operands of a full step; tmm6 and tmm7 those of a last, shorter one.
macro_rules! two_panels {
    ($dot:literal) => {
        concat!(
            "tilezero tmm0\n",
            "tilezero tmm1\n",
            "test {steps}, {steps}\n",
            "jz 3f\n",
            "2:\n",
            "tileloadd tmm4, [{a} + {a_stride}*1]\n",
            "tileloadd tmm5, [{b0} + {b_stride}*1]\n",
            $dot,
            " tmm0, tmm4, tmm5\n",
            "tileloadd tmm3, [{b1} + {b_stride}*1]\n",
            $dot,
            " tmm1, tmm4, tmm3\n",
            "add {a}, 64\n",
            "add {b0}, {b_step}\n",
            "add {b1}, {b_step}\n",
            "dec {steps}\n",
            "jnz 2b\n",
            "3:\n",
            "test {tail}, {tail}\n",
            "jz 4f\n",
            "tileloadd tmm6, [{a} + {a_stride}*1]\n",
            "tileloadd tmm7, [{b0} + {b_stride}*1]\n",
            $dot,
            " tmm0, tmm6, tmm7\n",
            "tileloadd tmm7, [{b1} + {b_stride}*1]\n",
            $dot,
            " tmm1, tmm6, tmm7\n",
            "4:\n",
            "tilestored [{out0} + {out_stride}*1], tmm0\n",
            "tilestored [{out1} + {out_stride}*1], tmm1\n",
        )
    };
}

/// Operands of the assembly. Strides are in bytes.
#[derive(Debug, Clone, Copy)]
struct Call {
    a: *const u8,
    a_stride: usize,
    b: [*const u8; 2],
    b_stride: usize,
    /// Full steps of 16 groups.
    steps: usize,
    /// Groups of a last step.
    tail: usize,
    out: [*mut u8; 2],
    out_stride: usize,
}

macro_rules! form {
    ($(#[$doc:meta])* $name:ident, $dot:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`TileFn`](super::tile::TileFn), and [`permit`] has succeeded.
        pub unsafe fn $name(tile: &Tile, sums: *mut [f32; LANES]) {
            let run = |call: &Call| {
                // SAFETY: the caller vouches for every address that the tile spans; the registers are those of
                // the configuration, which no compiled code touches.
                unsafe {
                    asm!(
                        two_panels!($dot),
                        a = inout(reg) call.a => _,
                        a_stride = in(reg) call.a_stride,
                        b0 = inout(reg) call.b[0] => _,
                        b1 = inout(reg) call.b[1] => _,
                        b_stride = in(reg) call.b_stride,
                        b_step = in(reg) call.b_stride * STEP,
                        steps = inout(reg) call.steps => _,
                        tail = in(reg) call.tail,
                        out0 = in(reg) call.out[0],
                        out1 = in(reg) call.out[1],
                        out_stride = in(reg) call.out_stride,
                        options(nostack),
                    );
                }
            };
            configure(tile.rows, tile.groups % STEP);
            by_pairs(tile, sums, run);
        }
    };
}

form!(
    /// bf16 operands.
    bf16, "tdpbf16ps"
);

form!(
    /// u8 left and i8 right operands.
    int8, "tdpbusd"
);

/// Calls `run` for two panels at a time. A single panel is multiplied twice, into the same place.
fn by_pairs(tile: &Tile, sums: *mut [f32; LANES], run: impl Fn(&Call)) {
    assert!(tile.segments == 1 && !tile.accumulate, "one segment from zero is all that this form does");
    assert!((1..=AMX_ROWS).contains(&tile.rows), "{} rows", tile.rows);
    for panel in (0..tile.panels).step_by(2) {
        let second = (panel + 1).min(tile.panels - 1);
        run(&Call {
            a: tile.a.cast(),
            a_stride: tile.a_stride * 4,
            b: [tile.b[0][panel].cast(), tile.b[0][second].cast()],
            b_stride: tile.b_stride * 4,
            steps: tile.groups / STEP,
            tail: tile.groups % STEP,
            out: [sums.wrapping_add(panel).cast(), sums.wrapping_add(second).cast()],
            out_stride: tile.sums_stride * LANES * 4,
        });
    }
}

/// The memory image that `ldtilecfg` reads.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Shapes of all tile registers for products of `rows` rows whose last step has `tail` groups.
fn configuration(rows: usize, tail: usize) -> Configuration {
    let mut configuration =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let rows = rows as u8;
    let mut set = |register: usize, rows: u8, row_bytes: u16| {
        configuration.rows[register] = rows;
        configuration.row_bytes[register] = row_bytes;
    };
    set(0, rows, 64);
    set(1, rows, 64);
    set(3, STEP as u8, 64);
    set(4, rows, 64);
    set(5, STEP as u8, 64);
    if tail > 0 {
        set(6, rows, tail as u16 * 4);
        set(7, tail as u8, 64);
    }
    configuration
}

thread_local! {
    /// The shapes that this thread's tile registers have.
    static CONFIGURED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn configure(rows: usize, tail: usize) {
    if CONFIGURED.get() == (rows, tail) {
        return;
    }
    let configuration = configuration(rows, tail);
    // SAFETY: the image is valid for palette 1 and lives in memory across the instruction: without the option
    // `nomem`, the compiler must have written it.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const configuration, options(nostack)) };
    CONFIGURED.set((rows, tail));
}

/// Whether this process may use AMX here and its products are right; if not, why.
///
/// # Errors
/// The reason, as a sentence.
pub fn permit() -> Result<(), &'static str> {
    static PERMIT: OnceLock<Result<(), &'static str>> = OnceLock::new();
    *PERMIT.get_or_init(|| {
        supported()?;
        request()?;
        self_test()
    })
}

fn supported() -> Result<(), &'static str> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & (BF16 | TILE | INT8) != BF16 | TILE | INT8 {
        return Err("the processor lacks AMX tiles with bf16 and int8");
    }
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return Err("the operating system does not manage extended registers");
    }
    let (low, high): (u32, u32);
    // SAFETY: the operating system has set OSXSAVE, so the instruction exists.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    let _ = high;
    if low & (3 << 17) == 3 << 17 { Ok(()) } else { Err("the operating system does not save AMX tiles") }
}

/// Asks the kernel for the tile registers; without it the first use ends the process.
#[cfg(target_os = "linux")]
fn request() -> Result<(), &'static str> {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this request changes nothing but the process' permission.
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    if answer == 0 { Ok(()) } else { Err("the kernel refuses AMX tiles to this process") }
}

#[cfg(not(target_os = "linux"))]
fn request() -> Result<(), &'static str> {
    Err("AMX is used on Linux only")
}

/// Compares products with the portable form, over full and short steps, rows and panels.
fn self_test() -> Result<(), &'static str> {
    for (rows, panels, groups) in [(16, 2, 48), (1, 1, 16), (7, 2, 5), (16, 4, 37), (3, 2, 288)] {
        let case = Case::new(rows, panels, groups);
        // SAFETY: the case's operands have these sizes, and the kernel has granted the registers.
        let (bf16, int8) = unsafe { (case.run(bf16, Precision::Bf16), case.run(int8, Precision::Int8)) };
        let reference = tile_portable::form;
        // SAFETY: as above; the portable form needs nothing.
        let (bf16_right, int8_right) = unsafe {
            (
                case.run(reference(Precision::Bf16), Precision::Bf16),
                case.run(reference(Precision::Int8), Precision::Int8),
            )
        };
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * groups as f32;
        if !bf16.iter().zip(&bf16_right).all(near) {
            return Err("a bf16 product with AMX differs from the portable form");
        }
        if !int8.iter().zip(&int8_right).all(|(a, b)| a.to_bits() == b.to_bits()) {
            return Err("an int8 product with AMX differs from the portable form");
        }
    }
    Ok(())
}

/// Operands of one product, random but always the same.
struct Case {
    rows: usize,
    panels: usize,
    groups: usize,
}

impl Case {
    fn new(rows: usize, panels: usize, groups: usize) -> Self {
        Self { rows, panels, groups }
    }

    /// A word of two bf16 values of about one, or of four bytes.
    fn word(precision: Precision, seed: usize) -> u32 {
        let bits = (seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
        match precision {
            Precision::Bf16 => (bits as u32 & 0x807F_807F) | 0x3F00_3F00,
            _ => bits as u32,
        }
    }

    /// The sums as `form` computes them, `[rows][panels][lanes]`.
    ///
    /// # Safety
    /// As [`TileFn`] for the form.
    unsafe fn run(&self, form: TileFn, precision: Precision) -> Vec<f32> {
        let (a, b) = self.operands(precision);
        let tile = self.tile(&a, &b);
        let mut sums = vec![[f32::NAN; LANES]; self.rows * self.panels];
        // SAFETY: passed on; the operands were made for this tile.
        unsafe { form(&tile, sums.as_mut_ptr()) };
        sums.into_iter().flatten().collect()
    }

    fn operands(&self, precision: Precision) -> (Vec<u32>, Vec<u32>) {
        let a = (0..self.rows * self.a_stride()).map(|index| Self::word(precision, index));
        let b = (0..self.panels * self.groups * LANES).map(|index| Self::word(precision, index + 7919));
        (a.collect(), b.collect())
    }

    /// Wider than the groups, so that strides are tested.
    fn a_stride(&self) -> usize {
        self.groups + 3
    }

    fn tile(&self, a: &[u32], b: &[u32]) -> Tile {
        let mut panels = [b.as_ptr(); TILE_PANELS];
        for (index, panel) in panels.iter_mut().enumerate().take(self.panels) {
            *panel = b[index * self.groups * LANES..].as_ptr();
        }
        Tile {
            a: a.as_ptr(),
            a_stride: self.a_stride(),
            rows: self.rows,
            b: [panels; TILE_SEGMENTS],
            segments: 1,
            b_stride: LANES,
            panels: self.panels,
            groups: self.groups,
            sums_stride: self.panels,
            accumulate: false,
            next: [panels; TILE_SEGMENTS],
            later: a.as_ptr(),
        }
    }
}

#[cfg(test)]
mod tests;
