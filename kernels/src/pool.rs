//! The threads of a step.
//!
//! A step makes some hundred dispatches of a few microseconds each, so handing out work must cost about one:
//! workers spin for a short while between dispatches and sleep when no step follows. The caller takes part.
//! Tasks are claimed one by one from a counter; which thread runs a task never changes what it computes.
//! A panic in a task ends the process: the other threads may hold pointers into the caller's stack.

use std::cell::UnsafeCell;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

/// Polls before a worker sleeps: about 100 microseconds, the longest pause between two dispatches of a step
/// that the host's own work causes. An idle engine burns no more than this after its last step.
const SPINS_BEFORE_SLEEP: u32 = 3_000;
/// Polls before the caller lets others run while it waits for a worker that was descheduled.
const SPINS_BEFORE_YIELD: u32 = 10_000;
/// More threads than this would not pay on any machine that the arena's tasks are cut for.
pub const THREADS_MAX: usize = 256;

/// Bytes that processors move at once between memory and caches.
#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;

type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// A dispatch: what to run and how far it is.
struct Dispatch {
    /// Valid from the change of `epoch` until `busy` is zero.
    task: UnsafeCell<Option<Task<'static>>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
}

struct Worker {
    asleep: AtomicBool,
}

struct Shared {
    dispatch: Dispatch,
    epoch: AtomicUsize,
    busy: AtomicUsize,
    ending: AtomicBool,
    workers: Vec<Worker>,
}

// SAFETY: `task` is written by the caller alone, before it changes `epoch` (release) and after all workers have
// reported (`busy` is zero, acquire); workers read it only in between.
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference inside is to a `Sync` closure.
unsafe impl Send for Shared {}

/// Threads that wait for work.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// Ends the process when a task unwinds.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("a kernel task panicked; other threads may use its caller's memory: the process ends");
            std::process::abort();
        }
    }
}

impl Pool {
    /// Starts `threads` threads less one (the caller is one of them), at most [`THREADS_MAX`].
    pub fn new(threads: Option<NonZeroUsize>) -> Self {
        let available = || thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = threads.map_or_else(available, NonZeroUsize::get).min(THREADS_MAX);
        let shared = Arc::new(Shared {
            dispatch: Dispatch {
                task: UnsafeCell::new(None),
                tasks: AtomicUsize::new(0),
                next: AtomicUsize::new(0),
            },
            epoch: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            workers: (1..threads).map(|_| Worker { asleep: AtomicBool::new(false) }).collect(),
        });
        let handles: Vec<_> = (1..threads)
            .map(|index| {
                let shared = shared.clone();
                let name = format!("kernels-{index}");
                let work = move || work(&shared, index);
                thread::Builder::new().name(name).spawn(work).expect("a thread can be started at start-up")
            })
            .collect();
        let threads = handles.iter().map(|handle| handle.thread().clone()).collect();
        Self { shared, handles, threads }
    }

    /// Threads that work on a dispatch, the caller included.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Runs `task(thread, index)` for each index below `tasks`, each once, on all threads; returns when all
    /// are done. `thread` is below [`Pool::threads`] and differs between tasks that run at the same time.
    pub fn run(&mut self, tasks: usize, task: impl Fn(usize, usize) + Sync) {
        let _abort = AbortOnUnwind;
        if tasks <= 1 || self.handles.is_empty() {
            (0..tasks).for_each(|index| task(0, index));
            return;
        }
        let shared = &*self.shared;
        let task: Task<'_> = &task;
        // SAFETY: the lifetime is stretched only until this function returns, and it returns (or aborts) after
        // every worker has reported that it no longer uses the task.
        let task: Task<'static> = unsafe { std::mem::transmute(task) };
        // SAFETY: no worker reads the cell before the epoch changes; `&mut self` keeps other callers away.
        unsafe { *shared.dispatch.task.get() = Some(task) };
        shared.dispatch.tasks.store(tasks, Ordering::Relaxed);
        shared.dispatch.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.handles.len(), Ordering::Relaxed);
        // Sequentially consistent with the workers' `asleep`: either the worker sees the new epoch before it
        // sleeps, or this thread sees that it sleeps.
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (worker, thread) in shared.workers.iter().zip(&self.threads) {
            if worker.asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        claim(shared, 0, task);
        let mut spins = 0;
        while shared.busy.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // A worker cannot have panicked: that aborts.
            let _ = handle.join();
        }
    }
}

fn claim(shared: &Shared, thread: usize, task: Task<'_>) {
    let tasks = shared.dispatch.tasks.load(Ordering::Relaxed);
    loop {
        let index = shared.dispatch.next.fetch_add(1, Ordering::Relaxed);
        if index >= tasks {
            break;
        }
        task(thread, index);
    }
}

fn work(shared: &Shared, thread: usize) {
    let _abort = AbortOnUnwind;
    let mut seen = 0;
    loop {
        seen = wait(shared, thread, seen);
        if shared.ending.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the epoch changed, so the caller has written the cell and waits for this worker's report.
        let task = unsafe { *shared.dispatch.task.get() };
        claim(shared, thread, task.expect("written before the epoch changed"));
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

/// Waits for an epoch after `seen`.
fn wait(shared: &Shared, thread: usize, seen: usize) -> usize {
    for _ in 0..SPINS_BEFORE_SLEEP {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        std::hint::spin_loop();
    }
    let worker = &shared.workers[thread - 1];
    worker.asleep.store(true, Ordering::SeqCst);
    let epoch = loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            break epoch;
        }
        thread::park();
    };
    worker.asleep.store(false, Ordering::SeqCst);
    epoch
}

/// Memory that tasks of one dispatch write at places that differ from task to task.
#[derive(Debug)]
pub struct Scattered<T> {
    pointer: *mut T,
    len: usize,
}

// SAFETY: whoever uses it promises (in `range`) that tasks touch different places.
unsafe impl<T: Send> Sync for Scattered<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Scattered<T> {}

impl<T> Clone for Scattered<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Scattered<T> {}

impl<T> Scattered<T> {
    /// Takes a slice apart for the time of a dispatch.
    pub fn new(slice: &mut [T]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Elements `first..first + len`.
    ///
    /// # Safety
    /// The slice that this was made of is alive and not used otherwise, and no one else holds a range that
    /// overlaps this one.
    ///
    /// # Panics
    /// When the range is outside of the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range<'a>(&self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first, "{first} + {len} of {}", self.len);
        // SAFETY: inside of the slice; the caller keeps ranges apart.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(first), len) }
    }

    /// Asks for elements `first..first + len` of each of `rows` rows, `stride` apart, to be brought near, to be
    /// written. Any place will do: nothing is read or written.
    #[inline]
    pub fn prefetch(&self, first: usize, len: usize, (rows, stride): (usize, usize)) {
        #[cfg(target_arch = "x86_64")]
        for row in 0..rows {
            let start = self.pointer.wrapping_add(first + row * stride).cast::<u8>();
            for line in 0..(len * size_of::<T>()).div_ceil(CACHE_LINE) {
                let line = start.wrapping_add(line * CACHE_LINE);
                // SAFETY: a prefetch has no effect but on speed, and never faults; processors of this kind that
                // do not know it do nothing.
                unsafe {
                    std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly))
                };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (first, len, rows, stride);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use super::*;

    fn check(threads: usize, tasks: usize) {
        let mut pool = Pool::new(NonZeroUsize::new(threads));
        for round in 0..50 {
            let runs: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            pool.run(tasks, |thread, index| {
                assert!(thread < threads);
                runs[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "each task once");
            if round == 25 {
                // Long enough for the workers to sleep: they must wake again.
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            for tasks in [0, 1, 2, 7, 1000] {
                check(threads, tasks);
            }
        }
    }

    #[test]
    fn writes_of_tasks_are_seen_by_the_caller() {
        let mut pool = Pool::new(NonZeroUsize::new(4));
        let mut values = vec![0_usize; 4096];
        for round in 0..100 {
            let scattered = Scattered::new(&mut values);
            pool.run(64, |_, index| {
                // SAFETY: each task has its own 64 elements.
                unsafe { scattered.range(index * 64, 64) }.fill(round + index);
            });
            assert!(values.iter().enumerate().all(|(at, &value)| value == round + at / 64));
        }
    }
}
