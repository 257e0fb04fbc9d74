//! What one source's ids say: its tokens, their rows for each expert, and their visits to each rank.

use crate::check::check_length;
use crate::error::Result;
use crate::ids::{Id, check_ids, check_rows};
use crate::placement::Placement;

/// The ranks that a token visits, where all ranks fit one word.
#[inline(always)]
pub(crate) fn visits_word<I: Id>(placement: &Placement, row: &[I]) -> u64 {
    row.iter().fold(0, |visited, &id| visited | placement.rank_bit(id.low()))
}

/// Count one source's routed rows: `counts` `[P]` per physical expert and `visits` `[R]`, how many of
/// its tokens have an expert on each rank. Gives the number of tokens: rows with at least one valid id.
///
/// # Errors
/// Arrays of other lengths, or an id at or above the number of physical experts. Nothing is written then.
pub fn count<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    counts: &mut [u32],
    visits: &mut [u32],
) -> Result<u32> {
    check_rows(ids.len(), top_k)?;
    check_length("counts", counts.len(), placement.physical_experts())?;
    check_length("visits", visits.len(), placement.ranks())?;
    check_ids(placement, ids, top_k)?;
    counts.fill(0);
    visits.fill(0);
    let one_word = placement.ranks() <= 64;
    Ok(match top_k {
        6 if one_word => count_rows(placement, ids, 6, counts, visits),
        8 if one_word => count_rows(placement, ids, 8, counts, visits),
        _ if one_word => count_rows(placement, ids, top_k, counts, visits),
        _ => count_wide_rows(placement, ids, top_k, counts, visits),
    })
}

#[inline(always)]
fn count_rows<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    counts: &mut [u32],
    visits: &mut [u32],
) -> u32 {
    let mut tokens = 0;
    // Eight ranks' counters share a word, a byte each, and are emptied before any could overflow.
    let mut lanes = [0u64; 8];
    let words = visits.len().div_ceil(8);
    for rows in ids.chunks(255 * top_k) {
        for row in rows.chunks_exact(top_k) {
            for id in row {
                if let Some(count) = counts.get_mut(id.low() as usize) {
                    *count += 1;
                }
            }
            let visited = visits_word(placement, row);
            tokens += u32::from(visited != 0);
            for (word, lane) in lanes[..words].iter_mut().enumerate() {
                *lane += BYTE_OF_BIT[(visited >> (8 * word) & 255) as usize];
            }
        }
        for (rank, visits) in visits.iter_mut().enumerate() {
            *visits += (lanes[rank / 8] >> (8 * (rank % 8)) & 255) as u32;
        }
        lanes = [0; 8];
    }
    tokens
}

/// Byte i of an entry is bit i of its index.
static BYTE_OF_BIT: [u64; 256] = {
    let mut table = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        let mut bit = 0;
        while bit < 8 {
            table[bits] |= (bits as u64 >> bit & 1) << (8 * bit);
            bit += 1;
        }
        bits += 1;
    }
    table
};

fn count_wide_rows<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    counts: &mut [u32],
    visits: &mut [u32],
) -> u32 {
    let mut tokens = 0;
    for row in ids.chunks_exact(top_k) {
        for (column, &id) in row.iter().enumerate().filter(|&(_, &id)| id > I::NONE) {
            let id = id.low() as usize;
            counts[id] += 1;
            let rank = placement.rank_of(id);
            let before = row[..column].iter().filter(|&&id| id > I::NONE);
            let seen = before.map(|id| placement.rank_of(id.low() as usize)).any(|r| r == rank);
            visits[rank] += u32::from(!seen);
        }
        tokens += u32::from(row.iter().any(|&id| id > I::NONE));
    }
    tokens
}
