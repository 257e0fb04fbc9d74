//! Replicas and shared rows in one plan: the water-fill job by job, swept until nothing moves.
//!
//! Each replicated logical expert is a job whose rows may run on its replicas' ranks; the shared rows
//! are a job that may run on any eligible rank. A sweep takes one job off, fills it anew, and goes on.
//! With [`CostModel::Rows`] the fixed point in fractions of rows is the balanced allocation, which no
//! allocation beats at the slowest rank (`docs/algorithm.md`).
//!
//! [`CostModel::Rows`]: crate::cost::CostModel::Rows

use crate::cost::CostModel;
use crate::level::{level, room};
use crate::problem::Problem;

/// Enough for 0.1% at 64 ranks with 64 redundant experts; fewer are made when nothing moves.
const MOST_SWEEPS: usize = 32;

/// Workspace of the sweeps; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sweeps {
    /// `[R]` shared rows on each rank, as of the last sweep.
    shared: Vec<u32>,
    /// Ranks of the job at hand, and the rows and base cost of each.
    ranks: Vec<usize>,
    rows: Vec<u32>,
    bases: Vec<u64>,
}

impl Sweeps {
    /// Split `replica_rows` (`[P]`, rows as routed) anew; `bases` (`[R]`, each rank's routed cost) follows.
    pub(crate) fn run(&mut self, problem: &Problem, bases: &mut [u64], replica_rows: &mut [u32]) {
        self.shared.clear();
        self.shared.resize(problem.placement.ranks(), 0);
        for sweep in 0..MOST_SWEEPS {
            let moved = self.sweep_replicas(problem, bases, replica_rows);
            let shared_moved = self.sweep_shared(problem, bases, sweep == 0);
            if !moved && !shared_moved {
                break;
            }
        }
        for (base, &rows) in bases.iter_mut().zip(&self.shared) {
            *base -= problem.cost.cost(u64::from(rows));
        }
    }

    fn sweep_replicas(
        &mut self,
        problem: &Problem,
        bases: &mut [u64],
        replica_rows: &mut [u32],
    ) -> bool {
        let mut moved = false;
        for replicas in problem.placement.jobs() {
            self.take_off_replicas(problem, replicas, bases, replica_rows);
            let rows = self.rows.iter().sum();
            let level = level(problem.cost, &self.bases, u64::from(rows));
            let mut left = rows;
            let mut ranks = self.ranks.iter().zip(&self.bases).zip(&self.rows);
            let mut last_rank = None;
            for &replica in replicas {
                let rank = problem.placement.rank_of(replica as usize);
                let target = &mut replica_rows[replica as usize];
                // A second replica on one rank adds nothing: the first one has taken the rank's room.
                if last_rank == Some(rank) {
                    *target = 0;
                    continue;
                }
                last_rank = Some(rank);
                let ((&rank, &base), &before) = ranks.next().expect("one entry a rank of the job");
                *target = fill(problem.cost, base, level, &mut left);
                bases[rank] = base + problem.cost.cost(u64::from(*target));
                moved |= *target != before;
            }
        }
        moved
    }

    /// Gather the job's ranks, each with its rows of the job and its cost without them.
    fn take_off_replicas(
        &mut self,
        problem: &Problem,
        replicas: &[u32],
        bases: &[u64],
        replica_rows: &[u32],
    ) {
        self.ranks.clear();
        self.rows.clear();
        self.bases.clear();
        for &replica in replicas {
            let rank = problem.placement.rank_of(replica as usize);
            let rows = replica_rows[replica as usize];
            let cost = problem.cost.cost(u64::from(rows));
            if self.ranks.last() == Some(&rank) {
                *self.rows.last_mut().expect("as long as ranks") += rows;
                *self.bases.last_mut().expect("as long as ranks") -= cost;
            } else {
                self.ranks.push(rank);
                self.rows.push(rows);
                self.bases.push(bases[rank] - cost);
            }
        }
    }

    fn sweep_shared(&mut self, problem: &Problem, bases: &mut [u64], first: bool) -> bool {
        let rows = problem.shared_rows();
        self.ranks.clear();
        self.bases.clear();
        for rank in (0..bases.len()).filter(|&rank| problem.is_eligible(rank)) {
            self.ranks.push(rank);
            self.bases.push(bases[rank] - problem.cost.cost(u64::from(self.shared[rank])));
        }
        let level = level(problem.cost, &self.bases, rows);
        let mut left = rows as u32;
        let mut moved = first;
        for (&rank, &base) in self.ranks.iter().zip(&self.bases) {
            let rows = fill(problem.cost, base, level, &mut left);
            moved |= rows != self.shared[rank];
            self.shared[rank] = rows;
            bases[rank] = base + problem.cost.cost(u64::from(rows));
        }
        moved
    }
}

/// Rows that a rank takes at `level`, as long as any are left.
fn fill(cost: &CostModel, base: u64, level: u64, left: &mut u32) -> u32 {
    let rows = room(cost, base, level).min(u64::from(*left)) as u32;
    *left -= rows;
    rows
}
