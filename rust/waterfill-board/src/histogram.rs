//! How long waits took, in few words: four buckets an octave, so a quantile is at most a quarter too high.
//!
//! Not a library's histogram, because its words lie on the board, where others read them while they grow.

/// Buckets, up to 2^33 ns; longer waits are in the last one.
pub const BUCKETS: usize = 128;

/// A histogram of waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    buckets: [u64; BUCKETS],
    longest: u64,
}

impl Default for Waits {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], longest: 0 }
    }
}

impl Waits {
    /// From buckets and the longest wait in nanoseconds, as they stand on a board.
    pub(crate) fn from_words(words: impl Iterator<Item = u64>, longest: u64) -> Self {
        let mut waits = Self { longest, ..Self::default() };
        waits.buckets.iter_mut().zip(words).for_each(|(bucket, word)| *bucket = word);
        waits
    }

    /// Count one of so many nanoseconds; gives the bucket and its new count.
    pub(crate) fn add(&mut self, nanoseconds: u64) -> (usize, u64) {
        let bucket = bucket(nanoseconds);
        self.buckets[bucket] += 1;
        self.longest = self.longest.max(nanoseconds);
        (bucket, self.buckets[bucket])
    }

    /// Waits counted, each bucket, shortest first; [`limit`](Self::limit) tells what is in which.
    #[must_use]
    pub fn buckets(&self) -> &[u64; BUCKETS] {
        &self.buckets
    }

    /// Nanoseconds that every wait in `bucket` was below; the last bucket has no limit.
    #[must_use]
    pub fn limit(bucket: usize) -> u64 {
        let next = bucket as u64 + 1;
        if next < 4 { next } else { (4 + next % 4) << (next / 4 - 1) }
    }

    /// The longest, in nanoseconds.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.longest
    }

    /// Nanoseconds that at least `part` of the waits took no longer than; 0 if there were none.
    #[must_use]
    pub fn quantile(&self, part: f64) -> u64 {
        let total = self.buckets.iter().fold(0u64, |sum, &count| sum.saturating_add(count));
        let needed = ((total as f64 * part).ceil() as u64).max(1);
        let mut sum = 0u64;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            sum = sum.saturating_add(count);
            if sum >= needed {
                return Self::limit(bucket).min(self.longest);
            }
        }
        0
    }
}

/// Values below 4 by themselves; then by the highest bit and the two after it.
fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < 4 {
        return nanoseconds as usize;
    }
    let octave = nanoseconds.ilog2();
    let quarter = nanoseconds >> (octave - 2) & 3;
    (((octave - 1) * 4) as usize + quarter as usize).min(BUCKETS - 1)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_in_the_bucket_whose_limits_hold_it() {
        for octave in 0..33 {
            for value in [1u64 << octave, (1 << octave) + 1, (1u64 << octave) * 2 - 1] {
                let bucket = bucket(value);
                assert!(value < Waits::limit(bucket), "{value} in {bucket}");
                assert!(bucket == 0 || value >= Waits::limit(bucket - 1), "{value} in {bucket}");
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_at_most_a_quarter_too_high() {
        let mut waits = Waits::default();
        assert_eq!(waits.quantile(0.5), 0);
        for i in 1..=1000 {
            waits.add(i * 10);
        }
        for part in [0.5, 0.9, 0.99] {
            let exact = part * 10_000.0;
            let found = waits.quantile(part) as f64;
            assert!(found >= exact && found <= exact * 1.25, "{part}: {found}, exactly {exact}");
        }
        assert_eq!((waits.quantile(1.0), waits.longest()), (10_000, 10_000));
    }
}
