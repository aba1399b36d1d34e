//! The engine: tokens in, tokens out, for many sequences at once.
//!
//! [`Core`] is the loop of the engine's thread: take requests in, schedule, queue, collect, advance, report. Where
//! steps run beside this thread, step n+1 is scheduled and queued while step n runs, and only then is step n
//! collected; at most one step more is queued than runs. It reads no clock, no file and no network: time is the
//! [`Observer`]'s, randomness is the seeds'. A sequence whose logits are not numbers fails alone; a device that
//! fails, or a broken invariant, panics, and the process must end with it.

pub mod blocks;
pub mod handle;
pub mod lengths;
pub mod request;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millrace_kernels::ops::{Ops, StepError};
use millrace_kernels::sampling::Sampled;
use tokio::sync::mpsc;

use handle::{EngineInbox, EngineLoad, Submission};
use request::{Event, SequenceUsage};
use runner::Runner;
use scheduler::{Chunk, Scheduler, Slot};
use sequence::Sequence;

/// Sequences of a class that the scheduler holds beyond the running ones; more wait in the channel, and then their
/// submitters wait. Enough for prefixes to be found and for the longest-first window.
const WAITING_MAX: usize = 1024;

/// What a step consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepShape {
    /// Rows of sequences that had one token to compute.
    pub decode_rows: usize,
    /// Rows of prompts (and of sequences that are computed again).
    pub prefill_rows: usize,
    /// Rows that were sampled.
    pub sampled_rows: usize,
    /// Positions that each row looks back on, its own included, summed over rows.
    pub attended: usize,
    /// Positions in the cache that are read, summed over sequences.
    pub cached: usize,
}

/// Moments of the engine's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A turn of the loop begins, with work to do.
    Begun,
    /// The next step is decided.
    Scheduled(StepShape),
    /// The oldest step that was decided is computed: by the device in this time, if it is not the engine's own thread
    /// that computes. Where steps overlap, the next one was decided before.
    Computed(Option<Duration>),
    /// The tokens of what was computed in this turn are sent and the numbers reported.
    Reported,
}

/// Watches the engine's loop from its thread; whoever wants times brings the clock. Must be quick.
pub trait Observer: Send {
    /// One of the moments has come.
    fn observe(&mut self, moment: Moment);
}

impl Observer for () {
    fn observe(&mut self, _: Moment) {}
}

/// The engine's loop and all of its state.
pub struct Core<O: Ops> {
    scheduler: Scheduler,
    runner: Runner<O>,
    inbox: EngineInbox,
    /// Where each slot's events go.
    listeners: Vec<Option<mpsc::Sender<Event>>>,
    /// Whether the next step is queued while one runs.
    overlap: bool,
    /// The step that is being decided.
    step: Vec<Chunk>,
    /// The step that is queued and not collected; empty when there is none.
    in_flight: Vec<Chunk>,
    sampled: Vec<Sampled>,
    gone: Vec<Slot>,
    output_tokens: u64,
    observer: Box<dyn Observer>,
}

impl<O: Ops> Core<O> {
    /// Puts the parts together. `overlap` says whether the next step is queued while one runs.
    pub fn new(
        scheduler: Scheduler,
        runner: Runner<O>,
        inbox: EngineInbox,
        overlap: bool,
        observer: Box<dyn Observer>,
    ) -> Self {
        Self {
            scheduler,
            runner,
            inbox,
            listeners: Vec::new(),
            overlap,
            step: Vec::new(),
            in_flight: Vec::new(),
            sampled: Vec::new(),
            gone: Vec::new(),
            output_tokens: 0,
            observer,
        }
    }

    /// Runs until every handle is dropped and every sequence has ended.
    pub fn run(mut self) {
        while self.take_in() {
            self.observer.observe(Moment::Begun);
            self.drop_cancelled();
            self.turn();
            self.observer.observe(Moment::Reported);
        }
    }

    fn is_idle(&self) -> bool {
        self.scheduler.running().is_empty()
            && self.scheduler.waiting().len() == 0
            && self.in_flight.is_empty()
    }

    /// Takes new requests in; sleeps while there is nothing to do. False when all is over.
    fn take_in(&mut self) -> bool {
        if self.is_idle() {
            self.report();
            match self.inbox.next_blocking() {
                Some(submission) => self.submit(submission),
                None => return false,
            }
        }
        loop {
            let wanted = self.scheduler.waiting_by_class().map(|waiting| waiting < WAITING_MAX);
            match self.inbox.try_next(wanted) {
                Some(submission) => self.submit(submission),
                None => break,
            }
        }
        true
    }

    fn submit(&mut self, Submission { request, urgency, events }: Submission) {
        let block_tokens = self.scheduler.blocks().block_tokens();
        let slot = self.scheduler.submit(Sequence::new(request, block_tokens), urgency) as usize;
        if slot >= self.listeners.len() {
            self.listeners.resize(slot + 1, None);
        }
        self.listeners[slot] = Some(events);
    }

    fn drop_cancelled(&mut self) {
        for (slot, listener) in self.listeners.iter().enumerate() {
            if listener.as_ref().is_some_and(mpsc::Sender::is_closed) {
                self.gone.push(slot as Slot);
            }
        }
        while let Some(slot) = self.gone.pop() {
            self.remove(slot);
        }
    }

    fn remove(&mut self, slot: Slot) -> (mpsc::Sender<Event>, SequenceUsage) {
        let usage = self.scheduler.remove(slot).usage();
        (self.listeners[slot as usize].take().expect("a live sequence has a listener"), usage)
    }

    /// One turn: the next step is queued, then the one in flight is collected; the next one too where steps do not
    /// overlap. A step that cannot be decided before the tokens of the one in flight are known waits for these.
    fn turn(&mut self) {
        if self.scheduler.needs_tokens(&self.in_flight) {
            self.collect();
        }
        self.queue();
        self.collect();
        std::mem::swap(&mut self.in_flight, &mut self.step);
        self.scheduler.advance(&self.in_flight);
        if !self.overlap {
            self.collect();
        }
        self.report();
    }

    /// Decides who runs next and queues it.
    fn queue(&mut self) {
        self.scheduler.schedule(&mut self.step);
        if !self.step.is_empty() {
            self.observer.observe(Moment::Scheduled(shape(&self.step)));
            self.runner.queue(&self.scheduler, &self.step).unwrap_or_else(broken);
        }
    }

    /// Waits for the step in flight, if there is one, and tells of its tokens.
    fn collect(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let (mut step, mut sampled) =
            (std::mem::take(&mut self.in_flight), std::mem::take(&mut self.sampled));
        let device_time = self.runner.collect(&mut sampled).unwrap_or_else(broken);
        self.observer.observe(Moment::Computed(device_time));
        self.emit(&step, &mut sampled);
        self.inbox.load.steps.fetch_add(1, Ordering::Relaxed);
        step.clear();
        (self.in_flight, self.sampled) = (step, sampled);
    }

    /// Adds the new tokens to the sequences that still want them and tells the listeners.
    fn emit(&mut self, step: &[Chunk], sampled: &mut Vec<Sampled>) {
        let slots = step.iter().filter(|chunk| chunk.samples).map(|chunk| chunk.slot);
        assert_eq!(sampled.len(), slots.clone().count(), "one choice per sampled row");
        for (row, (slot, outcome)) in (0..).zip(slots.zip(sampled.drain(..))) {
            if !self.scheduler.awaits(slot, row) {
                continue;
            }
            let choice = match outcome {
                Ok(choice) => choice,
                Err(poisoned) => {
                    let (events, _) = self.remove(slot);
                    let _ = events.try_send(Event::Failed(poisoned.to_string()));
                    continue;
                }
            };
            self.output_tokens += 1;
            let finish = self.scheduler.append(slot, choice.token);
            let events = self.listeners[slot as usize].as_ref().expect("a live sequence has a listener");
            // The channel has room for all events; a closed one is found at the next turn.
            let _ = events.try_send(Event::Token(sampler::token(choice)));
            if let Some(finish) = finish {
                let (events, usage) = self.remove(slot);
                let _ = events.try_send(Event::Finished(finish, usage));
            }
        }
    }

    fn report(&self) {
        let set = |value: &AtomicU64, to: u64| value.store(to, Ordering::Relaxed);
        let EngineLoad { kv_blocks_used, running, waiting, .. } = &*self.inbox.load;
        let (blocks, counters) = (self.scheduler.blocks(), self.scheduler.counters());
        set(kv_blocks_used, (blocks.total() - blocks.free()) as u64);
        set(running, self.scheduler.running().len() as u64);
        set(waiting, self.scheduler.waiting().len() as u64);
        for (gauge, count) in self.inbox.load.waiting_by_class.iter().zip(self.scheduler.waiting_by_class()) {
            set(gauge, count as u64);
        }
        let EngineLoad { prompt_tokens, cached_tokens, output_tokens, preemptions, .. } = &*self.inbox.load;
        set(prompt_tokens, counters.prompt_tokens);
        set(cached_tokens, counters.cached_tokens);
        set(output_tokens, self.output_tokens);
        set(preemptions, counters.preemptions);
    }
}

fn broken<T>(error: StepError) -> T {
    panic!("the engine cannot go on: {error}")
}

fn shape(step: &[Chunk]) -> StepShape {
    let mut shape = StepShape::default();
    for chunk in step {
        let decode = chunk.rows == 1 && chunk.samples && chunk.start > 0;
        *(if decode { &mut shape.decode_rows } else { &mut shape.prefill_rows }) += chunk.rows;
        shape.sampled_rows += usize::from(chunk.samples);
        shape.attended += chunk.rows * chunk.start + chunk.rows * (chunk.rows + 1) / 2;
        shape.cached += chunk.start + chunk.rows;
    }
    shape
}
