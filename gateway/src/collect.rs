//! Lines of outcomes in input order: what is ready, what is missing, and the file that they go to.
//!
//! While a command waits, the output file is always a prefix of the final one, so it may be interrupted at
//! any moment; the next run cuts off a torn last line and goes on. Lines that are there are not fetched
//! again. Only when lines of late jobs must go between lines that are there already is the file written
//! anew, beside it, and put in its place whole.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use millrace_crds::names::JobId;
use millrace_crds::result::OutputLine;

use crate::failure::Failure;
use crate::plan::PlannedJob;

/// Which jobs are done, and the lines that wait for their turn. Pure.
#[derive(Debug, Default)]
pub struct Collector {
    index: HashMap<JobId, usize>,
    slots: Vec<Slot>,
    next: usize,
    missing: usize,
}

#[derive(Debug)]
enum Slot {
    Missing,
    Ready(Vec<String>),
    Taken,
}

/// What an outcome was to the collector.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed {
    /// The first one of its job.
    New,
    /// The job has one already.
    Again,
    /// The job is not among those asked for.
    Foreign,
}

impl Collector {
    /// For these jobs, in this order.
    pub fn new<'a>(jobs: impl IntoIterator<Item = &'a JobId>) -> Self {
        let index: HashMap<JobId, usize> =
            jobs.into_iter().enumerate().map(|(place, id)| (id.clone(), place)).collect();
        let missing = index.len();
        let slots = (0..missing).map(|_| Slot::Missing).collect();
        Self { index, slots, next: 0, missing }
    }

    /// A job's place in the input, if it was asked for.
    pub fn place_of(&self, job: &JobId) -> Option<usize> {
        self.index.get(job).copied()
    }

    /// Whether a job was asked for and has no outcome yet.
    pub fn misses(&self, job: &JobId) -> bool {
        self.place_of(job).is_some_and(|place| matches!(self.slots[place], Slot::Missing))
    }

    /// Puts a job's lines into their place.
    pub fn put(&mut self, job: &JobId, lines: Vec<String>) -> Placed {
        match self.place_of(job) {
            None => Placed::Foreign,
            Some(place) if !matches!(self.slots[place], Slot::Missing) => Placed::Again,
            Some(place) => {
                self.slots[place] = Slot::Ready(lines);
                self.missing -= 1;
                Placed::New
            }
        }
    }

    /// Jobs without an outcome, in order, at most `limit`.
    pub fn missing(&self, limit: usize) -> Vec<&JobId> {
        let mut missing: Vec<(usize, &JobId)> = self
            .index
            .iter()
            .filter(|(_, place)| matches!(self.slots[**place], Slot::Missing))
            .map(|(id, place)| (*place, id))
            .collect();
        missing.sort_unstable_by_key(|(place, _)| *place);
        missing.into_iter().take(limit).map(|(_, id)| id).collect()
    }

    /// The number of jobs without an outcome.
    pub fn missing_count(&self) -> usize {
        self.missing
    }

    /// Takes the lines whose turn has come: all before the first missing job.
    pub fn take_in_order(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(slot) = self.slots.get_mut(self.next) {
            match std::mem::replace(slot, Slot::Taken) {
                Slot::Missing => {
                    *slot = Slot::Missing;
                    break;
                }
                Slot::Ready(ready) => lines.extend(ready),
                Slot::Taken => {}
            }
            self.next += 1;
        }
        lines
    }

    /// Takes all lines, over missing jobs too.
    pub fn take_all(&mut self) -> Vec<String> {
        let take = |slot: &mut Slot| match slot {
            Slot::Ready(lines) => {
                let lines = std::mem::take(lines);
                *slot = Slot::Taken;
                lines
            }
            _ => Vec::new(),
        };
        self.slots.iter_mut().flat_map(take).collect()
    }
}

/// A file of output lines that is completed, never started over.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    file: File,
    present: Vec<String>,
}

impl OutputFile {
    /// Opens or creates; a torn last line is cut off.
    ///
    /// # Errors
    /// [`Failure::Usage`] when a line in it is no output line; [`Failure::File`].
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let fail = |e| Failure::file(format!("--output {}", path.display()), e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(fail)?;
        let mut present = Vec::new();
        let mut whole = 0;
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let bytes = reader.read_until(b'\n', &mut line).map_err(fail)?;
            if bytes == 0 || line.last() != Some(&b'\n') {
                break;
            }
            let parsed: OutputLine = serde_json::from_slice(&line).map_err(|error| {
                Failure::Usage(format!(
                    "--output {}: line {} is no output line ({error}); give another file",
                    path.display(),
                    present.len() + 1
                ))
            })?;
            present.push(parsed.custom_id);
            whole += bytes as u64;
        }
        file.set_len(whole).map_err(fail)?;
        Ok(Self { path: path.to_owned(), file, present })
    }

    /// The custom_ids whose lines are there, in the file's order.
    pub fn present(&self) -> &[String] {
        &self.present
    }

    /// The jobs of the input whose lines are all there.
    ///
    /// # Errors
    /// [`Failure::Usage`] when the file holds lines that are not of these jobs.
    pub fn jobs_present(&self, jobs: &[PlannedJob]) -> Result<HashSet<JobId>, Failure> {
        let asked: HashSet<&String> = jobs.iter().flat_map(|job| &job.custom_ids).collect();
        if let Some(line) = self.present.iter().position(|custom_id| !asked.contains(custom_id)) {
            return Err(Failure::Usage(format!(
                "--output {}: line {} is of custom_id {:?}, which is not in the input; give another file",
                self.path.display(),
                line + 1,
                self.present[line]
            )));
        }
        let there: HashSet<&String> = self.present.iter().collect();
        let whole = jobs.iter().filter(|job| job.custom_ids.iter().all(|id| there.contains(id)));
        Ok(whole.map(|job| job.id.clone()).collect())
    }

    /// Adds lines at the end.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn append(&mut self, lines: &[String]) -> Result<(), Failure> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut text = String::new();
        for line in lines {
            let parsed: OutputLine = serde_json::from_str(line).expect("lines are output lines");
            self.present.push(parsed.custom_id);
            text += line;
            text.push('\n');
        }
        let fail = |e| Failure::file(format!("--output {}", self.path.display()), e);
        self.file.write_all(text.as_bytes()).map_err(fail)
    }

    /// Puts the lines into the order of these custom_ids if they are not, drops repeated ones, and makes
    /// the file durable.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn finish(mut self, order: &HashMap<&str, usize>) -> Result<(), Failure> {
        let fail = |e| Failure::file(format!("--output {}", self.path.display()), e);
        let place = |custom_id: &String| order.get(custom_id.as_str()).copied().unwrap_or(usize::MAX);
        if self.present.windows(2).all(|pair| place(&pair[0]) < place(&pair[1])) || order.is_empty() {
            return self.file.sync_all().map_err(fail);
        }
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        let lines: Vec<String> =
            BufReader::new(&self.file).lines().collect::<std::io::Result<_>>().map_err(fail)?;
        let mut numbered: Vec<(usize, String)> = self.present.iter().map(place).zip(lines).collect();
        numbered.sort_by_key(|(place, _)| *place);
        numbered.dedup_by_key(|(place, _)| *place);
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut anew = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).map_err(fail)?;
        for (_, line) in numbered {
            writeln!(anew, "{line}").map_err(fail)?;
        }
        anew.as_file().sync_all().map_err(fail)?;
        anew.persist(&self.path).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
