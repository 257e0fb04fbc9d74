//! Replicas and shared rows in one plan, for costs that are not rows: the water-fill job by job, swept until nothing moves.
//!
//! Each replicated logical expert is a job whose rows may run on its replicas' eligible ranks; the shared
//! rows are a job that may run on any eligible rank. A sweep takes one job off, fills it anew, and goes on.
//! It is a heuristic: rows themselves have an exact way (`split.rs`, `docs/algorithm.md`).

use crate::cost::CostModel;
use crate::level::{level, room};
use crate::problem::Problem;
use crate::workspace::hold;

/// At most: fewer are made when nothing moves.
const MOST_SWEEPS: usize = 32;

/// Workspace of the sweeps; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sweeps {
    /// `[R]` shared rows on each rank, as of the last sweep.
    shared: Vec<u32>,
    /// Ranks allowed to the job at hand, and the cost of each without the job's rows.
    ranks: Vec<usize>,
    bases: Vec<u64>,
}

impl Sweeps {
    /// Split `replica_rows` (`[P]`, rows as routed) anew; `bases` (`[R]`, each rank's routed cost) follows.
    pub(crate) fn run(&mut self, problem: &Problem, bases: &mut [u64], replica_rows: &mut [u32]) {
        let ranks = problem.placement.ranks();
        hold(&mut self.ranks, ranks);
        hold(&mut self.bases, ranks);
        self.shared.clear();
        self.shared.resize(ranks, 0);
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
        let rank_of = |replica: &u32| problem.placement.rank_of(*replica as usize);
        for replicas in problem.placement.jobs() {
            if !replicas.iter().any(|replica| problem.is_eligible(rank_of(replica))) {
                continue; // Nobody may take its rows: they stay as they were routed.
            }
            let mut left = self.take_off_replicas(problem, replicas, bases, replica_rows);
            let level = level(problem.cost, &self.bases, u64::from(left));
            let mut ranks = self.ranks.iter().peekable();
            for replica in replicas {
                let rank = rank_of(replica);
                // A second replica on one rank adds nothing: the first one has taken the rank's room.
                let rows = match ranks.next_if_eq(&&rank) {
                    Some(_) => fill(problem.cost, bases[rank], level, &mut left),
                    None => 0,
                };
                bases[rank] += problem.cost.cost(u64::from(rows));
                moved |= std::mem::replace(&mut replica_rows[*replica as usize], rows) != rows;
            }
        }
        moved
    }

    /// Take the job's rows off `bases`, and gather its eligible ranks and their costs without them; gives the rows.
    fn take_off_replicas(
        &mut self,
        problem: &Problem,
        replicas: &[u32],
        bases: &mut [u64],
        replica_rows: &[u32],
    ) -> u32 {
        self.ranks.clear();
        let mut taken = 0;
        for &replica in replicas {
            let rank = problem.placement.rank_of(replica as usize);
            let rows = replica_rows[replica as usize];
            taken += rows;
            bases[rank] -= problem.cost.cost(u64::from(rows));
            if problem.is_eligible(rank) && self.ranks.last() != Some(&rank) {
                self.ranks.push(rank);
            }
        }
        self.bases.clear();
        self.bases.extend(self.ranks.iter().map(|&rank| bases[rank]));
        taken
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
