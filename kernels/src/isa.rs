//! Which instructions the processor has, and which of them the CPU implementation uses.
//!
//! Detection happens once at start. A form that the processor lacks is refused, never tried.

use std::fmt;

/// An instruction set that kernels are written for, from the plainest to the widest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable Rust: the reference that all others are tested against.
    Scalar,
}

impl Isa {
    /// The widest form that this processor has.
    pub fn detect() -> Isa {
        Isa::Scalar
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
        })
    }
}
