//! Where everything is on the board, in 64-bit words: the one place that knows.
//!
//! A header; what each rank and the planner count of themselves, for those who look from outside; then a
//! ring of calls. Each slot of the ring holds one block of counts a rank and one block of quotas a rank.
//! Every block has one writer and starts a cache line of its own, so that a rank (or its GPU) polls a
//! line that nobody else reads.

use std::ops::Range;

use waterfill_core::ReplicaCounts;

use crate::error::{Error, Result};
use crate::presence::End;

/// Words in a cache line.
const LINE: usize = 8;
/// Calls that may be in flight: ranks are at most one call apart, and two batches may overlap.
pub const RING: usize = 4;

/// Shape of a board. Equal shapes have equal layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// EP size.
    pub ranks: usize,
    /// Physical experts over all ranks, or as many as ranks, for counts of ranks alone.
    pub experts: usize,
    /// Physical experts beyond one for each logical expert, where plans choose among replicas; else 0.
    pub redundant: usize,
}

impl Shape {
    /// A shape.
    ///
    /// # Errors
    /// What [`waterfill_core::Placement::contiguous`] refuses.
    pub fn new(ranks: usize, experts: usize) -> Result<Self> {
        waterfill_core::Placement::contiguous(ranks, experts)?;
        Ok(Self { ranks, experts, redundant: 0 })
    }

    /// A shape whose plans choose among the replicas of `redundant` experts too.
    ///
    /// # Errors
    /// As [`new`](Self::new), or no expert that is not redundant.
    pub fn with_redundant(ranks: usize, experts: usize, redundant: usize) -> Result<Self> {
        let shape = Self::new(ranks, experts)?;
        if redundant >= experts {
            return Err(Error::Redundant { redundant, experts });
        }
        Ok(Self { redundant, ..shape })
    }

    /// Whether ranks post one count for each rank, the rows of its experts together. Where each rank has one expert that
    /// is one for each expert too: the same words, whoever reads them.
    #[must_use]
    pub fn has_counts_per_rank(&self) -> bool {
        self.experts == self.ranks && self.redundant == 0
    }

    /// Words of the whole board.
    #[must_use]
    pub fn words(&self) -> usize {
        self.ring() + RING * self.slot()
    }

    /// Bytes of the whole board.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.words() * size_of::<u64>()
    }

    /// The first of the [`RANK_TALLY`] words in which `rank` counts how its calls ended.
    #[must_use]
    pub fn rank_tally(&self, rank: usize) -> usize {
        HEADER + rank * lines(RANK_TALLY)
    }

    /// The first of the words of a rank's tally that count its calls by how they ended, in the order of [`Outcome`](crate::Outcome).
    #[must_use]
    pub fn calls_of(&self, rank: usize) -> usize {
        self.rank_tally(rank) + 1
    }

    /// The first of the words in which the planner counts its plans: [`PLANNER_TALLY`], then one a rank.
    #[must_use]
    pub fn planner_tally(&self) -> usize {
        self.rank_tally(self.ranks)
    }

    /// The word by which the process at `end` says that it holds its lock; the lock is on the byte where it begins.
    #[must_use]
    pub fn mark(&self, end: End) -> usize {
        match end {
            End::Rank(rank) => self.rank_tally(rank) + RANK_TALLY - LINE,
            End::Planner => self.planner_tally() + PLANNER_TALLY - 1,
        }
    }

    /// The word in which the planner tells `rank` of the last call for which it has no plan.
    #[must_use]
    pub fn without_plan(&self, rank: usize) -> usize {
        self.mark(End::Rank(rank)) + 1
    }

    /// The word in which `rank`'s own process tells its kernel that the planner is gone.
    #[must_use]
    pub fn deserted(&self, rank: usize) -> usize {
        self.mark(End::Rank(rank)) + 2
    }

    /// The first of the words in which the planner counts how long `rank`'s counts waited for its answer: the longest
    /// wait, then the buckets.
    #[must_use]
    pub fn waits_seen(&self, rank: usize) -> usize {
        self.planner_tally() + lines(PLANNER_TALLY + self.ranks) + rank * SEEN
    }

    /// The first word of the ring.
    #[must_use]
    pub fn ring(&self) -> usize {
        self.waits_seen(self.ranks)
    }

    /// Words that a rank posts: its tokens, then [`posted_visits`](Self::posted_visits), [`posted_counts`](Self::posted_counts),
    /// where plans choose among replicas [`posted_jobs`](Self::posted_jobs), [`posted_active`](Self::posted_active) and the
    /// [fingerprint](Self::posted_fingerprint) of its map, and last [whether it waits](Self::posted_waits) for a plan.
    #[must_use]
    pub fn posted(&self) -> usize {
        self.posted_waits() + 1
    }

    /// Of the words that a rank posts: its visits `[R]`.
    #[must_use]
    pub fn posted_visits(&self) -> Range<usize> {
        1..1 + self.ranks
    }

    /// Of the words that a rank posts: its counts `[P]`; where plans choose among replicas its
    /// [loads](ReplicaCounts::loads) `[R]`.
    #[must_use]
    pub fn posted_counts(&self) -> Range<usize> {
        let start = self.posted_visits().end;
        start..start + if self.redundant > 0 { self.ranks } else { self.experts }
    }

    /// Of the words that a rank posts: its rows of each [job](ReplicaCounts::jobs) `[redundant]`, 0 past its table's last.
    #[must_use]
    pub fn posted_jobs(&self) -> Range<usize> {
        let start = self.posted_counts().end;
        start..start + self.redundant
    }

    /// Of the words that a rank posts: a bit for each [active expert](ReplicaCounts::active) that belongs to no job,
    /// `[ceil(P / 32)]`; empty where plans do not choose among replicas.
    #[must_use]
    pub fn posted_active(&self) -> Range<usize> {
        let start = self.posted_jobs().end;
        let words = if self.redundant > 0 { ReplicaCounts::active_words(self.experts) } else { 0 };
        start..start + words
    }

    /// Of the words that a rank posts: the fingerprint of its map, where plans choose among replicas.
    #[must_use]
    pub fn posted_fingerprint(&self) -> Option<usize> {
        (self.redundant > 0).then_some(self.posted_active().end)
    }

    /// Of the words that a rank posts: whether it waits for a plan, 1 or 0. The last one.
    #[must_use]
    pub fn posted_waits(&self) -> usize {
        self.posted_active().end + usize::from(self.redundant > 0)
    }

    /// The first word of the counts that `rank` posts for a call with this tag.
    #[must_use]
    pub fn counts(&self, tag: u32, rank: usize) -> usize {
        self.ring() + tag as usize % RING * self.slot() + rank * self.counts_stride()
    }

    /// Words from the counts of one rank to those of the next.
    #[must_use]
    pub fn counts_stride(&self) -> usize {
        lines(self.posted())
    }

    /// The first word of the quotas of `rank` for a call with this tag, `[R]`.
    #[must_use]
    pub fn quotas(&self, tag: u32, rank: usize) -> usize {
        self.counts(tag, self.ranks) + rank * lines(self.planned())
    }

    /// Behind them, where plans choose among replicas: the fingerprint of the map that the plan is made for, or 0 if it chose
    /// none; then the quota of each slot of the layer's table, at most twice as many as redundant experts.
    #[must_use]
    pub fn replica_quotas(&self, tag: u32, rank: usize) -> usize {
        self.quotas(tag, rank) + self.ranks
    }

    /// Words of one rank's part of a plan.
    #[must_use]
    pub fn planned(&self) -> usize {
        self.ranks + if self.redundant > 0 { 1 + 2 * self.redundant } else { 0 }
    }

    /// Words of one slot of the ring.
    #[must_use]
    pub fn slot(&self) -> usize {
        self.ranks * (self.counts_stride() + lines(self.planned()))
    }
}

/// Words of the header, whose fields `header.rs` names.
pub(crate) const HEADER: usize = 2 * LINE;
/// Words of a rank's tally, which `tally.rs` names.
pub const RANK_TALLY: usize = LINE + crate::histogram::BUCKETS + LINE;
/// Words in which the planner counts a rank's waits.
const SEEN: usize = LINE + crate::histogram::BUCKETS;
/// Words of the planner's tally before those by rank, which `tally.rs` names.
pub const PLANNER_TALLY: usize = 2 * LINE;

/// `words`, up to whole lines.
fn lines(words: usize) -> usize {
    words.next_multiple_of(LINE)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_rank_posts_counts_of_experts_or_of_jobs_and_the_rest() {
        let shape = Shape::new(4, 256).unwrap();
        assert_eq!((shape.posted_visits(), shape.posted_counts()), (1..5, 5..261));
        assert_eq!((shape.posted_jobs(), shape.posted_active()), (261..261, 261..261));
        assert_eq!((shape.posted_fingerprint(), shape.posted_waits()), (None, 261));
        assert_eq!(shape.posted(), 262);
        let shape = Shape::with_redundant(4, 288, 32).unwrap();
        assert_eq!((shape.posted_visits(), shape.posted_counts()), (1..5, 5..9));
        assert_eq!((shape.posted_jobs(), shape.posted_active()), (9..41, 41..50));
        assert_eq!((shape.posted_fingerprint(), shape.posted_waits()), (Some(50), 51));
        assert_eq!(shape.posted(), 52);
        // Experts that do not fill the last word of bits; one expert a rank.
        assert_eq!(Shape::with_redundant(3, 33, 3).unwrap().posted_active(), 10..12);
        assert_eq!(Shape::with_redundant(2, 2, 1).unwrap().posted(), 9);
    }

    #[test]
    fn blocks_are_lines_of_their_own_and_fill_the_board() {
        for (ranks, experts, redundant) in [
            (1, 1, 0),
            (2, 6, 0),
            (2, 6, 3),
            (8, 256, 0),
            (8, 288, 32),
            (12, 12, 0),
            (72, 288, 0),
            (72, 360, 72),
        ] {
            let shape = Shape::with_redundant(ranks, experts, redundant).unwrap();
            let mut taken = vec![false; shape.words()];
            taken[..HEADER].fill(true);
            for rank in 0..ranks {
                taken[shape.rank_tally(rank)..][..RANK_TALLY].fill(true);
            }
            taken[shape.planner_tally()..shape.ring()].fill(true);
            for tag in 1..=RING as u32 {
                for rank in 0..ranks {
                    let counts = (shape.counts(tag, rank), shape.posted());
                    let quotas = (shape.quotas(tag, rank), shape.planned());
                    for (start, words) in [counts, quotas] {
                        assert_eq!(start % LINE, 0);
                        for word in &mut taken[start..start + lines(words)] {
                            assert!(!std::mem::replace(word, true), "two blocks share a word");
                        }
                    }
                }
            }
            assert!(taken.into_iter().all(|word| word), "{shape:?}");
        }
    }
}
