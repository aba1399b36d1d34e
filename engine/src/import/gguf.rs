//! The header of a GGUF file: metadata and the directory of tensors.
//!
//! The file is hostile input. Every count, length and offset is compared with a named limit and with the
//! bytes that the file really has left *before* anything is allocated or read, all arithmetic on sizes is
//! checked, and the tensors' data must lie one after the other inside the file. Refused: version 1, big-endian
//! files, nested arrays, strings that are not UTF-8, formats without a dequantisation here.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod header;

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::blocks::BlockFormat;
use header::{Cursor, alignment, place, read_counts, read_directory, read_metadata};

/// Metadata entries in one file; real files have some dozens.
pub const ENTRIES_MAX: u64 = 4096;
/// Tensors in one file; the largest dense models have some thousands.
pub const TENSORS_MAX: u64 = 20_000;
/// Bytes of a metadata key or a tensor name; ggml itself stops at 64 for tensors.
pub const NAME_BYTES_MAX: u64 = 256;
/// Bytes of one string; the longest real ones are chat templates of some 20 KB.
pub const STRING_BYTES_MAX: u64 = 1 << 20;
/// Elements of one array; the longest real ones are the merges of vocabularies of 256 K tokens.
pub const ARRAY_ELEMENTS_MAX: u64 = 4 << 20;
/// Bytes of the whole header; the largest real ones stay below 20 MB.
pub const HEADER_BYTES_MAX: u64 = 256 << 20;
/// Dimensions of a tensor, as in ggml.
pub const DIMENSIONS_MAX: u32 = 4;
/// Elements of one tensor: 2^40 of them would be 2 TiB in 16 bits.
pub const ELEMENTS_MAX: u64 = 1 << 40;
/// Alignment of tensor data; 32 when the file names none.
pub const ALIGNMENT_MAX: u64 = 1 << 16;

/// Why a GGUF header was refused.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file could not be read.
    #[error("cannot read {field}: {source}")]
    Read {
        /// What was being read.
        field: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A number is beyond its limit.
    #[error("{field} is {value}, the limit is {limit}")]
    Limit {
        /// What the number counts.
        field: String,
        /// The number in the file.
        value: u64,
        /// The largest one accepted.
        limit: u64,
    },
    /// The file ends too early.
    #[error("{field} needs {bytes} bytes at offset {offset}, the file has {len}")]
    Truncated {
        /// What was being read.
        field: String,
        /// Where it begins.
        offset: u64,
        /// How long it is said to be.
        bytes: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// A value is none of those that the format allows.
    #[error("{field} is {value}; {rule}")]
    Invalid {
        /// What the value is.
        field: String,
        /// The value in the file.
        value: String,
        /// What would be right.
        rule: String,
    },
    /// Metadata that the import needs is absent.
    #[error("metadata {key} is missing")]
    Missing {
        /// The key.
        key: String,
    },
}

/// A metadata value. Integers of all widths are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An integer.
    Integer(i128),
    /// A float; 32-bit ones are widened without loss.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of integers or truth values.
    Integers(Vec<i64>),
    /// An array of floats.
    Floats(Vec<f32>),
    /// An array of strings.
    Texts(Vec<String>),
}

impl Value {
    /// Whether it is an array without elements, of whichever type: writers choose one.
    fn is_empty_array(&self) -> bool {
        match self {
            Value::Integers(numbers) => numbers.is_empty(),
            Value::Floats(numbers) => numbers.is_empty(),
            Value::Texts(texts) => texts.is_empty(),
            _ => false,
        }
    }

    /// The kind of the value, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::Text(_) => "a string",
            Value::Integers(_) => "an array of integers",
            Value::Floats(_) => "an array of floats",
            Value::Texts(_) => "an array of strings",
        }
    }
}

/// One tensor of the directory.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Row-major shape, outermost dimension first (GGUF writes it the other way round).
    pub shape: Vec<u64>,
    /// How its numbers are stored.
    pub format: BlockFormat,
    /// The part of a split file that holds its data; 0 is the first.
    pub part: usize,
    /// Where its data begin in that file.
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

impl TensorInfo {
    /// Numbers in the tensor.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// The header of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors in the order of the file.
    pub tensors: Vec<TensorInfo>,
}

impl Gguf {
    /// Reads and checks the header. `len` is the size of the whole file in bytes; `reader` stands at its start.
    pub fn read<R: Read>(reader: R, len: u64) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(reader, len);
        let (tensor_count, entry_count) = read_counts(&mut cursor)?;
        let metadata = read_metadata(&mut cursor, entry_count)?;
        let directory = read_directory(&mut cursor, tensor_count)?;
        let alignment = alignment(&metadata)?;
        let tensors = place(directory, cursor.position(), alignment, len)?;
        Ok(Self { metadata, tensors })
    }

    /// The value of `key`, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The string at `key`.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_kind(key, other, "a string")),
        }
    }

    /// The integer at `key`, from 0 to `max`.
    pub fn integer(&self, key: &str, max: u64) -> Result<Option<u64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(number)) => match u64::try_from(*number) {
                Ok(number) if number <= max => Ok(Some(number)),
                Ok(number) => Err(GgufError::Limit { field: key.into(), value: number, limit: max }),
                Err(_) => Err(invalid(key, number, "it must not be negative")),
            },
            // Some sizes stand once for each layer; where all are the same, that is the one.
            Some(Value::Integers(numbers)) => match numbers.first() {
                Some(&first) if numbers.iter().all(|&number| number == first) => match u64::try_from(first) {
                    Ok(number) if number <= max => Ok(Some(number)),
                    _ => Err(invalid(key, first, &format!("it must be from 0 to {max}"))),
                },
                _ => Err(invalid(key, "a list of different numbers", "all layers must have the same")),
            },
            Some(other) => Err(wrong_kind(key, other, "an integer")),
        }
    }

    /// The float at `key`; finite as f32.
    pub fn float(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) if (*number as f32).is_finite() => Ok(Some(*number as f32)),
            Some(Value::Float(number)) => Err(invalid(key, number, "it must be finite in 32 bits")),
            Some(Value::Integer(number)) => Ok(Some(*number as f32)),
            Some(other) => Err(wrong_kind(key, other, "a float")),
        }
    }

    /// The truth value at `key`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_kind(key, other, "a bool")),
        }
    }

    /// The strings at `key`.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(value) if value.is_empty_array() => Ok(Some(&[])),
            Some(other) => Err(wrong_kind(key, other, "an array of strings")),
        }
    }

    /// The integers at `key`.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integers(numbers)) => Ok(Some(numbers)),
            Some(value) if value.is_empty_array() => Ok(Some(&[])),
            Some(other) => Err(wrong_kind(key, other, "an array of integers")),
        }
    }

    /// The floats at `key`.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Floats(numbers)) => Ok(Some(numbers)),
            Some(value) if value.is_empty_array() => Ok(Some(&[])),
            Some(other) => Err(wrong_kind(key, other, "an array of floats")),
        }
    }
}

/// An `Option` that must be filled.
pub fn required<T>(value: Option<T>, key: &str) -> Result<T, GgufError> {
    value.ok_or_else(|| GgufError::Missing { key: key.into() })
}

/// A value that the format does not allow.
pub fn invalid(field: &str, value: impl ToString, rule: &str) -> GgufError {
    GgufError::Invalid { field: field.into(), value: value.to_string(), rule: rule.into() }
}

fn wrong_kind(key: &str, value: &Value, expected: &str) -> GgufError {
    invalid(key, value.kind(), &format!("it must be {expected}"))
}
