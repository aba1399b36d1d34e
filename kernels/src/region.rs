//! Large memory, carved from regions that the kernel may back with huge pages.
//!
//! Weights, cache and activations are read in long streams: with pages of 4 KiB the processor looks up a page
//! every 64 lines, and its prefetchers stop at each border. Matrices are often smaller than a huge page, so that
//! several share a region. A region is never extended and never reused in part: it is given back when the last
//! user of it is gone.
//!
//! A region is fresh from the system, whose pages are zero, so that nothing writes it here. A page becomes real
//! when it is first touched, so that a cache of gigabytes costs no time at start. Of large regions a thread of
//! the lowest priority touches the rest meanwhile: computing waits for few pages more than it needs, and memory that
//! the system does not have is missed before it is needed. Priority alone does not keep that thread out of the way:
//! a page is made in one go, and the cores of a step wait for each other, so that it rests between pages.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::VecDeque;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::tensor::ALIGNMENT;

/// A huge page of x86-64 and, with pages of 4 KiB, of AArch64.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a shared region: the unused end of one is small beside what it holds.
const REGION_BYTES: usize = 32 << 20;
/// Less than this is not worth a share of a region.
pub const LEAST_BYTES: usize = 128 << 10;
/// A rest between pages, in times of what the page before it took: the thread takes 3 % of one core at most.
const REST_TIMES: u32 = 32;
/// The longest rest.
const REST_MAX: Duration = Duration::from_millis(200);

/// A range of memory on a border of huge pages.
#[derive(Debug)]
pub struct Region {
    /// What the system gave; it lies on a border of small pages only.
    mapping: *mut libc::c_void,
    mapped_bytes: usize,
    /// The first border of a huge page in it.
    pointer: *mut u8,
    /// From there; a whole number of huge pages.
    bytes: usize,
}

// SAFETY: the region owns its memory; who may touch which part of it is settled by `take`.
unsafe impl Send for Region {}
// SAFETY: as above; the region itself never reads or writes it.
unsafe impl Sync for Region {}

/// The region that is being carved, and how many of its bytes are taken.
static CURRENT: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

/// Large regions whose pages are not all real yet, each with the first byte of those that are not.
struct Untouched {
    regions: VecDeque<(Weak<Region>, usize)>,
    thread_runs: bool,
    /// Who waits for the thread, which then takes no rest.
    waiting: usize,
}

static UNTOUCHED: Mutex<Untouched> =
    Mutex::new(Untouched { regions: VecDeque::new(), thread_runs: false, waiting: 0 });
static ALL_TOUCHED: Condvar = Condvar::new();
static NO_REST: Condvar = Condvar::new();

impl Region {
    fn new(bytes: usize) -> Arc<Self> {
        // Room to move up to a border of huge pages; what is never touched takes no memory.
        let layout =
            Layout::from_size_align(bytes, HUGE_PAGE).expect("length in bytes fits the address space");
        let mapped_bytes = layout.size() + HUGE_PAGE;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the system's choice changes no other memory.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), mapped_bytes, protection, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            handle_alloc_error(layout);
        }
        // Before the first touch, which decides about the page. Where it is refused, small pages do.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is this mapping.
        let _ = unsafe { libc::madvise(mapping, mapped_bytes, libc::MADV_HUGEPAGE) };
        let pointer = mapping.cast::<u8>();
        // SAFETY: the border is less than `HUGE_PAGE` away, and the mapping is longer than that.
        let pointer = unsafe { pointer.add(pointer.addr().wrapping_neg() % HUGE_PAGE) };
        Arc::new(Self { mapping, mapped_bytes, pointer, bytes: layout.size() })
    }

    /// Memory of `bytes`, all zero and on a boundary of [`ALIGNMENT`], for the caller alone as long as it holds
    /// the region.
    pub fn take(bytes: usize) -> (*mut u8, Arc<Self>) {
        let bytes =
            bytes.checked_next_multiple_of(ALIGNMENT).expect("length in bytes fits the address space");
        let (region, start) = if bytes > REGION_BYTES / 2 {
            let whole =
                bytes.checked_next_multiple_of(HUGE_PAGE).expect("length in bytes fits the address space");
            let region = Self::new(whole);
            touch_later(&region);
            (region, 0)
        } else {
            let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
            let (region, start) = match current.0.upgrade() {
                Some(region) if REGION_BYTES - current.1 >= bytes => (region, current.1),
                _ => (Self::new(REGION_BYTES), 0),
            };
            *current = (Arc::downgrade(&region), start + bytes);
            (region, start)
        };
        // SAFETY: `start + bytes` lies inside of the region. Nobody was given a part of that range before, so that
        // it is as zero as the system made it.
        let pointer = unsafe { region.pointer.add(start) };
        (pointer, region)
    }

    /// Makes the huge page at an offset real, whatever it holds. Gives the offset of the next one, or none after the
    /// last or where the system cannot.
    fn touch(&self, start: usize) -> Option<usize> {
        assert!(start + HUGE_PAGE <= self.bytes, "the page is outside of the region");
        #[cfg(target_os = "linux")]
        // SAFETY: the range is inside of the mapping; to populate it changes no byte of it.
        let touched = unsafe {
            libc::madvise(self.pointer.add(start).cast(), HUGE_PAGE, libc::MADV_POPULATE_WRITE) == 0
        };
        #[cfg(not(target_os = "linux"))]
        let touched = false;
        Some(start + HUGE_PAGE).filter(|next| touched && *next < self.bytes)
    }
}

/// Leaves a region to the thread that touches pages.
fn touch_later(region: &Arc<Region>) {
    let mut untouched = UNTOUCHED.lock().unwrap_or_else(PoisonError::into_inner);
    untouched.regions.push_back((Arc::downgrade(region), 0));
    if !untouched.thread_runs {
        // Without the thread each page waits for its first use.
        untouched.thread_runs = std::thread::Builder::new().name("touch".into()).spawn(touch_all).is_ok();
    }
}

/// Touches a page of each region in turn: what is first in each is used first. Ends when none is left.
fn touch_all() {
    #[cfg(target_os = "linux")]
    // SAFETY: the call takes numbers, and changes nothing but this thread's priority.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid() as libc::id_t, 19) };
    loop {
        let mut untouched = UNTOUCHED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((region, start)) = untouched.regions.pop_front() else {
            untouched.thread_runs = false;
            ALL_TOUCHED.notify_all();
            return;
        };
        drop(untouched);
        let began = Instant::now();
        let next = region.upgrade().and_then(|region| region.touch(start));
        let rest = REST_MAX.min(began.elapsed() * REST_TIMES);
        let mut untouched = UNTOUCHED.lock().unwrap_or_else(PoisonError::into_inner);
        untouched.regions.extend(next.map(|next| (region, next)));
        let rested = NO_REST.wait_timeout_while(untouched, rest, |untouched| untouched.waiting == 0);
        drop(rested.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Waits until all large memory taken so far is real, which then takes no longer than it must: for measurements,
/// which then see none of the first use's cost.
pub fn wait_until_real() {
    let mut untouched = UNTOUCHED.lock().unwrap_or_else(PoisonError::into_inner);
    untouched.waiting += 1;
    NO_REST.notify_all();
    let done = ALL_TOUCHED.wait_while(untouched, |untouched| untouched.thread_runs);
    done.unwrap_or_else(PoisonError::into_inner).waiting -= 1;
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and whoever had a part of it held the region. It fails for a range that is no
        // mapping only, which this one is.
        let _ = unsafe { libc::munmap(self.mapping, self.mapped_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_apart_aligned_and_zero() {
        let sizes =
            [LEAST_BYTES, LEAST_BYTES + 1, REGION_BYTES / 2, REGION_BYTES / 2 + 1, 3 * REGION_BYTES, 64];
        let mut taken: Vec<(usize, usize, Arc<Region>)> = Vec::new();
        for bytes in sizes.into_iter().cycle().take(18) {
            let (pointer, region) = Region::take(bytes);
            // SAFETY: `take` gave these bytes to this test alone.
            let part = unsafe { std::slice::from_raw_parts_mut(pointer, bytes) };
            assert!(part.iter().all(|&byte| byte == 0), "{bytes} bytes are not zero");
            part.fill(0xFF);
            let start = pointer as usize;
            assert!(start.is_multiple_of(ALIGNMENT), "{bytes} bytes are not aligned");
            assert!((region.pointer as usize).is_multiple_of(HUGE_PAGE), "the region is not aligned");
            let end = region.pointer as usize + region.bytes;
            assert!(end <= region.mapping as usize + region.mapped_bytes, "the region is not mapped");
            assert!(
                start >= region.pointer as usize && start + bytes <= end,
                "{bytes} bytes leave the region"
            );
            for (other, len, _) in &taken {
                assert!(start + bytes <= *other || other + len <= start, "two parts overlap");
            }
            taken.push((start, bytes, region));
        }
    }

    /// Pages that are in memory of a range on borders of pages.
    #[cfg(target_os = "linux")]
    fn resident_pages(pointer: *mut u8, bytes: usize) -> usize {
        let mut pages = vec![0u8; bytes / 4096];
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages, which have 4 KiB at least.
        let failed = unsafe { libc::mincore(pointer.cast(), bytes, pages.as_mut_ptr()) };
        assert_eq!(failed, 0);
        pages.iter().filter(|&&page| page & 1 == 1).count()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_becomes_real_where_it_is_touched_and_behind_its_user() {
        let bytes = 64 << 20;
        let region = Region::new(bytes);
        assert_eq!(resident_pages(region.pointer, bytes), 0);
        // SAFETY: the region is this test's alone.
        unsafe { region.pointer.add(bytes / 2).write(7) };
        let touched = resident_pages(region.pointer, bytes);
        assert!((1..=HUGE_PAGE / 4096).contains(&touched), "{touched} pages");
        touch_later(&region);
        wait_until_real();
        assert_eq!(resident_pages(region.pointer, bytes), bytes / 4096);
        // SAFETY: as above.
        assert_eq!(unsafe { region.pointer.add(bytes / 2).read() }, 7);
    }
}
