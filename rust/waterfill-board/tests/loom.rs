//! Every interleaving, and every value that a relaxed load may see: `make test-models`. (Two ranks and the
//! planner do not end within minutes, even with one preemption: shuttle has those.)
#![cfg(loom)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use loom::sync::atomic::AtomicBool;

use loom::sync::Arc;
use loom::thread;
use waterfill_board::{BoardPlanner, End, Heap, Outcome, Port, Posted, Presence, Region, Shape};
use waterfill_core::{CostModel, ReplicaTable};

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

/// A board whose rank 1 is gone once it is told so.
struct Watched {
    heap: Heap,
    gone: AtomicBool,
}

impl Region for Watched {
    fn words(&self) -> &[loom::sync::atomic::AtomicU64] {
        self.heap.words()
    }

    fn presence(&self, end: End) -> Presence {
        // SeqCst: as a call of the system, which orders all that is before and after it.
        let gone = end == End::Rank(1) && self.gone.load(Ordering::SeqCst);
        if gone { Presence::Gone } else { Presence::Here }
    }
}

fn exchange<R: Region>(ranks: usize, port: &mut Port<R>, tokens: u32, cap: Duration) -> Outcome {
    let (visits, counts) = ([tokens; 2], [tokens; 2]);
    let mut quotas = [0; 2];
    let posted = Posted { tokens, visits: &visits[..ranks], counts: &counts[..ranks] };
    let outcome = port.exchange(posted, cap, &mut quotas[..ranks]).unwrap();
    assert_eq!(quotas.iter().sum::<u32>(), tokens);
    outcome
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
                assert_eq!(exchange(1, &mut port, tokens, LONG), Outcome::Live);
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
fn replicas_are_chosen_for_the_map_that_was_posted() {
    const CALLS: u32 = 2;
    check("replicas", || {
        // One rank with two replicas of one expert.
        let shape = Shape::with_redundant(1, 2, 1).unwrap();
        let table = std::sync::Arc::new(ReplicaTable::new(1, &[0, 0]).unwrap());
        let board = Arc::new(Heap::new(shape));
        let mut port = Port::new(Arc::clone(&board), shape, COST, 0).unwrap();
        let mut planner = BoardPlanner::new(board, shape, COST, LONG).unwrap();
        planner.set_map(0, std::sync::Arc::clone(&table));
        let rank = thread::spawn(move || {
            for call in 1..=CALLS {
                let has_table = call == 1;
                port.set_table(has_table.then_some(&table)).unwrap();
                let posted = Posted { tokens: 0, visits: &[0], counts: &[call, 1] };
                assert_eq!(port.exchange(posted, LONG, &mut [0]).unwrap(), Outcome::Live);
                let taken = port.replica_quotas().map(|quotas| quotas.iter().sum::<u32>());
                assert_eq!(taken, has_table.then_some(call + 1));
            }
        });
        for _ in 0..CALLS {
            while !planner.poll() {
                thread::yield_now();
            }
        }
        assert_eq!((planner.published().whole, planner.published().replicas), (2, 1));
        rank.join().unwrap();
    });
}

#[test]
fn without_a_living_ranks_counts_there_is_no_plan() {
    check("a rank that is late", || {
        let (mut port, mut planner) = start(2, Duration::ZERO);
        let rank = thread::spawn(move || {
            assert_eq!(exchange(2, &mut port, 3, LONG), Outcome::NoPlan);
        });
        while !planner.poll() {
            thread::yield_now();
        }
        assert_eq!((planner.published().plans(), planner.published().late), (0, 1));
        rank.join().unwrap();
    });
}

#[test]
fn a_rank_that_is_gone_is_left_out_in_the_same_call() {
    check("a rank that is gone", || {
        let shape = Shape::new(2, 2).unwrap();
        let board = Arc::new(Watched { heap: Heap::new(shape), gone: AtomicBool::new(false) });
        let mut port = Port::new(Arc::clone(&board), shape, COST, 0).unwrap();
        let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
        let rank = thread::spawn(move || {
            assert_eq!(exchange(2, &mut port, 3, LONG), Outcome::Live);
        });
        planner.poll();
        board.gone.store(true, Ordering::SeqCst);
        while !planner.poll() {
            thread::yield_now();
        }
        assert_eq!((planner.published().partial, planner.published().none()), (1, 0));
        rank.join().unwrap();
    });
}

#[test]
fn a_plan_is_taken_though_a_later_call_has_none() {
    check("no plan after a plan", || {
        let shape = Shape::new(2, 2).unwrap();
        let board = Arc::new(Heap::new(shape));
        let port = |rank| Port::new(Arc::clone(&board), shape, COST, rank).unwrap();
        let (mut late, mut other) = (port(0), port(1));
        let mut planner =
            BoardPlanner::new(Arc::clone(&board), shape, COST, Duration::ZERO).unwrap();
        let posted = Posted { tokens: 3, visits: &[3; 2], counts: &[3; 2] };
        late.post(posted).unwrap();
        other.post(posted).unwrap();
        let rank = thread::spawn(move || {
            assert_eq!(late.finish(posted, LONG, &mut [0; 2]).unwrap(), Outcome::Live);
        });
        assert!(planner.poll(), "both have posted");
        other.post(posted).unwrap();
        assert!(planner.poll(), "the patience with rank 0 is spent at once");
        assert_eq!((planner.published().whole, planner.published().late), (1, 1));
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
            assert_eq!((port.tally().ended[Outcome::Torn], port.tally().calls()), (0, 3));
            port.tally().clone()
        });
        for _ in 0..4 {
            planner.poll();
        }
        let tally = rank.join().unwrap();
        let published = planner.published();
        assert_eq!(published.refused, 0);
        // Who does not wait says so with its counts: such a call has no plan.
        assert!(
            tally.ended[Outcome::Live] <= published.whole
                && published.whole <= 3 - tally.ended[Outcome::Broken]
        );
    });
}
