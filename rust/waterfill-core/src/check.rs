//! Checks that are made at several doors, each here once.

use crate::cost::sum;
use crate::error::{Error, Result};

/// A rank is one of the group; gives it as an index.
///
/// # Errors
/// [`Error::Rank`].
pub fn check_rank(name: &'static str, rank: i64, ranks: usize) -> Result<usize> {
    let index = usize::try_from(rank).ok().filter(|&index| index < ranks);
    index.ok_or(Error::Rank { name, rank, ranks })
}

/// An array has as many entries as it must.
///
/// # Errors
/// [`Error::Length`].
pub fn check_length(name: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { name, found, expected }) }
}

/// Quotas are 32 bits wide, so a layer's rows must be too.
pub(crate) fn check_sum(name: &'static str, rows: &[u32]) -> Result<()> {
    check_total(name, sum(rows))
}

/// The same of a sum that is known.
pub(crate) fn check_total(name: &'static str, value: u64) -> Result<()> {
    let limit = u64::from(u32::MAX);
    if value > limit { Err(Error::TooLarge { name, value, limit }) } else { Ok(()) }
}
