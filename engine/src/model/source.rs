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

    /// Whether there is a tensor of that name.
    fn has(&self, name: &str) -> bool {
        self.tensor(name).is_ok()
    }
}
