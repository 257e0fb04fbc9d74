//! The one primitive of every plan: how high the water stands when a job's rows are filled over ranks.
//!
//! A rank has a base cost; the job's rows on it cost extra, by the cost model. The level is the smallest
//! cost at which the ranks together have room for all the job's rows. Room never shrinks as the level
//! rises, so no distribution of the rows can end below it, and it is exact for any cost model.

use crate::cost::CostModel;

/// The rows of a job that a rank of cost `base` has room for at `level`.
#[inline]
pub(crate) fn room(cost: &CostModel, base: u64, level: u64) -> u64 {
    if level < base { 0 } else { cost.rows_within(level - base) }
}

/// The smallest level at which ranks of cost `bases` have room for `rows` rows; 0 for no rows.
///
/// `bases` are the ranks allowed to the job, at least one of them if there are rows.
pub(crate) fn level(cost: &CostModel, bases: &[u64], rows: u64) -> u64 {
    match cost {
        _ if rows == 0 => 0,
        CostModel::Rows => level_of_rows(bases, rows),
        _ => level_of_cost(cost, bases, rows),
    }
}

/// Newton's method from above on the convex, piecewise linear room `sum(max(0, level - base))`.
///
/// Each step is the level that the ranks below the last one would need by themselves. Steps fall and
/// stop at the first integer that has room, after few passes in practice and never more than ranks.
fn level_of_rows(bases: &[u64], rows: u64) -> u64 {
    let mut level = (rows + bases.iter().sum::<u64>()).div_ceil(bases.len() as u64);
    loop {
        let (mut below, mut sum) = (0, rows);
        for &base in bases {
            // Without a branch: which ranks are below is as good as random.
            let is_below = u64::from(base < level);
            below += is_below;
            sum += base * is_below;
        }
        let next = sum.div_ceil(below);
        if next == level {
            return level;
        }
        level = next;
    }
}

/// Bisection between a level that has no room and one that has.
fn level_of_cost(cost: &CostModel, bases: &[u64], rows: u64) -> u64 {
    let lowest = bases.iter().copied().min().unwrap_or(0);
    // All rows on the lowest rank would end here; its share alone is the least that a rank can end at.
    let mut enough = lowest + cost.cost(rows);
    let mut least = lowest;
    while least < enough {
        let middle = least + (enough - least) / 2;
        if has_room(cost, bases, middle, rows) {
            enough = middle;
        } else {
            least = middle + 1;
        }
    }
    enough
}

fn has_room(cost: &CostModel, bases: &[u64], level: u64, rows: u64) -> bool {
    let mut left = rows;
    for &base in bases {
        let room = room(cost, base, level);
        if room >= left {
            return true;
        }
        left -= room;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Roofline, Table};

    /// The definition, tried level by level.
    fn by_scan(cost: &CostModel, bases: &[u64], rows: u64) -> u64 {
        let fits = |level: u64| {
            bases.iter().filter(|&&b| b <= level).map(|&b| cost.rows_within(level - b)).sum::<u64>()
                >= rows
        };
        (0..).find(|&level| fits(level)).unwrap()
    }

    #[test]
    fn equals_a_scan_of_every_level() {
        let models = [
            CostModel::Rows,
            // Picoseconds, so that a scan ends soon.
            CostModel::Roofline(Roofline::new(20e-6, 2e-6, 4).unwrap()),
            CostModel::Table(Table::new(&[(3, 5e-6), (9, 9e-6), (20, 31e-6)]).unwrap()),
        ];
        let mut random = waterfill_testing::Random(1);
        let mut below = |n| random.below(n) as u64;
        for _ in 0..3000 {
            let bases: Vec<u64> = (0..=below(9)).map(|_| below(60)).collect();
            let rows = below(80);
            for cost in &models {
                assert_eq!(
                    level(cost, &bases, rows),
                    by_scan(cost, &bases, rows),
                    "{cost:?} {bases:?} {rows}"
                );
            }
        }
    }
}
