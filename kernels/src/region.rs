//! Large memory, carved from regions that the kernel may back with huge pages.
//!
//! Weights, cache and activations are read in long streams: with pages of 4 KiB the processor looks up a page
//! every 64 lines, and its prefetchers stop at each border. Matrices are often smaller than a huge page, so that
//! several share a region. A region is never extended and never reused in part: it is given back when the last
//! user of it is gone.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::tensor::ALIGNMENT;

/// A huge page of x86-64 and, with pages of 4 KiB, of AArch64.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a shared region: the unused end of one is small beside what it holds.
const REGION_BYTES: usize = 32 << 20;
/// Less than this is not worth a share of a region.
pub const LEAST_BYTES: usize = 128 << 10;

/// A range of memory on a border of huge pages.
#[derive(Debug)]
pub struct Region {
    pointer: *mut u8,
    layout: Layout,
}

// SAFETY: the region owns its memory; who may touch which part of it is settled by `take`.
unsafe impl Send for Region {}
// SAFETY: as above; the region itself never reads or writes it.
unsafe impl Sync for Region {}

/// The region that is being carved, and how many of its bytes are taken.
static CURRENT: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

impl Region {
    fn new(bytes: usize) -> Arc<Self> {
        let layout =
            Layout::from_size_align(bytes, HUGE_PAGE).expect("length in bytes fits the address space");
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc(layout) };
        if pointer.is_null() {
            handle_alloc_error(layout);
        }
        // Before the first touch, which decides about the page. Where it is refused, small pages do.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is this allocation.
        let _ = unsafe { libc::madvise(pointer.cast(), layout.size(), libc::MADV_HUGEPAGE) };
        Arc::new(Self { pointer, layout })
    }

    /// Memory of `bytes`, all zero and on a boundary of [`ALIGNMENT`], for the caller alone as long as it holds
    /// the region.
    pub fn take(bytes: usize) -> (*mut u8, Arc<Self>) {
        let bytes =
            bytes.checked_next_multiple_of(ALIGNMENT).expect("length in bytes fits the address space");
        let (region, start) = if bytes > REGION_BYTES / 2 {
            let whole =
                bytes.checked_next_multiple_of(HUGE_PAGE).expect("length in bytes fits the address space");
            (Self::new(whole), 0)
        } else {
            let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
            let (region, start) = match current.0.upgrade() {
                Some(region) if REGION_BYTES - current.1 >= bytes => (region, current.1),
                _ => (Self::new(REGION_BYTES), 0),
            };
            *current = (Arc::downgrade(&region), start + bytes);
            (region, start)
        };
        // SAFETY: `start + bytes` lies inside of the region, and nobody else was given a part of that range.
        let pointer = unsafe {
            let pointer = region.pointer.add(start);
            pointer.write_bytes(0, bytes);
            pointer
        };
        (pointer, region)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this same layout.
        unsafe { dealloc(self.pointer, self.layout) };
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
            let end = region.pointer as usize + region.layout.size();
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
}
