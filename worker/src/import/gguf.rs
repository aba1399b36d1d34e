//! Reads the header of a GGUF file: metadata and the directory of tensors.
//!
//! The file is hostile input. Every count, length and offset is compared with a named limit and with the
//! bytes that the file really has left *before* anything is allocated or read, all arithmetic on sizes is
//! checked, and the tensors' data must lie one after the other inside the file. Refused: version 1, big-endian
//! files, nested arrays, strings that are not UTF-8, formats without a dequantisation here.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read};

use super::blocks::BlockFormat;

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
const ALIGNMENT_DEFAULT: u64 = 32;

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
    /// Where its data begin in the file.
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
        let mut cursor = Cursor { reader, position: 0, len };
        let (tensor_count, entry_count) = read_counts(&mut cursor)?;
        let metadata = read_metadata(&mut cursor, entry_count)?;
        let directory = read_directory(&mut cursor, tensor_count)?;
        let alignment = alignment(&metadata)?;
        let tensors = place(directory, cursor.position, alignment, len)?;
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
            Some(other) => Err(wrong_kind(key, other, "an integer")),
        }
    }

    /// The float at `key`; finite as f32.
    pub fn float(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) if (*number as f32).is_finite() => Ok(Some(*number as f32)),
            Some(Value::Float(number)) => Err(invalid(key, number, "it must be finite in 32 bits")),
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
            Some(other) => Err(wrong_kind(key, other, "an array of strings")),
        }
    }

    /// The integers at `key`.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integers(numbers)) => Ok(Some(numbers)),
            Some(other) => Err(wrong_kind(key, other, "an array of integers")),
        }
    }

    /// The floats at `key`.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Floats(numbers)) => Ok(Some(numbers)),
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

fn limited(field: &str, value: u64, limit: u64) -> Result<u64, GgufError> {
    if value > limit { Err(GgufError::Limit { field: field.into(), value, limit }) } else { Ok(value) }
}

/// A reader that knows where it stands and never reads past the end or the header limit.
struct Cursor<R> {
    reader: R,
    position: u64,
    len: u64,
}

impl<R: Read> Cursor<R> {
    /// Checks that `bytes` more bytes are there.
    fn expect(&self, bytes: u64, field: &str) -> Result<(), GgufError> {
        // The position never exceeds `len`, so the difference cannot wrap.
        if bytes > self.len - self.position {
            let (offset, len) = (self.position, self.len);
            return Err(GgufError::Truncated { field: field.into(), offset, bytes, len });
        }
        limited("size of the header", self.position + bytes, HEADER_BYTES_MAX)?;
        Ok(())
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], GgufError> {
        self.expect(N as u64, field)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes, field)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8], field: &str) -> Result<(), GgufError> {
        self.reader.read_exact(bytes).map_err(|source| GgufError::Read { field: field.into(), source })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    fn text(&mut self, field: &str, bytes_max: u64) -> Result<String, GgufError> {
        let length = self.u64(field)?;
        limited(&format!("length of {field}"), length, bytes_max)?;
        self.expect(length, field)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, field)?;
        String::from_utf8(bytes).map_err(|error| {
            invalid(
                field,
                format!("not UTF-8 from byte {}", error.utf8_error().valid_up_to()),
                "strings must be UTF-8",
            )
        })
    }
}

/// Magic, version and both counts.
fn read_counts<R: Read>(cursor: &mut Cursor<R>) -> Result<(u64, u64), GgufError> {
    let magic: [u8; 4] = cursor.array("magic")?;
    if &magic != b"GGUF" {
        return Err(invalid("magic", format!("{magic:02x?}"), "a GGUF file begins with \"GGUF\""));
    }
    let version = cursor.u32("version")?;
    if !(2..=3).contains(&version) {
        let hint = if version.swap_bytes() <= 3 { " (the file is big-endian)" } else { "" };
        return Err(invalid(
            "version",
            format!("{version}{hint}"),
            "versions 2 and 3, little-endian, are read",
        ));
    }
    let tensors = limited("number of tensors", cursor.u64("number of tensors")?, TENSORS_MAX)?;
    let entries =
        limited("number of metadata entries", cursor.u64("number of metadata entries")?, ENTRIES_MAX)?;
    Ok((tensors, entries))
}

fn read_metadata<R: Read>(cursor: &mut Cursor<R>, count: u64) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = cursor.text(&format!("key of metadata entry {index}"), NAME_BYTES_MAX)?;
        let kind = cursor.u32(&format!("type of {key}"))?;
        let value = if kind == 9 { read_array(cursor, &key)? } else { read_scalar(cursor, &key, kind)? };
        if metadata.contains_key(&key) {
            return Err(invalid(&format!("metadata key {key}"), "repeated", "keys must be unique"));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn read_scalar<R: Read>(cursor: &mut Cursor<R>, key: &str, kind: u32) -> Result<Value, GgufError> {
    Ok(match kind {
        0 => Value::Integer(u8::from_le_bytes(cursor.array(key)?).into()),
        1 => Value::Integer(i8::from_le_bytes(cursor.array(key)?).into()),
        2 => Value::Integer(u16::from_le_bytes(cursor.array(key)?).into()),
        3 => Value::Integer(i16::from_le_bytes(cursor.array(key)?).into()),
        4 => Value::Integer(cursor.u32(key)?.into()),
        5 => Value::Integer(i32::from_le_bytes(cursor.array(key)?).into()),
        6 => Value::Float(f32::from_le_bytes(cursor.array(key)?).into()),
        7 => match cursor.array::<1>(key)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => return Err(invalid(key, other, "a bool is 0 or 1")),
        },
        8 => Value::Text(cursor.text(key, STRING_BYTES_MAX)?),
        10 => Value::Integer(cursor.u64(key)?.into()),
        11 => Value::Integer(i64::from_le_bytes(cursor.array(key)?).into()),
        12 => Value::Float(f64::from_le_bytes(cursor.array(key)?)),
        other => return Err(invalid(&format!("type of {key}"), other, "types are 0 to 12")),
    })
}

/// Bytes that one element of an array takes at least.
fn element_bytes_min(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        8 | 10..=12 => Some(8),
        _ => None,
    }
}

fn read_array<R: Read>(cursor: &mut Cursor<R>, key: &str) -> Result<Value, GgufError> {
    let kind = cursor.u32(&format!("element type of {key}"))?;
    let element_bytes = element_bytes_min(kind)
        .ok_or_else(|| invalid(&format!("element type of {key}"), kind, "arrays hold scalars or strings"))?;
    let count = cursor.u64(&format!("length of {key}"))?;
    limited(&format!("length of {key}"), count, ARRAY_ELEMENTS_MAX)?;
    // The count is at most 4 Mi and an element at most 8 bytes here: no overflow.
    cursor.expect(count * element_bytes, key)?;
    let count = count as usize;
    match kind {
        8 => {
            let mut texts = Vec::with_capacity(count);
            for index in 0..count {
                texts.push(cursor.text(&format!("{key}[{index}]"), STRING_BYTES_MAX)?);
            }
            Ok(Value::Texts(texts))
        }
        6 | 12 => {
            let mut floats = Vec::with_capacity(count);
            for _ in 0..count {
                match read_scalar(cursor, key, kind)? {
                    Value::Float(number) => floats.push(number as f32),
                    _ => unreachable!("kinds 6 and 12 are floats"),
                }
            }
            Ok(Value::Floats(floats))
        }
        _ => {
            let mut integers = Vec::with_capacity(count);
            for _ in 0..count {
                integers.push(match read_scalar(cursor, key, kind)? {
                    Value::Integer(number) => i64::try_from(number)
                        .map_err(|_| invalid(key, number, "array elements fit 63 bits"))?,
                    Value::Bool(value) => value.into(),
                    _ => unreachable!("the other kinds are integers and bools"),
                });
            }
            Ok(Value::Integers(integers))
        }
    }
}

/// A tensor of the directory before its place in the file is known to be right.
struct Entry {
    name: String,
    shape: Vec<u64>,
    format: BlockFormat,
    relative: u64,
    bytes: u64,
}

fn read_directory<R: Read>(cursor: &mut Cursor<R>, count: u64) -> Result<Vec<Entry>, GgufError> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    for index in 0..count {
        let name = cursor.text(&format!("name of tensor {index}"), NAME_BYTES_MAX)?;
        if !names.insert(name.clone()) {
            return Err(invalid(&format!("tensor name {name}"), "repeated", "names must be unique"));
        }
        let shape = read_shape(cursor, &name)?;
        let kind = cursor.u32(&format!("type of tensor {name}"))?;
        let format = BlockFormat::from_ggml(kind).ok_or_else(|| {
            invalid(
                &format!("type of tensor {name}"),
                kind,
                "read are F32, F16, BF16, Q4_0 to Q8_0 and Q2_K to Q6_K",
            )
        })?;
        let relative = cursor.u64(&format!("offset of tensor {name}"))?;
        let elements: u64 = shape.iter().product();
        let columns = shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(format.elements() as u64) {
            let rule = format!("rows of {format:?} are multiples of {}", format.elements());
            return Err(invalid(&format!("row length of tensor {name}"), columns, &rule));
        }
        // At most 2^40 elements of at most 4 bytes: no overflow.
        let bytes = elements / format.elements() as u64 * format.bytes() as u64;
        entries.push(Entry { name, shape, format, relative, bytes });
    }
    Ok(entries)
}

/// The shape of a tensor, outermost dimension first, with at most `ELEMENTS_MAX` elements.
fn read_shape<R: Read>(cursor: &mut Cursor<R>, name: &str) -> Result<Vec<u64>, GgufError> {
    let dimensions = cursor.u32(&format!("dimensions of tensor {name}"))?;
    if dimensions == 0 || dimensions > DIMENSIONS_MAX {
        let rule = format!("1 to {DIMENSIONS_MAX} are allowed");
        return Err(invalid(&format!("dimensions of tensor {name}"), dimensions, &rule));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    let mut elements: u64 = 1;
    for _ in 0..dimensions {
        let size = cursor.u64(&format!("shape of tensor {name}"))?;
        if size == 0 {
            return Err(invalid(&format!("shape of tensor {name}"), 0, "no dimension is empty"));
        }
        let field = || format!("number of elements of tensor {name}");
        elements =
            elements.checked_mul(size).filter(|elements| *elements <= ELEMENTS_MAX).ok_or_else(|| {
                GgufError::Limit { field: field(), value: elements.saturating_mul(size), limit: ELEMENTS_MAX }
            })?;
        shape.push(size);
    }
    shape.reverse();
    Ok(shape)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    const KEY: &str = "general.alignment";
    let value = match metadata.get(KEY) {
        None => return Ok(ALIGNMENT_DEFAULT),
        Some(Value::Integer(value)) => *value,
        Some(other) => return Err(wrong_kind(KEY, other, "an integer")),
    };
    match u64::try_from(value) {
        Ok(value) if value.is_power_of_two() && (8..=ALIGNMENT_MAX).contains(&value) => Ok(value),
        _ => Err(invalid(KEY, value, &format!("it must be a power of two from 8 to {ALIGNMENT_MAX}"))),
    }
}

/// Gives every tensor its absolute offset. As ggml does, data must follow each other in the order of the
/// directory with padding only, which rules out overlap, gaps and anything hidden behind the last tensor.
fn place(entries: Vec<Entry>, header: u64, alignment: u64, len: u64) -> Result<Vec<TensorInfo>, GgufError> {
    // The header is at most 256 MiB and the alignment at most 64 KiB.
    let start = header.next_multiple_of(alignment);
    let mut expected: u64 = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        if entry.relative != expected {
            let rule = format!("it must be {expected}, where the data before it end");
            return Err(invalid(&format!("offset of tensor {}", entry.name), entry.relative, &rule));
        }
        // Tensors are at most 20,000 of at most 4 TiB; `expected` is checked against the file each time.
        let offset = start + expected;
        let bytes = entry.bytes;
        if offset.checked_add(bytes).is_none_or(|end| end > len) {
            return Err(GgufError::Truncated {
                field: format!("data of tensor {}", entry.name),
                offset,
                bytes,
                len,
            });
        }
        expected += bytes.next_multiple_of(alignment);
        tensors.push(TensorInfo {
            name: entry.name,
            shape: entry.shape,
            format: entry.format,
            offset,
            bytes,
        });
    }
    let end = start + expected;
    if len > end {
        let rule = format!("the last tensor and its padding end at {end}");
        return Err(invalid("size of the file", len, &rule));
    }
    Ok(tensors)
}
