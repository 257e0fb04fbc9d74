//! How good a placement is: the one definition that tests, benches, the replay and the demo use.

use crate::check::{check_length, check_rank};
use crate::cost::{CostModel, check_costs};
use crate::error::Result;
use crate::ids::{Id, check_ids, check_rows};
use crate::placement::Placement;

/// The ranks' costs in two figures, in the cost model's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MaxAndMean {
    /// The slowest rank's: what the layer takes.
    pub max: u64,
    /// The mean over all ranks.
    pub mean: f64,
}

/// What the shared rows of one source cost on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// DeepEP's normal mode sends a token once to each rank it visits: shared rows on a rank that is
    /// neither the token's own nor one that it visits.
    pub extra_copies: u64,
    /// DeepEP's low-latency mode sends every row by itself: shared rows on another rank than their own.
    pub extra_messages: u64,
}

/// Each rank's cost, ranks in order: that of its routed rows (`[P]`, per physical expert) and its
/// `shared` rows (`[R]`).
///
/// # Errors
/// Arrays of other lengths, costs of an hour or more.
pub fn costs<'a>(
    placement: &Placement,
    cost: &'a CostModel,
    routed: &'a [u32],
    shared: &'a [u32],
) -> Result<impl Iterator<Item = u64> + 'a> {
    check_length("routed", routed.len(), placement.physical_experts())?;
    check_length("shared", shared.len(), placement.ranks())?;
    let all_shared = shared.iter().map(|&rows| u64::from(rows)).sum();
    check_costs(cost, placement.experts_per_rank(), routed, all_shared, 1)?;
    let ranks = routed.chunks_exact(placement.experts_per_rank()).zip(shared);
    Ok(ranks.map(|(experts, shared)| {
        experts.iter().chain([shared]).map(|&rows| cost.cost(rows.into())).sum()
    }))
}

/// The slowest and the mean rank's cost, of [`costs`].
///
/// # Errors
/// As [`costs`].
pub fn max_and_mean(
    placement: &Placement,
    cost: &CostModel,
    routed: &[u32],
    shared: &[u32],
) -> Result<MaxAndMean> {
    let (mut max, mut sum) = (0, 0);
    for rank in costs(placement, cost, routed, shared)? {
        max = max.max(rank);
        sum += rank;
    }
    Ok(MaxAndMean { max, mean: sum as f64 / placement.ranks() as f64 })
}

/// Count what one source's shared rows cost: `ids` `[N, top_k]` physical, `shared_rank` `[N]`.
///
/// # Errors
/// Arrays of other lengths, `source` outside the group, an id at or above the number of physical
/// experts, a shared rank outside the group on a row with a valid id.
pub fn traffic<I: Id>(
    placement: &Placement,
    source: usize,
    ids: &[I],
    top_k: usize,
    shared_rank: &[i32],
) -> Result<Traffic> {
    let ranks = placement.ranks();
    let rows = check_rows(ids.len(), top_k)?;
    check_length("shared_rank", shared_rank.len(), rows)?;
    check_ids(placement, ids, top_k)?;
    check_rank("source", source as i64, ranks)?;
    let mut traffic = Traffic::default();
    for (row, &shared) in ids.chunks_exact(top_k).zip(shared_rank) {
        let mut visited =
            row.iter().filter(|&&id| id > I::NONE).map(|id| placement.rank_of(id.low() as usize));
        if row.iter().all(|&id| id <= I::NONE) || usize::try_from(shared) == Ok(source) {
            continue;
        }
        let shared = check_rank("shared_rank", shared.into(), ranks)?;
        traffic.extra_messages += 1;
        traffic.extra_copies += u64::from(!visited.any(|rank| rank == shared));
    }
    Ok(traffic)
}
