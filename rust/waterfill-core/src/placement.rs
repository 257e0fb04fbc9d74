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
    jobs: Vec<Vec<u32>>,
    /// `[R]` the replicas on each rank, and the place of each in `jobs`.
    replicated: Vec<Vec<(u32, u32)>>,
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
            jobs: Vec::new(),
            replicated: vec![Vec::new(); ranks],
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
        let replicas = replicas_by_logical(physical_to_logical)?;
        let logical_experts = replicas.len();
        let jobs: Vec<_> = replicas.into_iter().filter(|r| r.len() > 1).collect();
        Ok(Self {
            ranks,
            experts_per_rank,
            logical_experts,
            replicated: replicated(ranks, experts_per_rank, &jobs),
            jobs,
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
        self.jobs.iter().map(Vec::as_slice)
    }

    /// The physical replicas of the replicated expert at place `job` of [`jobs`](Self::jobs).
    pub(crate) fn replicas_of(&self, job: u32) -> &[u32] {
        &self.jobs[job as usize]
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
