//! How often a thread asks for memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts: a test makes it its `#[global_allocator]`.
pub struct Counting;

// SAFETY: every call is passed on unchanged to the system's allocator; counting in a thread-local
// without a destructor neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// How often `call` asks for memory in this thread.
///
/// # Panics
/// Where [`Counting`] is not the program's `#[global_allocator]`: nothing would be counted.
pub fn allocations(call: impl FnOnce()) -> u64 {
    let one = counted(|| drop(black_box(vec![1u8])));
    assert_eq!(one, 1, "`Counting` is not the #[global_allocator]");
    counted(call)
}

fn counted(call: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    call();
    ALLOCATIONS.get() - before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "is not the #[global_allocator]")]
    fn what_is_not_counted_is_no_zero() {
        allocations(|| ());
    }
}
