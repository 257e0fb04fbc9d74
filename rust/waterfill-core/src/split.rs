//! The rows of replicated experts over their replicas, so that the fullest rank has the fewest rows that it can: exact.
//!
//! A level is enough if every rank over it can hand its surplus on: from rank to rank, at each step rows of one
//! replicated expert from its replica on the one rank to its replica on the next, to a rank with room. Such paths are
//! searched breadth first from all ranks over the level at once (Edmonds and Karp, 1972). If no rank with room can be
//! reached, no row on the reached ranks has a replica anywhere else, so their mean is a lower bound of the optimum, and
//! the next level to try (Dinkelbach, 1967). The first level is the mean of all rows, shared ones too, so it rises to
//! the optimum from below, in whole rows, and no row moves that need not.

use crate::placement::Placement;
use crate::problem::Problem;
use crate::workspace::hold;

/// Workspace; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Splitter {
    /// Ranks reached, in order: the roots, which are over the level, first.
    reached: Vec<u32>,
    /// `[R]` how each rank was reached.
    steps: Vec<Step>,
}

/// Rows go from `given` to `taken`: two replicas of one expert, on two ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Unreached,
    Root,
    From { given: u32, taken: u32 },
}

impl Splitter {
    pub(crate) fn hold(&mut self, ranks: usize) {
        hold(&mut self.reached, ranks);
        hold(&mut self.steps, ranks);
    }

    /// Split `replica_rows` (`[P]`, rows as routed) anew; `loads` (`[R]`, each rank's routed rows) follows.
    ///
    /// Counts are taken as rows: the cost model is not asked.
    pub(crate) fn run(&mut self, problem: &Problem, loads: &mut [u64], replica_rows: &mut [u32]) {
        leave_ineligible(problem, loads, replica_rows);
        let all = problem.shared_rows();
        self.level(problem, all, loads, replica_rows);
    }

    /// Move rows from replica to replica until no rank could have fewer than the fullest, with `more` rows to be put
    /// anywhere afterwards; gives the rows of the fullest rank. None of a rank that is not eligible are moved.
    pub(crate) fn level(
        &mut self,
        problem: &Problem,
        more: u64,
        loads: &mut [u64],
        replica_rows: &mut [u32],
    ) -> u64 {
        let Some(mut level) = first_level(problem, more, loads) else {
            return loads.iter().copied().max().unwrap_or(0); // Nobody may take a row.
        };
        loop {
            match self.reach_room(problem, loads, replica_rows, level) {
                Reached::NobodyIsOver => return level,
                Reached::Room(rank) => {
                    self.hand_on(problem.placement, loads, replica_rows, level, rank);
                }
                Reached::NoRoom => level = self.mean_of_reached(loads),
            }
        }
    }

    /// Search the shortest path from a rank over `level` to one below it.
    fn reach_room(
        &mut self,
        problem: &Problem,
        loads: &[u64],
        replica_rows: &[u32],
        level: u64,
    ) -> Reached {
        self.steps.clear();
        self.steps.resize(loads.len(), Step::Unreached);
        self.reached.clear();
        for (rank, &load) in loads.iter().enumerate() {
            if load > level && problem.is_eligible(rank) {
                self.steps[rank] = Step::Root;
                self.reached.push(rank as u32);
            }
        }
        if self.reached.is_empty() {
            return Reached::NobodyIsOver;
        }
        let placement = problem.placement;
        let mut next = 0;
        while let Some(&rank) = self.reached.get(next) {
            next += 1;
            for &(given, job) in placement.replicated_on(rank as usize) {
                if replica_rows[given as usize] == 0 {
                    continue;
                }
                for &taken in placement.replicas_of(job) {
                    let to = placement.rank_of_known(taken as usize);
                    if self.steps[to] != Step::Unreached || !problem.is_eligible(to) {
                        continue;
                    }
                    self.steps[to] = Step::From { given, taken };
                    if loads[to] < level {
                        return Reached::Room(to);
                    }
                    self.reached.push(to as u32);
                }
            }
        }
        Reached::NoRoom
    }

    /// Move as many rows along the path to `rank` as its first rank has too many, the last has room for, and all have.
    fn hand_on(
        &self,
        placement: &Placement,
        loads: &mut [u64],
        replica_rows: &mut [u32],
        level: u64,
        last: usize,
    ) {
        let mut rows = level - loads[last];
        let mut rank = last;
        while let Step::From { given, .. } = self.steps[rank] {
            rows = rows.min(replica_rows[given as usize].into());
            rank = placement.rank_of_known(given as usize);
        }
        rows = rows.min(loads[rank] - level);
        loads[rank] -= rows;
        loads[last] += rows;
        let mut rank = last;
        while let Step::From { given, taken } = self.steps[rank] {
            replica_rows[given as usize] -= rows as u32;
            replica_rows[taken as usize] += rows as u32;
            rank = placement.rank_of_known(given as usize);
        }
    }

    fn mean_of_reached(&self, loads: &[u64]) -> u64 {
        let rows: u64 = self.reached.iter().map(|&rank| loads[rank as usize]).sum();
        rows.div_ceil(self.reached.len() as u64)
    }
}

enum Reached {
    NobodyIsOver,
    Room(usize),
    NoRoom,
}

/// Rows on ranks that may take none go to the first replica that may, if there is one.
fn leave_ineligible(problem: &Problem, loads: &mut [u64], replica_rows: &mut [u32]) {
    if problem.is_everyone_eligible() {
        return;
    }
    let rank_of = |replica: u32| problem.placement.rank_of_known(replica as usize);
    for replicas in problem.placement.jobs() {
        let Some(&taken) = replicas.iter().find(|&&r| problem.is_eligible(rank_of(r))) else {
            continue;
        };
        for &given in replicas.iter().filter(|&&r| !problem.is_eligible(rank_of(r))) {
            let rows = std::mem::take(&mut replica_rows[given as usize]);
            replica_rows[taken as usize] += rows;
            loads[rank_of(given)] -= u64::from(rows);
            loads[rank_of(taken)] += u64::from(rows);
        }
    }
}

/// No plan ends below the mean of the eligible ranks, nor below a rank that keeps its rows. None if nobody is eligible.
fn first_level(problem: &Problem, more: u64, loads: &[u64]) -> Option<u64> {
    let (mut ranks, mut rows, mut kept) = (0, more, 0);
    for (rank, &load) in loads.iter().enumerate() {
        if problem.is_eligible(rank) {
            ranks += 1;
            rows += load;
        } else {
            kept = kept.max(load);
        }
    }
    (ranks > 0).then(|| rows.div_ceil(ranks).max(kept))
}
