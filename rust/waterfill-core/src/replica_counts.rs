//! Counts as a plan with replicas needs them: the rows of each replicated expert, and each rank's others together.

use std::ops::Range;

use crate::check::check_length;
use crate::error::Result;
use crate::placement::Placement;

/// Physical experts whose bits share a word.
const BITS: usize = u32::BITS as usize;

/// What one source, or all of them, know of a layer's rows, where plans choose among replicas.
///
/// A *job* is a replicated logical expert, in order of the logical experts. Ranks post these words on a board in place of the
/// rows of every expert, because a planner reads them while all ranks wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaCounts {
    loads: Vec<u32>,
    jobs: Vec<u32>,
    active: Vec<u32>,
}

impl ReplicaCounts {
    /// No counts; reused, it allocates nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `[R]` the rows of each rank's experts that belong to no job.
    #[must_use]
    pub fn loads(&self) -> &[u32] {
        &self.loads
    }

    /// `[jobs]` the rows of each job.
    #[must_use]
    pub fn jobs(&self) -> &[u32] {
        &self.jobs
    }

    /// `[ceil(P / 32)]` bit `p % 32` of word `p / 32`: physical expert `p` belongs to no job and has rows. Other bits say nothing.
    #[must_use]
    pub fn active(&self) -> &[u32] {
        &self.active
    }

    /// Words of [`active`](Self::active) for so many physical experts.
    #[must_use]
    pub fn active_words(physical_experts: usize) -> usize {
        physical_experts.div_ceil(BITS)
    }

    /// The active experts of `rank` that belong to no job, whatever the bits of those that do.
    #[must_use]
    pub(crate) fn active_on(&self, placement: &Placement, rank: usize) -> u64 {
        let experts = placement.experts_per_rank();
        let Range { start, end } = rank * experts..(rank + 1) * experts;
        // Bit 31 stands for all up to it.
        let below = |bits: usize| (1u64 << bits) - 1;
        let (first, last) = (start / BITS, (end - 1) / BITS);
        let replicas = &placement.replica_bits()[first..=last];
        let words = self.active[first..=last].iter().zip(replicas).zip(first..);
        let count = |((&word, &replicas), index): ((&u32, &u32), usize)| {
            let from = start.saturating_sub(index * BITS);
            let until = (end - index * BITS).min(BITS);
            (u64::from(word & !replicas) & below(until) & !below(from)).count_ones()
        };
        words.map(count).sum::<u32>().into()
    }

    /// They are of this placement.
    pub(crate) fn check(&self, placement: &Placement) -> Result<()> {
        check_length("loads", self.loads.len(), placement.ranks())?;
        check_length("jobs", self.jobs.len(), placement.jobs().len())?;
        let words = Self::active_words(placement.physical_experts());
        check_length("words of active experts", self.active.len(), words)
    }

    /// Take the counts of `[P]` rows of each physical expert: those of one source, or of all.
    ///
    /// # Errors
    /// Counts of another length. More than `u32::MAX` rows together are counted as so many.
    pub fn reduce(&mut self, placement: &Placement, counts: &[u32]) -> Result<()> {
        check_length("counts", counts.len(), placement.physical_experts())?;
        self.clear(placement);
        let per_rank = counts.chunks_exact(placement.experts_per_rank());
        for (load, rows) in self.loads.iter_mut().zip(per_rank) {
            *load = clamped(rows.iter().map(|&rows| u64::from(rows)).sum());
        }
        for (active, rows) in self.active.iter_mut().zip(counts.chunks(BITS)) {
            *active = rows.iter().rev().fold(0, |bits, &rows| bits << 1 | u32::from(rows > 0));
        }
        for (job, replicas) in self.jobs.iter_mut().zip(placement.jobs()) {
            for replica in replicas.iter().map(|&replica| replica as usize) {
                let load = &mut self.loads[placement.rank_of_known(replica)];
                *load = load.saturating_sub(counts[replica]);
                *job = job.saturating_add(counts[replica]);
                self.active[replica / BITS] &= !(1 << (replica % BITS));
            }
        }
        Ok(())
    }

    /// No rows, of no source, for this placement.
    pub fn clear(&mut self, placement: &Placement) {
        let words = Self::active_words(placement.physical_experts());
        let sizes = [placement.ranks(), placement.jobs().len(), words];
        for (words, size) in
            [&mut self.loads, &mut self.jobs, &mut self.active].into_iter().zip(sizes)
        {
            words.clear();
            words.resize(size, 0);
        }
    }

    /// Add what another source has: `loads` `[R]`, `jobs` of which those past this one's are left out, `active` `[ceil(P / 32)]`.
    pub fn add(&mut self, loads: &[u32], jobs: &[u32], active: &[u32]) {
        let add = |(sum, &rows): (&mut u32, &u32)| *sum = sum.saturating_add(rows);
        self.loads.iter_mut().zip(loads).for_each(add);
        self.jobs.iter_mut().zip(jobs).for_each(add);
        self.active.iter_mut().zip(active).for_each(|(all, &bits)| *all |= bits);
    }

    /// Add so many rows to those of each rank.
    pub fn add_to_each_rank(&mut self, rows: u32) {
        self.loads.iter_mut().for_each(|load| *load = load.saturating_add(rows));
    }
}

fn clamped(rows: u64) -> u32 {
    u32::try_from(rows).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use waterfill_testing::Random;

    #[test]
    fn counts_are_those_of_a_plain_count() {
        let mut random = Random(23);
        for _ in 0..300 {
            let ranks = 1 + random.below(6);
            let physical = ranks * (1 + random.below(40));
            let logical = 1 + random.below(physical);
            let mut map: Vec<u32> = (0..logical as u32).collect();
            map.extend((logical..physical).map(|_| random.below(logical) as u32));
            random.shuffle(&mut map);
            let placement = Placement::replicated(ranks, &map).unwrap();
            let counts: Vec<u32> = map.iter().map(|_| random.below(3) as u32 * 7).collect();
            let mut reduced = ReplicaCounts::new();
            reduced.reduce(&placement, &counts).unwrap();
            let of_job = |p: usize| map.iter().filter(|&&other| other == map[p]).count() > 1;
            let others = |rank: usize| {
                (0..physical)
                    .filter(move |&p| placement_of(p, physical, ranks) == rank && !of_job(p))
            };
            // Bits of replicas, which whoever posts may have set.
            let mut all = reduced.clone();
            let mut of_replicas = vec![0; ReplicaCounts::active_words(physical)];
            for p in (0..physical).filter(|&p| of_job(p)) {
                of_replicas[p / 32] |= 1 << (p % 32);
            }
            all.add(&[], &[], &of_replicas);
            for rank in 0..ranks {
                let rows: u32 = others(rank).map(|p| counts[p]).sum();
                assert_eq!(reduced.loads()[rank], rows);
                let active = others(rank).filter(|&p| counts[p] > 0).count() as u64;
                assert_eq!(reduced.active_on(&placement, rank), active);
                assert_eq!(all.active_on(&placement, rank), active, "bits of replicas count");
            }
            for (p, &rows) in counts.iter().enumerate() {
                let bit = reduced.active()[p / 32] >> (p % 32) & 1;
                assert_eq!(bit == 1, rows > 0 && !of_job(p));
            }
            let jobs: Vec<u32> =
                placement.jobs().map(|job| job.iter().map(|&p| counts[p as usize]).sum()).collect();
            assert_eq!(reduced.jobs(), jobs);
        }
    }

    fn placement_of(physical: usize, experts: usize, ranks: usize) -> usize {
        physical / (experts / ranks)
    }

    #[test]
    fn sources_add_up() {
        let placement = Placement::replicated(2, &[0, 1, 2, 0]).unwrap();
        let mut all = ReplicaCounts::new();
        all.clear(&placement);
        let mut one = ReplicaCounts::new();
        for counts in [[1, 2, 0, 4], [8, 0, 0, 2]] {
            one.reduce(&placement, &counts).unwrap();
            // A table with more jobs: its last are left out.
            all.add(one.loads(), &[one.jobs(), &[99]].concat(), one.active());
        }
        one.reduce(&placement, &[9, 2, 0, 6]).unwrap();
        assert_eq!(all, one);
        all.add(&[u32::MAX, 1], &[u32::MAX], &[4]);
        assert_eq!(
            (all.loads(), all.jobs(), all.active()),
            (&[u32::MAX, 1][..], &[u32::MAX][..], &[6][..])
        );
        all.add_to_each_rank(3);
        assert_eq!((all.loads(), all.jobs()), (&[u32::MAX, 4][..], &[u32::MAX][..]));
    }

    #[test]
    fn counts_of_another_length_are_refused() {
        let placement = Placement::contiguous(2, 4).unwrap();
        let refused = ReplicaCounts::new().reduce(&placement, &[0; 5]).unwrap_err().to_string();
        assert!(refused.contains('5') && refused.contains('4'), "{refused}");
    }
}
