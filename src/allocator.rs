//! The program's memory allocator: the system's, with huge pages behind large blocks, which are kept for the next one
//! of their size.
#![expect(unsafe_code, reason = "a global allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks from this size on are large.
const LARGE_BYTES: usize = 1 << 20;
/// Sizes between two powers of two.
const STEPS: usize = 8;
/// Room for blocks of up to 2^43 bytes.
const CLASSES: usize = 24 * STEPS;
/// Free blocks that are kept, in bytes, until [`keep_all`] is called.
const MOST_KEPT_BYTES: usize = 256 << 20;

static MOST_KEPT: AtomicUsize = AtomicUsize::new(MOST_KEPT_BYTES);

/// From now on keeps every large block: for a process that trains and ends.
pub fn keep_all() {
    MOST_KEPT.store(usize::MAX, Ordering::Relaxed);
}

/// The system's allocator with two habits for large blocks.
///
/// It asks for huge pages behind them: weights are read in strides of kilobytes, and with pages of 4 KiB looking
/// pages up takes longer than the reading. And it keeps freed ones: a training step allocates the same sizes again
/// and again, and the kernel would clear every page of them each time.
#[derive(Debug)]
pub struct LargeBlocks;

/// Free blocks by size; each holds the address of the next.
#[derive(Debug)]
struct Kept {
    first: [usize; CLASSES],
    bytes: usize,
}

static KEPT: Mutex<Kept> = Mutex::new(Kept {
    first: [0; CLASSES],
    bytes: 0,
});

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives every kept block back to the system: between parts of a run that need blocks of different sizes.
pub fn release() {
    for index in 0..CLASSES {
        while let Some((block, class)) = kept().pop(index) {
            if let Some(layout) = class.layout() {
                // SAFETY: the block came from the system with this layout, and nobody owns it.
                unsafe { System.dealloc(block, layout) };
            }
        }
    }
}

impl Kept {
    fn pop(&mut self, index: usize) -> Option<(*mut u8, Class)> {
        let block = self.first[index] as *mut u8;
        if block.is_null() {
            return None;
        }
        let class = Class::at(index);
        // SAFETY: a kept block begins with the address of the next.
        self.first[index] = unsafe { block.cast::<usize>().read() };
        self.bytes -= class.bytes;
        Some((block, class))
    }
}

impl LargeBlocks {
    /// A block of this class, and whether it is fresh from the system.
    unsafe fn take(class: Class, zeroed: bool) -> (*mut u8, bool) {
        let found = kept().pop(class.index);
        if let Some((block, _)) = found {
            return (block, false);
        }
        let Some(layout) = class.layout() else {
            return (null_mut(), true);
        };
        // SAFETY: the size is not zero.
        let block = unsafe {
            if zeroed {
                System.alloc_zeroed(layout)
            } else {
                System.alloc(layout)
            }
        };
        advise(block, class.bytes);
        (block, true)
    }

    unsafe fn give(block: *mut u8, class: Class) {
        {
            let mut kept = kept();
            if kept.bytes + class.bytes <= MOST_KEPT.load(Ordering::Relaxed) {
                // SAFETY: the block is free and large enough for an address.
                unsafe { block.cast::<usize>().write(kept.first[class.index]) };
                kept.first[class.index] = block as usize;
                kept.bytes += class.bytes;
                return;
            }
        }
        if let Some(layout) = class.layout() {
            // SAFETY: the block came from the system with this layout.
            unsafe { System.dealloc(block, layout) };
        }
    }
}

/// Sizes that share their free blocks: eight between two powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Class {
    index: usize,
    bytes: usize,
}

impl Class {
    /// Alignment of all large blocks; what asks for more goes to the system. With this one the system knows of fresh
    /// pages that they are zero.
    const ALIGN: usize = 16;

    fn of(layout: Layout) -> Option<Self> {
        let size = layout.size();
        if size < LARGE_BYTES || layout.align() > Self::ALIGN {
            return None;
        }
        let power = size.ilog2();
        let step = 1_usize << (power - STEPS.ilog2());
        let steps = (size - (1 << power)).div_ceil(step);
        let index = (power - LARGE_BYTES.ilog2()) as usize * STEPS + steps;
        let bytes = (1 << power) + steps * step;
        (index < CLASSES).then_some(Self { index, bytes })
    }

    fn at(index: usize) -> Self {
        let power = LARGE_BYTES.ilog2() as usize + index / STEPS;
        let bytes = (1 << power) + (index % STEPS) * (1 << (power - STEPS.ilog2() as usize));
        Self { index, bytes }
    }

    fn layout(self) -> Option<Layout> {
        Layout::from_size_align(self.bytes, Self::ALIGN).ok()
    }
}

// SAFETY: blocks come from the system and are handed out to one owner at a time; a class depends on the layout alone,
// so that a block goes back to where it came from.
unsafe impl GlobalAlloc for LargeBlocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            match Class::of(layout) {
                Some(class) => Self::take(class, false).0,
                None => System.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise; a kept block holds what its last owner left.
        unsafe {
            match Class::of(layout) {
                Some(class) => {
                    let (block, fresh) = Self::take(class, true);
                    if !fresh {
                        block.write_bytes(0, layout.size());
                    }
                    block
                }
                None => System.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe {
            match Class::of(layout) {
                Some(class) => Self::give(block, class),
                None => System.dealloc(block, layout),
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return null_mut();
        };
        // SAFETY: the caller's promise.
        unsafe {
            match (Class::of(layout), Class::of(wanted)) {
                (None, None) => System.realloc(block, layout, size),
                (Some(from), Some(to)) if from == to => block,
                _ => {
                    let moved = self.alloc(wanted);
                    if !moved.is_null() {
                        moved.copy_from_nonoverlapping(block, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    moved
                }
            }
        }
    }
}

#[cfg(target_os = "linux")]
fn advise(block: *mut u8, size: usize) {
    use rustix::mm::{Advice, madvise};

    const PAGE: usize = 4096;
    if block.is_null() {
        return;
    }
    let before = block.align_offset(PAGE);
    let whole = (size - before) / PAGE * PAGE;
    // SAFETY: these pages belong to the block. Advice that the kernel does not take changes nothing.
    let _ = unsafe { madvise(block.add(before).cast(), whole, Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_block: *mut u8, _size: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 8).unwrap()
    }

    #[test]
    fn classes_hold_what_is_asked_for_and_waste_an_eighth_at_most() {
        assert_eq!(Class::of(layout(LARGE_BYTES - 1)), None);
        let mut last = 0;
        for bytes in (LARGE_BYTES..64 * LARGE_BYTES).step_by(77_777) {
            let class = Class::of(layout(bytes)).unwrap();
            assert!(class.bytes >= bytes && class.bytes <= bytes + bytes / 8);
            assert!(class.index >= last);
            assert_eq!(Class::of(layout(class.bytes)), Some(class));
            assert_eq!(Class::at(class.index), class);
            last = class.index;
        }
    }

    /// One test: the free blocks are the process's.
    #[test]
    fn freed_blocks_are_used_again_up_to_a_limit_and_given_back() {
        let three = layout(3 << 20);
        // SAFETY: blocks are written within their layout and freed once.
        unsafe {
            let first = LargeBlocks.alloc(three);
            first.write_bytes(7, three.size());
            LargeBlocks.dealloc(first, three);
            let second = LargeBlocks.alloc_zeroed(three);
            assert_eq!(first, second);
            assert!(
                std::slice::from_raw_parts(second, three.size())
                    .iter()
                    .all(|b| *b == 0)
            );
            second.write(9);
            let grown = LargeBlocks.realloc(second, three, 5 << 20);
            assert_eq!(grown.read(), 9);
            LargeBlocks.dealloc(grown, layout(5 << 20));
            assert!(kept().bytes > 0);
            release();
            assert_eq!(kept().bytes, 0);

            let half = layout(MOST_KEPT_BYTES / 2);
            let taken = [(); 3].map(|()| LargeBlocks.alloc(half));
            for block in taken {
                LargeBlocks.dealloc(block, half);
            }
            assert_eq!(kept().bytes, MOST_KEPT_BYTES);
            release();
        }
    }
}
