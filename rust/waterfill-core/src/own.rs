//! The plan from one rank's own counts, for when nobody else's are known.
//!
//! Own counts are a sample of the layer's: the fewer the rows, the more of their unevenness is chance.
//! So they are shrunk towards their mean before they are levelled. And every rank breaks ties from itself
//! on: if all began at rank 0, all would round up there. Without the two, plans from own counts were
//! worse than shared rows at home at 64 tokens on each of 32 ranks (`docs/measurements/routing.md`).
//!
//! Rows add up, so levelling own rows levels the layer's. Times do not: an expert whose weights own rows
//! barely pay for may be busy with the rows of all ranks. So with the other cost models a rank takes the
//! layer to be its own counts times the ranks, levels that, and takes its part of each rank's room.

use crate::check::{check_length, check_rank, check_sum};
use crate::cost::{CostModel, check_costs, sum};
use crate::error::Result;
use crate::level::{level, room};
use crate::placement::Placement;
use crate::problem::base_costs;
use crate::workspace::hold;

/// Own counts of so many routed rows a rank are trusted by half.
pub const HALF_TRUSTED: u64 = 48;
/// Least trust, in tenths: an expert's popularity shows in few rows too.
pub const LEAST_TENTHS: u64 = 3;

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
        check_rank("source", self.source as i64, ranks)?;
        check_sum("the sum of routed rows", self.routed)?;
        // Costs are those of the layer, as own counts make it out to be.
        let (experts_per_rank, times) = (self.placement.experts_per_rank(), self.placement.ranks());
        check_costs(self.cost, experts_per_rank, self.routed, self.tokens.into(), times as u64)
    }

    /// What all ranks together have, if each has what this one has.
    fn of_layer(&self, own: u64) -> u64 {
        own * self.placement.ranks() as u64
    }

    /// Routed rows of this rank's tokens.
    fn rows(&self) -> u64 {
        sum(self.routed)
    }

    /// How far own counts are trusted, in 1024ths: rows / (rows + HALF_TRUSTED), but not under LEAST_TENTHS.
    fn trust(&self) -> u64 {
        let rows = self.rows() / self.placement.ranks() as u64;
        (rows * 1024 / (rows + HALF_TRUSTED)).max(LEAST_TENTHS * 1024 / 10)
    }
}

/// Makes quotas from own counts; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct OwnPlanner {
    /// `[R]` estimated costs, rooms and rows, from the source on: entry i is rank `(source + i) % R`.
    bases: Vec<u64>,
    rooms: Vec<u32>,
    /// What of the layer's rooms is not this rank's part; empty for rows, whose rooms are all its own.
    others: Vec<u32>,
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
        let ranks = own.placement.ranks();
        own.check()?;
        check_length("quotas", quotas.len(), ranks)?;
        for list in [&mut self.rooms, &mut self.others, &mut self.capacities] {
            hold(list, ranks);
        }
        self.rows.clear();
        self.rows.resize(ranks, 0);
        let worth_moving = match own.cost {
            CostModel::Rows => self.rooms_of_rows(own),
            _ => self.rooms_of_layer(own),
        };
        if worth_moving {
            self.fill(own);
        } else {
            self.rows[0] = own.tokens;
        }
        quotas.copy_from_slice(&self.rows);
        quotas.rotate_right(own.source);
        Ok(())
    }

    /// Rooms for this rank's tokens above its own rows.
    fn rooms_of_rows(&mut self, own: &OwnCounts) -> bool {
        self.estimate_rows(own);
        let level = level(own.cost, &self.bases, own.tokens.into());
        let top = level.max(self.bases.iter().copied().max().unwrap_or(0));
        self.rooms.clear();
        let room = |&base: &u64| room(own.cost, base, top).min(own.tokens.into()) as u32;
        self.rooms.extend(self.bases.iter().map(room));
        self.others.clear();
        true
    }

    /// Each rank's rows as far as own counts tell them, shrunk towards the mean.
    fn estimate_rows(&mut self, own: &OwnCounts) {
        base_costs(own.placement, own.cost, own.routed, &mut self.bases);
        self.bases.rotate_left(own.source);
        let mean = self.bases.iter().sum::<u64>() / self.bases.len() as u64;
        let trust = own.trust();
        for base in &mut self.bases {
            let part = |rows: u64| (rows * trust + 512) / 1024;
            *base =
                if *base < mean { mean - part(mean - *base) } else { mean + part(*base - mean) };
        }
    }

    /// This rank's part of the rooms of a layer that is its own counts times the ranks; false where
    /// moving shared rows makes the slowest rank no faster there.
    fn rooms_of_layer(&mut self, own: &OwnCounts) -> bool {
        self.estimate_layer(own);
        let slowest = self.bases.iter().copied().max().unwrap_or(0);
        let tokens = own.of_layer(own.tokens.into());
        let top = level(own.cost, &self.bases, tokens).max(slowest);
        // At home every rank has as many shared rows, so the slowest stays the slowest.
        if top >= slowest + own.cost.cost(own.tokens.into()) {
            return false;
        }
        let ranks = self.bases.len() as u64;
        self.rooms.clear();
        self.others.clear();
        for (i, &base) in self.bases.iter().enumerate() {
            let room = room(own.cost, base, top).min(tokens);
            // The parts of the ranks that see the same add up to the room; the rank itself rounds up first.
            let before = (ranks - i as u64) % ranks;
            let part = ((before + 1) * room).div_ceil(ranks) - (before * room).div_ceil(ranks);
            let most = |rows: u64| rows.min(own.tokens.into()) as u32;
            self.rooms.push(most(part));
            self.others.push(most(room - part));
        }
        true
    }

    /// Each rank's cost in that layer. Its experts' rows are shrunk towards the mean expert's.
    fn estimate_layer(&mut self, own: &OwnCounts) {
        let (ranks, experts) = (own.placement.ranks() as u128, own.routed.len() as u128);
        let (trust, all) = (u128::from(own.trust()), u128::from(own.rows()));
        let rows = |&own: &u32| {
            let shrunk = trust * u128::from(own) * experts + (1024 - trust) * all;
            ((ranks * shrunk + 512 * experts) / (1024 * experts)) as u64
        };
        let per_rank = own.routed.chunks_exact(own.placement.experts_per_rank());
        let cost =
            |block: &[u32]| block.iter().map(|own_rows| own.cost.cost(rows(own_rows))).sum::<u64>();
        self.bases.clear();
        self.bases.extend(per_rank.map(cost));
        self.bases.rotate_left(own.source);
    }

    /// Own rank first, then visited ranks, then any; then beyond this rank's part of the rooms.
    fn fill(&mut self, own: &OwnCounts) {
        let home = own.tokens.min(self.rooms[0]);
        self.rows[0] = home;
        self.rooms[0] = 0;
        let mut left = own.tokens - home;
        left -= spread_over_visited(left, own, &self.rooms, &mut self.capacities, &mut self.rows);
        for (room, &rows) in self.rooms.iter_mut().zip(&self.rows).skip(1) {
            *room -= rows;
        }
        left -= spread(left, &self.rooms, &mut self.rows);
        if left > 0 {
            left -=
                spread_over_visited(left, own, &self.others, &mut self.capacities, &mut self.rows);
            spread(left, &self.others, &mut self.rows);
        }
    }
}

/// [`spread`] over ranks that the tokens visit, at most as many rows as visit them; `capacities` is workspace.
fn spread_over_visited(
    rows: u32,
    own: &OwnCounts,
    rooms: &[u32],
    capacities: &mut Vec<u32>,
    out: &mut [u32],
) -> u32 {
    let visits = (0..rooms.len()).map(|i| own.visits[(own.source + i) % rooms.len()]);
    capacities.clear();
    capacities.extend(rooms.iter().zip(visits).map(|(&room, visits)| room.min(visits)));
    spread(rows, capacities, out)
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
