//! Ranks as threads, the planner as another: every plan is the core's, and nobody waits for the gone.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use waterfill_board::{
    BoardPlanner, End, Heap, Outcome, Pace, PlannerThread, Port, Posted, Presence, Region,
    Sequence, Shape,
};
use waterfill_testing::Random;

use support::{Batch, COST, Watched, expected, expected_with};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(2);

fn start(shape: Shape, patience: Duration) -> (Arc<Heap>, PlannerThread) {
    let board = Arc::new(Heap::new(shape));
    let planner = BoardPlanner::new(Arc::clone(&board), shape, COST, patience).unwrap();
    (board, PlannerThread::spawn(planner, Pace::Spin(None)).unwrap())
}

fn port(board: &Arc<Heap>, shape: Shape, rank: usize) -> Port<Arc<Heap>> {
    Port::new(Arc::clone(board), shape, COST, rank).unwrap()
}

#[test]
fn every_plan_is_the_cores() {
    for (ranks, experts, calls) in [(1, 4, 500), (2, 6, 1000), (3, 12, 500), (12, 12, 100)] {
        let shape = Shape::new(ranks, experts).unwrap();
        let (board, planner) = start(shape, LONG);
        thread::scope(|scope| {
            for rank in 0..ranks {
                let mut port = port(&board, shape, rank);
                scope.spawn(move || {
                    let mut quotas = vec![0; ranks];
                    for call in 0..calls {
                        let batch = Batch::new(shape, rank, call);
                        let outcome = port.exchange(batch.posted(), LONG, &mut quotas).unwrap();
                        assert_eq!(outcome, Outcome::Live);
                        assert_eq!(quotas, expected(shape, call, rank), "call {call}");
                    }
                    assert_eq!(port.tally().ended[Outcome::Live], calls);
                });
            }
        });
        assert_eq!(planner.finish().unwrap().whole, calls);
    }
}

#[test]
fn a_gone_peer_is_left_out_at_once_and_gets_no_token() {
    let shape = Shape::new(3, 6).unwrap();
    let board = Arc::new(Watched::new(shape));
    board.leave(End::Rank(1));
    // Nobody waits so long: neither the ranks nor the planner.
    let planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let planner = PlannerThread::spawn(planner, Pace::Spin(None)).unwrap();
    thread::scope(|scope| {
        for rank in [0, 2] {
            let mut port = Port::new(Arc::clone(&board), shape, COST, rank).unwrap();
            scope.spawn(move || {
                let mut quotas = [0; 3];
                for call in 0..50 {
                    let batch = Batch::new(shape, rank, call);
                    let outcome = port.exchange(batch.posted(), LONG, &mut quotas).unwrap();
                    assert_eq!((outcome, quotas[1]), (Outcome::Live, 0), "{quotas:?}");
                    assert_eq!(quotas[..], expected_with(shape, call, rank, &[true, false, true]));
                }
            });
        }
    });
    let published = planner.finish().unwrap();
    assert_eq!((published.whole, published.partial, published.none()), (0, 50, 0));
    assert_eq!(published.missed, [0, 50, 0]);
}

#[test]
fn a_gone_peer_that_joins_again_is_waited_for_again() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Watched::new(shape));
    let port = |rank| Port::new(Arc::clone(&board), shape, COST, rank).unwrap();
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let (mut first, mut second) = (port(0), port(1));
    let batch = Batch { tokens: 1, visits: vec![1, 0], counts: vec![1, 0, 0, 0] };
    board.leave(End::Rank(1));
    for call in 1..=3 {
        first.post(batch.posted()).unwrap();
        while !planner.poll() {}
        second.resume_after(Sequence::from_tag(call).unwrap());
    }
    assert_eq!(planner.published().partial, 3);
    board.come_back(End::Rank(1));
    // Always after rank 0 and the planner's look.
    for _ in 0..8 {
        first.post(batch.posted()).unwrap();
        planner.poll();
        second.post(batch.posted()).unwrap();
        planner.poll();
        first.finish(batch.posted(), SHORT, &mut [0; 2]).unwrap();
        second.finish(batch.posted(), SHORT, &mut [0; 2]).unwrap();
    }
    let published = planner.published();
    assert!(published.whole >= 4 && published.partial <= 5, "{published:?}");
}

#[test]
fn without_a_peer_that_may_live_there_is_no_plan_and_after_two_calls_no_wait() {
    const PATIENCE: Duration = Duration::from_millis(100);
    let shape = Shape::new(2, 4).unwrap();
    // Nobody can be watched on this one.
    let (board, planner) = start(shape, PATIENCE);
    let mut port = port(&board, shape, 0);
    let begun = Instant::now();
    for call in 0..1000 {
        let batch = Batch::new(shape, 0, call);
        let outcome = port.exchange(batch.posted(), LONG, &mut [0; 2]).unwrap();
        assert_eq!(outcome, Outcome::NoPlan, "call {call}");
    }
    assert!(begun.elapsed() >= PATIENCE * 2 && begun.elapsed() < PATIENCE * 100);
    // It comes, far behind: nothing is waited for that has no plan, and then all are together again.
    let late = {
        let mut late = self::port(&board, shape, 1);
        thread::spawn(move || {
            let exchange = |call| {
                let batch = Batch::new(shape, 1, call);
                late.exchange(batch.posted(), LONG, &mut [0; 2]).unwrap()
            };
            let outcomes: Vec<Outcome> = (0..1100).map(exchange).collect();
            assert!(outcomes[..900].iter().all(|&outcome| outcome == Outcome::NoPlan));
            assert!(outcomes[1050..].iter().all(|&outcome| outcome == Outcome::Live));
        })
    };
    thread::sleep(PATIENCE / 2);
    for call in 1000..1100 {
        let batch = Batch::new(shape, 0, call);
        port.exchange(batch.posted(), LONG, &mut [0; 2]).unwrap();
    }
    late.join().unwrap();
    let published = planner.finish().unwrap();
    assert!(published.silent >= 998 && published.whole >= 50, "{published:?}");
}

#[test]
fn a_rank_that_died_is_waited_for_once() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Watched::new(shape));
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let mut ports = [0, 1].map(|rank| Port::new(Arc::clone(&board), shape, COST, rank).unwrap());
    let batch = Batch { tokens: 1, visits: vec![1, 0], counts: vec![1, 0, 0, 0] };
    ports.iter_mut().for_each(|port| port.post(batch.posted()).unwrap());
    assert!(planner.poll(), "both are there");
    board.leave(End::Rank(1));
    ports[0].post(batch.posted()).unwrap();
    assert!(!planner.poll(), "nobody is asked for in the first millisecond");
    while !planner.poll() {
        thread::sleep(Duration::from_micros(100));
    }
    for _ in 0..3 {
        ports[0].post(batch.posted()).unwrap();
        assert!(planner.poll(), "it is known to be gone");
    }
    assert_eq!((planner.published().whole, planner.published().partial), (1, 4));
}

#[test]
fn a_planner_that_is_gone_is_not_waited_for() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Watched::new(shape));
    board.leave(End::Planner);
    let mut port = Port::new(Arc::clone(&board), shape, COST, 1).unwrap();
    let begun = Instant::now();
    for call in 0..1000 {
        let batch = Batch::new(shape, 1, call);
        let outcome = port.exchange(batch.posted(), LONG, &mut [0; 2]).unwrap();
        assert_eq!(outcome, Outcome::Broken, "call {call}");
    }
    assert!(begun.elapsed() < LONG / 10, "{:?}", begun.elapsed());
}

/// A board whose ends do one thing more before they are seen to be gone.
struct Ending<F> {
    heap: Arc<Heap>,
    last: F,
}

impl<F: Fn(End) + Send + Sync> Region for Ending<F> {
    fn words(&self) -> &[AtomicU64] {
        self.heap.words()
    }

    fn presence(&self, end: End) -> Presence {
        (self.last)(end);
        Presence::Gone
    }
}

#[test]
fn what_a_process_wrote_just_before_it_ended_is_found() {
    let shape = Shape::new(2, 2).unwrap();
    let heap = Arc::new(Heap::new(shape));
    let batch = Batch { tokens: 1, visits: vec![1, 0], counts: vec![1, 0] };
    let second = Mutex::new(Some(port(&heap, shape, 1)));
    port(&heap, shape, 0).post(batch.posted()).unwrap();
    let posts = |end| {
        let mut second = second.lock().unwrap();
        if let Some(mut second) = second.take_if(|_| end == End::Rank(1)) {
            second.post(batch.posted()).unwrap();
        }
    };
    let board = Ending { heap: Arc::clone(&heap), last: posts };
    let mut planner = BoardPlanner::new(board, shape, COST, LONG).unwrap();
    while !planner.poll() {}
    assert_eq!((planner.published().whole, planner.published().partial), (1, 0));

    let shape = Shape::new(1, 1).unwrap();
    let heap = Arc::new(Heap::new(shape));
    let planner = BoardPlanner::new(Arc::clone(&heap), shape, COST, LONG).unwrap();
    let planner = Mutex::new(planner);
    let plans = |_| {
        planner.lock().unwrap().poll();
    };
    let mut port = Port::new(Ending { heap, last: plans }, shape, COST, 0).unwrap();
    let posted = Posted { tokens: 1, visits: &[1], counts: &[1] };
    assert_eq!(port.exchange(posted, LONG, &mut [0]).unwrap(), Outcome::Live);
}

#[test]
fn once_a_rank_went_on_alone_no_other_gets_a_plan_nor_waits_for_one() {
    let shape = Shape::new(2, 4).unwrap();
    let batch = Batch { tokens: 1, visits: vec![1, 0], counts: vec![1, 0, 0, 0] };
    let exchange =
        |port: &mut Port<Arc<Heap>>, cap| port.exchange(batch.posted(), cap, &mut [0; 2]).unwrap();
    // Rank 0 makes so many calls, at first to its cap, then without a wait; after the fifth it uses its first words again.
    for calls in 1..=5 {
        for posts_first in [false, true] {
            let board = Arc::new(Heap::new(shape));
            let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
            let (mut first, mut second) = (port(&board, shape, 0), port(&board, shape, 1));
            if posts_first {
                second.post(batch.posted()).unwrap();
            }
            for _ in 0..calls {
                assert_ne!(exchange(&mut first, Duration::ZERO), Outcome::Live);
            }
            let outcome = if posts_first {
                assert!(planner.poll());
                second.finish(batch.posted(), LONG, &mut [0; 2]).unwrap()
            } else {
                // Nobody's words of the first call are there any more after the fifth.
                while !planner.poll() {}
                exchange(&mut second, LONG)
            };
            assert_eq!(outcome, Outcome::NoPlan, "after {calls} calls, {posts_first}");
            assert_eq!(planner.published().plans(), 0);
        }
    }
}

#[test]
fn a_rank_behind_a_planner_that_went_ahead_waits_for_none_of_the_calls_left_out() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let (mut ahead, mut behind) = (port(&board, shape, 0), port(&board, shape, 1));
    ahead.resume_after(Sequence::from_tag(5).unwrap());
    ahead.post(Batch::new(shape, 0, 5).posted()).unwrap();
    for _ in 0..1000 {
        assert!(!planner.poll(), "rank 1 is waited for");
    }
    let outcomes = [0, 1, 2, 3, 4, 5].map(|call| {
        let batch = Batch::new(shape, 1, call);
        behind.post(batch.posted()).unwrap();
        let meanwhile = || {
            planner.poll();
        };
        behind.finish_with(batch.posted(), LONG, &mut [0; 2], meanwhile).unwrap()
    });
    assert_eq!(outcomes[..5], [Outcome::NoPlan; 5]);
    assert_eq!(outcomes[5], Outcome::Live);
}

#[test]
fn without_a_planner_two_caps_are_spent_and_own_counts_go_on() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut port = port(&board, shape, 1);
    let batch = Batch { tokens: 100, visits: vec![60, 80], counts: vec![90, 80, 20, 10] };
    let begun = Instant::now();
    let outcomes: Vec<Outcome> = (0..1000)
        .map(|_| {
            let mut quotas = [0; 2];
            let outcome = port.exchange(batch.posted(), SHORT, &mut quotas).unwrap();
            assert_eq!(quotas.iter().sum::<u32>(), 100);
            assert!(quotas[1] > quotas[0], "own counts say that rank 1 is the emptier: {quotas:?}");
            outcome
        })
        .collect();
    assert!(begun.elapsed() < SHORT * 250, "{:?}", begun.elapsed());
    assert_eq!(outcomes[..2], [Outcome::TimedOut; 2]);
    assert!(outcomes[2..].iter().all(|&outcome| outcome == Outcome::Broken));
    assert_eq!(
        (port.tally().ended[Outcome::TimedOut], port.tally().ended[Outcome::Broken]),
        (2, 998)
    );

    // A planner comes, far behind: it catches up, and the breaker closes by itself.
    let planner = BoardPlanner::new(Arc::clone(&board), shape, COST, Duration::ZERO).unwrap();
    let planner = PlannerThread::spawn(planner, Pace::Spin(None)).unwrap();
    let begun = Instant::now();
    let mut quotas = [0; 2];
    while port.exchange(batch.posted(), LONG, &mut quotas).unwrap() != Outcome::NoPlan {
        assert!(begun.elapsed() < LONG, "it never waits again");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(planner.finish().unwrap().none() > 0);
}

#[test]
fn a_wait_whose_looks_take_long_ends_at_the_first_past_the_cap() {
    let shape = Shape::new(1, 1).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut port = port(&board, shape, 0);
    let (posted, mut quotas, mut looks) =
        (Posted { tokens: 1, visits: &[1], counts: &[1] }, [0], 0);
    port.post(posted).unwrap();
    let cap = Duration::from_millis(20);
    // As on a core that others have between the looks, once the waiter yields it.
    let meanwhile = || {
        looks += 1;
        if looks > 256 {
            thread::sleep(cap);
        }
    };
    let outcome = port.finish_with(posted, cap, &mut quotas, meanwhile).unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    assert!(looks <= 257, "{looks} looks");
}

#[test]
fn a_plan_that_came_while_a_rank_did_not_run_is_taken_past_the_cap_too() {
    let shape = Shape::new(1, 1).unwrap();
    // At any of the looks, those included at which the clock is read.
    for stopped_at in 1..=64 {
        let board = Arc::new(Heap::new(shape));
        let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
        let mut port = port(&board, shape, 0);
        let (posted, mut quotas, mut looks) =
            (Posted { tokens: 1, visits: &[1], counts: &[1] }, [0], 0);
        port.post(posted).unwrap();
        let meanwhile = || {
            looks += 1;
            if looks == stopped_at {
                thread::sleep(SHORT);
                assert!(planner.poll());
            }
        };
        let outcome = port.finish_with(posted, SHORT, &mut quotas, meanwhile).unwrap();
        assert_eq!(outcome, Outcome::Live, "stopped at look {stopped_at}");
    }
}

#[test]
fn a_foreign_word_far_ahead_does_not_lead_an_idle_planner_away() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, SHORT).unwrap();
    for tag in 0..4 {
        board.words()[shape.counts(tag, 1)].store(u64::from(tag + 1024) << 32, Ordering::Relaxed);
    }
    for _ in 0..1000 {
        assert!(!planner.poll());
    }
    let batch = Batch { tokens: 1, visits: vec![1, 0], counts: vec![1, 0, 0, 0] };
    let mut ports = [0, 1].map(|rank| port(&board, shape, rank));
    ports.iter_mut().for_each(|port| port.post(batch.posted()).unwrap());
    let meanwhile = || {
        planner.poll();
    };
    let outcome = ports[0].finish_with(batch.posted(), LONG, &mut [0; 2], meanwhile).unwrap();
    assert_eq!(outcome, Outcome::Live);
}

#[test]
fn calls_go_on_over_the_wrap_of_the_sequence() {
    let shape = Shape::new(2, 4).unwrap();
    let board = Arc::new(Heap::new(shape));
    let near = Sequence::from_tag(u32::MAX - 8).unwrap();
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    planner.resume_at(near.next());
    let planner = PlannerThread::spawn(planner, Pace::Spin(None)).unwrap();
    thread::scope(|scope| {
        for rank in 0..2 {
            let mut port = port(&board, shape, rank);
            port.resume_after(near);
            scope.spawn(move || {
                let mut quotas = [0; 2];
                for call in 0..1000 {
                    let batch = Batch::new(shape, rank, call);
                    let outcome = port.exchange(batch.posted(), LONG, &mut quotas).unwrap();
                    assert_eq!(outcome, Outcome::Live);
                    assert_eq!(quotas[..], expected(shape, call, rank)[..]);
                }
            });
        }
    });
    assert_eq!(planner.finish().unwrap().whole, 1000);
}

#[test]
fn that_a_call_had_no_plan_is_not_taken_for_one_of_half_the_numbers_later() {
    let shape = Shape::new(1, 1).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let mut port = port(&board, shape, 0);
    let (posted, mut quotas) = (Posted { tokens: 1, visits: &[1], counts: &[1] }, [0]);
    assert_eq!(port.exchange(posted, Duration::ZERO, &mut quotas).unwrap(), Outcome::TimedOut);
    assert!(planner.poll() && planner.published().given_up == 1, "call 1 has no plan");
    // As if all calls between had plans: over a quarter of the numbers each time, and over the wrap.
    for call in [1 << 30, 2 << 30, 3 << 30, 1 << 20, 1 << 30, (2 << 30) + 1] {
        port.resume_after(Sequence::from_tag(call - 1).unwrap());
        planner.resume_at(Sequence::from_tag(call).unwrap());
        port.post(posted).unwrap();
        let meanwhile = || {
            planner.poll();
        };
        let outcome = port.finish_with(posted, LONG, &mut quotas, meanwhile).unwrap();
        assert_eq!(outcome, Outcome::Live, "call {call}");
    }
}

#[test]
fn a_planner_that_gets_its_core_seldom_still_makes_plans() {
    let shape = Shape::new(1, 1).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let mut port = port(&board, shape, 0);
    let (posted, mut quotas) = (Posted { tokens: 1, visits: &[1], counts: &[1] }, [0]);
    // The ring goes round twice between two polls.
    let mut polls = 0..400;
    let planned = |_| {
        for _ in 0..8 {
            port.exchange(posted, Duration::ZERO, &mut quotas).unwrap();
        }
        planner.poll()
    };
    assert!(polls.any(planned), "no plan in 400 polls");
    while planner.poll() {}
    // The breaker is open, and tries seldom.
    let is_live = |_| {
        port.post(posted).unwrap();
        let meanwhile = || {
            planner.poll();
        };
        port.finish_with(posted, LONG, &mut quotas, meanwhile).unwrap() == Outcome::Live
    };
    assert!((0..200).any(is_live), "no plan in 200 calls");
}

#[test]
fn a_late_plan_closes_the_breaker_over_the_wrap_too() {
    let shape = Shape::new(1, 1).unwrap();
    let board = Arc::new(Heap::new(shape));
    let last = Sequence::from_tag(u32::MAX).unwrap();
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    planner.resume_at(last);
    let mut port = port(&board, shape, 0);
    port.resume_after(Sequence::from_tag(u32::MAX - 3).unwrap());
    let (posted, mut quotas) = (Posted { tokens: 1, visits: &[1], counts: &[1] }, [0]);
    let outcomes = [0; 3].map(|_| port.exchange(posted, Duration::ZERO, &mut quotas).unwrap());
    assert_eq!(outcomes, [Outcome::TimedOut, Outcome::TimedOut, Outcome::Broken]);
    assert!(planner.poll(), "the last call before the wrap");
    port.post(posted).unwrap();
    let meanwhile = || {
        planner.poll();
    };
    assert_eq!(port.finish_with(posted, LONG, &mut quotas, meanwhile).unwrap(), Outcome::Live);
}

#[test]
fn whatever_stands_on_the_board_quotas_add_up_and_nobody_hangs() {
    let shape = Shape::new(2, 4).unwrap();
    let (board, planner) = start(shape, Duration::from_micros(50));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(7);
            while !done.load(Ordering::Relaxed) {
                let word = random.below(shape.words());
                // Tags of calls now and then, so that values get past them.
                let (tag, value) = (random.below(1 << 12) << 32, random.below(1 << 24));
                board.words()[word].store((tag | value) as u64, Ordering::Relaxed);
            }
        });
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                let mut port = port(&board, shape, rank);
                scope.spawn(move || {
                    let mut quotas = [0; 2];
                    for call in 0..4000 {
                        let batch = Batch::new(shape, rank, call);
                        let cap = Duration::from_micros(200);
                        port.exchange(batch.posted(), cap, &mut quotas).unwrap();
                        assert_eq!(quotas.iter().sum::<u32>(), batch.tokens, "call {call}");
                    }
                    port.tally().clone()
                })
            })
            .collect();
        let tallies: Vec<_> = ranks.into_iter().map(|rank| rank.join()).collect();
        done.store(true, Ordering::Relaxed);
        for tally in tallies {
            let tally = tally.unwrap();
            assert_eq!(tally.calls(), 4000);
        }
    });
    assert!(planner.finish().is_some(), "the planner did not panic");
}

#[test]
fn refusals_name_the_numbers_and_post_nothing() {
    let shape = Shape::new(2, 4).unwrap();
    assert!(Shape::new(3, 4).unwrap_err().to_string().contains("4 physical experts over 3"));
    let board = Arc::new(Heap::new(shape));
    let other = Shape::new(4, 4).unwrap();
    let refused = Port::new(Arc::clone(&board), other, COST, 0).unwrap_err().to_string();
    assert!(refused.contains(&format!("give {}", other.words())), "{refused}");
    let refused = Port::new(Arc::clone(&board), shape, COST, 2).unwrap_err().to_string();
    assert_eq!(refused, "rank 2: give a rank from 0 to 1");
    let mut port = port(&board, shape, 0);
    let mut quotas = [9; 2];
    for (visits, counts) in [(&[1][..], &[1, 0, 0, 0][..]), (&[1, 0], &[1])] {
        let posted = Posted { tokens: 1, visits, counts };
        assert!(port.exchange(posted, SHORT, &mut quotas).is_err());
    }
    let posted = Posted { tokens: 1, visits: &[1, 1], counts: &[u32::MAX, 1, 0, 0] };
    assert!(port.exchange(posted, SHORT, &mut quotas).is_err());
    assert_eq!(quotas, [9; 2]);
    assert!(board.words()[shape.ring()..].iter().all(|word| word.load(Ordering::Relaxed) == 0));
}

#[test]
fn a_planner_that_is_always_late_costs_ever_fewer_waits() {
    const CALLS: u64 = 1000;
    let shape = Shape::new(1, 1).unwrap();
    let board = Arc::new(Heap::new(shape));
    let mut port = port(&board, shape, 0);
    let mut planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    for call in 0..CALLS {
        let batch = Batch::new(shape, 0, call);
        let cap = Duration::from_micros(10);
        port.exchange(batch.posted(), cap, &mut [0]).unwrap();
        assert!(planner.poll(), "after the rank went on, and before its next call");
    }
    let tally = port.tally();
    // Two, six ever more seldom ones, then one in 64 calls.
    assert!(tally.ended[Outcome::TimedOut] <= 8 + CALLS / 64 + 1, "{tally:?}");
    assert_eq!(tally.ended[Outcome::Live], 0);
}
