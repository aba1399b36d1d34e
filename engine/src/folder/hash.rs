//! The digests of a file: SHA-256 over all its bytes, which is one chain, and SHA-256 over the digests of its chunks,
//! which are hashed in any order, sixteen at once and by several threads. What they are for stands in
//! [`super::manifest`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use millrace_kernels::sha256::{Digest, digests};
use sha2::{Digest as _, Sha256};

use super::manifest::{CHUNK_BYTES, FileEntry};
use super::map::MappedFile;
use super::{FolderError, io};

/// Bytes of a part: what a pull's journal counts, and what is mapped and hashed at once. The chunks of a part are as
/// many as the processor hashes together.
pub const PART_BYTES: u64 = 16 * CHUNK_BYTES;
/// Bytes read at once when a file is hashed in order: fits the second-level cache.
const READ_BYTES: usize = 256 << 10;
/// Threads that hash one local file at most: together they are faster than the disks of most machines.
const THREADS_MAX: usize = 8;

/// Both digests of bytes that come in order.
#[derive(Default)]
pub struct FileHash {
    chain: Sha256,
    /// The beginning of a part.
    part: Vec<u8>,
    chunks: Vec<Digest>,
    bytes: u64,
}

impl FileHash {
    /// Of no bytes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.chain.update(bytes);
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let room = PART_BYTES as usize - self.part.len();
            let (taken, rest) = bytes.split_at(room.min(bytes.len()));
            self.part.extend_from_slice(taken);
            if taken.len() == room {
                self.end_part();
            }
            bytes = rest;
        }
    }

    fn end_part(&mut self) {
        self.chunks.extend(digests(&self.part, CHUNK_BYTES as usize));
        self.part.clear();
    }

    /// The file of this name that the bytes make.
    pub fn finish(mut self, name: String) -> FileEntry {
        self.end_part();
        FileEntry {
            name,
            bytes: self.bytes,
            sha256: hex::encode(self.chain.finalize()),
            chunks_sha256: Some(hex::encode(Sha256::digest(self.chunks.as_flattened()))),
        }
    }
}

/// The digests of a file's chunks, by the number of the part that holds them.
pub type PartDigests = BTreeMap<u64, Vec<Digest>>;

/// The digest of the digests of all chunks.
pub fn of_chunks(parts: &PartDigests) -> String {
    let mut hash = Sha256::new();
    parts.values().for_each(|chunks| hash.update(chunks.as_flattened()));
    hex::encode(hash.finalize())
}

/// Maps a part of a file of so many bytes.
pub fn map_part(file: &File, bytes: u64, part: u64) -> io::Result<MappedFile> {
    let first = part * PART_BYTES;
    MappedFile::part(file, first, PART_BYTES.min(bytes - first) as usize)
}

/// Hashes the chunks of a part.
pub fn hash_part(file: &File, bytes: u64, part: u64) -> io::Result<(u64, Vec<Digest>)> {
    Ok((part, digests(&map_part(file, bytes, part)?, CHUNK_BYTES as usize)))
}

/// A local file with its size and both digests.
pub fn hash_file(path: &Path, name: &str) -> Result<FileEntry, FolderError> {
    let mut hash = FileHash::new();
    read_all(path, |bytes| hash.update(bytes)).map_err(io(path))?;
    Ok(hash.finish(name.to_owned()))
}

/// A local file with its size and the digest that decides whether it is the one wanted: that of its chunks, where it is
/// known, else that of the whole.
pub fn hash_as(path: &Path, wanted: &FileEntry) -> Result<FileEntry, FolderError> {
    if wanted.chunks_sha256.is_some() {
        let (bytes, chunks) = hash_chunks(path).map_err(io(path))?;
        return Ok(FileEntry { bytes, chunks_sha256: Some(chunks), ..wanted.clone() });
    }
    let (mut chain, mut bytes) = (Sha256::new(), 0);
    let taken = read_all(path, |read| {
        chain.update(read);
        bytes += read.len() as u64;
    });
    taken.map_err(io(path))?;
    Ok(FileEntry { bytes, sha256: hex::encode(chain.finalize()), ..wanted.clone() })
}

/// Opens a plain file; opening anything else may wait for ever.
fn open(path: &Path) -> io::Result<File> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no plain file"));
    }
    File::open(path)
}

fn read_all(path: &Path, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let (mut file, mut buffer) = (open(path)?, vec![0; READ_BYTES]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            count => take(&buffer[..count]),
        }
    }
}

/// Size of a file and digest of its chunks. Threads take its parts in turns.
fn hash_chunks(path: &Path) -> io::Result<(u64, String)> {
    let file = open(path)?;
    let bytes = file.metadata()?.len();
    let parts = bytes.div_ceil(PART_BYTES);
    let next = AtomicU64::new(0);
    let take = || {
        let mut hashed = Vec::new();
        loop {
            match next.fetch_add(1, Relaxed) {
                part if part < parts => hashed.push(hash_part(&file, bytes, part)?),
                _ => return Ok(hashed),
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(parts as usize);
    let hashed: io::Result<Vec<_>> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        running.into_iter().map(|thread| thread.join().expect("hashing does not panic")).collect()
    });
    Ok((bytes, of_chunks(&hashed?.into_iter().flatten().collect())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: usize = CHUNK_BYTES as usize;

    /// As the format says it.
    fn defined(bytes: &[u8]) -> (String, String) {
        let chunks: Vec<u8> = bytes.chunks(CHUNK).flat_map(Sha256::digest).collect();
        (hex::encode(Sha256::digest(bytes)), hex::encode(Sha256::digest(&chunks)))
    }

    #[test]
    fn both_digests_are_as_defined_whoever_computes_them() {
        let whole: Vec<u8> = (0..35 * CHUNK as u32 + 5).map(|n| (n / 999) as u8 ^ n as u8).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for count in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 16 * CHUNK, 16 * CHUNK + 1, whole.len()] {
            let (sha256, chunks) = defined(&whole[..count]);
            let wanted =
                FileEntry { name: "a".into(), bytes: count as u64, sha256, chunks_sha256: Some(chunks) };
            let mut hash = FileHash::new();
            whole[..count].chunks(3 * CHUNK / 2 + 1).for_each(|bytes| hash.update(bytes));
            assert_eq!(hash.finish("a".into()), wanted, "{count} bytes in order");
            std::fs::write(&path, &whole[..count]).unwrap();
            assert_eq!(hash_file(&path, "a").unwrap(), wanted, "{count} bytes read in order");
            let claimed = FileEntry { bytes: 9, chunks_sha256: Some("other".into()), ..wanted.clone() };
            assert_eq!(hash_as(&path, &claimed).unwrap(), wanted, "{count} bytes by chunks");
            let claimed =
                FileEntry { bytes: 9, sha256: "other".into(), chunks_sha256: None, ..wanted.clone() };
            let wanted = FileEntry { chunks_sha256: None, ..wanted };
            assert_eq!(hash_as(&path, &claimed).unwrap(), wanted, "{count} bytes as one");
        }
        assert!(hash_file(folder.path(), "a").unwrap_err().to_string().contains("no plain file"));
    }
}
