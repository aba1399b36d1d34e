//! The engine seen from outside: submit, listen, drop to cancel, look at the load.
//!
//! The engine runs on a thread of its own; this side is async. A sequence's events wait in a channel with
//! room for all of them, so that a slow listener never holds up a step; that room is bounded because
//! `max_tokens` is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_crds::names::Class;
use tokio::sync::mpsc;

use super::request::{Event, Refusal, Request, Urgency};

/// Requests of a class that may wait between the async side and the engine's thread; more submitters wait.
pub const SUBMIT_QUEUE: usize = 256;

/// What the engine's sizes allow. Constant after start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest prompt plus output, in tokens.
    pub max_model_len: u32,
    /// Most sequences in one step.
    pub max_sequences: u32,
    /// Tokens in a KV block.
    pub block_tokens: u32,
    /// KV blocks in all.
    pub kv_blocks: u32,
    /// Size of the vocabulary.
    pub vocabulary: u32,
}

impl Limits {
    /// KV blocks that a request holds at its end.
    pub fn blocks_of(&self, request: &Request) -> usize {
        (request.prompt.len() + request.max_tokens as usize).div_ceil(self.block_tokens as usize)
    }

    /// Whether a request could run alone.
    ///
    /// # Errors
    /// When it never could; the refusal names value and limit.
    pub fn admit(&self, request: &Request) -> Result<(), Refusal> {
        if request.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        let total = request.prompt.len() + request.max_tokens as usize;
        if total > self.max_model_len as usize || request.max_tokens == 0 {
            return Err(Refusal::TooLong {
                prompt: request.prompt.len(),
                max_tokens: request.max_tokens,
                limit: self.max_model_len,
            });
        }
        let needed = self.blocks_of(request);
        if needed > self.kv_blocks as usize {
            return Err(Refusal::TooManyBlocks { needed, total: self.kv_blocks as usize });
        }
        let sampling = &request.sampling;
        let biased = sampling.logit_bias.iter().map(|(token, _)| token);
        let named = biased.chain(&sampling.forced).chain(sampling.bad_words.iter().flatten());
        match request.prompt.iter().chain(named).find(|&&token| token >= self.vocabulary) {
            Some(&token) => Err(Refusal::UnknownToken { token, vocabulary: self.vocabulary }),
            None => request.sampling.check(),
        }
    }
}

/// Counters and gauges that the engine's thread writes after each step and anyone may read.
#[derive(Debug, Default)]
pub struct EngineLoad {
    /// Steps done. While it stands still with work present, the engine hangs.
    pub steps: AtomicU64,
    /// KV blocks that sequences hold.
    pub kv_blocks_used: AtomicU64,
    /// Sequences in the running batch.
    pub running: AtomicU64,
    /// Sequences that wait.
    pub waiting: AtomicU64,
    /// The same by class, in the order of [`Class::ALL`]; one whose turn has come is of the first.
    pub waiting_by_class: [AtomicU64; Class::ALL.len()],
    /// Prompt tokens computed or found in the cache.
    pub prompt_tokens: AtomicU64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: AtomicU64,
    /// Tokens generated.
    pub output_tokens: AtomicU64,
    /// Sequences preempted.
    pub preemptions: AtomicU64,
}

impl EngineLoad {
    /// Reads one of the numbers.
    pub fn get(value: &AtomicU64) -> u64 {
        value.load(Ordering::Relaxed)
    }
}

/// One submitted request, as the engine's thread receives it.
#[derive(Debug)]
pub struct Submission {
    /// What to run.
    pub request: Request,
    /// What is served first.
    pub urgency: Urgency,
    /// Where its events go. A closed channel means cancelled.
    pub events: mpsc::Sender<Event>,
}

/// The engine from outside. Cheap to clone; when the last one is gone, the engine ends.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    limits: Limits,
    load: Arc<EngineLoad>,
    /// One channel a class, so that none waits behind the submissions of another.
    submissions: [mpsc::Sender<Submission>; Class::ALL.len()],
    /// Room for one word: that a channel may hold something.
    wake: mpsc::Sender<()>,
    urgency: Urgency,
}

/// The inside end, for the engine's thread (or a test's fake).
#[derive(Debug)]
pub struct EngineInbox {
    /// Incoming requests by class, each bounded by [`SUBMIT_QUEUE`].
    submissions: [mpsc::Receiver<Submission>; Class::ALL.len()],
    wake: mpsc::Receiver<()>,
    /// Where to report.
    pub load: Arc<EngineLoad>,
}

impl EngineInbox {
    /// The next request of the classes that are wanted, higher ones first, if there is one.
    pub fn try_next(&mut self, wanted: [bool; Class::ALL.len()]) -> Option<Submission> {
        let wanted = self.submissions.iter_mut().zip(wanted).filter(|(_, wanted)| *wanted);
        wanted.filter_map(|(submissions, _)| submissions.try_recv().ok()).next()
    }

    /// Waits for the next request; `None` when every handle is dropped.
    pub fn next_blocking(&mut self) -> Option<Submission> {
        let all = [true; Class::ALL.len()];
        loop {
            match self.try_next(all) {
                Some(submission) => return Some(submission),
                None => self.wake.blocking_recv()?,
            }
        }
    }
}

/// Makes both ends.
pub fn channel(limits: Limits) -> (EngineHandle, EngineInbox) {
    let channels = Class::ALL.map(|_| mpsc::channel(SUBMIT_QUEUE));
    let senders = channels.each_ref().map(|(sender, _)| sender.clone());
    let (wake, woken) = mpsc::channel(1);
    let load = Arc::new(EngineLoad::default());
    let urgency = Urgency::default();
    let handle = EngineHandle { limits, load: load.clone(), submissions: senders, wake, urgency };
    (handle, EngineInbox { submissions: channels.map(|(_, receiver)| receiver), wake: woken, load })
}

impl EngineHandle {
    /// What the engine's sizes allow.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// A handle whose submissions have this urgency.
    #[must_use]
    pub fn with_urgency(&self, urgency: Urgency) -> Self {
        Self { urgency, ..self.clone() }
    }

    fn queue(&self) -> &mpsc::Sender<Submission> {
        &self.submissions[self.urgency.class as usize]
    }

    /// Counters and gauges.
    pub fn load(&self) -> &EngineLoad {
        &self.load
    }

    /// Submits one sequence, for callers without an async runtime; blocks while the queue to the engine is
    /// full.
    ///
    /// # Errors
    /// When the request can never run, or the engine has ended.
    pub fn submit_blocking(&self, request: Request) -> Result<Generation, Refusal> {
        self.limits.admit(&request)?;
        let (events, receiver) = mpsc::channel(request.max_tokens as usize + 1);
        let submission = Submission { request, urgency: self.urgency, events };
        self.queue().blocking_send(submission).map_err(|_| Refusal::Stopped)?;
        let _ = self.wake.try_send(());
        Ok(Generation { events: receiver })
    }

    /// Submits one sequence; waits while the queue to the engine is full.
    ///
    /// # Errors
    /// When the request can never run, or the engine has ended.
    pub async fn submit(&self, request: Request) -> Result<Generation, Refusal> {
        self.limits.admit(&request)?;
        let (events, receiver) = mpsc::channel(request.max_tokens as usize + 1);
        let submission = Submission { request, urgency: self.urgency, events };
        self.queue().send(submission).await.map_err(|_| Refusal::Stopped)?;
        // A word that waits already says the same.
        let _ = self.wake.try_send(());
        Ok(Generation { events: receiver })
    }
}

/// A sequence that runs. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::Receiver<Event>,
}

impl Generation {
    /// The next event; `None` when the engine died before the sequence ended.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// The next event, for callers without an async runtime.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_waits_behind_no_submission_of_another() {
        let limits =
            Limits { max_model_len: 64, max_sequences: 1, block_tokens: 16, kv_blocks: 4, vocabulary: 9 };
        let (handle, mut inbox) = channel(limits);
        let of = |class| handle.with_urgency(Urgency { class, ..Urgency::default() });
        let (low, high) = (of(Class::Low), of(Class::High));
        let submit = |handle: &EngineHandle| handle.submit_blocking(Request::greedy(vec![1], 1)).unwrap();
        let _generations: Vec<Generation> = (0..SUBMIT_QUEUE).map(|_| submit(&low)).collect();
        let _urgent = submit(&high);
        assert_eq!(inbox.next_blocking().unwrap().urgency.class, Class::High);
        assert!(inbox.try_next([true, true, false]).is_none(), "low ones are not wanted");
        assert_eq!(inbox.next_blocking().unwrap().urgency.class, Class::Low);
        drop((handle, low, high));
        assert_eq!(std::iter::from_fn(|| inbox.next_blocking()).count(), SUBMIT_QUEUE - 1, "none is lost");
    }
}
