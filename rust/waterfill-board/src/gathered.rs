//! What all ranks posted for a call, copied from the board by the planner.

use waterfill_core::{Placement, ReplicaCounts};

use crate::layout::Shape;
use crate::sync::AtomicU64;
use crate::word::{self, Sequence};

/// A call's words of all ranks, ranks in order.
#[derive(Debug)]
pub(crate) struct Gathered {
    shape: Shape,
    /// `[R]`
    pub tokens: Vec<u32>,
    /// `[R, R]`
    pub visits: Vec<u32>,
    /// `[R, P]` counts, or `[R, R]` loads where plans choose among replicas.
    counts: Vec<u32>,
    /// `[R, redundant]` rows of jobs.
    pub jobs: Vec<u32>,
    /// `[R, ceil(P / 32)]` bits of active experts, where plans choose among replicas.
    active: Vec<u32>,
    /// `[R]` fingerprints of maps, where plans choose among replicas; else 0.
    pub fingerprints: Vec<u32>,
}

impl Gathered {
    pub(crate) fn new(shape: Shape) -> Self {
        let words = |of_rank: usize| vec![0; shape.ranks * of_rank];
        Self {
            shape,
            tokens: words(1),
            visits: words(shape.ranks),
            counts: words(shape.posted_counts().len()),
            jobs: words(shape.posted_jobs().len()),
            active: words(shape.posted_active().len()),
            fingerprints: words(1),
        }
    }

    /// Copy what `rank` posted, all but its last word, for the call `sequence`; false as long as any of it is missing.
    pub(crate) fn read(&mut self, words: &[AtomicU64], sequence: Sequence, rank: usize) -> bool {
        let shape = self.shape;
        // Every word is looked at, whatever another tells: nothing orders them.
        let load = |from: std::ops::Range<usize>, to: &mut Vec<u32>| {
            let length = from.len();
            word::load_all(&words[from], sequence, &mut to[rank * length..][..length])
        };
        load(0..1, &mut self.tokens)
            && load(shape.posted_visits(), &mut self.visits)
            && load(shape.posted_counts(), &mut self.counts)
            && load(shape.posted_jobs(), &mut self.jobs)
            && load(shape.posted_active(), &mut self.active)
            && shape.posted_fingerprint().is_none_or(|at| load(at..at + 1, &mut self.fingerprints))
    }

    /// Unknown is not empty: whoever has no counts here must not be eligible either.
    pub(crate) fn forget(&mut self, rank: usize) {
        let lists = [
            &mut self.tokens,
            &mut self.visits,
            &mut self.counts,
            &mut self.jobs,
            &mut self.active,
            &mut self.fingerprints,
        ];
        for list in lists {
            let length = list.len() / self.shape.ranks;
            list[rank * length..][..length].fill(0);
        }
    }

    /// The counts `[P]` of all ranks together, where plans do not choose among replicas.
    pub(crate) fn add_up(&self, routed: &mut [u32]) {
        routed.fill(0);
        for counts in self.counts.chunks_exact(self.shape.experts) {
            for (sum, &rows) in routed.iter_mut().zip(counts) {
                *sum = sum.saturating_add(rows);
            }
        }
    }

    /// The same where they do. `known`: the placement is of the map that all ranks posted. Else nobody can tell which ranks
    /// have the rows of jobs, and each counts as having as many.
    pub(crate) fn reduce(&self, placement: &Placement, known: bool, all: &mut ReplicaCounts) {
        let Shape { ranks, redundant, .. } = self.shape;
        all.clear(placement);
        for rank in 0..ranks {
            let of_rank = |length: usize| rank * length..(rank + 1) * length;
            let words = self.shape.posted_active().len();
            all.add(
                &self.counts[of_rank(ranks)],
                &self.jobs[of_rank(redundant)],
                &self.active[of_rank(words)],
            );
        }
        if known {
            return;
        }
        let rows: u64 = self.jobs.iter().map(|&rows| u64::from(rows)).sum();
        // None in any call of a layer without a map. Some while a map is renewed, which is seldom.
        if rows > 0 {
            all.add_to_each_rank(u32::try_from(rows / ranks as u64).unwrap_or(u32::MAX));
        }
    }
}
