//! The requests of a file, one after another, in bounded memory.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::time::UNIX_EPOCH;

use millrace_engine::folder::wrapping;
use millrace_engine::text::job::{JobLimits, REQUEST_BYTES_MAX, Reject, RequestLine, is_blank};
use sha2::{Digest, Sha256};

use super::ID;

/// Most requests of a file: what is kept per request to find equal ids is then at most 160 MiB.
pub(super) const LINES_MAX: usize = 5_000_000;
/// Bytes that are hashed at once.
const HASH_BYTES: usize = 1 << 20;

/// SHA-256 of a file, and when it was last changed, in Unix seconds: that is the `created` of the answers of a new
/// output. An output that is resumed keeps its own.
pub(super) fn fingerprint(path: &Path) -> io::Result<(String, i64)> {
    let mut file = File::open(path)?;
    let modified = file.metadata()?.modified()?;
    let created = modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut hash = Sha256::new();
    let mut buffer = vec![0; HASH_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            bytes => hash.update(&buffer[..bytes]),
        }
    }
    Ok((hex::encode(hash.finalize()), i64::try_from(created).unwrap_or(0)))
}

/// Reads requests.
#[derive(Debug)]
pub(super) struct Input {
    file: BufReader<File>,
    limits: JobLimits,
    /// Requests read.
    count: usize,
    /// Hash of each `custom_id`, and who has it. A false match needs 2^32 requests to be likely.
    owners: HashMap<u64, u32>,
    ended: bool,
}

impl Input {
    pub(super) fn open(path: &Path, limits: JobLimits) -> io::Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let head = file.fill_buf()?;
        if let Some(what) = Some(head).filter(|head| !head.is_empty()).and_then(wrapping::stands_in) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it {what}")));
        }
        if head.starts_with(wrapping::MARK) {
            file.consume(wrapping::MARK.len());
        }
        Ok(Self { file, limits, count: 0, owners: HashMap::new(), ended: false })
    }

    /// One line without its end, or what its length is when that is over the limit; `None` at the end.
    fn read_line(&mut self) -> io::Result<Option<Result<Vec<u8>, usize>>> {
        let mut line = Vec::new();
        let limit = REQUEST_BYTES_MAX as u64 + 2;
        let read = self.file.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if read as u64 == limit {
            return Ok(Some(Err(read + skip_line(&mut self.file)?)));
        }
        Ok(Some(if line.len() > REQUEST_BYTES_MAX { Err(line.len()) } else { Ok(line) }))
    }

    fn read_request(&mut self) -> io::Result<Option<RequestLine>> {
        loop {
            let index = self.count;
            let id = format!("{ID}-{index}");
            let line = match self.read_line()? {
                None => return Ok(None),
                Some(Ok(bytes)) if is_blank(&bytes) => continue,
                Some(Ok(bytes)) => RequestLine::decode(index, id, &bytes, &self.limits),
                Some(Err(bytes)) => {
                    let field = "line".into();
                    let request = Err(Reject::TooLong { field, bytes, limit: REQUEST_BYTES_MAX });
                    RequestLine { index, custom_id: id.clone(), id, request }
                }
            };
            if index == LINES_MAX {
                let message = format!("more than {LINES_MAX} requests; split the file");
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
            }
            self.count += 1;
            return Ok(Some(self.with_own_id(line)));
        }
    }

    /// The first line with a `custom_id` keeps it.
    fn with_own_id(&mut self, mut line: RequestLine) -> RequestLine {
        let digest = Sha256::digest(line.custom_id.as_bytes());
        let mut hash = [0; 8];
        hash.copy_from_slice(&digest[..8]);
        match self.owners.entry(u64::from_le_bytes(hash)) {
            Entry::Occupied(owner) => {
                let first = *owner.get() as usize;
                line.request = Err(Reject::Duplicate { custom_id: line.custom_id.clone(), first });
            }
            Entry::Vacant(place) => {
                place.insert(u32::try_from(line.index).unwrap_or(u32::MAX));
            }
        }
        line
    }
}

/// Reads up to and with the next line feed; returns how many bytes stood before it.
fn skip_line(file: &mut BufReader<File>) -> io::Result<usize> {
    let mut skipped = 0;
    loop {
        let buffer = file.fill_buf()?;
        match buffer.iter().position(|&byte| byte == b'\n') {
            Some(at) => {
                file.consume(at + 1);
                return Ok(skipped + at);
            }
            None if buffer.is_empty() => return Ok(skipped),
            None => {
                let bytes = buffer.len();
                file.consume(bytes);
                skipped += bytes;
            }
        }
    }
}

impl Iterator for Input {
    type Item = io::Result<RequestLine>;

    fn next(&mut self) -> Option<io::Result<RequestLine>> {
        if self.ended {
            return None;
        }
        let next = self.read_request().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}
