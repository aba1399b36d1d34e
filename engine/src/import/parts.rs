//! The file or files of a GGUF: a large one may be split into parts named `NAME-00001-of-00003.gguf`.
//!
//! The first part holds the metadata, every part the tensors of its own. All parts lie beside each other.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::gguf::{Gguf, GgufError, TensorInfo, invalid};
use super::{ImportError, io_error};
use crate::folder::wrapping;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
/// Most parts; their numbers have five digits in the names, and a part in 16 bits is numbered.
const PARTS_MAX: u64 = 10_000;
/// Bytes that say what a file is.
const HEAD_BYTES: usize = 512;

/// A GGUF's header and its open files.
pub struct Parts {
    /// Metadata of the first part, tensors of all.
    pub header: Gguf,
    files: Vec<File>,
}

impl Parts {
    /// Opens a GGUF by its only or its first file.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let (mut header, file) = read(path)?;
        let mut files = vec![file];
        let count = header.integer(COUNT, PARTS_MAX)?.unwrap_or(1);
        if count > 1 {
            let number = header.integer(NUMBER, count - 1)?.unwrap_or(0);
            let names = names(path, number, count)?;
            for (part, name) in names.iter().enumerate().skip(1) {
                let (mut more, file) = read(name)?;
                let place = (more.integer(NUMBER, PARTS_MAX)?, more.integer(COUNT, PARTS_MAX)?);
                if place != (Some(part as u64), Some(count)) {
                    let rule = format!("{} must be part {part} of {count}", name.display());
                    return Err(invalid(NUMBER, format!("{place:?}"), &rule).into());
                }
                more.tensors.iter_mut().for_each(|tensor| tensor.part = part);
                header.tensors.append(&mut more.tensors);
                files.push(file);
            }
        }
        let mut seen = HashSet::new();
        if let Some(twice) = header.tensors.iter().find(|tensor| !seen.insert(tensor.name.as_str())) {
            let field = format!("tensor name {}", twice.name);
            return Err(invalid(&field, "repeated", "names must be unique over all parts").into());
        }
        Ok(Self { header, files })
    }

    /// Reads a part of a tensor's data that begins `from` bytes into it.
    pub fn read(&self, tensor: &TensorInfo, from: u64, into: &mut [u8]) -> Result<(), ImportError> {
        let offset = tensor.offset + from;
        let read = self.files[tensor.part].read_exact_at(into, offset);
        read.map_err(|source| ImportError::TensorRead { name: tensor.name.clone(), offset, source })
    }
}

fn read(path: &Path) -> Result<(Gguf, File), ImportError> {
    let file = File::open(path).map_err(|source| io_error("open", path, source))?;
    let len = file.metadata().map_err(|source| io_error("inspect", path, source))?.len();
    let mut head = vec![0; HEAD_BYTES.min(len as usize)];
    file.read_exact_at(&mut head, 0).map_err(|source| io_error("read", path, source))?;
    if !head.starts_with(b"GGUF")
        && let Some(what) = wrapping::stands_in(&head)
    {
        return Err(ImportError::NotGguf { what });
    }
    Ok((Gguf::read(BufReader::with_capacity(1 << 20, &file), len)?, file))
}

/// The names of all parts, from that of one.
fn names(path: &Path, number: u64, count: u64) -> Result<Vec<PathBuf>, GgufError> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let of = |part: u64| format!("-{:05}-of-{count:05}.gguf", part + 1);
    let Some(stem) = name.strip_suffix(&of(number)) else {
        let rule = format!(
            "{name} is part {} of {count} of a split GGUF: give the first part under its name, which ends in {}, with \
             the others beside it, or join them with `llama-gguf-split --merge`",
            number + 1,
            of(0),
        );
        return Err(invalid(COUNT, count, &rule));
    };
    if number != 0 {
        let rule = format!("{name} is a later part of a split GGUF: give the first one, {stem}{}", of(0));
        return Err(invalid(NUMBER, number, &rule));
    }
    Ok((0..count).map(|part| path.with_file_name(format!("{stem}{}", of(part)))).collect())
}
