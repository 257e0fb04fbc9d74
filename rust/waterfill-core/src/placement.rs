//! Where the experts are: physical experts in contiguous blocks, one block a rank.

use crate::error::{Error, Result};

/// The largest number of ranks supported.
pub const MAX_RANKS: usize = 1024;
/// The largest number of physical experts supported: ids fit 31 bits with room to spare, and a
/// placement's tables stay small whatever a caller asks for.
pub const MAX_EXPERTS: usize = 1 << 20;

/// Which rank holds each physical expert, and which logical expert each one computes.
///
/// Rank `r` holds the physical experts `r * e .. (r + 1) * e`, `e` being [`experts_per_rank`].
///
/// [`experts_per_rank`]: Placement::experts_per_rank
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    ranks: usize,
    experts_per_rank: usize,
    logical_experts: usize,
    /// `[jobs + 1]` where the replicas of each replicated expert begin, and the end of the last.
    first: Vec<u32>,
    /// The replicas of all of them, expert by expert, ascending.
    replicas: Vec<u32>,
    /// `[R]` the replicas on each rank, and the job of each.
    replicated: Vec<Vec<(u32, u32)>>,
    /// `[P]` the rank of each physical expert: plans ask so often that a division would be felt.
    ranks_of: Vec<u16>,
    /// `[ceil(P / 32)]` bit `p % 32` of word `p / 32`: physical expert `p` is a replica of a job.
    replica_bits: Vec<u32>,
    /// `[P + 1]` the bit of each physical expert's rank in its word of 64 ranks; the last is of no expert.
    rank_bits: Vec<u64>,
}

impl Placement {
    /// Each physical expert is a logical expert of its own.
    ///
    /// # Errors
    /// `ranks` outside `1..=`[`MAX_RANKS`], or `physical_experts` not a positive multiple of it, up to [`MAX_EXPERTS`].
    pub fn contiguous(ranks: usize, physical_experts: usize) -> Result<Self> {
        let experts_per_rank = experts_per_rank(ranks, physical_experts)?;
        Ok(Self {
            ranks,
            experts_per_rank,
            logical_experts: physical_experts,
            first: vec![0],
            replicas: Vec::new(),
            replicated: vec![Vec::new(); ranks],
            ranks_of: ranks_of(ranks, experts_per_rank),
            replica_bits: replica_bits(physical_experts, &[]),
            rank_bits: rank_bits(ranks, experts_per_rank),
        })
    }

    /// Physical expert `p` computes logical expert `physical_to_logical[p]`.
    ///
    /// # Errors
    /// As [`contiguous`](Self::contiguous), or a logical expert without a physical one.
    pub fn replicated(ranks: usize, physical_to_logical: &[u32]) -> Result<Self> {
        let physical_experts = physical_to_logical.len();
        let experts_per_rank = experts_per_rank(ranks, physical_experts)?;
        let by_logical = replicas_by_logical(physical_to_logical)?;
        let logical_experts = by_logical.len();
        let jobs: Vec<_> = by_logical.into_iter().filter(|r| r.len() > 1).collect();
        let (mut first, mut replicas) = (vec![0], Vec::new());
        for of_job in &jobs {
            replicas.extend_from_slice(of_job);
            first.push(replicas.len() as u32);
        }
        Ok(Self {
            ranks,
            experts_per_rank,
            logical_experts,
            replicated: replicated(ranks, experts_per_rank, &jobs),
            replica_bits: replica_bits(physical_experts, &replicas),
            first,
            replicas,
            ranks_of: ranks_of(ranks, experts_per_rank),
            rank_bits: rank_bits(ranks, experts_per_rank),
        })
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Number of physical experts, over all ranks.
    pub fn physical_experts(&self) -> usize {
        self.ranks * self.experts_per_rank
    }

    /// Number of physical experts on each rank.
    pub fn experts_per_rank(&self) -> usize {
        self.experts_per_rank
    }

    /// Number of logical experts.
    pub fn logical_experts(&self) -> usize {
        self.logical_experts
    }

    /// The rank that holds a physical expert.
    pub fn rank_of(&self, physical: usize) -> usize {
        physical / self.experts_per_rank
    }

    /// The rank of a physical expert that there is, without a division.
    #[inline]
    pub(crate) fn rank_of_known(&self, physical: usize) -> usize {
        self.ranks_of[physical].into()
    }

    /// The id of the shared expert on `rank`, in the id space that has one shared expert a rank.
    pub fn shared_id(&self, rank: usize) -> usize {
        rank * (self.experts_per_rank + 1) + self.experts_per_rank
    }

    /// The id of a physical expert, in the id space that has one shared expert a rank.
    pub fn expanded_id(&self, physical: usize) -> usize {
        physical + self.rank_of(physical)
    }

    /// The bit of a physical expert's rank in its word of 64 ranks; none for the id of no expert.
    #[inline(always)]
    pub(crate) fn rank_bit(&self, id: u32) -> u64 {
        self.rank_bits[(id as usize).min(self.rank_bits.len() - 1)]
    }

    /// The replicated logical experts, in order: the physical replicas of each, ascending.
    pub fn jobs(&self) -> impl ExactSizeIterator<Item = &[u32]> + Clone {
        self.first.windows(2).map(|slots| &self.replicas[slots[0] as usize..slots[1] as usize])
    }

    /// Where the replicas of each job begin in [`replicas`](Self::replicas), `[jobs + 1]`: the last is their end.
    pub(crate) fn first_replicas(&self) -> &[u32] {
        &self.first
    }

    /// The replicas of all jobs, job by job, ascending.
    pub(crate) fn replicas(&self) -> &[u32] {
        &self.replicas
    }

    /// `[ceil(P / 32)]` bit `p % 32` of word `p / 32`: physical expert `p` is a replica of a job.
    pub(crate) fn replica_bits(&self) -> &[u32] {
        &self.replica_bits
    }

    /// The physical replicas of the replicated expert at place `job` of [`jobs`](Self::jobs).
    pub(crate) fn replicas_of(&self, job: u32) -> &[u32] {
        let job = job as usize;
        &self.replicas[self.first[job] as usize..self.first[job + 1] as usize]
    }

    /// The replicas on `rank`, and the place of each in [`jobs`](Self::jobs).
    pub(crate) fn replicated_on(&self, rank: usize) -> &[(u32, u32)] {
        &self.replicated[rank]
    }
}

fn experts_per_rank(ranks: usize, physical_experts: usize) -> Result<usize> {
    if ranks == 0 || ranks > MAX_RANKS {
        return Err(Error::Ranks { ranks });
    }
    if physical_experts == 0 || !physical_experts.is_multiple_of(ranks) {
        return Err(Error::Indivisible { ranks, physical_experts });
    }
    if physical_experts > MAX_EXPERTS {
        let (value, limit) = (physical_experts as u64, MAX_EXPERTS as u64);
        return Err(Error::TooLarge { name: "number of physical experts", value, limit });
    }
    Ok(physical_experts / ranks)
}

fn ranks_of(ranks: usize, experts_per_rank: usize) -> Vec<u16> {
    (0..ranks as u16).flat_map(|rank| std::iter::repeat_n(rank, experts_per_rank)).collect()
}

fn replica_bits(physical_experts: usize, replicas: &[u32]) -> Vec<u32> {
    let mut bits = vec![0; physical_experts.div_ceil(u32::BITS as usize)];
    for &replica in replicas {
        bits[(replica / u32::BITS) as usize] |= 1 << (replica % u32::BITS);
    }
    bits
}

fn rank_bits(ranks: usize, experts_per_rank: usize) -> Vec<u64> {
    let mut bits = Vec::with_capacity(ranks * experts_per_rank + 1);
    for rank in 0..ranks {
        bits.extend(std::iter::repeat_n(1 << (rank % 64), experts_per_rank));
    }
    bits.push(0);
    bits
}

fn replicated(ranks: usize, experts_per_rank: usize, jobs: &[Vec<u32>]) -> Vec<Vec<(u32, u32)>> {
    let mut on_ranks = vec![Vec::new(); ranks];
    for (job, replicas) in jobs.iter().enumerate() {
        for &replica in replicas {
            on_ranks[replica as usize / experts_per_rank].push((replica, job as u32));
        }
    }
    on_ranks
}

fn replicas_by_logical(physical_to_logical: &[u32]) -> Result<Vec<Vec<u32>>> {
    let largest = physical_to_logical.iter().copied().max().unwrap_or(0) as usize;
    let logical_experts = largest + 1;
    let mut named: Vec<u32> = physical_to_logical.to_vec();
    named.sort_unstable();
    named.dedup();
    // Checked before allocating by the largest id, which may be garbage.
    if named.len() != logical_experts {
        let logical = named.iter().enumerate().position(|(i, &l)| i != l as usize);
        return Err(Error::MissingLogical { logical: logical.unwrap_or(0), logical_experts });
    }
    let mut replicas = vec![Vec::new(); logical_experts];
    for (physical, &logical) in physical_to_logical.iter().enumerate() {
        replicas[logical as usize].push(physical as u32);
    }
    Ok(replicas)
}
