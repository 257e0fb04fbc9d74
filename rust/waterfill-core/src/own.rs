//! The plan from one rank's own counts, for when nobody else's are known.
//!
//! Own counts are a sample of the layer's: the fewer the rows, the more of their unevenness is chance.
//! So they are shrunk towards their mean before they are levelled. And every rank breaks ties from itself
//! on: if all began at rank 0, all would round up there. Without the two, plans from own counts were
//! worse than shared rows at home at 64 tokens on each of 32 ranks (`docs/performance.md`).

use crate::cost::{CostModel, check_costs};
use crate::error::{Error, Result};
use crate::level::{level, room};
use crate::placement::Placement;
use crate::problem::{base_costs, check_length, check_sum};

/// Own counts of so many routed rows a rank are trusted by half.
const HALF_TRUSTED: u64 = 48;
/// Least trust, in tenths: an expert's popularity shows in few rows too.
const LEAST_TENTHS: u64 = 3;

/// One rank's own counts of one layer and step.
#[derive(Clone, Copy, Debug)]
pub struct OwnCounts<'a> {
    /// Where the experts are.
    pub placement: &'a Placement,
    /// What rows cost.
    pub cost: &'a CostModel,
    /// This rank.
    pub source: usize,
    /// `[P]` rows that its tokens send to each physical expert.
    pub routed: &'a [u32],
    /// `[R]` how many of its tokens visit each rank.
    pub visits: &'a [u32],
    /// Its tokens: rows with at least one valid id.
    pub tokens: u32,
}

impl OwnCounts<'_> {
    /// What [`OwnPlanner::plan`] would refuse of it.
    ///
    /// # Errors
    /// Arrays of other lengths, `source` outside the group, sums of 2^32 rows or more, costs of an hour or more.
    pub fn check(&self) -> Result<()> {
        let ranks = self.placement.ranks();
        check_length("visits", self.visits.len(), ranks)?;
        check_length("routed", self.routed.len(), self.placement.physical_experts())?;
        if self.source >= ranks {
            return Err(Error::Rank { name: "source", rank: self.source as i64, ranks });
        }
        check_sum("the sum of routed rows", self.routed)?;
        let experts_per_rank = self.placement.experts_per_rank();
        check_costs(self.cost, experts_per_rank, self.routed, self.tokens.into())
    }
}

/// Makes quotas from own counts; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct OwnPlanner {
    /// `[R]` estimated costs, rooms and rows, from the source on: entry i is rank `(source + i) % R`.
    bases: Vec<u64>,
    rooms: Vec<u32>,
    capacities: Vec<u32>,
    rows: Vec<u32>,
}

impl OwnPlanner {
    /// A planner whose workspace grows to the largest group it meets.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Write this rank's quotas, `[R]`: how many of its tokens go to each rank.
    ///
    /// # Errors
    /// What [`OwnCounts::check`] refuses, or `quotas` of another length. Nothing is written then.
    pub fn plan(&mut self, own: &OwnCounts, quotas: &mut [u32]) -> Result<()> {
        own.check()?;
        check_length("quotas", quotas.len(), own.placement.ranks())?;
        self.estimate(own);
        let level = level(own.cost, &self.bases, own.tokens.into());
        let top = level.max(self.bases.iter().copied().max().unwrap_or(0));
        self.rooms.clear();
        let room = |&base: &u64| room(own.cost, base, top).min(own.tokens.into()) as u32;
        self.rooms.extend(self.bases.iter().map(room));
        self.fill(own);
        quotas.copy_from_slice(&self.rows);
        quotas.rotate_right(own.source);
        Ok(())
    }

    /// Each rank's cost as far as own counts tell it, shrunk towards the mean.
    fn estimate(&mut self, own: &OwnCounts) {
        base_costs(own.placement, own.cost, own.routed, &mut self.bases);
        self.bases.rotate_left(own.source);
        let mean = self.bases.iter().sum::<u64>() / self.bases.len() as u64;
        let rows =
            own.routed.iter().map(|&rows| u64::from(rows)).sum::<u64>() / self.bases.len() as u64;
        // rows / (rows + HALF_TRUSTED), but not under LEAST_TENTHS, in 1024ths.
        let trust = (rows * 1024 / (rows + HALF_TRUSTED)).max(LEAST_TENTHS * 1024 / 10);
        for base in &mut self.bases {
            let part = |value: u64| ((u128::from(value) * u128::from(trust) + 512) / 1024) as u64;
            *base =
                if *base < mean { mean - part(mean - *base) } else { mean + part(*base - mean) };
        }
    }

    /// Own rank first, then visited ranks, then any.
    fn fill(&mut self, own: &OwnCounts) {
        let ranks = self.rooms.len();
        self.rows.clear();
        self.rows.resize(ranks, 0);
        let home = own.tokens.min(self.rooms[0]);
        self.rows[0] = home;
        self.rooms[0] -= home;
        let mut left = own.tokens - home;
        self.capacities.clear();
        let visits = (0..ranks).map(|i| own.visits[(own.source + i) % ranks]);
        self.capacities
            .extend(self.rooms.iter().zip(visits).map(|(&room, visits)| room.min(visits)));
        self.capacities[0] = 0;
        left -= spread(left, &self.capacities, &mut self.rows);
        for (room, &rows) in self.rooms.iter_mut().zip(&self.rows).skip(1) {
            *room -= rows;
        }
        spread(left, &self.rooms, &mut self.rows);
    }
}

/// Add `rows` to `out` in proportion to the capacities, what is left from the first on; gives how many fitted.
fn spread(rows: u32, capacities: &[u32], out: &mut [u32]) -> u32 {
    let total: u64 = capacities.iter().map(|&capacity| u64::from(capacity)).sum();
    let fits = u64::from(rows).min(total);
    // Shares of a running total: each rank gets its share rounded up or down, and they add up exactly.
    let (mut before, mut given) = (0, 0);
    for (&capacity, out) in capacities.iter().zip(out) {
        before += u64::from(capacity);
        let until = share(fits, before, total);
        *out += (until - given) as u32;
        given = until;
    }
    fits as u32
}

/// `ceil(rows * part / whole)`, 0 of nothing; the product of two sums may need more than 64 bits.
fn share(rows: u64, part: u64, whole: u64) -> u64 {
    match rows.checked_mul(part) {
        Some(product) => product.div_ceil(whole.max(1)),
        None => (u128::from(rows) * u128::from(part)).div_ceil(u128::from(whole)) as u64,
    }
}
