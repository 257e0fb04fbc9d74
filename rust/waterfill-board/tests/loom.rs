//! Every interleaving of a rank and the planner, within loom's bound: `make loom`.
#![cfg(loom)]

use std::time::Duration;

use loom::sync::Arc;
use loom::thread;
use waterfill_board::{BoardPlanner, Heap, Port, Posted, Shape, Source};
use waterfill_core::CostModel;

const COST: CostModel = CostModel::Rows;
/// Longer than a model takes: the waits end by what the others do.
const LONG: Duration = Duration::from_secs(3600);

fn check(threads: impl Fn() + Sync + Send + 'static, preemptions: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 100_000;
    model.check(threads);
}

/// `calls` calls of each rank, each rank a thread; the planner is this thread. (Two ranks are more
/// interleavings than end within minutes.)
fn run(ranks: usize, calls: u32) {
    let shape = Shape::new(ranks, ranks).unwrap();
    let board = Arc::new(Heap::new(shape));
    let threads: Vec<_> = (0..ranks)
        .map(|rank| {
            let mut port = Port::new(Arc::clone(&board), shape, COST, rank).unwrap();
            thread::spawn(move || {
                for call in 1..=calls {
                    let tokens = call * 3 + rank as u32;
                    let (visits, counts) = (vec![tokens; ranks], vec![tokens; ranks]);
                    let mut quotas = vec![0; ranks];
                    let posted = Posted { tokens, visits: &visits, counts: &counts };
                    let source = port.exchange(posted, LONG, &mut quotas).unwrap();
                    assert_eq!(source, Source::Live);
                    assert_eq!(quotas.iter().sum::<u32>(), tokens);
                }
            })
        })
        .collect();
    let mut planner = BoardPlanner::new(board, shape, COST, LONG).unwrap();
    for _ in 0..calls {
        while !planner.poll() {
            thread::yield_now();
        }
    }
    assert_eq!(planner.published().whole, u64::from(calls));
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn one_rank_and_the_planner() {
    check(|| run(1, 2), 3);
}
