//! The plan: how many shared rows each source sends to each rank, so that the slowest rank is as fast as can be.

use crate::check::{check_length, check_rank};
use crate::cost::{CostModel, sum};
use crate::error::{Error, Result};
use crate::joint::Sweeps;
use crate::level::{level, room};
use crate::placement::Placement;
use crate::problem::{Problem, Routed};
use crate::single::{Chooser, FEW_TRIES, MOST_TRIES, SOME_TRIES};
use crate::split::Splitter;
use crate::transport::{Transfer, Transport};

/// What [`Planner`] decided for one layer and step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    ranks: usize,
    optimum: u64,
    shared_rows: Vec<u32>,
    transfers: Vec<Transfer>,
    replica_rows: Vec<u32>,
}

impl Plan {
    /// An empty plan, to be filled; reused, it allocates nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The slowest rank's cost under this plan, in the cost model's unit.
    #[must_use]
    pub fn optimum(&self) -> u64 {
        self.optimum
    }

    /// `[R]` shared rows that each rank gets.
    #[must_use]
    pub fn shared_rows(&self) -> &[u32] {
        &self.shared_rows
    }

    /// Every quota above zero, sorted by source, then destination; rows that stay at home included.
    #[must_use]
    pub fn transfers(&self) -> &[Transfer] {
        &self.transfers
    }

    /// `[P]` routed rows of each physical expert: as split by [`Planner::joint`], else as given.
    /// Empty if the problem had counts per rank.
    #[must_use]
    pub fn replica_rows(&self) -> &[u32] {
        &self.replica_rows
    }

    /// Write the quotas of one source, `[R]`: how many of its tokens go to each rank.
    ///
    /// # Errors
    /// `source` outside the plan's ranks, or `out` of another length.
    pub fn quotas_of(&self, source: usize, out: &mut [u32]) -> Result<()> {
        check_rank("source", source as i64, self.ranks)?;
        check_length("quotas", out.len(), self.ranks)?;
        out.fill(0);
        let first = self.transfers.partition_point(|t| usize::from(t.source) < source);
        for t in self.transfers[first..].iter().take_while(|t| usize::from(t.source) == source) {
            out[usize::from(t.destination)] = t.rows;
        }
        Ok(())
    }
}

/// Makes plans. It holds only workspace: the same problem gives the same plan on every rank, always.
#[derive(Clone, Debug, Default)]
pub struct Planner {
    bases: Vec<u64>,
    eligible_bases: Vec<u64>,
    transport: Transport,
    splitter: Splitter,
    chooser: Chooser,
    sweeps: Sweeps,
    /// The plan that [`replicas`](Self::replicas) compares with.
    other: Plan,
}

/// An expert's weights take as long as so many of its rows: 11.2 us and 0.061 us a row of an expert of 44 MB on an H200
/// (DeepGEMM FP8, figures of NVIDIA's aiconfigurator). Of other GPUs the ratio is 158 (B200) to 262 (H100).
pub const WEIGHTS_AS_ROWS: u64 = 184;

/// How replicas are chosen, as far as the counts tell before a plan is made.
enum Way {
    Split,
    Single,
    Either,
}

impl Way {
    /// Splits cost nothing where experts have several times the rows that their weights are worth. They hardly ever win where no
    /// replicated expert has as many: only where an expert without replicas has far more than its rank's others.
    fn of(problem: &Problem, replica_rows: &[u32]) -> Self {
        let active = replica_rows.iter().filter(|&&rows| rows > 0).count() as u64;
        let rows = sum(replica_rows);
        if rows >= 4 * WEIGHTS_AS_ROWS * active {
            return Self::Split;
        }
        let of_job = |replicas: &[u32]| {
            replicas.iter().map(|&r| u64::from(replica_rows[r as usize])).sum::<u64>()
        };
        let most = problem.placement.jobs().map(of_job).max().unwrap_or(0);
        if most <= WEIGHTS_AS_ROWS { Self::Single } else { Self::Either }
    }
}

/// The slowest rank's routed rows, where an active expert takes as long as `WEIGHTS_AS_ROWS` rows at least.
fn slowest(placement: &Placement, rows: &[u32]) -> u64 {
    let time = |&rows: &u32| if rows == 0 { 0 } else { u64::from(rows).max(WEIGHTS_AS_ROWS) };
    let ranks = rows.chunks_exact(placement.experts_per_rank());
    ranks.map(|experts| experts.iter().map(time).sum()).max().unwrap_or(0)
}

impl Planner {
    /// A planner whose workspace grows to the largest problem it meets; then it allocates nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Place the shared rows alone: the exact optimum of the slowest rank's cost, then the fewest
    /// extra copies that the counts allow.
    ///
    /// A rank that knows its own counts only has [`OwnPlanner`](crate::OwnPlanner).
    ///
    /// # Errors
    /// Arrays of other lengths than the placement's, sums of 2^32 rows or more, costs of an hour or
    /// more, a cost model that needs counts per expert without them, rows but no eligible rank. `plan` is untouched then.
    pub fn live(&mut self, problem: &Problem, plan: &mut Plan) -> Result<()> {
        problem.check()?;
        problem.base_costs(&mut self.bases);
        plan.replica_rows.clear();
        if let Routed::PerExpert(rows) = problem.routed {
            plan.replica_rows.extend_from_slice(rows);
        }
        self.place_shared(problem, plan);
        Ok(())
    }

    /// Split every replicated expert's rows over its replicas and place the shared rows, as one plan.
    ///
    /// Counts of one expert's replicas are added up and split anew over the eligible ranks among theirs. For
    /// [`CostModel::Rows`] it is the optimum, in whole rows (`docs/algorithm.md`). For other cost models it is a
    /// heuristic, and the shared rows are optimal for the split. Where all ranks are eligible it is never slower than `live`.
    ///
    /// [`CostModel::Rows`]: crate::CostModel::Rows
    ///
    /// # Errors
    /// As [`live`](Self::live), and [`Error::NeedsExpertCounts`] for counts per rank.
    pub fn joint(&mut self, problem: &Problem, plan: &mut Plan) -> Result<()> {
        start_from_routed(problem, plan)?;
        problem.base_costs(&mut self.bases);
        if matches!(problem.cost, CostModel::Rows) {
            self.splitter.run(problem, &mut self.bases, &mut plan.replica_rows);
            self.place_shared(problem, plan);
            return Ok(());
        }
        let as_routed = self.optimum(problem);
        self.sweeps.run(problem, &mut self.bases, &mut plan.replica_rows);
        // Where a row's cost depends on the rows beside it, a split can cost more than it levels.
        if self.optimum(problem) > as_routed && problem.is_everyone_eligible() {
            return self.live(problem, plan);
        }
        self.place_shared(problem, plan);
        Ok(())
    }

    /// Put each replicated expert's rows on one of its replicas, and place the shared rows: for decode, where an
    /// expert's weights take longer than its rows.
    ///
    /// First the rank with the most active experts has as few as can be, exactly. Then, with that many, the slowest
    /// rank costs as little as a local search finds.
    ///
    /// # Errors
    /// As [`joint`](Self::joint).
    pub fn single_replica(&mut self, problem: &Problem, plan: &mut Plan) -> Result<()> {
        self.single(problem, plan, MOST_TRIES)
    }

    /// Choose replicas as a server does: split as by [`joint`](Self::joint), or one each as by
    /// [`single_replica`](Self::single_replica), whichever makes the slowest rank's routed rows faster.
    ///
    /// An active expert takes its rows or its weights, whichever is longer: `max(rows, WEIGHTS_AS_ROWS)`. So few rows a
    /// expert are better on one replica, and many are better split. Equals: one replica each.
    ///
    /// # Errors
    /// As [`joint`](Self::joint).
    pub fn replicas(&mut self, problem: &Problem, plan: &mut Plan) -> Result<()> {
        start_from_routed(problem, plan)?;
        match Way::of(problem, &plan.replica_rows) {
            Way::Split => return self.joint(problem, plan),
            Way::Single => return self.single(problem, plan, FEW_TRIES),
            Way::Either => {}
        }
        self.joint(problem, plan)?;
        let split = slowest(problem.placement, &plan.replica_rows);
        let mut other = std::mem::take(&mut self.other);
        let single = self.single(problem, &mut other, SOME_TRIES);
        if single.is_ok() && slowest(problem.placement, &other.replica_rows) <= split {
            std::mem::swap(plan, &mut other);
        }
        self.other = other;
        single
    }

    fn single(&mut self, problem: &Problem, plan: &mut Plan, tries: u32) -> Result<()> {
        start_from_routed(problem, plan)?;
        self.chooser.run(problem, &mut self.bases, &mut plan.replica_rows, tries);
        self.place_shared(problem, plan);
        Ok(())
    }

    /// The least that the slowest rank can cost with the shared rows on top of `self.bases`.
    fn optimum(&mut self, problem: &Problem) -> u64 {
        self.eligible_bases.clear();
        let bases = self.bases.iter().enumerate();
        self.eligible_bases.extend(bases.filter(|&(r, _)| problem.is_eligible(r)).map(|(_, &b)| b));
        let level = level(problem.cost, &self.eligible_bases, problem.shared_rows());
        level.max(self.bases.iter().copied().max().unwrap_or(0))
    }

    /// The last job of every plan: the shared rows over the eligible ranks, on top of `self.bases`.
    fn place_shared(&mut self, problem: &Problem, plan: &mut Plan) {
        let rows = problem.shared_rows();
        // Below the slowest rank's cost everything is free: use it to keep tokens at home.
        plan.optimum = self.optimum(problem);
        plan.ranks = problem.placement.ranks();
        let optimum = plan.optimum;
        let rooms = self.bases.iter().enumerate().map(|(rank, &base)| {
            let room =
                if problem.is_eligible(rank) { room(problem.cost, base, optimum) } else { 0 };
            room.min(rows) as u32
        });
        self.transport.solve(problem.tokens, rooms, problem.visits, &mut plan.transfers);
        plan.shared_rows.clear();
        plan.shared_rows.resize(plan.ranks, 0);
        for t in &plan.transfers {
            plan.shared_rows[usize::from(t.destination)] += t.rows;
        }
    }
}

/// The rows of each physical expert as routed, for a plan that moves them.
fn start_from_routed(problem: &Problem, plan: &mut Plan) -> Result<()> {
    problem.check()?;
    let Routed::PerExpert(routed) = problem.routed else {
        return Err(Error::NeedsExpertCounts);
    };
    plan.replica_rows.clear();
    plan.replica_rows.extend_from_slice(routed);
    Ok(())
}
