//! The slow, obvious optimum, sharing nothing with the planner: what tests and fuzzers compare against.

use crate::cost::CostModel;

/// The smallest slowest-rank cost that any placement of `rows` shared rows reaches.
///
/// Every cost at which some rank could end is tried in order: a rank with cost `bases[r]` and `k` rows
/// ends at `bases[r] + cost(k)`. `bases` is `[R]`; `eligible` `[R]`. O((R x rows) log(R x rows)).
#[must_use]
pub fn optimum(cost: &CostModel, bases: &[u64], eligible: &[bool], rows: u64) -> u64 {
    let slowest = bases.iter().copied().max().unwrap_or(0);
    // (cost at which one more row fits, in all): one entry for each row on each rank.
    let mut steps: Vec<u64> = Vec::new();
    for (rank, &base) in bases.iter().enumerate() {
        if eligible[rank] {
            steps.extend((1..=rows).map(|k| base + cost.cost(k)));
        }
    }
    steps.sort_unstable();
    if rows == 0 { slowest } else { slowest.max(steps[rows as usize - 1]) }
}

/// The fewest tokens that end neither on their own rank nor on one they visit, among all placements in
/// which rank `d` takes at most `room[d]` tokens and source `s` uses at most `visits[s * R + d]` of its
/// visits: total minus a maximum flow, one unit at a time (Ford and Fulkerson, 1956).
#[must_use]
pub fn fewest_extra_copies(tokens: &[u32], room: &[u32], visits: &[u32]) -> u64 {
    let ranks = tokens.len();
    let (source, sink, nodes) = (2 * ranks, 2 * ranks + 1, 2 * ranks + 2);
    let mut capacity = vec![vec![0u32; nodes]; nodes];
    for s in 0..ranks {
        capacity[source][s] = tokens[s];
        capacity[ranks + s][sink] = room[s];
        for d in 0..ranks {
            capacity[s][ranks + d] = if s == d { tokens[s] } else { visits[s * ranks + d] };
        }
    }
    let mut free = 0;
    while push_one(&mut capacity, source, sink, &mut vec![false; nodes]) {
        free += 1;
    }
    tokens.iter().map(|&n| u64::from(n)).sum::<u64>() - free
}

fn push_one(capacity: &mut [Vec<u32>], from: usize, sink: usize, seen: &mut [bool]) -> bool {
    if from == sink {
        return true;
    }
    seen[from] = true;
    for to in 0..capacity.len() {
        if !seen[to] && capacity[from][to] > 0 && push_one(capacity, to, sink, seen) {
            capacity[from][to] -= 1;
            capacity[to][from] += 1;
            return true;
        }
    }
    false
}

/// The least rows of the slowest rank over all ways to split jobs, for [`CostModel::Rows`] and few ranks.
///
/// A job is its rows and the set of ranks (a bit each) that may take them; `fixed` (`[R]`) rows stay. By
/// Hall's theorem a level is enough if for every set of ranks the rows that have nowhere else to go fit
/// under it, so the optimum is the largest mean, rounded up, over all sets. O(2^R x jobs).
#[must_use]
pub fn joint_optimum(jobs: &[(u64, u32)], fixed: &[u64]) -> u64 {
    let mean = |set: u32| {
        let inside = (0..fixed.len()).filter(|&rank| set >> rank & 1 == 1);
        let held: u64 = inside.map(|rank| fixed[rank]).sum();
        let confined = jobs.iter().filter(|&&(_, allowed)| allowed & !set == 0);
        (held + confined.map(|&(rows, _)| rows).sum::<u64>()).div_ceil(set.count_ones().into())
    };
    (1..1 << fixed.len()).map(mean).max().unwrap_or(0)
}

/// The same for any number of ranks: the least level at which a maximum flow takes every row to a rank (Edmonds and
/// Karp, 1972), by bisection. A job's ranks are listed.
#[must_use]
pub fn joint_optimum_by_flow(jobs: &[(u64, Vec<usize>)], fixed: &[u64]) -> u64 {
    let rows: u64 = jobs.iter().map(|job| job.0).sum();
    let mut least = fixed.iter().copied().max().unwrap_or(0);
    let mut enough = least + rows;
    while least < enough {
        let middle = least + (enough - least) / 2;
        if rows_that_fit(jobs, fixed, middle) == rows {
            enough = middle;
        } else {
            least = middle + 1;
        }
    }
    enough
}

/// Rows of jobs that find room under `level`. Nodes: the jobs, the ranks, a source and a sink.
fn rows_that_fit(jobs: &[(u64, Vec<usize>)], fixed: &[u64], level: u64) -> u64 {
    let (source, sink) = (jobs.len() + fixed.len(), jobs.len() + fixed.len() + 1);
    let mut capacity = vec![vec![0; sink + 1]; sink + 1];
    for (job, (rows, allowed)) in jobs.iter().enumerate() {
        capacity[source][job] = *rows;
        allowed.iter().for_each(|&rank| capacity[job][jobs.len() + rank] = *rows);
    }
    for (rank, held) in fixed.iter().enumerate() {
        capacity[jobs.len() + rank][sink] = level - held;
    }
    let mut flow = 0;
    loop {
        let mut from = vec![usize::MAX; sink + 1];
        let mut queue = std::collections::VecDeque::from([source]);
        while let Some(node) = queue.pop_front() {
            for to in (0..=sink).filter(|&to| to != source) {
                if from[to] == usize::MAX && capacity[node][to] > 0 {
                    from[to] = node;
                    queue.push_back(to);
                }
            }
        }
        if from[sink] == usize::MAX {
            return flow;
        }
        let path: Vec<_> = std::iter::successors(Some(sink), |&node| Some(from[node]))
            .take_while(|&node| node != source)
            .map(|node| (from[node], node))
            .collect();
        let most = path.iter().map(|&(a, b)| capacity[a][b]).min().unwrap_or(0);
        for (a, b) in path {
            capacity[a][b] -= most;
            capacity[b][a] += most;
        }
        flow += most;
    }
}

/// One rank for each job, all ways tried: first the fewest jobs on the fullest rank, then the least cost of the costliest.
///
/// A job is its cost and the set of ranks (a bit each) that may run it; `fixed` (`[R]`) are `(jobs, cost)` that stay.
/// Gives both. O(R^jobs).
#[must_use]
pub fn single_replica_optimum(jobs: &[(u64, u32)], fixed: &[(u64, u64)]) -> (u64, u64) {
    let Some((&(cost, allowed), others)) = jobs.split_first() else {
        let most = |of: fn(&(u64, u64)) -> u64| fixed.iter().map(of).max().unwrap_or(0);
        return (most(|each| each.0), most(|each| each.1));
    };
    let mut held = fixed.to_vec();
    let mut least = (u64::MAX, u64::MAX);
    for rank in (0..fixed.len()).filter(|&rank| allowed >> rank & 1 == 1) {
        held[rank] = (held[rank].0 + 1, held[rank].1 + cost);
        least = least.min(single_replica_optimum(others, &held));
        held[rank] = fixed[rank];
    }
    least
}
