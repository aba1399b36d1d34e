//! The answers of a file: appended, synced at bounded intervals, and found again after any interruption.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use millrace_crds::result::OutputLine;
use millrace_engine::text::completion::to_json;
use serde::{Deserialize, Serialize};

use super::ID;

/// A power failure costs at most the answers of this time; a killed process costs none that is written.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// What an output answers. It stands beside the output, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Of the whole input file.
    pub input_sha256: String,
    /// Of what the answers depend on beside it: model, name, numeric types, longest length.
    pub settings_sha256: String,
    /// The answers' `created`.
    pub created: i64,
}

/// The output file of one run. Nobody else may write it meanwhile.
#[derive(Debug)]
pub(super) struct Output {
    file: BufWriter<File>,
    answered: usize,
    succeeded: usize,
    created: i64,
    synced: Instant,
}

fn refuse(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

impl Output {
    /// Opens the output of a run. What an earlier run of the same kind wrote stays, save for a torn end.
    pub(super) fn open(path: &Path, state: &State) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(refuse("another run is writing it".into())),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let bytes = file.metadata()?.len();
        let created = check_state(&state_path(path), state, bytes)?;
        let Found { answered, succeeded, good } = count_answers(&mut file)?;
        if good < bytes {
            eprintln!("{}: cutting {} bytes of an unfinished answer", path.display(), bytes - good);
            file.set_len(good)?;
        }
        file.seek(SeekFrom::Start(good))?;
        Ok(Self { file: BufWriter::new(file), answered, succeeded, created, synced: Instant::now() })
    }

    /// How many answers are there.
    pub(super) fn answered(&self) -> usize {
        self.answered
    }

    /// How many of them are no errors.
    pub(super) fn succeeded(&self) -> usize {
        self.succeeded
    }

    /// The answers' `created`: that of the first run, so that an undisturbed output and a resumed one agree.
    pub(super) fn created(&self) -> i64 {
        self.created
    }

    /// Appends an answer; after this call it survives the end of the process.
    pub(super) fn append(&mut self, line: &OutputLine) -> io::Result<()> {
        self.file.write_all(&to_json(line))?;
        self.file.write_all(b"\n")?;
        self.file.flush()?;
        self.answered += 1;
        self.succeeded += usize::from(line.error.is_none());
        if self.synced.elapsed() >= SYNC_INTERVAL {
            self.file.get_ref().sync_data()?;
            self.synced = Instant::now();
        }
        Ok(())
    }

    /// Everything is on disk after this.
    pub(super) fn close(mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }
}

/// `OUTPUT.state`.
pub(super) fn state_path(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_owned();
    name.push(".state");
    output.with_file_name(name)
}

/// Compares what an output answers with what it shall answer, by content; gives its `created`. The state is durable
/// before the first answer is, so that no answer is without one.
fn check_state(path: &Path, state: &State, output_bytes: u64) -> io::Result<i64> {
    let found = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound && output_bytes == 0 => {
            return write_state(path, state).map(|()| state.created);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let shown = path.display();
            return Err(refuse(format!(
                "it holds {output_bytes} bytes and {shown} is missing; name another output"
            )));
        }
        Err(error) => return Err(error),
    };
    let found: State =
        serde_json::from_slice(&found).map_err(|error| refuse(format!("{}: {error}", path.display())))?;
    let other = if found.input_sha256 != state.input_sha256 {
        Some("input")
    } else if found.settings_sha256 != state.settings_sha256 {
        Some("model or setting (name, dtype, quantization, max-model-len)")
    } else {
        None
    };
    match other {
        Some(what) => {
            Err(refuse(format!("it answers another {what}; name another output, or remove both files")))
        }
        None => Ok(found.created),
    }
}

fn write_state(path: &Path, state: &State) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec(state).map_err(io::Error::other)?)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// What an output holds already.
#[derive(Debug, Default)]
struct Found {
    /// Whole answers at its beginning.
    answered: usize,
    /// Those that are no errors.
    succeeded: usize,
    /// Where the last of them ends.
    good: u64,
}

/// Counts whole answers at the beginning of the file. Each must be JSON with the id of its place: after a power
/// failure the end of a file can hold anything.
fn count_answers(file: &mut File) -> io::Result<Found> {
    let mut reader = BufReader::new(file);
    let mut found = Found::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line)?;
        let succeeded = match succeeds(&line, found.answered) {
            Some(succeeded) if line.last() == Some(&b'\n') => succeeded,
            _ => return Ok(found),
        };
        found.answered += 1;
        found.succeeded += usize::from(succeeded);
        found.good += bytes as u64;
    }
}

/// Of a whole answer, whether it is one rather than an error.
fn succeeds(line: &[u8], index: usize) -> Option<bool> {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<serde::de::IgnoredAny>,
    }
    let begins = line.starts_with(format!("{{\"id\":\"{ID}-{index}\",").as_bytes());
    let answer: Answer = serde_json::from_slice(line).ok().filter(|_| begins)?;
    Some(answer.error.is_none())
}
