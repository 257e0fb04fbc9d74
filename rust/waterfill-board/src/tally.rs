//! What ranks and planner count of themselves, and where on the board each count stands: written for those
//! who look from outside, never read by the exchange itself.

use crate::histogram::{BUCKETS, Waits};
use crate::layout::{PLANNER_TALLY, Shape};
use crate::outcome::{Ended, Outcome};
use crate::region::Region;
use crate::sync::{AtomicU64, Ordering};

/// How one rank's calls ended, since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The process that is at this end; 0 before it came.
    pub process: u64,
    /// Calls by how they ended.
    pub ended: Ended,
    /// Tokens of all calls.
    pub tokens: u64,
    /// How long the calls waited, those without a wait left out. A kernel does not count its own: of a rank on a GPU this
    /// is how long its counts waited for the planner's answer, as the planner saw it.
    pub waits: Waits,
}

/// Plans made, since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// The process that plans; 0 before it came.
    pub process: u64,
    /// Plans from all ranks' counts.
    pub whole: u64,
    /// Plans from all living ranks' counts, without those whose process is gone.
    pub partial: u64,
    /// Calls without a plan, because a rank's counts did not come within the planner's patience.
    pub late: u64,
    /// Calls without a plan, and without a wait: a rank whose counts did not come to the last calls either.
    pub silent: u64,
    /// Calls without a plan, because the planner came when a rank had given it up.
    pub given_up: u64,
    /// Calls without a plan: counts on the board that the core refuses.
    pub refused: u64,
    /// The slowest rank's cost with shared rows at home, summed over the plans, in the cost model's unit.
    pub home: u64,
    /// The slowest rank's cost under the plan, summed.
    pub planned: u64,
    /// The mean rank's cost under the plan, summed.
    pub mean: u64,
    /// Plans that chose replicas too.
    pub replicas: u64,
    /// `[R]` calls that were ended without a rank's counts, planned or not.
    pub missed: Vec<u64>,
}

/// The words of a rank's tally: the process; its calls by outcome, which a kernel writes; the tokens; the longest wait.
/// The buckets of its waits follow.
const RANK_WORDS: usize = 1 + Outcome::COUNT + 2;

impl Tally {
    /// A tally without a call, shown on the board: this process is at the end of `rank` from now on.
    pub fn announce(region: &impl Region, shape: Shape, rank: usize) -> Self {
        let tally = Self { process: std::process::id().into(), ..Self::default() };
        tally.show(region.words(), shape, rank, None);
        tally
    }

    /// Calls so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.ended.sum()
    }

    fn words(&self) -> [u64; RANK_WORDS] {
        let mut words = [0; RANK_WORDS];
        words[0] = self.process;
        words[1..=Outcome::COUNT].copy_from_slice(&self.ended.0);
        words[1 + Outcome::COUNT..].copy_from_slice(&[self.tokens, self.waits.longest()]);
        words
    }

    /// Write all but the buckets, then the bucket that changed.
    pub(crate) fn show(
        &self,
        words: &[AtomicU64],
        shape: Shape,
        rank: usize,
        wait: Option<(usize, u64)>,
    ) {
        let start = shape.rank_tally(rank);
        show(&words[start..], self.words());
        if let Some((bucket, count)) = wait {
            show(&words[start + RANK_WORDS + bucket..], [count]);
        }
    }

    /// As it stands on a board.
    pub(crate) fn read(words: &[AtomicU64], shape: Shape, rank: usize) -> Self {
        let start = shape.rank_tally(rank);
        let words_of_rank = &words[start..][..RANK_WORDS + BUCKETS];
        let read: [u64; RANK_WORDS] = std::array::from_fn(|word| look(&words_of_rank[word]));
        let [process, .., tokens, longest] = read;
        let ended = Ended(std::array::from_fn(|outcome| read[1 + outcome]));
        let waits = if longest > 0 {
            Waits::from_words(words_of_rank[RANK_WORDS..].iter().map(look), longest)
        } else {
            let seen = &words[shape.waits_seen(rank)..];
            Waits::from_words(seen[1..=BUCKETS].iter().map(look), look(&seen[0]))
        };
        Self { process, ended, tokens, waits }
    }
}

impl Published {
    /// Plans so far.
    #[must_use]
    pub fn plans(&self) -> u64 {
        self.whole + self.partial
    }

    /// Calls for which there was no plan.
    #[must_use]
    pub fn none(&self) -> u64 {
        self.late + self.silent + self.given_up + self.refused
    }

    pub(crate) fn show(&self, words: &[AtomicU64], shape: Shape) {
        let start = shape.planner_tally();
        let own = [
            self.process,
            self.whole,
            self.partial,
            self.late,
            self.silent,
            self.given_up,
            self.refused,
            self.home,
            self.planned,
            self.mean,
            self.replicas,
        ];
        show(&words[start..], own);
        show(&words[start + PLANNER_TALLY..], self.missed.iter().copied());
    }

    /// As it stands on a board.
    pub(crate) fn read(words: &[AtomicU64], shape: Shape) -> Self {
        let words = &words[shape.planner_tally()..][..PLANNER_TALLY + shape.ranks];
        let [
            process,
            whole,
            partial,
            late,
            silent,
            given_up,
            refused,
            home,
            planned,
            mean,
            replicas,
        ] = std::array::from_fn(|field| look(&words[field]));
        let missed = words[PLANNER_TALLY..].iter().map(look).collect();
        Self {
            process,
            whole,
            partial,
            late,
            silent,
            given_up,
            refused,
            home,
            planned,
            mean,
            replicas,
            missed,
        }
    }
}

/// Show a wait that the planner counted for `rank`: the longest, and the bucket that changed.
pub(crate) fn show_seen(
    words: &[AtomicU64],
    shape: Shape,
    rank: usize,
    longest: u64,
    (bucket, count): (usize, u64),
) {
    let start = shape.waits_seen(rank);
    show(&words[start..], [longest]);
    show(&words[start + 1 + bucket..], [count]);
}

fn show(words: &[AtomicU64], values: impl IntoIterator<Item = u64>) {
    for (word, value) in words.iter().zip(values) {
        // Relaxed: a count that nobody decides by; words of one tally may be of two calls. Partner: `look`.
        word.store(value, Ordering::Relaxed);
    }
}

fn look(word: &AtomicU64) -> u64 {
    // Relaxed: partner and reason in `show`.
    word.load(Ordering::Relaxed)
}
