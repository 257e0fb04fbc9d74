//! The memory of a board: words that processes or threads share.

use crate::layout::Shape;
use crate::sync::AtomicU64;

/// Words shared by everybody on one board. All are zero at first.
pub trait Region: Send + Sync {
    /// The words, [`Shape::words`] of them.
    fn words(&self) -> &[AtomicU64];
}

impl<T: Region> Region for std::sync::Arc<T> {
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

#[cfg(loom)]
impl<T: Region> Region for loom::sync::Arc<T> {
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

/// A board's memory within one process: for tests, and for ranks that are threads.
/// Aligned to words, not to cache lines.
#[derive(Debug)]
pub struct Heap {
    words: Box<[AtomicU64]>,
}

impl Heap {
    /// Zeroed words for a board of this shape.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        Self { words: (0..shape.words()).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Region for Heap {
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }
}
