//! The plan: how many shared rows each source sends to each rank, so that the slowest rank is as fast as can be.

use crate::check::{check_length, check_rank};
use crate::cost::{CostModel, sum};
use crate::error::{Error, Result};
use crate::joint::Sweeps;
use crate::level::{level, room};
use crate::placement::Placement;
use crate::problem::{Problem, Routed};
use crate::replica_counts::ReplicaCounts;
use crate::single::{Chooser, FEW_TRIES, MORE_TRIES, MOST_TRIES};
use crate::split::Splitter;
use crate::transport::{Transfer, Transport};
use crate::workspace::hold;

/// What [`Planner`] decided for one layer and step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    ranks: usize,
    optimum: u64,
    start_costs: Vec<u64>,
    routed_costs: Vec<u64>,
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

    /// `[R]` the cost of each rank's routed rows before the plan: as routed, or with replicas divided evenly where that is not
    /// known.
    #[must_use]
    pub fn start_costs(&self) -> &[u64] {
        &self.start_costs
    }

    /// `[R]` the cost of each rank's routed rows under the plan.
    #[must_use]
    pub fn routed_costs(&self) -> &[u64] {
        &self.routed_costs
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
    /// Empty if the problem had counts per rank; of [`Routed::Reduced`] counts 0 for experts without replicas.
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
    /// `[R]` active experts as a plan begins.
    active: Vec<u64>,
    /// `[R]` each rank's time by the rule of [`replicas`](Self::replicas), without jobs and with them.
    fixed_times: Vec<u64>,
    times: Vec<u64>,
    eligible_bases: Vec<u64>,
    transport: Transport,
    splitter: Splitter,
    chooser: Chooser,
    sweeps: Sweeps,
    /// What [`replicas`](Self::replicas) compares with, or copies from: `[P]` rows and `[R]` costs.
    other_rows: Vec<u32>,
    other_bases: Vec<u64>,
    /// What it plans from, where counts per expert were given.
    counts: ReplicaCounts,
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
    ///
    /// `active`: `[R]` active experts, those of jobs as the plan begins.
    fn of(counts: &ReplicaCounts, active: &[u64]) -> Self {
        let rows = sum(counts.loads()) + sum(counts.jobs());
        if rows >= 4 * WEIGHTS_AS_ROWS * active.iter().sum::<u64>() {
            return Self::Split;
        }
        let most = counts.jobs().iter().copied().max().unwrap_or(0);
        if u64::from(most) <= WEIGHTS_AS_ROWS { Self::Single } else { Self::Either }
    }
}

/// What an expert takes, in rows.
fn time_of(rows: u32) -> u64 {
    if rows == 0 { 0 } else { u64::from(rows).max(WEIGHTS_AS_ROWS) }
}

impl Planner {
    /// A planner whose workspace grows to the largest problem of each method and cost model; then it allocates nothing.
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
        self.start(problem, plan);
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
        check_movable(problem)?;
        self.splitter.hold(problem.placement.ranks());
        self.start(problem, plan);
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
        check_movable(problem)?;
        self.chooser.hold(problem.placement);
        self.start(problem, plan);
        self.chooser.run(problem, &mut self.bases, &mut plan.replica_rows, MOST_TRIES);
        self.place_shared(problem, plan);
        Ok(())
    }

    /// Choose replicas as a server does: split as by [`joint`](Self::joint), or one each as by
    /// [`single_replica`](Self::single_replica), whichever makes the slowest rank's routed rows faster.
    ///
    /// An active expert takes its rows or its weights, whichever is longer: `max(rows, WEIGHTS_AS_ROWS)`. A rank's experts
    /// without replicas are taken together, because a server does not know the rows of each: their rows, or all their weights.
    /// So few rows a replicated expert are better on one replica, and many are better split. One replica each it is where
    /// they are equal, or where no split could gain more than a hundredth.
    ///
    /// Replicas are chosen by rows, and from [`Routed::Reduced`] counts: counts per expert are reduced first. The cost model
    /// is asked for the shared rows alone.
    ///
    /// An expert without a replica on an eligible rank stays as routed. Reduced counts do not tell how it was routed: from them
    /// its rows are divided evenly over its replicas, in [`Plan::replica_rows`] and in the costs of their ranks.
    ///
    /// # Errors
    /// As [`joint`](Self::joint).
    pub fn replicas(&mut self, problem: &Problem, plan: &mut Plan) -> Result<()> {
        problem.check()?;
        let rows = match problem.routed {
            Routed::Reduced(counts) => {
                self.by_rule(problem, counts, plan);
                return Ok(());
            }
            Routed::PerExpert(rows) => rows,
            Routed::PerRank(_) => return Err(Error::NeedsExpertCounts),
        };
        let mut counts = std::mem::take(&mut self.counts);
        let reduced = counts.reduce(problem.placement, rows);
        if reduced.is_ok() {
            let (cost, routed) = (&CostModel::Rows, Routed::Reduced(&counts));
            self.by_rule(&Problem { cost, routed, ..*problem }, &counts, plan);
        }
        self.counts = counts;
        reduced?;
        let chosen = &mut self.other_rows;
        std::mem::swap(&mut plan.replica_rows, chosen);
        plan.replica_rows.clear();
        plan.replica_rows.extend_from_slice(rows);
        let may_move =
            |replicas: &&[u32]| replicas.iter().any(|&replica| problem.may_take(replica));
        for &replica in problem.placement.jobs().filter(may_move).flatten() {
            plan.replica_rows[replica as usize] = chosen[replica as usize];
        }
        problem.base_costs(rows, &mut plan.start_costs);
        problem.base_costs(&plan.replica_rows, &mut self.bases);
        self.place_shared(problem, plan);
        Ok(())
    }

    /// The rule of [`replicas`](Self::replicas), of a checked problem with these counts.
    fn by_rule(&mut self, problem: &Problem, counts: &ReplicaCounts, plan: &mut Plan) {
        self.hold(problem.placement);
        self.start(problem, plan);
        problem.active(&plan.replica_rows, &mut self.active);
        let (bases, rows) = (&mut self.bases, &mut plan.replica_rows);
        match Way::of(counts, &self.active) {
            Way::Split => self.splitter.run(problem, bases, rows),
            Way::Single => self.chooser.run(problem, bases, rows, FEW_TRIES),
            Way::Either => self.take_faster(problem, counts, rows),
        }
        self.place_shared(problem, plan);
    }

    /// Both ways, from `rows` as the plan starts, unless one replica each is near the best.
    fn take_faster(&mut self, problem: &Problem, counts: &ReplicaCounts, rows: &mut Vec<u32>) {
        self.take_times(problem.placement, counts);
        self.other_rows.clone_from(rows);
        self.other_bases.clone_from(&self.bases);
        self.chooser.run(problem, &mut self.bases, rows, FEW_TRIES);
        if self.slowest(problem.placement, rows) * 99 <= self.least(counts) * 100 {
            return;
        }
        self.chooser.go_on(problem, &mut self.bases, rows, MORE_TRIES);
        let single = self.slowest(problem.placement, rows);
        let mut split = std::mem::take(&mut self.other_rows);
        self.splitter.run(problem, &mut self.other_bases, &mut split);
        if self.slowest(problem.placement, &split) < single {
            std::mem::swap(rows, &mut split);
            std::mem::swap(&mut self.bases, &mut self.other_bases);
        }
        self.other_rows = split;
    }

    /// Each rank's time of its experts without replicas.
    fn take_times(&mut self, placement: &Placement, counts: &ReplicaCounts) {
        let time = |(rank, &load): (usize, &u32)| {
            u64::from(load).max(WEIGHTS_AS_ROWS * counts.active_on(placement, rank))
        };
        self.fixed_times.clear();
        self.fixed_times.extend(counts.loads().iter().enumerate().map(time));
    }

    /// The slowest rank's time, with those rows of replicas.
    fn slowest(&mut self, placement: &Placement, rows: &[u32]) -> u64 {
        self.times.clone_from(&self.fixed_times);
        for &replica in placement.replicas() {
            let rank = placement.rank_of_known(replica as usize);
            self.times[rank] += time_of(rows[replica as usize]);
        }
        self.times.iter().copied().max().unwrap_or(0)
    }

    /// What no choice of replicas gets the slowest rank below: the mean rank's time, and any rank's without jobs.
    fn least(&self, counts: &ReplicaCounts) -> u64 {
        let times = &self.fixed_times;
        let jobs: u64 = counts.jobs().iter().map(|&rows| time_of(rows)).sum();
        let mean = (times.iter().sum::<u64>() + jobs).div_ceil(times.len() as u64);
        times.iter().copied().max().unwrap_or(0).max(mean)
    }

    /// Memory for every way of choosing replicas, whichever the counts ask for.
    fn hold(&mut self, placement: &Placement) {
        let ranks = placement.ranks();
        self.splitter.hold(ranks);
        self.chooser.hold(placement);
        hold(&mut self.other_rows, placement.physical_experts());
        for list in [&mut self.other_bases, &mut self.fixed_times, &mut self.times] {
            hold(list, ranks);
        }
    }

    /// What a plan begins with: rows of experts, and the ranks' costs of them.
    fn start(&mut self, problem: &Problem, plan: &mut Plan) {
        problem.start(&mut plan.replica_rows);
        problem.base_costs(&plan.replica_rows, &mut self.bases);
        plan.start_costs.clone_from(&self.bases);
    }

    /// The least that the slowest rank can cost with the shared rows on top of `self.bases`.
    fn optimum(&mut self, problem: &Problem) -> u64 {
        // All ranks' at first, for the memory: more of them may be eligible in a later call.
        self.eligible_bases.clone_from(&self.bases);
        if let Some(eligible) = problem.eligible {
            let mut eligible = eligible.iter();
            self.eligible_bases.retain(|_| eligible.next() == Some(&true));
        }
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
        plan.routed_costs.clone_from(&self.bases);
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

/// Counts tell rows that a plan can move.
fn check_movable(problem: &Problem) -> Result<()> {
    problem.check()?;
    if matches!(problem.routed, Routed::PerRank(_)) {
        Err(Error::NeedsExpertCounts)
    } else {
        Ok(())
    }
}
