//! One replica for each replicated expert: what decode wants, where an expert's weights take longer than its rows.
//!
//! A rank reads the weights of each of its *active* experts, those with rows, once a layer. A second replica in use is
//! a second set of weights to be read. So every expert runs on one replica, and first the rank with the most active
//! experts has as few as can be: exact, by the same paths as rows are split (`split.rs`), an expert being one unit.
//! Then, with that many, ranks are made cheaper than the costliest is, for as long as a search finds how: it takes an
//! expert off a rank that is too costly or has too many, and then one off the rank that took it where need be, depth
//! first, fewest moves first. With no bound on its tries it would find every such way of up to [`MOST_MOVES`] moves.

use crate::placement::Placement;
use crate::problem::Problem;
use crate::split::Splitter;
use crate::workspace::hold;

/// Experts that change their rank in one step of the search, at most.
const MOST_MOVES: usize = 10;
/// Moves that are tried in one plan, at most. What was found until then stays.
pub(crate) const MOST_TRIES: u32 = 1024;
/// Those of a plan that a layer of few rows waits for: under a microsecond.
pub(crate) const FEW_TRIES: u32 = 32;
/// Those that such a plan goes on with where it may be far from the best.
pub(crate) const MORE_TRIES: u32 = 96;

/// Workspace; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chooser {
    splitter: Splitter,
    /// `[P]` 1 where a replicated expert with rows runs.
    chosen: Vec<u32>,
    /// `[jobs]` rows of each.
    rows: Vec<u32>,
    /// `[R]` active experts.
    active: Vec<u64>,
    /// Those of the fullest rank.
    most: u64,
    /// `[jobs]` whether the step at hand has moved each.
    moved: Vec<bool>,
    /// Ranks to be made cheaper, and those that took an expert in this step.
    touched: Vec<usize>,
    tries_left: u32,
}

/// What the search works on.
struct State<'a> {
    problem: &'a Problem<'a>,
    bases: &'a mut [u64],
    replica_rows: &'a mut [u32],
    /// What all ranks are to end below.
    limit: u64,
}

impl Chooser {
    pub(crate) fn hold(&mut self, placement: &Placement) {
        let (ranks, jobs) = (placement.ranks(), placement.jobs().len());
        self.splitter.hold(ranks);
        hold(&mut self.chosen, placement.physical_experts());
        hold(&mut self.rows, jobs);
        hold(&mut self.active, ranks);
        hold(&mut self.moved, jobs);
        hold(&mut self.touched, ranks + MOST_MOVES);
    }

    /// Put the rows of each replicated expert (`replica_rows`, `[P]`, however divided) on one replica; `bases` becomes `[R]`,
    /// the cost of each rank's routed rows then. `tries`: moves that the search may try.
    pub(crate) fn run(
        &mut self,
        problem: &Problem,
        bases: &mut Vec<u64>,
        replica_rows: &mut [u32],
        tries: u32,
    ) {
        self.take_off(problem, replica_rows);
        problem.base_costs(replica_rows, bases);
        problem.active(replica_rows, &mut self.active);
        self.choose(problem, bases);
        self.most = self.splitter.level(problem, 0, &mut self.active, &mut self.chosen);
        self.put_rows(problem, replica_rows);
        problem.base_costs(replica_rows, bases);
        self.go_on(problem, bases, replica_rows, tries);
    }

    /// Search on from where [`run`](Self::run) ended, with the same arguments.
    pub(crate) fn go_on(
        &mut self,
        problem: &Problem,
        bases: &mut [u64],
        replica_rows: &mut [u32],
        tries: u32,
    ) {
        self.tries_left = tries;
        let mut state = State { problem, bases, replica_rows, limit: 0 };
        while self.improve(&mut state) {}
    }

    /// The rows of every job off its replicas, but of one that nobody may take.
    fn take_off(&mut self, problem: &Problem, replica_rows: &mut [u32]) {
        let placement = problem.placement;
        self.rows.clear();
        self.rows.extend(placement.jobs().map(|replicas| {
            if !replicas.iter().any(|&replica| problem.may_take(replica)) {
                return 0;
            }
            let all = replicas.iter().map(|&r| std::mem::take(&mut replica_rows[r as usize]));
            all.sum::<u32>()
        }));
        self.moved.clear();
        self.moved.resize(placement.jobs().len(), false);
    }

    /// Each job on the eligible rank with the fewest active experts so far, of equals the cheapest, of those the first.
    fn choose(&mut self, problem: &Problem, bases: &mut [u64]) {
        let placement = problem.placement;
        let rank_of = |replica: u32| placement.rank_of_known(replica as usize);
        self.chosen.clear();
        self.chosen.resize(placement.physical_experts(), 0);
        for (replicas, &rows) in placement.jobs().zip(&self.rows).filter(|&(_, &rows)| rows > 0) {
            let eligible = replicas.iter().filter(|&&replica| problem.may_take(replica));
            let best = eligible.min_by_key(|&&r| (self.active[rank_of(r)], bases[rank_of(r)]));
            if let Some(&best) = best {
                self.chosen[best as usize] = 1;
                self.active[rank_of(best)] += 1;
                bases[rank_of(best)] += problem.cost.cost(rows.into());
            }
        }
    }

    /// The rows follow the units.
    fn put_rows(&self, problem: &Problem, replica_rows: &mut [u32]) {
        for (replicas, &rows) in problem.placement.jobs().zip(&self.rows) {
            if let Some(&taken) = replicas.iter().find(|&&r| self.chosen[r as usize] == 1) {
                replica_rows[taken as usize] = rows;
            }
        }
    }

    /// Make every rank cheaper than the costliest is, by as few moves as that takes; gives whether it could.
    fn improve(&mut self, state: &mut State) -> bool {
        state.limit = state.bases.iter().copied().max().unwrap_or(0);
        self.touched.clear();
        self.touched
            .extend((0..state.bases.len()).filter(|&rank| state.bases[rank] == state.limit));
        (1..=MOST_MOVES).any(|moves| self.relieve(state, moves))
    }

    /// Take experts off ranks that are too costly or have too many, each expert once, until none is; or undo it all.
    fn relieve(&mut self, state: &mut State, moves_left: usize) -> bool {
        let is_over =
            |&&rank: &&usize| state.bases[rank] >= state.limit || self.active[rank] > self.most;
        let Some(&rank) = self.touched.iter().find(is_over) else {
            return true;
        };
        if moves_left == 0 {
            return false;
        }
        let placement = state.problem.placement;
        for &(given, job) in placement.replicated_on(rank) {
            if self.chosen[given as usize] == 0 || self.moved[job as usize] {
                continue;
            }
            for &taken in placement.replicas_of(job) {
                let to = placement.rank_of_known(taken as usize);
                if to == rank || !state.problem.is_eligible(to) {
                    continue;
                }
                if self.tries_left == 0 {
                    return false;
                }
                self.tries_left -= 1;
                if moves_left == 1 && self.leaves_over(state, given, rank, to) {
                    continue; // Seen without the move: most of all tries end here.
                }
                self.moved[job as usize] = true;
                self.touched.push(to);
                self.shift(state, given, taken);
                let done = self.relieve(state, moves_left - 1);
                self.moved[job as usize] = false;
                if done {
                    return true;
                }
                self.touched.pop();
                self.shift(state, taken, given);
            }
        }
        false
    }

    /// Whether the expert's move from `rank` to another would leave either of them too costly or with too many.
    fn leaves_over(&self, state: &State, given: u32, rank: usize, to: usize) -> bool {
        let cost = state.problem.cost.cost(state.replica_rows[given as usize].into());
        state.bases[rank] - cost >= state.limit
            || state.bases[to] + cost >= state.limit
            || self.active[rank] > self.most + 1
            || self.active[to] >= self.most
    }

    /// One expert from a replica of its to another.
    fn shift(&mut self, state: &mut State, given: u32, taken: u32) {
        let rank_of = |replica: u32| state.problem.placement.rank_of_known(replica as usize);
        let rows = std::mem::take(&mut state.replica_rows[given as usize]);
        state.replica_rows[taken as usize] = rows;
        let cost = state.problem.cost.cost(rows.into());
        state.bases[rank_of(given)] -= cost;
        state.bases[rank_of(taken)] += cost;
        self.active[rank_of(given)] -= 1;
        self.active[rank_of(taken)] += 1;
        self.chosen[given as usize] = 0;
        self.chosen[taken as usize] = 1;
    }
}
