//! The tensors of a local model folder: `model.safetensors`, or the shards that its index names.
//!
//! Files are mapped, not read: what is loaded goes from the page cache straight to the device's form. Refused:
//! headers, tensors and files beyond the limits, shards outside of the folder, tensors in two files or in
//! another file than the index says, types that are no floats, and data that do not fill a file exactly.

use std::collections::HashMap;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::source::{SourceError, StoredDtype, StoredTensor, TensorSource};
use crate::folder::map::MappedFile;

/// Most files that an index may name, as in a manifest.
const FILES_MAX: usize = crate::folder::manifest::FILES_MAX;
/// Most tensors of a model. The largest dense ones have some thousands, mixtures of experts some 100,000.
const TENSORS_MAX: usize = 1 << 18;
/// Bytes of a file's header: 256 for each of the most tensors would be 64 MiB.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Bytes of an index; as a header, which it repeats.
const INDEX_BYTES_MAX: u64 = HEADER_BYTES_MAX;
/// The name of the index.
const INDEX: &str = "model.safetensors.index.json";
/// The name of a model's only file.
const SINGLE: &str = "model.safetensors";

/// Why a folder's tensors cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{file}: {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// A number is beyond its limit.
    #[error("{file}: {field} is {value}; the limit is {limit}")]
    Limit {
        /// The file.
        file: String,
        /// What the number counts.
        field: &'static str,
        /// The number.
        value: u64,
        /// The largest one allowed.
        limit: u64,
    },
}

#[derive(Debug, Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: StoredDtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// All tensors of a folder, mapped.
#[derive(Debug)]
pub struct Files {
    files: Vec<MappedFile>,
    tensors: HashMap<String, Entry>,
}

impl Files {
    /// Maps a folder's files and reads their headers.
    ///
    /// # Errors
    /// When a file is missing, malformed or beyond a limit; the error names it.
    pub fn read(folder: &Path) -> Result<Self, FilesError> {
        let index = read_index(folder)?;
        let names: BTreeSet<&str> = match &index {
            Some(index) => index.weight_map.values().map(String::as_str).collect(),
            None => BTreeSet::from([SINGLE]),
        };
        limited(INDEX, "number of files", names.len() as u64, FILES_MAX as u64)?;
        if let Some(name) = names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
            return Err(malformed(INDEX, format!("file {name:?} is not a plain name")));
        }
        let mut all = Self { files: Vec::new(), tensors: HashMap::new() };
        for name in names {
            all.add(folder, name)?;
        }
        if let Some(index) = &index {
            all.check_places(index)?;
        }
        Ok(all)
    }

    /// Maps one file and takes its tensors in.
    fn add(&mut self, folder: &Path, name: &str) -> Result<(), FilesError> {
        let file = MappedFile::open(&folder.join(name))
            .map_err(|source| FilesError::Read { file: name.to_owned(), source })?;
        if let Some(length) = file.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) {
            limited(name, "size of the header", length, HEADER_BYTES_MAX)?;
        }
        let parsed = SafeTensors::deserialize(&file).map_err(|error| malformed(name, error.to_string()))?;
        limited(name, "number of tensors", (self.tensors.len() + parsed.len()) as u64, TENSORS_MAX as u64)?;
        for (tensor, view) in parsed.iter() {
            let dtype = match view.dtype() {
                Dtype::F32 => StoredDtype::F32,
                Dtype::F16 => StoredDtype::F16,
                Dtype::BF16 => StoredDtype::Bf16,
                other => {
                    let reason = format!("tensor {tensor:?} has type {other:?}; read are F32, F16 and BF16");
                    return Err(malformed(name, reason));
                }
            };
            let start = view.data().as_ptr() as usize - file.as_ptr() as usize;
            let range = start..start + view.data().len();
            let entry = Entry { file: self.files.len(), dtype, shape: view.shape().to_vec(), range };
            if self.tensors.insert(tensor.to_owned(), entry).is_some() {
                return Err(malformed(name, format!("tensor {tensor:?} is in another file too")));
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Whether each tensor of the index lies in the file that the index says. Files were added in the order of
    /// their names.
    fn check_places(&self, index: &Index) -> Result<(), FilesError> {
        let names: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        let number: HashMap<&str, usize> = names.into_iter().zip(0..).collect();
        let lies = |(tensor, file): &(&String, &String)| {
            self.tensors.get(*tensor).is_some_and(|entry| Some(&entry.file) == number.get(file.as_str()))
        };
        match index.weight_map.iter().find(|place| !lies(place)) {
            Some((tensor, file)) => Err(malformed(INDEX, format!("tensor {tensor:?} is not in {file}"))),
            None => Ok(()),
        }
    }
}

fn malformed(file: &str, reason: String) -> FilesError {
    FilesError::Malformed { file: file.to_owned(), reason }
}

fn limited(file: &str, field: &'static str, value: u64, limit: u64) -> Result<(), FilesError> {
    if value > limit {
        return Err(FilesError::Limit { file: file.to_owned(), field, value, limit });
    }
    Ok(())
}

/// The index, if the folder has one.
fn read_index(folder: &Path) -> Result<Option<Index>, FilesError> {
    let unreadable = |source| FilesError::Read { file: INDEX.to_owned(), source };
    let file = match std::fs::File::open(folder.join(INDEX)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    limited(INDEX, "size in bytes", file.metadata().map_err(unreadable)?.len(), INDEX_BYTES_MAX)?;
    let mut text = String::new();
    file.take(INDEX_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
    let index: Index = serde_json::from_str(&text).map_err(|error| malformed(INDEX, error.to_string()))?;
    if index.weight_map.is_empty() {
        return Err(malformed(INDEX, "weight_map names no tensor; at least 1 is needed".to_owned()));
    }
    Ok(Some(index))
}

impl TensorSource for Files {
    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, SourceError> {
        let entry = self.tensors.get(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
        let data = &self.files[entry.file][entry.range.clone()];
        Ok(StoredTensor { dtype: entry.dtype, shape: entry.shape.clone(), data })
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

#[cfg(test)]
mod tests;
