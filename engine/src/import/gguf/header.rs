//! Reads the header step by step: counts, metadata, directory, and the tensors' places in the file.
//!
//! Nothing is allocated or read before its size was compared with a limit and with what the file has left.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use super::{
    ALIGNMENT_MAX, ARRAY_ELEMENTS_MAX, DIMENSIONS_MAX, ELEMENTS_MAX, ENTRIES_MAX, GgufError,
    HEADER_BYTES_MAX, NAME_BYTES_MAX, STRING_BYTES_MAX, TENSORS_MAX, TensorInfo, Value, invalid, wrong_kind,
};
use crate::import::blocks::BlockFormat;

/// Alignment of tensor data in a file that names none.
const ALIGNMENT_DEFAULT: u64 = 32;

fn limited(field: &str, value: u64, limit: u64) -> Result<u64, GgufError> {
    if value > limit { Err(GgufError::Limit { field: field.into(), value, limit }) } else { Ok(value) }
}

/// A reader that knows where it stands and never reads past the end or the header limit.
pub struct Cursor<R> {
    reader: R,
    position: u64,
    len: u64,
}

impl<R: Read> Cursor<R> {
    /// At the start of a file of `len` bytes.
    pub fn new(reader: R, len: u64) -> Self {
        Self { reader, position: 0, len }
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

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

    fn bytes(&mut self, field: &str, bytes_max: u64) -> Result<Vec<u8>, GgufError> {
        let length = self.u64(field)?;
        limited(&format!("length of {field}"), length, bytes_max)?;
        self.expect(length, field)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, field)?;
        Ok(bytes)
    }

    /// The string of a metadata entry. A description that is no UTF-8 harms nobody; one of the tokenizer does.
    fn value(&mut self, key: &str) -> Result<String, GgufError> {
        if key.starts_with("tokenizer.") {
            return self.text(key, STRING_BYTES_MAX);
        }
        let bytes = self.bytes(key, STRING_BYTES_MAX)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn text(&mut self, field: &str, bytes_max: u64) -> Result<String, GgufError> {
        String::from_utf8(self.bytes(field, bytes_max)?).map_err(|error| {
            invalid(
                field,
                format!("not UTF-8 from byte {}", error.utf8_error().valid_up_to()),
                "strings must be UTF-8",
            )
        })
    }
}

/// Magic, version and both counts.
pub fn read_counts<R: Read>(cursor: &mut Cursor<R>) -> Result<(u64, u64), GgufError> {
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

pub fn read_metadata<R: Read>(
    cursor: &mut Cursor<R>,
    count: u64,
) -> Result<BTreeMap<String, Value>, GgufError> {
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
        8 => Value::Text(cursor.value(key)?),
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
pub struct DirectoryEntry {
    name: String,
    shape: Vec<u64>,
    format: BlockFormat,
    relative: u64,
    bytes: u64,
}

pub fn read_directory<R: Read>(cursor: &mut Cursor<R>, count: u64) -> Result<Vec<DirectoryEntry>, GgufError> {
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
        entries.push(DirectoryEntry { name, shape, format, relative, bytes });
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

pub fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
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
pub fn place(
    entries: Vec<DirectoryEntry>,
    header: u64,
    alignment: u64,
    len: u64,
) -> Result<Vec<TensorInfo>, GgufError> {
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
            part: 0,
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
