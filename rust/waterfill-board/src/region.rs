//! The memory of a board: words that processes or threads share.

use crate::error::Result;
use crate::layout::Shape;
use crate::presence::{End, Held, Presence};
use crate::sync::AtomicU64;

/// Words shared by everybody on one board. All are zero at first.
pub trait Region: Send + Sync {
    /// The words, [`Shape::words`] of them.
    fn words(&self) -> &[AtomicU64];

    /// Let the others see that the process at `end`, which is this one, lives. None where nobody can be watched.
    ///
    /// # Errors
    /// Another process is at that end, or the system refuses.
    fn hold(&self, _end: End) -> Result<Option<Held>> {
        Ok(None)
    }

    /// What is known of the process at `end`.
    fn presence(&self, _end: End) -> Presence {
        Presence::Unwatched
    }
}

impl<T: Region> Region for std::sync::Arc<T> {
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }

    fn hold(&self, end: End) -> Result<Option<Held>> {
        (**self).hold(end)
    }

    fn presence(&self, end: End) -> Presence {
        (**self).presence(end)
    }
}

#[cfg(loom)]
impl<T: Region> Region for loom::sync::Arc<T> {
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }

    fn hold(&self, end: End) -> Result<Option<Held>> {
        (**self).hold(end)
    }

    fn presence(&self, end: End) -> Presence {
        (**self).presence(end)
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
