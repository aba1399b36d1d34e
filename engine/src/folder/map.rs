//! Weight files as read-only memory maps: pages come from the file as they are read and can be dropped again,
//! so that loading a model takes no memory beside what the engine keeps.
//!
//! The one place outside of the kernels with `unsafe`. It refuses what is no plain file. Files are mapped whole
//! after their digests were checked, and the cache's are read-only from then on; parts are mapped to be
//! hashed, as soon as a pull has written them.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

/// A file's bytes.
#[derive(Debug)]
pub struct MappedFile(Option<Mmap>);

impl MappedFile {
    /// Maps a file. It must not be changed or cut while it is mapped.
    ///
    /// # Errors
    /// When it is no plain file, or the system refuses.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file"));
        }
        if metadata.len() == 0 {
            // An empty range cannot be mapped.
            return Ok(Self(None));
        }
        // SAFETY: the map is private and read-only. A model's files do not change under a running worker: those
        // of the cache are made read-only before they appear, and replacing one by renaming leaves the mapped
        // file as it is. Whoever cuts a file in place ends the process with SIGBUS, as a bad disk would.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(Some(map)))
    }

    /// Maps the bytes `first..first + count` of a file, with all their pages. They must not be written, nor the file
    /// be cut, while they are mapped.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn part(file: &File, first: u64, count: usize) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        options.offset(first).len(count).populate();
        // SAFETY: the map is read-only. A pull hands a part on when its last byte is written, no request asks for it
        // again, and the lock of the cache keeps other workers from the file. A file that nobody pulls is a model's.
        let map = unsafe { options.map(file)? };
        Ok(Self(Some(map)))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn bytes_are_the_files_and_stay_when_the_name_is_given_to_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"first").unwrap();
        let map = MappedFile::open(&path).unwrap();
        std::fs::write(folder.path().join("b"), b"other").unwrap();
        std::fs::rename(folder.path().join("b"), &path).unwrap();
        assert_eq!(&*map, b"first");
        assert_eq!(&*MappedFile::open(&path).unwrap(), b"other");
    }

    #[test]
    fn a_part_is_what_was_written_there() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 16).unwrap();
        let written: Vec<u8> = (0..70_000u32).map(|n| n as u8).collect();
        file.write_all_at(&written, 1 << 16).unwrap();
        assert!(*MappedFile::part(&file, 1 << 16, written.len()).unwrap() == written[..]);
        assert!(MappedFile::part(&file, 1, 10).is_ok_and(|part| part.iter().all(|&byte| byte == 0)));
    }

    #[test]
    fn an_empty_file_has_no_bytes_and_a_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("empty"), b"").unwrap();
        assert!(MappedFile::open(&folder.path().join("empty")).unwrap().is_empty());
        assert!(MappedFile::open(folder.path()).is_err());
        let missing = MappedFile::open(&folder.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
