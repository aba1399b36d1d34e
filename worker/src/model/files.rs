//! The tensors of a local model folder: `model.safetensors`, or the shards that its index names.
//!
//! Files are read whole, not mapped. Refused: shards outside of the folder, tensors in two files, types that
//! are no floats.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::source::{SourceError, StoredDtype, StoredTensor, TensorSource};

/// Most files that an index may name.
const FILES_MAX: usize = 10_000;

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
}

#[derive(Debug, Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: StoredDtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// All tensors of a folder, in memory.
#[derive(Debug)]
pub struct Files {
    files: Vec<Vec<u8>>,
    tensors: HashMap<String, Entry>,
}

impl Files {
    /// Reads a folder.
    ///
    /// # Errors
    /// When a file is missing or malformed; the error names it.
    pub fn read(folder: &Path) -> Result<Self, FilesError> {
        let mut all = Self { files: Vec::new(), tensors: HashMap::new() };
        for name in file_names(folder)? {
            let malformed = |reason: String| FilesError::Malformed { file: name.clone(), reason };
            let path = folder.join(&name);
            let bytes =
                std::fs::read(&path).map_err(|source| FilesError::Read { file: name.clone(), source })?;
            let parsed = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
            for (tensor, view) in parsed.iter() {
                let dtype = match view.dtype() {
                    Dtype::F32 => StoredDtype::F32,
                    Dtype::F16 => StoredDtype::F16,
                    Dtype::BF16 => StoredDtype::Bf16,
                    other => return Err(malformed(format!("tensor {tensor:?} has type {other:?}"))),
                };
                let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                let range = start..start + view.data().len();
                let entry = Entry { file: all.files.len(), dtype, shape: view.shape().to_vec(), range };
                if all.tensors.insert(tensor.to_owned(), entry).is_some() {
                    return Err(malformed(format!("tensor {tensor:?} is in another file too")));
                }
            }
            all.files.push(bytes);
        }
        Ok(all)
    }
}

/// The safetensors files of a folder.
fn file_names(folder: &Path) -> Result<Vec<String>, FilesError> {
    let index = "model.safetensors.index.json";
    if !folder.join(index).exists() {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let malformed = |reason: String| FilesError::Malformed { file: index.to_owned(), reason };
    let text = std::fs::read_to_string(folder.join(index))
        .map_err(|source| FilesError::Read { file: index.to_owned(), source })?;
    let parsed: Index = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if names.len() > FILES_MAX {
        return Err(malformed(format!("{} files; the limit is {FILES_MAX}", names.len())));
    }
    match names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        Some(name) => Err(malformed(format!("file {name:?} is not a plain name"))),
        None => Ok(names.into_iter().collect()),
    }
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
