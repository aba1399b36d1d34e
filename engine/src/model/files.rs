//! The tensors of a local model folder: `model.safetensors`, or the shards that its index names.
//!
//! Files are mapped, not read: what is loaded goes from the page cache straight to the device's form. Refused:
//! headers, tensors and files beyond the limits, shards outside of the folder, and data that do not fill a file
//! exactly. What nobody asks for refuses nothing: a tensor of a type that is no float, one that lies in two files, or
//! one that the index names and no file has, is an error when it is needed.

use std::collections::HashMap;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::source::{RawDtype, RawTensor, SourceError, StoredDtype, StoredTensor, TensorSource};
use crate::folder::map::MappedFile;
use crate::folder::{json, wrapping};

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

#[derive(Debug, Default, Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// All tensors of a folder, mapped.
#[derive(Debug)]
pub struct Files {
    names: Vec<String>,
    files: Vec<MappedFile>,
    /// By name, wherever one lies.
    tensors: HashMap<String, Vec<Entry>>,
    index: Index,
    /// Files that the index names and the folder lacks.
    missing: BTreeSet<String>,
    /// `model.safetensors` lies beside an index that does not name it.
    unread: bool,
}

impl Files {
    /// Maps a folder's files and reads their headers.
    ///
    /// # Errors
    /// When a file is missing, malformed or beyond a limit; the error names it.
    pub fn read(folder: &Path) -> Result<Self, FilesError> {
        let index = read_index(folder)?;
        let names: BTreeSet<String> = match &index {
            Some(index) => index.weight_map.values().cloned().collect(),
            None => without_index(folder)?,
        };
        limited(INDEX, "number of files", names.len() as u64, FILES_MAX as u64)?;
        if let Some(name) = names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
            return Err(malformed(INDEX, format!("file {name:?} is not a plain name")));
        }
        let mut all = Self {
            names: Vec::new(),
            files: Vec::new(),
            tensors: HashMap::new(),
            missing: BTreeSet::new(),
            unread: index.is_some() && !names.contains(SINGLE) && folder.join(SINGLE).exists(),
            index: index.unwrap_or_default(),
        };
        for name in names {
            all.add(folder, name)?;
        }
        match all.missing.first() {
            Some(name) if all.files.is_empty() && all.unread => {
                let beside = format!("{SINGLE} beside it is not read unless the index is removed");
                Err(malformed(INDEX, format!("it names {name}, which is missing; {beside}")))
            }
            Some(name) if all.files.is_empty() => {
                let source = std::io::ErrorKind::NotFound.into();
                Err(FilesError::Read { file: name.clone(), source })
            }
            _ => Ok(all),
        }
    }

    /// What a user should know about the folder's files though nothing is wrong.
    pub fn notes(&self) -> Vec<String> {
        self.unread
            .then(|| format!("{SINGLE} lies beside {INDEX}, which does not name it, and is not read"))
            .into_iter()
            .collect()
    }

    /// Maps one file and takes its tensors in.
    fn add(&mut self, folder: &Path, name: String) -> Result<(), FilesError> {
        let file = match MappedFile::open(&folder.join(&name)) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.missing.insert(name);
                return Ok(());
            }
            Err(source) => return Err(FilesError::Read { file: name, source }),
        };
        if let Some(what) = wrapping::stands_in(&file) {
            return Err(malformed(&name, format!("it {what}")));
        }
        if let Some(length) = file.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) {
            limited(&name, "size of the header", length, HEADER_BYTES_MAX)?;
        }
        let parsed = SafeTensors::deserialize(&file).map_err(|error| malformed(&name, error.to_string()))?;
        let count = self.tensors.values().map(Vec::len).sum::<usize>() + parsed.len();
        limited(&name, "number of tensors", count as u64, TENSORS_MAX as u64)?;
        for (tensor, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - file.as_ptr() as usize;
            let range = start..start + view.data().len();
            let entry =
                Entry { file: self.files.len(), dtype: view.dtype(), shape: view.shape().to_vec(), range };
            self.tensors.entry(tensor.to_owned()).or_default().push(entry);
        }
        self.files.push(file);
        self.names.push(name);
        Ok(())
    }

    /// The entry of exactly this name: where the index says, else in the only file that has it.
    fn entry(&self, name: &str) -> Result<&Entry, SourceError> {
        let entries = self.tensors.get(name).map(Vec::as_slice).unwrap_or_default();
        let said = self.index.weight_map.get(name);
        if let Some(entry) = entries.iter().find(|entry| said == Some(&self.names[entry.file])) {
            return Ok(entry);
        }
        let unreadable = |reason| Err(SourceError::Unreadable { name: name.to_owned(), reason });
        match (entries, said) {
            ([entry], _) => Ok(entry),
            ([first, second, ..], _) => {
                let (first, second) = (&self.names[first.file], &self.names[second.file]);
                unreadable(format!(
                    "it is in {first} and in {second}, and {INDEX} does not say which to take"
                ))
            }
            ([], Some(file)) if self.missing.contains(file) => {
                unreadable(format!("{INDEX} names {file}, which is missing"))
            }
            ([], Some(file)) => unreadable(format!("{INDEX} says that it is in {file}, and it is not")),
            ([], None) => Err(SourceError::Missing(name.to_owned())),
        }
    }

    /// The entry of a decoder's tensor. A bare model saved alone lacks the `model.` of its names, and one inside of a
    /// model that reads images, too, stands under `language_model`.
    fn find(&self, name: &str) -> Result<&Entry, SourceError> {
        let found = self.entry(name);
        if found.is_ok() {
            return found;
        }
        let bare = name.strip_prefix("model.").unwrap_or(name);
        let others =
            [bare.to_owned(), format!("language_model.{name}"), format!("model.language_model.{bare}")];
        others
            .iter()
            .filter(|other| *other != name)
            .find_map(|other| self.entry(other).ok())
            .map_or(found, Ok)
    }
}

/// The files of a folder that has no index: the only one, or shards that name their number themselves.
fn without_index(folder: &Path) -> Result<BTreeSet<String>, FilesError> {
    let single = || BTreeSet::from([SINGLE.to_owned()]);
    if folder.join(SINGLE).exists() {
        return Ok(single());
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(single()) };
    let names: BTreeSet<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let shards: BTreeSet<String> = names
        .iter()
        .filter(|name| name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors"))
        .cloned()
        .collect();
    if !shards.is_empty() {
        return Ok(shards);
    }
    let of = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    let instead =
        of(&[".gguf"]).map(|name| format!("{name} is there: `millrace import` makes a model folder of it"));
    let instead = instead
        .or_else(|| {
            of(&[".bin", ".pt", ".pth"]).map(|name| format!("{name} is there: save it as safetensors"))
        })
        .or_else(|| {
            let named = of(&[".safetensors"])?;
            Some(format!("{named} is there, which is neither that nor one of its shards"))
        });
    match instead {
        Some(instead) => Err(malformed(SINGLE, format!("it is missing; {instead}"))),
        None => Ok(single()),
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
    let mut bytes = Vec::new();
    file.take(INDEX_BYTES_MAX).read_to_end(&mut bytes).map_err(unreadable)?;
    let index: Index = json::parse(&bytes).map_err(|error| malformed(INDEX, error))?;
    if index.weight_map.is_empty() {
        return Err(malformed(INDEX, "weight_map names no tensor; at least 1 is needed".to_owned()));
    }
    Ok(Some(index))
}

impl TensorSource for Files {
    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, SourceError> {
        match self.raw(name)? {
            RawTensor { dtype: RawDtype::Float(dtype), shape, data } => {
                Ok(StoredTensor { dtype, shape, data })
            }
            RawTensor { dtype, .. } => {
                let reason = format!(
                    "it has type {dtype}; where config.json names no quantization_config for it, F32, F16 and BF16 \
                     are read"
                );
                Err(SourceError::Unreadable { name: name.to_owned(), reason })
            }
        }
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>, SourceError> {
        let entry = self.find(name).map_err(|error| match error {
            SourceError::Missing(name) if self.unread => {
                let reason = format!("{INDEX} does not name it; {SINGLE} beside the index is not read");
                SourceError::Unreadable { name, reason }
            }
            other => other,
        })?;
        let dtype = match entry.dtype {
            Dtype::F32 => RawDtype::Float(StoredDtype::F32),
            Dtype::F16 => RawDtype::Float(StoredDtype::F16),
            Dtype::BF16 => RawDtype::Float(StoredDtype::Bf16),
            Dtype::F8_E4M3 => RawDtype::F8E4m3,
            Dtype::F8_E8M0 => RawDtype::F8E8m0,
            Dtype::I8 => RawDtype::Int8,
            Dtype::U8 => RawDtype::Uint8,
            Dtype::I32 => RawDtype::Int32,
            Dtype::I64 => RawDtype::Int64,
            other => {
                let reason =
                    format!("it has type {other:?}, which no format has; F32, F16 and BF16 are read");
                return Err(SourceError::Unreadable { name: name.to_owned(), reason });
            }
        };
        let data = &self.files[entry.file][entry.range.clone()];
        Ok(RawTensor { dtype, shape: entry.shape.clone(), data })
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }
}

#[cfg(test)]
mod tests;
