//! A value that tells by itself to which call it belongs: value and sequence in one atomic word.
//!
//! Nothing else is published through a word, so there is nothing to order: a reader that finds the
//! sequence it waits for has the value that was stored with it, in the same 64 bits. That is why
//! accesses are relaxed and no fence is needed, on the CPU or by a GPU over its link. The one exception is the
//! word that tells that calls have no plan: it tells of words that will not come, so it is released and acquired.

use crate::sync::{AtomicU64, Ordering};

/// A call's number in words: the ranks' calls are numbered alike, from 1 on.
///
/// It wraps to 1 after 2^32 - 1, because 0 is what fresh memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence(u32);

impl Sequence {
    /// Before the first call: what fresh memory holds.
    pub(crate) const NONE: Self = Self(0);
    /// The first call.
    pub const FIRST: Self = Self(1);

    /// The sequence of a tag; none for 0, which no call has.
    #[must_use]
    pub fn from_tag(tag: u32) -> Option<Self> {
        (tag != 0).then_some(Self(tag))
    }

    /// The next call.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1).max(1))
    }

    /// The call before. For the first it is the one before the wrap, which fresh memory does not hold.
    pub(crate) fn previous(self) -> Self {
        Self(if self.0 > 1 { self.0 - 1 } else { u32::MAX })
    }

    /// Whether this is `other` or comes after it.
    pub(crate) fn has_reached(self, other: Self) -> bool {
        self == other || self.is_after(other)
    }

    /// Whether it comes after `other`, for calls less than half the numbers apart.
    #[must_use]
    pub fn is_after(self, other: Self) -> bool {
        self != other && self.0.wrapping_sub(other.0) < 1 << 31
    }

    /// As it stands in words.
    #[must_use]
    pub fn tag(self) -> u32 {
        self.0
    }
}

/// Words that are read or written in one step of a loop: the compiler does not unroll loops of atomic words.
const UNROLLED: usize = 8;

/// Store `value` for the call `sequence`. A word has one writer.
pub fn store(word: &AtomicU64, sequence: Sequence, value: u32) {
    // Relaxed: the word guards nothing but itself (module documentation). Partner: `load`.
    word.store(u64::from(sequence.0) << 32 | u64::from(value), Ordering::Relaxed);
}

/// Store `values` for the call `sequence`, in order.
pub(crate) fn store_all(words: &[AtomicU64], sequence: Sequence, values: &[u32]) {
    debug_assert_eq!(words.len(), values.len());
    let (lines, words) = words.as_chunks::<UNROLLED>();
    let (values_of_lines, values) = values.as_chunks::<UNROLLED>();
    for (words, values) in lines.iter().zip(values_of_lines) {
        words.iter().zip(values).for_each(|(word, &value)| store(word, sequence, value));
    }
    words.iter().zip(values).for_each(|(word, &value)| store(word, sequence, value));
}

/// Store `value` for the call `sequence`, after all that this thread stored before.
pub(crate) fn store_last(word: &AtomicU64, sequence: Sequence, value: u32) {
    // Release: whoever finds this word finds what was stored before it. Partner: `sequence_first`.
    word.store(u64::from(sequence.0) << 32 | u64::from(value), Ordering::Release);
}

/// The call that a word of [`store_last`] is of; what was stored before it is found by later loads.
pub(crate) fn sequence_first(word: &AtomicU64) -> Option<Sequence> {
    // Acquire: partner and reason in `store_last`.
    Sequence::from_tag((word.load(Ordering::Acquire) >> 32) as u32)
}

/// The value of the call `sequence`, once it is there.
pub fn load(word: &AtomicU64, sequence: Sequence) -> Option<u32> {
    // Relaxed: the word guards nothing but itself (module documentation). Partner: `store`.
    let word = word.load(Ordering::Relaxed);
    ((word >> 32) as u32 == sequence.0).then_some(word as u32)
}

/// Copy the values of the call `sequence`; false if any word is of another call, and `values` is then of no use.
pub(crate) fn load_all(words: &[AtomicU64], sequence: Sequence, values: &mut [u32]) -> bool {
    debug_assert_eq!(words.len(), values.len());
    let (expected, mut other) = (u64::from(sequence.0) << 32, 0);
    // Without a branch at each word: nearly always all are there.
    let mut take = |word: &AtomicU64, value: &mut u32| {
        // Relaxed: as in `load`, each word by itself.
        let word = word.load(Ordering::Relaxed);
        *value = word as u32;
        other |= word ^ expected;
    };
    let (lines, words) = words.as_chunks::<UNROLLED>();
    let (values_of_lines, values) = values.as_chunks_mut::<UNROLLED>();
    for (words, values) in lines.iter().zip(values_of_lines) {
        words.iter().zip(values).for_each(|(word, value)| take(word, value));
    }
    words.iter().zip(values).for_each(|(word, value)| take(word, value));
    other >> 32 == 0
}

/// The call that a word is of, and its value; none for fresh memory.
pub(crate) fn load_any(word: &AtomicU64) -> Option<(Sequence, u32)> {
    // Relaxed: as in `load`.
    let word = word.load(Ordering::Relaxed);
    Sequence::from_tag((word >> 32) as u32).map(|sequence| (sequence, word as u32))
}

/// The call that a word is of; none for fresh memory.
pub fn sequence(word: &AtomicU64) -> Option<Sequence> {
    load_any(word).map(|(sequence, _)| sequence)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_word_belongs_to_one_call() {
        let word = AtomicU64::new(0);
        assert_eq!(load(&word, Sequence::FIRST), None);
        store(&word, Sequence::FIRST, u32::MAX);
        assert_eq!(load(&word, Sequence::FIRST), Some(u32::MAX));
        assert_eq!(load(&word, Sequence::FIRST.next()), None);
    }

    #[test]
    fn the_sequence_wraps_past_zero() {
        assert_eq!(Sequence(u32::MAX).next(), Sequence::FIRST);
        assert_eq!(Sequence::FIRST.previous(), Sequence(u32::MAX));
        assert_eq!(Sequence::from_tag(0), None);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Calls whose words fall on the same place of the ring.
    const CALLS: [u32; 4] = [1, 5, 9, 13];

    #[test]
    fn a_word_used_again_gives_each_call_its_own_value_or_none() {
        loom::model(|| {
            let word = Arc::new(AtomicU64::new(0));
            let writer = {
                let word = Arc::clone(&word);
                thread::spawn(move || CALLS.map(|tag| store(&word, Sequence(tag), !tag)))
            };
            let mut newest = 0;
            for tag in CALLS {
                if let Some(value) = load(&word, Sequence(tag)) {
                    assert_eq!(value, !tag);
                    assert!(tag >= newest, "call {tag} after {newest}");
                }
                newest = sequence(&word).map_or(newest, |found| found.0.max(newest));
            }
            writer.join().unwrap();
            assert_eq!(load(&word, Sequence(13)), Some(!13));
            assert_eq!(load(&word, Sequence(1)), None);
        });
    }
}
