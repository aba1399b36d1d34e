//! Writes the model folder: small JSON files, sharded safetensors and the manifest.
//!
//! Everything goes into a hidden folder beside the target and is renamed at the end, so that a target that
//! exists is complete. Equal inputs give equal bytes. Memory is bounded by one band of rows (see `ROWS_BYTES_MAX`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value as Json, json};

use super::layout::PlannedTensor;
use super::parts::Parts;
use super::{ImportDtype, ImportError, io_error};
use crate::folder::hash::FileHash;
use crate::folder::manifest::{FileEntry, MANIFEST_NAME, Manifest};

/// Numbers that are converted at once, about: 4 MiB as f32.
const BAND_ELEMENTS: u64 = 1 << 20;
/// Numbers in one row or rotary head: what must be in memory together.
const BAND_ELEMENTS_MAX: u64 = 1 << 28;

/// A folder under construction; removed when it is dropped before `finish`.
pub struct OutputFolder {
    target: PathBuf,
    partial: PathBuf,
    files: Vec<FileEntry>,
    finished: bool,
}

impl OutputFolder {
    /// Begins a folder that will appear at `target`, which must not exist or be empty.
    pub fn create(target: &Path) -> Result<Self, ImportError> {
        let exists = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        if exists(target) || target.is_file() {
            return Err(ImportError::OutputExists { path: target.to_owned() });
        }
        let name = target.file_name().ok_or_else(|| ImportError::OutputName { path: target.to_owned() })?;
        let partial =
            target.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
        fs::create_dir_all(&partial).map_err(|source| io_error("create", &partial, source))?;
        Ok(Self { target: target.to_owned(), partial, files: Vec::new(), finished: false })
    }

    /// Where the files are until the folder is finished.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Writes a small file.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), ImportError> {
        let mut file = self.open(name)?;
        file.write(bytes)?;
        self.files.push(file.finish()?);
        Ok(())
    }

    /// Writes a JSON file, indented as Hugging Face does, with a newline at its end.
    pub fn write_json(&mut self, name: &str, json: &Json) -> Result<(), ImportError> {
        let mut bytes = serde_json::to_vec_pretty(json).expect("a JSON value always serialises");
        bytes.push(b'\n');
        self.write(name, &bytes)
    }

    /// Writes the tensors into as many shards as their sizes need, and the index when there are several.
    pub fn write_tensors(
        &mut self,
        source: &Parts,
        tensors: &[PlannedTensor],
        shape: &TensorShape,
    ) -> Result<(), ImportError> {
        let shards = split(tensors, shape);
        let mut index = Map::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            for tensor in *shard {
                index.insert(tensor.name.clone(), json!(name));
            }
            let mut file = self.open(&name)?;
            file.write(&header(shard, shape.dtype))?;
            for tensor in *shard {
                convert(source, tensor, shape.dtype, &mut file)?;
            }
            self.files.push(file.finish()?);
        }
        if shards.len() > 1 {
            let total: u64 = tensors.iter().map(|tensor| shape.bytes(tensor)).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": index});
            self.write_json("model.safetensors.index.json", &index)?;
        }
        Ok(())
    }

    /// Writes the manifest and lets the folder appear under its name.
    pub fn finish(mut self) -> Result<Manifest, ImportError> {
        let manifest = Manifest::new(std::mem::take(&mut self.files))?;
        let mut file = self.open(MANIFEST_NAME)?;
        file.write(&manifest.canonical())?;
        file.finish()?;
        sync(&self.partial)?;
        // A rename replaces an empty folder, and nothing else.
        fs::rename(&self.partial, &self.target)
            .map_err(|source| io_error("rename to", &self.target, source))?;
        self.finished = true;
        if let Some(parent) = self.target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync(parent)?;
        }
        Ok(manifest)
    }

    fn open(&self, name: &str) -> Result<HashedFile, ImportError> {
        let path = self.partial.join(name);
        let file = File::create(&path).map_err(|source| io_error("create", &path, source))?;
        let (name, writer) = (name.to_owned(), BufWriter::with_capacity(1 << 20, file));
        Ok(HashedFile { name, path, writer, hash: FileHash::new() })
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if !self.finished {
            // The import failed already; what cannot be removed is only a leftover.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

fn sync(path: &Path) -> Result<(), ImportError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| io_error("sync", path, source))
}

/// A file that is hashed as it is written.
struct HashedFile {
    name: String,
    path: PathBuf,
    writer: BufWriter<File>,
    hash: FileHash,
}

impl HashedFile {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        self.hash.update(bytes);
        self.writer.write_all(bytes).map_err(|source| io_error("write", &self.path, source))
    }

    fn finish(self) -> Result<FileEntry, ImportError> {
        let Self { name, path, writer, hash } = self;
        let file = writer.into_inner().map_err(|error| io_error("write", &path, error.into_error()))?;
        file.sync_all().map_err(|source| io_error("sync", &path, source))?;
        Ok(hash.finish(name))
    }
}

/// How tensors are written.
pub struct TensorShape {
    /// The numeric type of every tensor.
    pub dtype: ImportDtype,
    /// Most bytes of data in one file, unless one tensor alone has more.
    pub shard_bytes_max: u64,
}

impl TensorShape {
    fn bytes(&self, tensor: &PlannedTensor) -> u64 {
        tensor.source.elements() * self.dtype.bytes() as u64
    }
}

/// Cuts the tensors, in their order, into shards.
fn split<'a>(tensors: &'a [PlannedTensor], shape: &TensorShape) -> Vec<&'a [PlannedTensor]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        let more = shape.bytes(tensor);
        if index > start && bytes + more > shape.shard_bytes_max {
            shards.push(&tensors[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += more;
    }
    shards.push(&tensors[start..]);
    shards
}

/// Length and JSON of a safetensors header, padded so that the data begin at a multiple of 8 bytes.
fn header(tensors: &[PlannedTensor], dtype: ImportDtype) -> Vec<u8> {
    let mut entries = BTreeMap::new();
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.source.elements() * dtype.bytes() as u64;
        let entry = json!({"dtype": dtype.safetensors(), "shape": tensor.source.shape, "data_offsets": [offset, end]});
        entries.insert(tensor.name.as_str(), entry);
        offset = end;
    }
    let mut object = Map::new();
    object.insert("__metadata__".into(), json!({"format": "pt"}));
    object.extend(entries.into_iter().map(|(name, entry)| (name.to_owned(), entry)));
    let mut text = serde_json::to_vec(&object).expect("a JSON value always serialises");
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// Reads a tensor band by band, dequantises, puts rotary rows into Hugging Face's order, and writes it.
fn convert(
    source: &Parts,
    tensor: &PlannedTensor,
    dtype: ImportDtype,
    output: &mut HashedFile,
) -> Result<(), ImportError> {
    let info = &tensor.source;
    // A bias is a column: one number per row.
    let (rows, columns) = match info.shape.as_slice() {
        [rows] => {
            if tensor.unpermute_rows.is_some() {
                (*rows, 1)
            } else {
                (1, *rows)
            }
        }
        [rows, rest @ ..] => (*rows, rest.iter().product()),
        [] => (1, 1),
    };
    let unit = tensor.unpermute_rows.unwrap_or(1);
    if unit * columns > BAND_ELEMENTS_MAX || !rows.is_multiple_of(unit) {
        return Err(ImportError::RowLength { name: info.name.clone(), elements: unit * columns });
    }
    let rows_at_once = (BAND_ELEMENTS / (unit * columns)).max(1) * unit;
    let row_bytes = info.bytes / rows;
    let mut row = 0;
    let (mut input, mut numbers, mut encoded) = (Vec::new(), Vec::new(), Vec::new());
    while row < rows {
        let count = rows_at_once.min(rows - row);
        input.resize((count * row_bytes) as usize, 0);
        source.read(info, row * row_bytes, &mut input)?;
        numbers.resize((count * columns) as usize, 0.0);
        info.format.dequantize(&input, &mut numbers);
        if let Some(head_rows) = tensor.unpermute_rows {
            unpermute(&mut numbers, head_rows as usize, columns as usize);
        }
        if tensor.offset != 0.0 {
            numbers.iter_mut().for_each(|number| *number += tensor.offset);
        }
        encoded.clear();
        encode(&numbers, dtype, &mut encoded).map_err(|value| ImportError::NotFinite {
            name: info.name.clone(),
            value,
            dtype: dtype.safetensors(),
        })?;
        output.write(&encoded)?;
        row += count;
    }
    Ok(())
}

/// Undoes llama.cpp's interleaving of rotary rows: of each head, row `2 j + s` belongs at `s half + j`.
pub fn unpermute(numbers: &mut [f32], head_rows: usize, columns: usize) {
    let half = head_rows / 2;
    let mut head = vec![0.0; head_rows * columns];
    for permuted in numbers.chunks_exact_mut(head_rows * columns) {
        for (row, values) in permuted.chunks_exact(columns).enumerate() {
            let to = row % 2 * half + row / 2;
            head[to * columns..][..columns].copy_from_slice(values);
        }
        permuted.copy_from_slice(&head);
    }
}

/// Appends the numbers in little-endian `dtype`. A number that is not finite there is the error.
fn encode(numbers: &[f32], dtype: ImportDtype, output: &mut Vec<u8>) -> Result<(), f32> {
    let finite = match dtype {
        ImportDtype::F32 => {
            output.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            numbers.iter().position(|number| !number.is_finite())
        }
        ImportDtype::Bf16 => {
            output.extend(numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()));
            numbers.iter().position(|number| !bf16::from_f32(*number).is_finite())
        }
        ImportDtype::F16 => {
            output.extend(numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()));
            numbers.iter().position(|number| !f16::from_f32(*number).is_finite())
        }
    };
    finite.map_or(Ok(()), |at| Err(numbers[at]))
}
