//! Every interleaving of a rank and the planner, within loom's bound: `make test-rust`. (Two ranks are more
//! interleavings than end within minutes.)
#![cfg(loom)]

use std::time::Duration;

use loom::sync::Arc;
use loom::thread;
use waterfill_board::{BoardPlanner, Heap, Port, Posted, Shape, Source};
use waterfill_core::CostModel;

const COST: CostModel = CostModel::Rows;
/// Longer than a model takes: the waits end by what the others do.
const LONG: Duration = Duration::from_secs(3600);

#[test]
fn one_rank_and_the_planner_over_two_calls() {
    const CALLS: u32 = 2;
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.max_branches = 100_000;
    model.check(|| {
        let shape = Shape::new(1, 1).unwrap();
        let board = Arc::new(Heap::new(shape));
        let mut port = Port::new(Arc::clone(&board), shape, COST, 0).unwrap();
        let rank = thread::spawn(move || {
            for tokens in 1..=CALLS {
                let mut quotas = [0];
                let posted = Posted { tokens, visits: &[tokens], counts: &[tokens] };
                let source = port.exchange(posted, LONG, &mut quotas).unwrap();
                assert_eq!((source, quotas), (Source::Live, [tokens]));
            }
        });
        let mut planner = BoardPlanner::new(board, shape, COST, LONG).unwrap();
        for _ in 0..CALLS {
            while !planner.poll() {
                thread::yield_now();
            }
        }
        assert_eq!(planner.published().whole, u64::from(CALLS));
        rank.join().unwrap();
    });
}
