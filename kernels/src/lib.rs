//! The ops of a decoder: one trait, implemented on CPUs and on NVIDIA GPUs.
//!
//! [`ops::Ops`] is everything that a model description may ask for. It knows buffers, block tables and rows;
//! it knows no sequence, no scheduler and no architecture. [`cpu::Cpu`] implements it for the processor at
//! hand, `cuda::Cuda` for a GPU, behind the feature `cuda`. The invariant of every implementation: the bytes
//! computed for a row depend on that row's own sequence alone, never on the other rows of a step, their number, or
//! how a prompt was cut into chunks. Beside it stands what else needs the processor's own instructions:
//! [`sha256`] of model files.

pub mod bounds;
pub mod coded;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod e4m3;
mod groups;
pub mod isa;
pub mod ops;
pub mod pool;
mod precision;
mod region;
pub mod sampling;
pub mod sha256;
pub mod tensor;

pub use region::wait_until_real;
