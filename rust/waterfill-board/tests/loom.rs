//! Every interleaving, and every value that a relaxed load may see: `make test-models`. (Two ranks and the
//! planner do not end within minutes, even with one preemption: shuttle has those.)
#![cfg(loom)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use loom::sync::Arc;
use loom::thread;
use waterfill_board::{BoardPlanner, Heap, Port, Posted, Shape, Source};
use waterfill_core::CostModel;

const COST: CostModel = CostModel::Rows;
/// Longer than a model takes: the waits end by what the others do.
const LONG: Duration = Duration::from_secs(3600);

fn check(name: &str, model: fn()) {
    let executions = std::sync::Arc::new(AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{name}: {} executions", executions.load(Ordering::Relaxed));
}

fn exchange(ranks: usize, port: &mut Port<Arc<Heap>>, tokens: u32, cap: Duration) -> Source {
    let (visits, counts) = ([tokens; 2], [tokens; 2]);
    let mut quotas = [0; 2];
    let posted = Posted { tokens, visits: &visits[..ranks], counts: &counts[..ranks] };
    let source = port.exchange(posted, cap, &mut quotas[..ranks]).unwrap();
    assert_eq!(quotas.iter().sum::<u32>(), tokens);
    source
}

fn start(ranks: usize, patience: Duration) -> (Port<Arc<Heap>>, BoardPlanner<Arc<Heap>>) {
    let shape = Shape::new(ranks, ranks).unwrap();
    let board = Arc::new(Heap::new(shape));
    let port = Port::new(Arc::clone(&board), shape, COST, 0).unwrap();
    (port, BoardPlanner::new(board, shape, COST, patience).unwrap())
}

#[test]
fn one_rank_and_the_planner_over_three_calls() {
    const CALLS: u32 = 3;
    check("three calls", || {
        let (mut port, mut planner) = start(1, LONG);
        let rank = thread::spawn(move || {
            for tokens in 1..=CALLS {
                assert_eq!(exchange(1, &mut port, tokens, LONG), Source::Live);
            }
        });
        for _ in 0..CALLS {
            while !planner.poll() {
                thread::yield_now();
            }
        }
        assert_eq!(planner.published().whole, u64::from(CALLS));
        rank.join().unwrap();
    });
}

#[test]
fn the_planner_goes_on_without_a_rank_that_never_comes() {
    check("a rank that never comes", || {
        let (mut port, mut planner) = start(2, Duration::ZERO);
        let rank = thread::spawn(move || {
            assert_eq!(exchange(2, &mut port, 3, LONG), Source::Live);
        });
        while !planner.poll() {
            thread::yield_now();
        }
        assert_eq!(planner.published().partial, 1);
        rank.join().unwrap();
    });
}

#[test]
fn a_rank_goes_on_at_its_cap_and_a_late_plan_is_not_taken_for_the_next() {
    check("a late plan", || {
        let (mut port, mut planner) = start(1, LONG);
        let rank = thread::spawn(move || {
            for tokens in 1..=3 {
                exchange(1, &mut port, tokens, Duration::ZERO);
            }
            assert_eq!((port.tally().torn, port.tally().calls()), (0, 3));
        });
        for _ in 0..4 {
            planner.poll();
        }
        rank.join().unwrap();
        assert_eq!(planner.published().refused, 0);
    });
}
