//! Tensors as the host hands them over, and aligned memory for packed ones.
//!
//! A [`HostTensor`] borrows bytes (usually of a mapped file) and refuses a length that does not fit its shape.
//! [`Aligned`] is a fixed block of memory on a cache line boundary; it never grows, so that nothing in a step
//! can allocate through it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use half::{bf16, f16};

use crate::coded::Coded;
use crate::region::{LEAST_BYTES, Region};

/// Number format of a host tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

/// Why a host tensor cannot become a weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Bytes and shape disagree.
    #[error("tensor of shape {shape:?} needs {expected} bytes, not {found}")]
    Length {
        /// The shape given.
        shape: Vec<usize>,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Codes, scales and zeros do not fit each other.
    #[error("{field} is {found}; it must be {expected}")]
    Codes {
        /// What does not fit.
        field: &'static str,
        /// What it is.
        found: usize,
        /// What it must be.
        expected: usize,
    },
    /// A matrix needs two dimensions, a vector one, and none may be empty.
    #[error("tensor of shape {shape:?} is not a {wanted} with at least one element")]
    Rank {
        /// The shape given.
        shape: Vec<usize>,
        /// "matrix" or "vector".
        wanted: &'static str,
    },
    /// Parts that are stacked must have equal columns.
    #[error("a part of {found} columns cannot be stacked onto one of {expected} columns")]
    Columns {
        /// Columns of the first part.
        expected: usize,
        /// Columns of this part.
        found: usize,
    },
    /// Gate and up must have equal rows.
    #[error("gate has {gate} rows, up has {up}; they must be equal")]
    Gate {
        /// Rows of the gate.
        gate: usize,
        /// Rows of the up projection.
        up: usize,
    },
    /// The device has too little memory, or failed.
    #[error("device: {0}")]
    Device(String),
    /// Nothing was given.
    #[error("no tensor was given; at least 1 is needed")]
    Empty,
}

/// A tensor in the host's memory: numbers (little-endian, row-major, contiguous), or a matrix of codes with scales.
#[derive(Debug, Clone)]
pub struct HostTensor<'a> {
    shape: Vec<usize>,
    elements: Elements<'a>,
}

#[derive(Debug, Clone)]
enum Elements<'a> {
    Dense(DType, &'a [u8]),
    /// Rows of a matrix, from this one on.
    Coded(Arc<Coded<'a>>, usize),
}

impl<'a> HostTensor<'a> {
    /// Wraps bytes.
    ///
    /// # Errors
    /// When the bytes are not exactly those of the shape.
    pub fn new(dtype: DType, shape: &[usize], bytes: &'a [u8]) -> Result<Self, LoadError> {
        let expected = shape
            .iter()
            .try_fold(dtype.bytes(), |product, &extent| product.checked_mul(extent))
            .unwrap_or(usize::MAX);
        if expected != bytes.len() {
            return Err(LoadError::Length { shape: shape.to_vec(), expected, found: bytes.len() });
        }
        Ok(Self { shape: shape.to_vec(), elements: Elements::Dense(dtype, bytes) })
    }

    /// Wraps a matrix of codes.
    ///
    /// # Errors
    /// When its lengths do not fit each other.
    pub fn coded(coded: Coded<'a>) -> Result<Self, LoadError> {
        coded.check()?;
        let shape = vec![coded.rows, coded.columns];
        Ok(Self { shape, elements: Elements::Coded(Arc::new(coded), 0) })
    }

    /// Number format and bytes, unless these are codes.
    pub fn as_dense(&self) -> Option<(DType, &'a [u8])> {
        match self.elements {
            Elements::Dense(dtype, bytes) => Some((dtype, bytes)),
            Elements::Coded(..) => None,
        }
    }

    /// The codes, and which of their rows is this matrix' first.
    pub fn as_coded(&self) -> Option<(&Coded<'a>, usize)> {
        match &self.elements {
            Elements::Dense(..) => None,
            Elements::Coded(coded, first) => Some((coded, *first)),
        }
    }

    /// Some of a matrix' rows.
    ///
    /// # Errors
    /// When this is no matrix.
    ///
    /// # Panics
    /// When it has fewer rows.
    pub fn part(&self, first: usize, rows: usize) -> Result<Self, LoadError> {
        let (all, columns) = self.matrix_shape()?;
        assert!(first + rows <= all, "rows {first} + {rows} of {all}");
        let elements = match &self.elements {
            Elements::Dense(dtype, bytes) => {
                let row = columns * dtype.bytes();
                Elements::Dense(*dtype, &bytes[first * row..(first + rows) * row])
            }
            Elements::Coded(coded, before) => Elements::Coded(coded.clone(), before + first),
        };
        Ok(Self { shape: vec![rows, columns], elements })
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Rows and columns.
    ///
    /// # Errors
    /// When this is no matrix.
    pub fn matrix_shape(&self) -> Result<(usize, usize), LoadError> {
        match self.shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(LoadError::Rank { shape: self.shape.clone(), wanted: "matrix" }),
        }
    }

    /// Number of elements of a vector.
    ///
    /// # Errors
    /// When this is no vector.
    pub fn vector_len(&self) -> Result<usize, LoadError> {
        match self.shape[..] {
            [len] if len > 0 => Ok(len),
            _ => Err(LoadError::Rank { shape: self.shape.clone(), wanted: "vector" }),
        }
    }

    /// Writes elements `first..first + out.len()` as single precision.
    ///
    /// # Panics
    /// When the tensor has fewer elements.
    pub fn read_f32(&self, first: usize, out: &mut [f32]) {
        let (dtype, bytes) = match &self.elements {
            Elements::Dense(dtype, bytes) => (*dtype, *bytes),
            Elements::Coded(coded, before) => {
                let (mut at, mut rest) = (first, out);
                while !rest.is_empty() {
                    let (row, column) = (at / coded.columns, at % coded.columns);
                    let (part, others) = rest.split_at_mut(rest.len().min(coded.columns - column));
                    coded.read(before + row, column, part);
                    (at, rest) = (at + part.len(), others);
                }
                return;
            }
        };
        let size = dtype.bytes();
        let bytes = &bytes[first * size..(first + out.len()) * size];
        match dtype {
            DType::F32 => {
                for (out, raw) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *out = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                }
            }
            DType::F16 => {
                for (out, raw) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = f16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
            }
            DType::Bf16 => {
                for (out, raw) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = bf16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
            }
        }
    }
}

/// Alignment of packed memory: one cache line, one AVX-512 register, one AMX tile row.
pub const ALIGNMENT: usize = 64;

/// Plain numbers: every bit pattern is a value, zero bytes included.
///
/// # Safety
/// Only for types without padding, references or invalid bit patterns.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: every bit pattern of these primitive types is a value.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}

/// Zeroed memory of a fixed length on a boundary of [`ALIGNMENT`] bytes.
#[derive(Debug)]
pub struct Aligned<T: Plain> {
    pointer: *mut T,
    len: usize,
    /// Of large memory, which is part of one.
    region: Option<Arc<Region>>,
}

// SAFETY: it owns its memory alone, and `Plain` values may be sent and shared.
unsafe impl<T: Plain> Send for Aligned<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Plain> Sync for Aligned<T> {}

impl<T: Plain> Aligned<T> {
    /// Takes the memory for `len` elements, all zero.
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        if layout.size() >= LEAST_BYTES {
            let (pointer, region) = Region::take(layout.size());
            return Self { pointer: pointer.cast(), len, region: Some(region) };
        }
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) }.cast::<T>();
        if pointer.is_null() {
            handle_alloc_error(layout);
        }
        Self { pointer, len, region: None }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<T>()).expect("length in bytes fits the address space");
        Layout::from_size_align(bytes.max(1), ALIGNMENT).expect("length in bytes fits the address space")
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the memory holds `len` initialised elements and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and self is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T: Plain> Drop for Aligned<T> {
    fn drop(&mut self) {
        if self.region.is_none() {
            // SAFETY: allocated in `zeroed` with this same layout.
            unsafe { dealloc(self.pointer.cast(), Self::layout(self.len)) };
        }
    }
}
