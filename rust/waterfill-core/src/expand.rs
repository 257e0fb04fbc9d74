//! From routed ids and weights `[N, K]` to `[N, K + 1]`, the shared expert in the last column.
//!
//! Each rank has one more expert after the expansion, the shared one, so every id moves up by its rank.

use crate::check::{check_length, check_rank};
use crate::error::Result;
use crate::ids::{Divisor, Id, NO_EXPERT, Weight, check_ids, check_rows};
use crate::placement::Placement;

/// How ids move up past the shared experts of the ranks before theirs.
#[derive(Clone, Copy, Debug)]
struct Shift {
    rank_of: Divisor,
}

impl Shift {
    fn new(placement: &Placement) -> Self {
        Self { rank_of: Divisor::new(placement.experts_per_rank()) }
    }

    /// An expert's `e + e / experts_per_rank`; anything for what names no expert.
    #[inline(always)]
    fn moved_up<I: Id>(self, id: I) -> u32 {
        id.low().wrapping_add(self.rank_of.divide(id.low()))
    }
}

/// Routed ids and weights, each `[N, top_k]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, I, W> {
    /// Physical ids; negative for none.
    pub ids: &'a [I],
    /// Their weights.
    pub weights: &'a [W],
    /// Ids in a row.
    pub top_k: usize,
}

/// Where expanded ids and weights go, each `[N, top_k + 1]`, row-major.
#[derive(Debug)]
pub struct RowsMut<'a, I, W> {
    /// Ids that count one shared expert a rank.
    pub ids: &'a mut [I],
    /// Their weights.
    pub weights: &'a mut [W],
}

/// Widen one source's routed ids and weights by the shared expert; `shared_rank` is `[N]`.
///
/// A routed id `e` becomes `e + e / experts_per_rank`; the last column is the shared expert's id on
/// the row's shared rank, with `shared_weight`. A negative id stays as it is, with weight 0. A row
/// without a valid id is padding: its last column is -1 with weight 0, whatever its shared rank.
///
/// # Errors
/// Arrays of other lengths, an id at or above the number of physical experts, a shared rank outside
/// the group on a row that is not padding. Nothing is written then.
pub fn expand<I: Id, W: Weight>(
    placement: &Placement,
    routed: Rows<I, W>,
    shared_rank: &[i32],
    shared_weight: f32,
    out: RowsMut<I, W>,
) -> Result<()> {
    let rows = check_expansion(routed, &out)?;
    check_length("shared_rank", shared_rank.len(), rows)?;
    check_ids(placement, routed.ids, routed.top_k)?;
    check_shared_ranks(placement, routed.ids, routed.top_k, shared_rank)?;
    expand_checked(placement, routed, shared_rank, W::from_f32(shared_weight), out);
    Ok(())
}

/// One source's routed ids alone, moved up as [`expand`] moves them, for a batch whose shared rows are not routed.
///
/// `ids` and `out` are `[N, top_k]`, row-major. A routed id `e` becomes `e + e / experts_per_rank`; a negative id stays
/// as it is.
///
/// # Errors
/// Arrays of other lengths, an id at or above the number of physical experts. Nothing is written then.
pub fn move_up<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    out: &mut [i64],
) -> Result<()> {
    check_rows(ids.len(), top_k)?;
    check_length("out", out.len(), ids.len())?;
    check_ids(placement, ids, top_k)?;
    let shift = Shift::new(placement);
    for (out, &id) in out.iter_mut().zip(ids) {
        *out = if id > I::NONE { shift.moved_up(id).into() } else { id.into() };
    }
    Ok(())
}

/// [`expand`] on arguments that were checked.
pub(crate) fn expand_checked<I: Id, W: Weight>(
    placement: &Placement,
    routed: Rows<I, W>,
    shared_rank: &[i32],
    shared_weight: W,
    out: RowsMut<I, W>,
) {
    // A literal number of columns unrolls the rows; these are the models' usual ones.
    match routed.top_k {
        6 => expand_rows(placement, routed, 6, shared_rank, shared_weight, out),
        8 => expand_rows(placement, routed, 8, shared_rank, shared_weight, out),
        top_k => expand_rows(placement, routed, top_k, shared_rank, shared_weight, out),
    }
}

#[inline(always)]
fn expand_rows<I: Id, W: Weight>(
    placement: &Placement,
    routed: Rows<I, W>,
    top_k: usize,
    shared_rank: &[i32],
    shared_weight: W,
    out: RowsMut<I, W>,
) {
    let experts_per_rank = placement.experts_per_rank() as u32;
    let shift = Shift::new(placement);
    let moved = |id: I| I::from_low(shift.moved_up(id));
    let weights = routed.weights.chunks_exact(top_k);
    let rows = routed.ids.chunks_exact(top_k).zip(weights).zip(shared_rank);
    let out = out.ids.chunks_exact_mut(top_k + 1).zip(out.weights.chunks_exact_mut(top_k + 1));
    for (((ids, weights), &rank), (out_ids, out_weights)) in rows.zip(out) {
        let shared = (rank as u32).wrapping_mul(experts_per_rank + 1) + experts_per_rank;
        out_ids[top_k] = I::from_low(shared);
        out_weights[top_k] = shared_weight;
        // Nearly every row has no invalid slot and needs no selection.
        if ids.iter().fold(0, |all, id| all | id.low()) < NO_EXPERT {
            out_ids.iter_mut().zip(ids).for_each(|(out, &id)| *out = moved(id));
            out_weights[..top_k].copy_from_slice(weights);
            continue;
        }
        let mut largest = I::NONE;
        for (column, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
            let valid = id > I::NONE;
            out_ids[column] = if valid { moved(id) } else { id };
            out_weights[column] = if valid { weight } else { W::ZERO };
            largest = largest.max(id);
        }
        if largest == I::NONE {
            out_ids[top_k] = I::NONE;
            out_weights[top_k] = W::ZERO;
        }
    }
}

/// The arrays of an expansion fit each other; gives the number of rows.
pub(crate) fn check_expansion<I: Id, W: Weight>(
    routed: Rows<I, W>,
    out: &RowsMut<I, W>,
) -> Result<usize> {
    let rows = check_rows(routed.ids.len(), routed.top_k)?;
    check_length("weights", routed.weights.len(), routed.ids.len())?;
    check_length("out_ids", out.ids.len(), routed.ids.len() + rows)?;
    check_length("out_weights", out.weights.len(), routed.ids.len() + rows)?;
    Ok(rows)
}

fn check_shared_ranks<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    shared_rank: &[i32],
) -> Result<()> {
    let ranks = placement.ranks();
    // Only a padding row may have no rank, so most calls need not look at the ids.
    if shared_rank.iter().all(|&rank| (rank as u32 as usize) < ranks) {
        return Ok(());
    }
    for (row, &rank) in ids.chunks_exact(top_k).zip(shared_rank) {
        let padding = row.iter().all(|&id| id <= I::NONE);
        if !padding {
            check_rank("shared_rank", rank.into(), ranks)?;
        }
    }
    Ok(())
}
