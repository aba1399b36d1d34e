//! Where a model's weights come from: named tensors in the host's memory.
//!
//! A source hands out views and never copies; it has checked its files before it hands out the first one.
//! What the shapes should be is not its business: the binding compares them with the model's configuration.

/// Numeric types that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// 32-bit IEEE floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
}

impl StoredDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            StoredDtype::F32 => 4,
            StoredDtype::F16 | StoredDtype::Bf16 => 2,
        }
    }
}

/// One tensor: row-major, little endian, `data.len()` = product of `shape` times the element's bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor<'a> {
    /// Type of the elements.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements. No alignment is promised.
    pub data: &'a [u8],
}

/// Types of the tensors that matrices are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawDtype {
    /// Floats of 16 or 32 bits.
    Float(StoredDtype),
    /// 8-bit floats with 4 bits of exponent.
    F8E4m3,
    /// Powers of two.
    F8E8m0,
    /// Signed, 8 bits.
    Int8,
    /// Unsigned, 8 bits.
    Uint8,
    /// Signed, 32 bits.
    Int32,
    /// Signed, 64 bits.
    Int64,
}

impl std::fmt::Display for RawDtype {
    /// The name that safetensors has for it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RawDtype::Float(StoredDtype::F32) => "F32",
            RawDtype::Float(StoredDtype::F16) => "F16",
            RawDtype::Float(StoredDtype::Bf16) => "BF16",
            RawDtype::F8E4m3 => "F8_E4M3",
            RawDtype::F8E8m0 => "F8_E8M0",
            RawDtype::Int8 => "I8",
            RawDtype::Uint8 => "U8",
            RawDtype::Int32 => "I32",
            RawDtype::Int64 => "I64",
        })
    }
}

/// One tensor of any of these types, as [`StoredTensor`].
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor<'a> {
    /// Type of the elements.
    pub dtype: RawDtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements. No alignment is promised.
    pub data: &'a [u8],
}

/// A tensor that could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// No tensor of that name.
    #[error("the model folder has no tensor {0:?}")]
    Missing(String),
    /// The tensor is there, but not readable.
    #[error("tensor {name:?}: {reason}")]
    Unreadable {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Named tensors of one model.
pub trait TensorSource: Sync {
    /// The tensor of that name.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, SourceError>;

    /// The tensor of that name, whatever its type is.
    ///
    /// # Errors
    /// As [`Self::tensor`], or when its type is none of [`RawDtype`].
    fn raw(&self, name: &str) -> Result<RawTensor<'_>, SourceError> {
        let StoredTensor { dtype, shape, data } = self.tensor(name)?;
        Ok(RawTensor { dtype: RawDtype::Float(dtype), shape, data })
    }

    /// Whether there is a tensor of that name.
    fn has(&self, name: &str) -> bool {
        self.raw(name).is_ok()
    }
}
