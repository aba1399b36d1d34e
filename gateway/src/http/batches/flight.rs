//! The lines of a batch that are on their way: published, not yet written. Pure.
//!
//! Results come in any order and are written in that of the input, in segments from the first line on. What is kept of
//! results that wait for their turn has a bound: above it only those are asked for that are next.

use std::collections::VecDeque;

use millrace_crds::names::JobId;

use crate::http::batches::record::{ResultSegment, TokenCounts};
use crate::http::batches::result::LineResult;

/// Most bytes of a segment, but for its last line.
const SEGMENT_BYTES: usize = 4 << 20;
/// Above this many bytes of results only those are asked for that are next.
const KEPT_BYTES_MAX: usize = 12 << 20;
/// Most segments of a batch, but for those that are full of bytes.
const SEGMENTS: u64 = 256;
/// Fewest lines of a segment that is not the last.
const SEGMENT_LINES_MIN: u64 = 256;

/// A line on its way.
#[derive(Debug, Clone)]
pub struct FlightLine {
    /// Its job.
    pub job: JobId,
    /// The client's id of it.
    pub custom_id: String,
    /// Its result, once there is one.
    pub result: Option<LineResult>,
    /// Whether its job was cancelled.
    pub cancelled: bool,
}

/// A segment that is to be stored.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReadySegment {
    /// What it holds, without its blobs.
    pub segment: ResultSegment,
    /// The answers.
    pub output: String,
    /// The errors.
    pub errors: String,
}

/// The lines on their way, in the order of the input.
#[derive(Debug)]
pub struct LineFlight {
    lines: VecDeque<FlightLine>,
    segment_lines: u64,
    kept_bytes: usize,
    /// Whether no more lines will come.
    pub closed: bool,
}

impl LineFlight {
    /// Of a batch with so many lines.
    pub fn new(total: u64) -> Self {
        let segment_lines = total.div_ceil(SEGMENTS).max(SEGMENT_LINES_MIN);
        Self { lines: VecDeque::new(), segment_lines, kept_bytes: 0, closed: false }
    }

    /// Lines on their way.
    pub fn count(&self) -> usize {
        self.lines.len()
    }

    /// Whether all lines are written.
    pub fn is_over(&self) -> bool {
        self.closed && self.lines.is_empty()
    }

    /// More lines, which follow those before.
    pub fn push(&mut self, lines: impl IntoIterator<Item = FlightLine>) {
        for line in lines {
            self.kept_bytes += line.result.as_ref().map_or(0, |result| result.text.len());
            self.lines.push_back(line);
        }
    }

    /// Some of the lines without a result, the first ones first, with their places.
    pub fn missing(&self, most: usize) -> Vec<(usize, JobId)> {
        let within = if self.kept_bytes > KEPT_BYTES_MAX { self.segment_lines as usize } else { usize::MAX };
        let lines = self.lines.iter().enumerate().take(within).filter(|(_, line)| line.result.is_none());
        lines.take(most).map(|(place, line)| (place, line.job.clone())).collect()
    }

    /// Gives the line at this place a result, if it has none. Places hold until a segment is taken.
    pub fn fill(&mut self, place: usize, result: impl FnOnce(&FlightLine) -> LineResult) {
        if let Some(line) = self.lines.get_mut(place)
            && line.result.is_none()
        {
            let result = result(line);
            self.kept_bytes += result.text.len();
            line.result = Some(result);
        }
    }

    /// The jobs of lines without a result that were not cancelled yet, and are from now on.
    pub fn cancel(&mut self) -> Vec<JobId> {
        let lines = self.lines.iter_mut().filter(|line| line.result.is_none() && !line.cancelled);
        lines
            .map(|line| {
                line.cancelled = true;
                line.job.clone()
            })
            .collect()
    }

    /// Gives all lines that have no result this one.
    pub fn fill_all(&mut self, result: impl Fn(&FlightLine) -> LineResult) {
        for place in 0..self.lines.len() {
            self.fill(place, &result);
        }
    }

    /// Lines with an answer and with an error that are not written yet.
    pub fn seen(&self) -> (u64, u64) {
        let results = self.lines.iter().filter_map(|line| line.result.as_ref());
        results.fold((0, 0), |(good, bad), result| match result.answered {
            true => (good + 1, bad),
            false => (good, bad + 1),
        })
    }

    /// The next segment, if it is worth being stored: enough lines, enough bytes, or the last ones.
    pub fn take(&mut self) -> Option<ReadySegment> {
        let (mut lines, mut bytes) = (0, 0);
        for result in self.lines.iter().map_while(|line| line.result.as_ref()) {
            (lines, bytes) = (lines + 1, bytes + result.text.len());
            if lines as u64 == self.segment_lines || bytes >= SEGMENT_BYTES {
                break;
            }
        }
        let last = self.closed && lines == self.lines.len();
        if lines == 0 || (!last && (lines as u64) < self.segment_lines && bytes < SEGMENT_BYTES) {
            return None;
        }
        self.kept_bytes -= bytes;
        let mut ready = ReadySegment::default();
        for result in self.lines.drain(..lines).filter_map(|line| line.result) {
            let segment = &mut ready.segment;
            segment.lines += 1;
            segment.late |= result.late;
            let TokenCounts { input, output } = result.tokens;
            segment.tokens.input += input;
            segment.tokens.output += output;
            match result.answered {
                true => {
                    segment.completed += 1;
                    ready.output += &result.text;
                }
                false => ready.errors += &result.text,
            }
        }
        Some(ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::batches::record::BatchStatus;
    use crate::http::batches::result::job_id;

    fn line(number: u64) -> FlightLine {
        FlightLine {
            job: job_id("batch_0", number),
            custom_id: format!("c{number}"),
            result: None,
            cancelled: false,
        }
    }

    fn answer(line: &FlightLine, bytes: usize) -> LineResult {
        let text = format!("{} {}\n", line.custom_id, "x".repeat(bytes));
        LineResult { answered: true, late: false, tokens: TokenCounts { input: 1, output: 2 }, text }
    }

    #[test]
    fn results_are_written_in_the_order_of_the_input() {
        let mut flight = LineFlight::new(300);
        flight.push((0..300).map(line));
        // All but the first, backwards: nothing can be written.
        for place in (1..300).rev() {
            flight.fill(place, |line| answer(line, 0));
        }
        assert_eq!(flight.take(), None);
        assert_eq!((flight.seen(), flight.missing(9)), ((299, 0), vec![(0, job_id("batch_0", 0))]));
        flight.fill(0, |line| LineResult::given_up(&line.job, &line.custom_id, BatchStatus::Cancelled));
        // A second result changes nothing.
        flight.fill(0, |line| answer(line, 0));
        let first = flight.take().unwrap();
        assert_eq!((first.segment.lines, first.segment.completed), (256, 255));
        assert_eq!(first.errors.lines().count(), 1);
        assert_eq!(first.segment.tokens, TokenCounts { input: 255, output: 510 });
        // The rest is no whole segment, until nothing more comes.
        assert_eq!(flight.take(), None);
        flight.closed = true;
        let second = flight.take().unwrap();
        let all = first.output + &second.output;
        let names: Vec<&str> = all.lines().map(|line| line.trim_end()).collect();
        assert_eq!(names, (1..300).map(|number| format!("c{number}")).collect::<Vec<_>>());
        assert!(flight.is_over());
    }

    #[test]
    fn large_results_are_written_soon_and_not_hoarded() {
        let mut flight = LineFlight::new(10_000);
        flight.push((0..1000).map(line));
        for place in 1..200 {
            flight.fill(place, |line| answer(line, 100_000));
        }
        assert_eq!(flight.missing(1000).len(), 256 - 199, "only what is next");
        flight.fill(0, |line| answer(line, 100_000));
        let mut lines = 0;
        while let Some(ready) = flight.take() {
            assert!(ready.output.len() <= SEGMENT_BYTES + 100_010);
            lines += ready.segment.lines;
        }
        assert!((160..=200).contains(&lines), "{lines}");
        assert!(flight.missing(1000).len() > 700);
        let (missing, cancelled) = (flight.missing(1000).len(), flight.cancel().len());
        assert_eq!((missing, flight.cancel().len()), (cancelled, 0), "each job is cancelled once");
        flight.fill_all(|line| answer(line, 0));
        assert!(flight.missing(1).is_empty());
    }
}
