//! Quantised checkpoints: which form each matrix of one has, read from the tensors that stand for it.
//!
//! A format is a way to write one thing, codes with scales and zeros ([`Coded`]); each has a file here that turns its
//! tensors into that. What `config.json` says chooses the format, what the tensors are decides on the rest: a matrix
//! whose `weight` is floats is taken as it is, whether or not the configuration lists it. Activations are never
//! quantised by a checkpoint's static scales: where a product wants them in 8 bits it scales each row by itself.

mod awq;
mod compressed;
pub mod config;
mod gptq;
mod modules;
pub mod on_load;
mod parts;
mod scaled;

use millrace_kernels::coded::Coded;
use millrace_kernels::tensor::HostTensor;

use self::compressed::Compressed;
use self::gptq::GptqForm;
use super::binding::{BindError, load_error};
use super::source::{RawDtype, SourceError, TensorSource};

/// How a checkpoint's matrices are written.
#[derive(Debug, Clone, PartialEq)]
pub enum Quantised {
    /// compressed-tensors, in any of its formats that hold whole matrices.
    Compressed(Compressed),
    /// 8-bit floats with the scales that the tensors show: of `quant_method` fp8, fbgemm_fp8, and ModelOpt.
    Fp8 {
        /// Rows and columns of a block, where scales are of blocks.
        block: Option<(usize, usize)>,
    },
    /// ModelOpt's 4-bit floats with a scale for 16 columns and one for all.
    ModelOptFp4,
    /// GPTQ, of 4 or 8 bits.
    Gptq(GptqForm),
    /// AWQ in its form `gemm`, of 4 bits.
    Awq,
}

impl std::fmt::Display for Quantised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Quantised::Compressed(compressed) => write!(f, "compressed-tensors: {compressed}"),
            Quantised::Fp8 { block: None } => f.write_str("8-bit floats"),
            Quantised::Fp8 { block: Some((rows, columns)) } => {
                write!(f, "8-bit floats in blocks of {rows} x {columns}")
            }
            Quantised::ModelOptFp4 => f.write_str("4-bit floats in groups of 16"),
            Quantised::Gptq(_) => f.write_str("GPTQ"),
            Quantised::Awq => f.write_str("AWQ"),
        }
    }
}

impl Quantised {
    /// The matrix of that name (`...weight`) and shape; `None` where it is not quantised.
    ///
    /// # Errors
    /// When its tensors are missing or contradict each other; the error names one.
    pub fn matrix<'a>(
        &self,
        source: &'a dyn TensorSource,
        name: &str,
        shape: (usize, usize),
    ) -> Result<Option<HostTensor<'a>>, BindError> {
        let is_plain = source.raw(name).is_ok_and(|tensor| matches!(tensor.dtype, RawDtype::Float(_)));
        if is_plain {
            return Ok(None);
        }
        let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
        let module = Module { source, name: module, shape };
        let coded = match self {
            Quantised::Compressed(compressed) => compressed.matrix(module)?,
            Quantised::Fp8 { block } => scaled::fp8(module, *block)?,
            Quantised::ModelOptFp4 => scaled::modelopt_fp4(module)?,
            Quantised::Gptq(form) => gptq::matrix(module, *form)?,
            Quantised::Awq => awq::matrix(module)?,
        };
        HostTensor::coded(coded).map(Some).map_err(|source| load_error(name, source))
    }
}

/// A matrix of a checkpoint before it is read: `[output features, input features]`.
#[derive(Clone, Copy)]
struct Module<'a, 'n> {
    source: &'a dyn TensorSource,
    /// Without `.weight`.
    name: &'n str,
    shape: (usize, usize),
}

/// What a format's reader gives.
type Read<'a> = Result<Coded<'a>, BindError>;

/// A tensor that cannot be what the format says.
fn unreadable<T>(name: String, reason: impl Into<String>) -> Result<T, BindError> {
    Err(BindError::Source(SourceError::Unreadable { name, reason: reason.into() }))
}
