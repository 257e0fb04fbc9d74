//! Which replica runs each routed row of a replicated expert: the table of a layer's replicas, and the choice by quotas.

use crate::check::check_length;
use crate::cost::CostModel;
use crate::error::Result;
use crate::ids::{Id, check_rows};
use crate::placement::Placement;
use crate::plan::{Plan, Planner};
use crate::problem::{Problem, Routed};

/// In a table: a physical expert that is its expert's only one, or a slot that no replica has.
pub const NO_JOB: u32 = u32::MAX;
/// Rows whose slots are numbered together: those of a warp of the kernel.
const GROUP: usize = 32;

/// The replicas of one layer, as ranks, planner and kernel know them.
///
/// A *job* is a replicated logical expert, in order of the logical experts; a *slot* is one of its replicas, job by job,
/// ascending. There are at most as many jobs as redundant experts, and twice as many slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaTable {
    placement: Placement,
    fingerprint: u32,
    /// `[P]` the job of each physical expert, or [`NO_JOB`].
    job_of: Vec<u32>,
    primaries: Primaries,
}

/// One replica of each expert, for batches in which an expert's weights take longer than its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Primaries {
    /// `[P]` the primary replica of each physical expert's logical one.
    pub of: Vec<u32>,
    /// How many of a rank's physical experts are primary, if these are its first ones, on every rank as many.
    pub first: Option<usize>,
}

impl Primaries {
    /// The first physical experts of all ranks, if they are each logical expert once. Else as few on the rank with most as can be.
    fn new(placement: &Placement, physical_to_logical: &[u32]) -> Self {
        let first = first_of_each_rank(placement, physical_to_logical);
        let is_primary: Vec<bool> = match first {
            Some(first) => (0..physical_to_logical.len())
                .map(|physical| physical % placement.experts_per_rank() < first)
                .collect(),
            None => fewest_active(placement).iter().map(|&rows| rows > 0).collect(),
        };
        let mut primary = vec![0; placement.logical_experts()];
        for (physical, &logical) in physical_to_logical.iter().enumerate() {
            if is_primary[physical] {
                primary[logical as usize] = physical as u32;
            }
        }
        Self { of: physical_to_logical.iter().map(|&l| primary[l as usize]).collect(), first }
    }
}

fn first_of_each_rank(placement: &Placement, physical_to_logical: &[u32]) -> Option<usize> {
    let (ranks, logical_experts) = (placement.ranks(), placement.logical_experts());
    let first = logical_experts / ranks;
    let mut found = vec![false; logical_experts];
    for of_rank in physical_to_logical.chunks_exact(placement.experts_per_rank()) {
        of_rank[..first].iter().for_each(|&logical| found[logical as usize] = true);
    }
    // As many as there are experts, so each is found once.
    (logical_experts.is_multiple_of(ranks) && found.iter().all(|&found| found)).then_some(first)
}

/// `[P]` rows where each logical expert has one, on one replica.
fn fewest_active(placement: &Placement) -> Vec<u32> {
    let mut rows = vec![1; placement.physical_experts()];
    placement.jobs().for_each(|replicas| replicas[1..].iter().for_each(|&r| rows[r as usize] = 0));
    let tokens = vec![0; placement.ranks()];
    let problem = Problem {
        placement,
        cost: &CostModel::Rows,
        routed: Routed::PerExpert(&rows),
        tokens: &tokens,
        visits: None,
        eligible: None,
    };
    let mut plan = Plan::new();
    Planner::new().single_replica(&problem, &mut plan).expect("a row an expert is a problem");
    plan.replica_rows().to_vec()
}

impl ReplicaTable {
    /// Physical expert `p` computes logical expert `physical_to_logical[p]`.
    ///
    /// # Errors
    /// What [`Placement::replicated`] refuses.
    pub fn new(ranks: usize, physical_to_logical: &[u32]) -> Result<Self> {
        let placement = Placement::replicated(ranks, physical_to_logical)?;
        let mut job_of = vec![NO_JOB; physical_to_logical.len()];
        for (job, of_job) in placement.jobs().enumerate() {
            of_job.iter().for_each(|&replica| job_of[replica as usize] = job as u32);
        }
        let fingerprint = fingerprint(physical_to_logical);
        let primaries = Primaries::new(&placement, physical_to_logical);
        Ok(Self { placement, fingerprint, job_of, primaries })
    }

    /// One replica of each expert, the same whatever the counts.
    #[must_use]
    pub fn primaries(&self) -> &Primaries {
        &self.primaries
    }

    /// Where the experts are.
    #[must_use]
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// A number of the map's content, never 0: equal maps have equal ones, and others nearly always another.
    #[must_use]
    pub fn fingerprint(&self) -> u32 {
        self.fingerprint
    }

    /// Physical experts beyond one for each logical expert.
    #[must_use]
    pub fn redundant(&self) -> usize {
        self.job_of.len() - self.placement.logical_experts()
    }

    /// Replicated experts.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.placement.jobs().len()
    }

    /// Replicas of replicated experts.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.replicas().len()
    }

    /// The physical expert of each slot, job by job.
    #[must_use]
    pub fn replicas(&self) -> &[u32] {
        self.placement.replicas()
    }

    /// The slots of a job.
    #[must_use]
    pub fn slots_of(&self, job: usize) -> std::ops::Range<usize> {
        let first = self.placement.first_replicas();
        first[job] as usize..first[job + 1] as usize
    }

    /// The job that an id names, if it is of a replicated expert.
    fn job_of_id<I: Id>(&self, id: I) -> Option<usize> {
        usize::try_from(id.into()).ok().and_then(|physical| self.job_of(physical))
    }

    /// The job of a physical expert, if its expert is replicated.
    #[must_use]
    pub fn job_of(&self, physical: usize) -> Option<usize> {
        self.job_of.get(physical).filter(|&&job| job != NO_JOB).map(|&job| job as usize)
    }

    /// Words of [`words`](Self::words), for so many physical and redundant experts: the same whatever the map.
    #[must_use]
    pub fn words_of(physical_experts: usize, redundant: usize) -> usize {
        2 + physical_experts + redundant + 1 + 2 * redundant
    }

    /// The words of a layer without replicas: fingerprint 0, no job, no expert in one, slots of nothing.
    #[must_use]
    pub fn words_without(physical_experts: usize, redundant: usize) -> Vec<u32> {
        let mut words = vec![0, 0];
        words.resize(2 + physical_experts, NO_JOB);
        words.resize(2 + physical_experts + redundant + 1, 0);
        words.resize(Self::words_of(physical_experts, redundant), NO_JOB);
        words
    }

    /// As the kernel reads it: the fingerprint, the number of jobs, the job of each physical expert `[P]`, the first slot
    /// of each job `[redundant + 1]` (past the last job: the number of slots), the physical expert of each slot
    /// `[2 * redundant]` (past the last: [`NO_JOB`]).
    #[must_use]
    pub fn words(&self) -> Vec<u32> {
        let redundant = self.redundant();
        let mut words = vec![self.fingerprint, self.jobs() as u32];
        words.extend_from_slice(&self.job_of);
        words.extend_from_slice(self.placement.first_replicas());
        words.resize(2 + self.job_of.len() + redundant + 1, self.slots() as u32);
        words.extend_from_slice(self.replicas());
        words.resize(Self::words_of(self.job_of.len(), redundant), NO_JOB);
        words
    }
}

/// FNV-1a (Fowler, Noll, Vo) of the words, 32 bits; 1 where that is 0.
fn fingerprint(map: &[u32]) -> u32 {
    let bytes = map.iter().flat_map(|word| word.to_le_bytes());
    let hash = bytes
        .fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    lifted(hash)
}

/// Never 0, which says that there is no map.
fn lifted(hash: u32) -> u32 {
    hash.max(1)
}

/// Names replicas by quotas; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct ReplicaAssigner {
    /// `[slots]` sums of the quotas of a job's slots up to and with each.
    until: Vec<u32>,
    /// `[jobs]` rows of each job numbered so far.
    numbered: Vec<u32>,
    /// `[jobs]` whether its quotas add up to its rows.
    fits: Vec<bool>,
}

impl ReplicaAssigner {
    /// One whose workspace grows to the largest table it meets.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Name in `ids` (`[N, top_k]` physical) the replica that the quotas (`[slots]`) say for each slot of a replicated expert.
    ///
    /// A job's rows are numbered by groups of 32 rows, then by column, then by row. Number `n` goes to the first replica
    /// whose running sum of quotas is above `n`. A job whose quotas do not add up to its rows stays as it is, as do ids
    /// that name no physical expert.
    ///
    /// # Errors
    /// Arrays of other lengths. Nothing is written then.
    pub fn assign<I: Id>(
        &mut self,
        table: &ReplicaTable,
        quotas: &[u32],
        ids: &mut [I],
        top_k: usize,
    ) -> Result<()> {
        check_rows(ids.len(), top_k)?;
        check_length("replica quotas", quotas.len(), table.slots())?;
        self.sum(table, quotas);
        self.check(table, ids);
        for group in ids.chunks_mut(GROUP * top_k) {
            for column in 0..top_k {
                for row in group.chunks_exact_mut(top_k) {
                    if let Some(replica) = self.next(table, row[column]) {
                        row[column] = I::from_low(replica);
                    }
                }
            }
        }
        Ok(())
    }

    fn sum(&mut self, table: &ReplicaTable, quotas: &[u32]) {
        self.until.clear();
        for job in 0..table.jobs() {
            let sum = |sum: &mut u32, &quota: &u32| {
                *sum = sum.saturating_add(quota);
                Some(*sum)
            };
            self.until.extend(quotas[table.slots_of(job)].iter().scan(0, sum));
        }
    }

    fn check<I: Id>(&mut self, table: &ReplicaTable, ids: &[I]) {
        self.numbered.clear();
        self.numbered.resize(table.jobs(), 0);
        for job in ids.iter().filter_map(|&id| table.job_of_id(id)) {
            self.numbered[job] += 1;
        }
        self.fits.clear();
        let until = &self.until;
        let fits = |(job, &rows): (usize, &u32)| until[table.slots_of(job).end - 1] == rows;
        self.fits.extend(self.numbered.iter().enumerate().map(fits));
        self.numbered.fill(0);
    }

    /// The replica of the next row of an id's job.
    fn next<I: Id>(&mut self, table: &ReplicaTable, id: I) -> Option<u32> {
        let job = table.job_of_id(id).filter(|&job| self.fits[job])?;
        let number = self.numbered[job];
        self.numbered[job] += 1;
        let slots = table.slots_of(job);
        let slot = slots.start + self.until[slots].iter().position(|&until| until > number)?;
        Some(table.replicas()[slot])
    }
}

/// [`ReplicaAssigner::assign`] with a workspace of its own.
///
/// # Errors
/// As there.
pub fn choose_replicas<I: Id>(
    table: &ReplicaTable,
    quotas: &[u32],
    ids: &mut [I],
    top_k: usize,
) -> Result<()> {
    ReplicaAssigner::new().assign(table, quotas, ids, top_k)
}

/// Each source's part of each replica's rows; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct ReplicaQuotas {
    slots: usize,
    /// `[R, slots]`
    quotas: Vec<u32>,
    /// `[R, jobs]` what each source has left of each job.
    left: Vec<u32>,
    /// `[slots]` what each replica has room for.
    rooms: Vec<u32>,
    /// `[jobs]` the first slot of each that may have room.
    open: Vec<u32>,
}

impl ReplicaQuotas {
    /// One whose workspace grows to the largest table it meets.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Divide a plan's rows of each replica (`replica_rows`, `[P]`) over the sources that have them (`jobs`, `[R, redundant]`:
    /// the rows of each job, and past the table's last whatever).
    ///
    /// A source's rows go to the replica on its own rank first, because that needs no copy; the rest in order. Each source's
    /// quotas of a job add up to its rows of it.
    ///
    /// # Errors
    /// Arrays of other lengths.
    pub fn divide(
        &mut self,
        table: &ReplicaTable,
        jobs: &[u32],
        replica_rows: &[u32],
    ) -> Result<()> {
        let placement = table.placement();
        let (ranks, experts) = (placement.ranks(), placement.physical_experts());
        let redundant = table.redundant();
        check_length("rows of jobs", jobs.len(), ranks * redundant)?;
        check_length("replica rows", replica_rows.len(), experts)?;
        self.slots = table.slots();
        self.quotas.clear();
        self.quotas.resize(ranks * self.slots, 0);
        self.rooms.clear();
        self.rooms.extend(table.replicas().iter().map(|&replica| replica_rows[replica as usize]));
        self.left.clear();
        if table.jobs() == 0 {
            return Ok(());
        }
        for of_source in jobs.chunks_exact(redundant) {
            self.left.extend_from_slice(&of_source[..table.jobs()]);
        }
        self.give_own_ranks(table);
        self.give_the_rest(table);
        Ok(())
    }

    fn give_own_ranks(&mut self, table: &ReplicaTable) {
        for (slot, (&replica, room)) in table.replicas().iter().zip(&mut self.rooms).enumerate() {
            let source = table.placement.rank_of_known(replica as usize);
            let job = table.job_of[replica as usize] as usize;
            let left = &mut self.left[source * table.jobs() + job];
            let rows = (*room).min(*left);
            (*left, *room) = (*left - rows, *room - rows);
            self.quotas[source * self.slots + slot] = rows;
        }
    }

    /// Source after source fills a job's replicas in order, so most sources meet one replica that has room.
    fn give_the_rest(&mut self, table: &ReplicaTable) {
        let first = table.placement.first_replicas();
        self.open.clear();
        self.open.extend_from_slice(&first[..table.jobs()]);
        let lefts = self.left.chunks_exact(table.jobs());
        for (lefts, quotas) in lefts.zip(self.quotas.chunks_exact_mut(self.slots)) {
            for ((&left, open), &end) in lefts.iter().zip(&mut self.open).zip(&first[1..]) {
                let mut left = left;
                // Rows that no replica has room for: then the source's quotas do not add up, and it refuses them.
                while left > 0 && *open < end {
                    let slot = *open as usize;
                    let room = &mut self.rooms[slot];
                    let rows = left.min(*room);
                    left -= rows;
                    *room -= rows;
                    quotas[slot] += rows;
                    *open += u32::from(*room == 0);
                }
            }
        }
    }

    /// `[slots]` of one source.
    #[must_use]
    pub fn of(&self, source: usize) -> &[u32] {
        &self.quotas[source * self.slots..][..self.slots]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_the_words_that_the_kernel_reads() {
        // Two ranks of three: logical 0 on both, 1 twice on the second.
        let table = ReplicaTable::new(2, &[0, 2, 3, 0, 1, 1]).unwrap();
        assert_eq!((table.redundant(), table.jobs(), table.slots()), (2, 2, 4));
        let no = NO_JOB;
        let fingerprint = table.fingerprint();
        let expected = vec![fingerprint, 2, 0, no, no, 0, 1, 1, 0, 2, 4, 0, 3, 4, 5];
        assert_eq!(table.words(), expected);
        assert_eq!(table.words().len(), ReplicaTable::words_of(6, 2));
        let without = ReplicaTable::words_without(6, 2);
        assert_eq!(without, [0, 0, no, no, no, no, no, no, 0, 0, 0, no, no, no, no]);
        // One expert three times: one job, and words to spare.
        let table = ReplicaTable::new(2, &[0, 0, 1, 0, 2, 3]).unwrap();
        let expected = vec![table.fingerprint(), 1, 0, 0, no, 0, no, no, 0, 3, 3, 0, 1, 3, no];
        assert_eq!(table.words(), expected);
        assert_ne!(table.fingerprint(), fingerprint);
    }

    #[test]
    fn no_fingerprint_is_0() {
        assert_eq!([lifted(0), lifted(1), lifted(u32::MAX)], [1, 1, u32::MAX]);
    }

    #[test]
    fn primaries_are_the_first_of_each_rank_where_those_are_all_experts() {
        let table = ReplicaTable::new(2, &[0, 3, 1, 2, 1, 3]).unwrap();
        let expected = Primaries { of: vec![0, 1, 4, 3, 4, 1], first: Some(2) };
        assert_eq!(table.primaries(), &expected);
        // Expert 1 is first on both ranks: then as many on each rank.
        let table = ReplicaTable::new(2, &[1, 3, 0, 2, 1, 3]).unwrap();
        let primaries = table.primaries();
        assert_eq!(primaries.first, None);
        let logical = [1, 3, 0, 2, 1, 3];
        for (physical, &primary) in primaries.of.iter().enumerate() {
            assert_eq!(logical[physical], logical[primary as usize]);
            assert_eq!(primaries.of[primary as usize], primary);
        }
        let mut active: Vec<u32> = primaries.of.clone();
        active.sort_unstable();
        active.dedup();
        assert_eq!((active.len(), active.iter().filter(|&&p| p < 3).count()), (4, 2));
        // No rank has as many as another: three experts on two ranks.
        assert_eq!(ReplicaTable::new(2, &[0, 1, 2, 0]).unwrap().primaries().first, None);
    }

    #[test]
    fn rows_are_numbered_by_group_column_and_row() {
        let table = ReplicaTable::new(2, &[0, 1, 0, 2]).unwrap();
        // 33 rows of two columns, all of expert 0: the first 32 rows' first column, their second, then the last row.
        let mut ids = vec![0i32; 66];
        choose_replicas(&table, &[33, 33], &mut ids, 2).unwrap();
        let expected: Vec<i32> = (0..66)
            .map(|i| {
                let (row, column) = (i / 2, i % 2);
                let number = row / 32 * 64 + if row < 32 { column * 32 + row } else { column };
                if number < 33 { 0 } else { 2 }
            })
            .collect();
        assert_eq!(ids, expected);
    }

    #[test]
    fn quotas_that_do_not_add_up_and_ids_of_no_expert_change_nothing() {
        let table = ReplicaTable::new(2, &[0, 1, 0, 1]).unwrap();
        let given = [0i64, 1, -1, 2, 1 << 32, i64::MIN];
        let mut ids = given;
        choose_replicas(&table, &[3, 0, 0, 1], &mut ids, 2).unwrap();
        let kept = [0, 3, -1, 2, 1 << 32, i64::MIN];
        assert_eq!(ids, kept, "the first job has two rows, not three");
        choose_replicas(&table, &[u32::MAX, 3, 0, 1], &mut ids, 2).unwrap();
        assert_eq!(ids, kept);
    }
}
