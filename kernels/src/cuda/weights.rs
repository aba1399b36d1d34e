//! Weights on the device: bf16 matrices with their tensor maps, f32 vectors.
//!
//! Rows go through two pinned buffers in turn, so that the host fills one while the device copies the other. A matrix
//! row is padded to a multiple of 8 elements. Rows whose sums one thread of a product must hold both alternate by 8:
//! those of gate and up projections, and those of the two halves of a head that RoPE turns.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;
use half::bf16;

use super::device::{CudaDevice, DeviceError, DeviceMemory, Pinned};
use crate::tensor::{DType, HostTensor, LoadError};

/// Rows that alternate with others; the distance of two rows that one thread of a tensor core holds.
pub const PAIR_ROWS: usize = 8;
/// Bytes of each pinned buffer.
const STAGING_BYTES: usize = 32 << 20;
/// Elements that a row's length is rounded up to: 16 bytes, which the copy engine asks for.
const ROW_ELEMENTS: usize = 8;

/// A matrix of `features` rows and `columns` columns on the device.
#[derive(Debug)]
pub struct DeviceMatrix {
    memory: DeviceMemory,
    /// Rows, padding of gated matrices included.
    pub features: usize,
    /// Columns.
    pub columns: usize,
    /// Elements from row to row.
    pub stride: usize,
    /// Boxes of 64 rows and 64 columns, on Hopper.
    pub map: Option<sys::CUtensorMap>,
    /// Whether rows of the two halves of each head alternate.
    pub paired: bool,
}

impl DeviceMatrix {
    /// Where it starts.
    pub fn pointer(&self) -> u64 {
        self.memory.pointer()
    }
}

/// Boxes of `box_rows` rows and 64 columns, swizzled by 128 bytes, of bf16 rows; outside is zero. Chips before Hopper
/// have none.
pub fn tensor_map(
    pointer: u64,
    (rows, columns): (usize, usize),
    stride: usize,
    box_rows: usize,
) -> Result<sys::CUtensorMap, DeviceError> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let dimensions = [columns as u64, rows as u64];
    let strides = [(stride * 2) as u64];
    let (boxes, elements) = ([64, box_rows as u32], [1, 1]);
    // SAFETY: all pointers are to arrays of the rank that is given; the map is only a description.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            pointer as *mut c_void,
            dimensions.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            elements.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    code.result()?;
    Ok(map)
}

/// Where a matrix's rows come from.
enum Source<'a> {
    Stacked(&'a [HostTensor<'a>]),
    /// Heads of this many rows, whose halves alternate.
    Paired(&'a [HostTensor<'a>], usize),
    Gated(&'a HostTensor<'a>, &'a HostTensor<'a>),
}

/// A run of rows of one tensor.
struct Run<'a> {
    tensor: &'a HostTensor<'a>,
    first: usize,
    rows: usize,
}

/// Copies weights to the device.
#[derive(Debug)]
pub struct Upload {
    device: Arc<CudaDevice>,
    staging: [Pinned; 2],
    /// Which buffer is filled next; the other may be on its way.
    turn: usize,
    copies: u64,
}

fn failed(error: DeviceError) -> LoadError {
    LoadError::Device(error.to_string())
}

impl Upload {
    /// Takes the pinned buffers.
    ///
    /// # Errors
    /// When the system has no memory to lock.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Self, DeviceError> {
        let staging = [Pinned::zeroed(device, STAGING_BYTES)?, Pinned::zeroed(device, STAGING_BYTES)?];
        Ok(Self { device: device.clone(), staging, turn: 0, copies: 0 })
    }

    /// Loads a matrix, the parts stacked by rows.
    ///
    /// # Errors
    /// When the parts do not fit each other or the device fails.
    pub fn stacked(&mut self, parts: &[HostTensor<'_>]) -> Result<DeviceMatrix, LoadError> {
        let (features, columns) = Self::stack(parts)?;
        self.matrix(&Source::Stacked(parts), features, columns)
    }

    /// Loads a QKV matrix for products that turn heads.
    ///
    /// # Errors
    /// When the parts do not fit each other or the device fails.
    pub fn paired(&mut self, parts: &[HostTensor<'_>], head_dim: usize) -> Result<DeviceMatrix, LoadError> {
        let (features, columns) = Self::stack(parts)?;
        assert_eq!(features % head_dim, 0, "rows of whole heads");
        Ok(DeviceMatrix { paired: true, ..self.matrix(&Source::Paired(parts, head_dim), features, columns)? })
    }

    /// Rows and columns of parts that are stacked.
    fn stack(parts: &[HostTensor<'_>]) -> Result<(usize, usize), LoadError> {
        let first = parts.first().ok_or(LoadError::Empty)?;
        let (_, columns) = first.matrix_shape()?;
        let mut features = 0;
        for part in parts {
            let (rows, found) = part.matrix_shape()?;
            if found != columns {
                return Err(LoadError::Columns { expected: columns, found });
            }
            features += rows;
        }
        Ok((features, columns))
    }

    /// Loads a gate and an up projection.
    ///
    /// # Errors
    /// When their shapes differ or the device fails.
    pub fn gated(&mut self, gate: &HostTensor<'_>, up: &HostTensor<'_>) -> Result<DeviceMatrix, LoadError> {
        let ((gate_rows, columns), (up_rows, found)) = (gate.matrix_shape()?, up.matrix_shape()?);
        if found != columns {
            return Err(LoadError::Columns { expected: columns, found });
        }
        if gate_rows != up_rows {
            return Err(LoadError::Gate { gate: gate_rows, up: up_rows });
        }
        let features = 2 * gate_rows.next_multiple_of(PAIR_ROWS);
        self.matrix(&Source::Gated(gate, up), features, columns)
    }

    /// Loads a vector, the parts one after the other.
    ///
    /// # Errors
    /// When a part is no vector or the device fails.
    pub fn vector(&mut self, parts: &[HostTensor<'_>]) -> Result<(DeviceMemory, usize), LoadError> {
        let lens = parts.iter().map(HostTensor::vector_len).collect::<Result<Vec<_>, _>>()?;
        if lens.is_empty() {
            return Err(LoadError::Empty);
        }
        let len: usize = lens.iter().sum();
        let mut values = vec![0.0_f32; len];
        let mut first = 0;
        for (part, len) in parts.iter().zip(lens) {
            part.read_f32(0, &mut values[first..first + len]);
            first += len;
        }
        let memory = DeviceMemory::zeroed(&self.device, len * 4).map_err(failed)?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        for (index, chunk) in bytes.chunks(STAGING_BYTES).enumerate() {
            let staging = self.next_staging().map_err(failed)?;
            staging.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
            self.send(&memory, index * STAGING_BYTES, chunk.len()).map_err(failed)?;
        }
        Ok((memory, len))
    }

    fn matrix(
        &mut self,
        source: &Source<'_>,
        features: usize,
        columns: usize,
    ) -> Result<DeviceMatrix, LoadError> {
        let stride = columns.next_multiple_of(ROW_ELEMENTS);
        let row_bytes = stride * 2;
        let memory = DeviceMemory::zeroed(&self.device, features * row_bytes).map_err(failed)?;
        let rows_max = STAGING_BYTES / row_bytes;
        if rows_max == 0 {
            return Err(LoadError::Device(format!(
                "a row of {row_bytes} bytes; {STAGING_BYTES} are the most"
            )));
        }
        let mut first = 0;
        while first < features {
            let rows = rows_max.min(features - first);
            let staging = self.next_staging().map_err(failed)?;
            let target = &mut staging.as_mut_slice()[..rows * row_bytes];
            fill(source, (first, rows, columns), row_bytes, target);
            self.send(&memory, first * row_bytes, rows * row_bytes).map_err(failed)?;
            first += rows;
        }
        let map = || tensor_map(memory.pointer(), (features, columns), stride, 64);
        let map = self.device.hopper.then(map).transpose().map_err(failed)?;
        Ok(DeviceMatrix { memory, features, columns, stride, map, paired: false })
    }

    /// A pinned buffer that no copy reads any more.
    fn next_staging(&mut self) -> Result<&mut Pinned, DeviceError> {
        self.device.bind()?;
        if self.turn == 0 && self.copies > 0 {
            // Both buffers may be on their way: the copies before must end, while the other buffer was filled.
            self.device.synchronize()?;
        }
        Ok(&mut self.staging[self.turn])
    }

    fn send(&mut self, memory: &DeviceMemory, offset: usize, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the buffer is not written again before `next_staging` has waited for this copy.
        unsafe { memory.upload(offset, &self.staging[self.turn].as_slice()[..bytes]) }?;
        self.turn = 1 - self.turn;
        self.copies += 1;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // The pinned buffers may still be read. A failure shows at the next use of the device.
        let _ = self.device.synchronize();
    }
}

/// The run of rows that stands at this row of the matrix on the device; none is padding.
fn run_at<'a>(source: &'a Source<'a>, row: usize) -> Option<Run<'a>> {
    let inside = row % PAIR_ROWS;
    let (pair, second) = (row / (2 * PAIR_ROWS), row / PAIR_ROWS % 2);
    match source {
        Source::Stacked(parts) => stacked_at(parts, row),
        Source::Paired(parts, head_dim) => {
            let (head, pair) = (row / head_dim, pair % (head_dim / (2 * PAIR_ROWS)));
            let source = head * head_dim + second * (head_dim / 2) + pair * PAIR_ROWS + inside;
            let run = stacked_at(parts, source)?;
            Some(Run { rows: run.rows.min(PAIR_ROWS - inside), ..run })
        }
        Source::Gated(gate, up) => {
            let tensor = if second == 0 { gate } else { up };
            let first = pair * PAIR_ROWS + inside;
            let left = tensor.shape()[0].checked_sub(first).filter(|&left| left > 0)?;
            Some(Run { tensor, first, rows: left.min(PAIR_ROWS - inside) })
        }
    }
}

fn stacked_at<'a>(parts: &'a [HostTensor<'a>], row: usize) -> Option<Run<'a>> {
    let mut first = row;
    for part in parts {
        let rows = part.shape()[0];
        if first < rows {
            return Some(Run { tensor: part, first, rows: rows - first });
        }
        first -= rows;
    }
    None
}

fn fill(
    source: &Source<'_>,
    (first, rows, columns): (usize, usize, usize),
    row_bytes: usize,
    target: &mut [u8],
) {
    let mut row = 0;
    while row < rows {
        let Some(run) = run_at(source, first + row) else {
            target[row * row_bytes..][..row_bytes].fill(0);
            row += 1;
            continue;
        };
        let count = run.rows.min(rows - row);
        let target = &mut target[row * row_bytes..][..count * row_bytes];
        if let Some((DType::Bf16, bytes)) = run.tensor.as_dense()
            && row_bytes == columns * 2
        {
            target.copy_from_slice(&bytes[run.first * row_bytes..][..count * row_bytes]);
        } else {
            let mut values = vec![0.0_f32; columns];
            for (index, target) in target.chunks_exact_mut(row_bytes).enumerate() {
                run.tensor.read_f32((run.first + index) * columns, &mut values);
                target.fill(0);
                for (value, out) in values.iter().zip(target.chunks_exact_mut(2)) {
                    out.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
                }
            }
        }
        row += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(bytes: &[u8], rows: usize, columns: usize) -> HostTensor<'_> {
        HostTensor::new(DType::F32, &[rows, columns], bytes).unwrap()
    }

    fn filled(source: &Source<'_>, rows: usize, columns: usize) -> Vec<f32> {
        let row_bytes = columns.next_multiple_of(ROW_ELEMENTS) * 2;
        let mut target = vec![0xff; rows * row_bytes];
        // In two pieces, as staging would cut them.
        let (head, tail) = target.split_at_mut(3 * row_bytes);
        fill(source, (0, 3, columns), row_bytes, head);
        fill(source, (3, rows - 3, columns), row_bytes, tail);
        let value = |raw: &[u8]| bf16::from_le_bytes([raw[0], raw[1]]).to_f32();
        target.chunks_exact(row_bytes).map(value).collect()
    }

    #[test]
    fn rows_are_stacked_and_gates_alternate_with_ups() {
        let bytes = |first: usize, rows: usize| -> Vec<u8> {
            (first..first + rows).flat_map(|row| [row as f32; 3]).flat_map(f32::to_le_bytes).collect()
        };
        let (a, b) = (bytes(0, 4), bytes(100, 10));
        let parts = [tensor(&a, 4, 3), tensor(&b, 10, 3)];
        let stacked = filled(&Source::Stacked(&parts), 14, 3);
        assert_eq!(stacked[..6], [0.0, 1.0, 2.0, 3.0, 100.0, 101.0]);
        let (gate, up) = (bytes(0, 10), bytes(100, 10));
        let (gate, up) = (tensor(&gate, 10, 3), tensor(&up, 10, 3));
        let gated = filled(&Source::Gated(&gate, &up), 32, 3);
        assert_eq!((gated[0], gated[7], gated[8], gated[15]), (0.0, 7.0, 100.0, 107.0));
        assert_eq!((gated[16], gated[17], gated[18], gated[25]), (8.0, 9.0, 0.0, 109.0));
    }

    #[test]
    fn codes_become_the_weights_that_they_stand_for() {
        use crate::coded::{CodeKind, Coded, Zeros};
        let coded = |first: u8| Coded {
            kind: CodeKind::Uint4,
            rows: 4,
            columns: 3,
            codes: (0..8).map(|at| first + at).collect::<Vec<u8>>().into(),
            row_bytes: 2,
            block: (1, 2),
            scales: (1_u8..=8).map(f32::from).collect(),
            zeros: Zeros::Same(8),
            order: Vec::new(),
        };
        let parts = [0, 16].map(|first| HostTensor::coded(coded(first)).unwrap());
        let firsts = filled(&Source::Stacked(&parts), 8, 3);
        // Low halves of the first bytes, less 8, times the scale of each row's first group.
        assert_eq!(firsts, [-8.0, -18.0, -20.0, -14.0, -8.0, -18.0, -20.0, -14.0]);
    }

    #[test]
    fn halves_of_heads_alternate() {
        let bytes = |first: usize, rows: usize| -> Vec<u8> {
            (first..first + rows).flat_map(|row| [row as f32; 3]).flat_map(f32::to_le_bytes).collect()
        };
        // Two heads of queries and one of keys, of 32 elements.
        let (q, k) = (bytes(0, 64), bytes(100, 32));
        let paired = filled(&Source::Paired(&[tensor(&q, 64, 3), tensor(&k, 32, 3)], 32), 96, 3);
        let expected = |row: usize| {
            let (head, inside) = (row / 32, row % 32);
            let element = inside / 16 * 8 + inside % 8 + if inside / 8 % 2 == 1 { 16 } else { 0 };
            (if head == 2 { 100 } else { head * 32 }) + element
        };
        assert_eq!(paired, (0..96).map(|row| expected(row) as f32).collect::<Vec<_>>());
    }
}
