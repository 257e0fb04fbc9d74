//! What a plan is made from: one layer's live counts, for one step.

use crate::check::{check_length, check_sum, check_total};
use crate::cost::{CostModel, check_costs, sum};
use crate::error::{Error, Result};
use crate::placement::Placement;
use crate::replica_counts::ReplicaCounts;

/// Routed rows (token, expert pairs), summed over all source ranks.
#[derive(Clone, Copy, Debug)]
pub enum Routed<'a> {
    /// `[R]` rows routed to each rank: enough for [`CostModel::Rows`] without replicas.
    PerRank(&'a [u32]),
    /// `[P]` rows routed to each physical expert.
    PerExpert(&'a [u32]),
    /// Rows of each replicated expert, and those of each rank's others together: enough for [`CostModel::Rows`]. How a
    /// replicated expert's rows were routed is not known: plans start from an even division over its eligible replicas.
    Reduced(&'a ReplicaCounts),
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
    /// look empty. A replicated expert without a replica on an eligible rank keeps its rows as the plan starts: as routed,
    /// or of [`Routed::Reduced`] counts divided evenly over all its replicas.
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

    /// Whether a replica is on an eligible rank.
    pub(crate) fn may_take(&self, replica: u32) -> bool {
        self.is_eligible(self.placement.rank_of_known(replica as usize))
    }

    pub(crate) fn is_everyone_eligible(&self) -> bool {
        self.eligible.is_none_or(|eligible| eligible.iter().all(|&allowed| allowed))
    }

    /// Lengths, sums and eligibility, before anything is computed.
    pub(crate) fn check(&self) -> Result<()> {
        let ranks = self.placement.ranks();
        let (routed, jobs) = match self.routed {
            Routed::PerRank(rows) => {
                check_length("routed", rows.len(), ranks)?;
                (rows, &[][..])
            }
            Routed::PerExpert(rows) => {
                check_length("routed", rows.len(), self.placement.physical_experts())?;
                (rows, &[][..])
            }
            Routed::Reduced(counts) => {
                counts.check(self.placement)?;
                (counts.loads(), counts.jobs())
            }
        };
        check_length("tokens", self.tokens.len(), ranks)?;
        if let Some(visits) = self.visits {
            check_length("visits", visits.len(), ranks * ranks)?;
        }
        if let Some(eligible) = self.eligible {
            check_length("eligible", eligible.len(), ranks)?;
        }
        let per_expert = matches!(self.routed, Routed::PerExpert(_));
        if !per_expert && !matches!(self.cost, CostModel::Rows) {
            return Err(Error::NeedsExpertCounts);
        }
        check_total("the sum of routed rows", sum(routed) + sum(jobs))?;
        check_sum("the sum of tokens", self.tokens)?;
        check_costs(self.cost, self.placement.experts_per_rank(), routed, self.shared_rows(), 1)?;
        if self.shared_rows() > 0 && !(0..ranks).any(|rank| self.is_eligible(rank)) {
            return Err(Error::NoEligibleRank { rows: self.shared_rows(), ranks });
        }
        Ok(())
    }

    /// `[R]` each rank's cost of its routed rows, with those of replicas as in `replica_rows`; it is empty for counts per rank.
    pub(crate) fn base_costs(&self, replica_rows: &[u32], bases: &mut Vec<u64>) {
        bases.clear();
        match self.routed {
            Routed::PerRank(rows) => bases.extend(rows.iter().map(|&rows| u64::from(rows))),
            Routed::PerExpert(_) => base_costs(self.placement, self.cost, replica_rows, bases),
            Routed::Reduced(counts) => {
                bases.extend(counts.loads().iter().map(|&rows| u64::from(rows)));
                for &replica in self.placement.replicas() {
                    let rows = replica_rows[replica as usize];
                    bases[self.placement.rank_of_known(replica as usize)] += u64::from(rows);
                }
            }
        }
    }

    /// `[P]` the rows of each physical expert that a plan starts from: as routed, or even over the replicas of each job, with
    /// none for the other experts; empty for counts per rank.
    pub(crate) fn start(&self, replica_rows: &mut Vec<u32>) {
        replica_rows.clear();
        match self.routed {
            Routed::PerRank(_) => {}
            Routed::PerExpert(rows) => replica_rows.extend_from_slice(rows),
            Routed::Reduced(counts) => {
                replica_rows.resize(self.placement.physical_experts(), 0);
                for (replicas, &rows) in self.placement.jobs().zip(counts.jobs()) {
                    self.divide_evenly(replicas, rows, replica_rows);
                }
            }
        }
    }

    /// `[R]` active experts of each rank, with rows of replicas as in `replica_rows`.
    pub(crate) fn active(&self, replica_rows: &[u32], active: &mut Vec<u64>) {
        let placement = self.placement;
        active.clear();
        if let Routed::Reduced(counts) = self.routed {
            active.extend((0..placement.ranks()).map(|rank| counts.active_on(placement, rank)));
            for &replica in placement.replicas() {
                let is_active = replica_rows[replica as usize] > 0;
                active[placement.rank_of_known(replica as usize)] += u64::from(is_active);
            }
        } else {
            let per_rank = replica_rows.chunks_exact(placement.experts_per_rank());
            active.extend(per_rank.map(|rows| rows.iter().filter(|&&n| n > 0).count() as u64));
        }
    }

    /// Over the eligible replicas, or all if none is; the first ones take one row more where some are left.
    fn divide_evenly(&self, replicas: &[u32], rows: u32, replica_rows: &mut [u32]) {
        let eligible = replicas.iter().filter(|&&replica| self.may_take(replica)).count();
        let all = eligible == 0;
        let takers = if all { replicas.len() } else { eligible } as u32;
        let (each, mut left) = (rows / takers, rows % takers);
        for &replica in replicas.iter().filter(|&&replica| all || self.may_take(replica)) {
            let one_more = left.min(1);
            left -= one_more;
            replica_rows[replica as usize] = each + one_more;
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
