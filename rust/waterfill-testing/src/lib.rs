//! What tests and benchmarks share. Nothing that is shipped depends on it.
//!
//! ```
//! let draw = |seed| waterfill_testing::Random(seed).below(1000);
//! assert_eq!(draw(7), draw(7));
//! ```

mod allocations;

pub use allocations::{Counting, allocations};

/// The random generator of tests and benchmarks: its seed says everything, on every machine.
///
/// A linear congruential generator. Figures in `benches/instructions.json` and in `docs/` are of its draws. Source: D. Knuth's
/// MMIX, "The Art of Computer Programming", volume 2, 3.3.4.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// A number from 0 on, below `bound`, which is at least 1; never 2^31 or more.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The lower bits of the state repeat soon.
        (self.0 >> 33) as usize % bound
    }

    /// One time in `times`.
    pub fn rarely(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Bring `values` into any order.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        (1..values.len()).for_each(|i| values.swap(i, self.below(i + 1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_draws_are_those_that_figures_are_of() {
        let mut random = Random(1);
        assert_eq!([(); 4].map(|()| random.below(1000)), [774, 153, 196, 870]);
    }

    #[test]
    fn draws_below_a_bound_are_even() {
        let (mut random, mut drawn) = (Random(3), [0; 7]);
        (0..70_000).for_each(|_| drawn[random.below(7)] += 1);
        assert!(drawn.iter().all(|count| (9_700..10_300).contains(count)), "{drawn:?}");
    }

    #[test]
    fn a_shuffle_keeps_all_and_moves_some() {
        let mut values: Vec<usize> = (0..100).collect();
        Random(1).shuffle(&mut values);
        assert_ne!(values[..10], (0..10).collect::<Vec<_>>());
        values.sort_unstable();
        assert_eq!(values, (0..100).collect::<Vec<_>>());
    }
}
