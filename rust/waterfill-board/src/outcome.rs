//! How calls end: the one list, in the order in which they are counted on a board, by a kernel, and for Python.

use std::ops::{Index, IndexMut};

/// How a call ended, and so whose counts its quotas are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The planner's, from the counts of all ranks that live.
    Live,
    /// This rank's own counts, as on every other rank: the planner said that this call has no plan.
    NoPlan,
    /// This rank's own counts: the planner did not answer within the cap.
    TimedOut,
    /// This rank's own counts: the planner is gone, or did not answer too many calls of late and was not waited for.
    Broken,
    /// This rank's own counts: the board held quotas that do not add up to its tokens.
    Torn,
}

impl Outcome {
    /// How many there are.
    pub const COUNT: usize = Self::NAMES.len();
    /// Each one's name, in the order of the variants: what Python, metrics and messages say.
    pub const NAMES: [&str; 5] = ["live", "none", "timed_out", "broken", "torn"];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// Numbers of calls by how they ended, in the order of [`Outcome`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended(pub [u64; Outcome::COUNT]);

impl Ended {
    /// All calls.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Each number after the name of its outcome.
    pub fn by_name(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Outcome::NAMES.into_iter().zip(self.0)
    }
}

impl Index<Outcome> for Ended {
    type Output = u64;

    fn index(&self, outcome: Outcome) -> &u64 {
        &self.0[outcome as usize]
    }
}

impl IndexMut<Outcome> for Ended {
    fn index_mut(&mut self, outcome: Outcome) -> &mut u64 {
        &mut self.0[outcome as usize]
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_the_name_of_its_place() {
        use Outcome::{Broken, Live, NoPlan, TimedOut, Torn};
        let all = [Live, NoPlan, TimedOut, Broken, Torn];
        assert_eq!(all.map(|outcome| outcome as usize), [0, 1, 2, 3, 4]);
        assert_eq!(all.map(Outcome::name), ["live", "none", "timed_out", "broken", "torn"]);
        let mut ended = Ended::default();
        all.into_iter().for_each(|outcome| ended[outcome] += 10 + outcome as u64);
        let named: Vec<_> = ended.by_name().collect();
        let expected =
            [("live", 10), ("none", 11), ("timed_out", 12), ("broken", 13), ("torn", 14)];
        assert_eq!((named.as_slice(), ended.sum()), (&expected[..], 60));
    }
}
