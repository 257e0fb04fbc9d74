//! What a plan is made from: one layer's live counts, for one step.

use crate::check::{check_length, check_sum};
use crate::cost::{CostModel, check_costs};
use crate::error::{Error, Result};
use crate::placement::Placement;

/// Routed rows (token, expert pairs), summed over all source ranks.
#[derive(Clone, Copy, Debug)]
pub enum Routed<'a> {
    /// `[R]` rows routed to each rank: enough for [`CostModel::Rows`] without replicas.
    PerRank(&'a [u32]),
    /// `[P]` rows routed to each physical expert.
    PerExpert(&'a [u32]),
}

/// One layer of one step: what is to be levelled.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Where the experts are.
    pub placement: &'a Placement,
    /// What rows cost.
    pub cost: &'a CostModel,
    /// The routed rows.
    pub routed: Routed<'a>,
    /// `[R]` tokens of each source rank: its rows with at least one valid id, each one shared row.
    pub tokens: &'a [u32],
    /// `[R * R]`, row-major: how many tokens of source `s` have a routed expert on rank `d`. Without
    /// it the plan is as level, but cannot prefer visited ranks.
    pub visits: Option<&'a [u32]>,
    /// `[R]` ranks that may take shared rows, and in a joint plan rows of replicated experts; all when
    /// absent. A rank of which nothing is known must be left out here: its missing counts would make it
    /// look empty. A replicated expert without a replica on an eligible rank keeps its rows as routed.
    pub eligible: Option<&'a [bool]>,
}

impl Problem<'_> {
    /// Shared rows to place.
    pub(crate) fn shared_rows(&self) -> u64 {
        self.tokens.iter().map(|&n| u64::from(n)).sum()
    }

    pub(crate) fn is_eligible(&self, rank: usize) -> bool {
        self.eligible.is_none_or(|eligible| eligible[rank])
    }

    pub(crate) fn is_everyone_eligible(&self) -> bool {
        self.eligible.is_none_or(|eligible| eligible.iter().all(|&allowed| allowed))
    }

    /// Lengths, sums and eligibility, before anything is computed.
    pub(crate) fn check(&self) -> Result<()> {
        let ranks = self.placement.ranks();
        let (name, routed, expected) = match self.routed {
            Routed::PerRank(rows) => ("routed", rows, ranks),
            Routed::PerExpert(rows) => ("routed", rows, self.placement.physical_experts()),
        };
        check_length(name, routed.len(), expected)?;
        check_length("tokens", self.tokens.len(), ranks)?;
        if let Some(visits) = self.visits {
            check_length("visits", visits.len(), ranks * ranks)?;
        }
        if let Some(eligible) = self.eligible {
            check_length("eligible", eligible.len(), ranks)?;
        }
        if matches!(self.routed, Routed::PerRank(_)) && !matches!(self.cost, CostModel::Rows) {
            return Err(Error::NeedsExpertCounts);
        }
        check_sum("the sum of routed rows", routed)?;
        check_sum("the sum of tokens", self.tokens)?;
        check_costs(self.cost, self.placement.experts_per_rank(), routed, self.shared_rows(), 1)?;
        if self.shared_rows() > 0 && !(0..ranks).any(|rank| self.is_eligible(rank)) {
            return Err(Error::NoEligibleRank { rows: self.shared_rows(), ranks });
        }
        Ok(())
    }

    /// `[R]` each rank's cost of its routed rows.
    pub(crate) fn base_costs(&self, bases: &mut Vec<u64>) {
        match self.routed {
            Routed::PerRank(rows) => {
                bases.clear();
                bases.extend(rows.iter().map(|&rows| u64::from(rows)));
            }
            Routed::PerExpert(rows) => base_costs(self.placement, self.cost, rows, bases),
        }
    }
}

/// `[R]` each rank's cost of its experts' rows, `[P]`.
pub(crate) fn base_costs(
    placement: &Placement,
    cost: &CostModel,
    rows: &[u32],
    bases: &mut Vec<u64>,
) {
    bases.clear();
    let per_rank = rows.chunks_exact(placement.experts_per_rank());
    bases.extend(per_rank.map(|experts| cost_of_experts(cost, experts)));
}

/// The cost of the experts of one rank, `rows` each.
pub(crate) fn cost_of_experts(cost: &CostModel, rows: &[u32]) -> u64 {
    rows.iter().map(|&rows| cost.cost(u64::from(rows))).sum()
}
