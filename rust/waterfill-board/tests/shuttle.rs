//! Random schedules of ranks and the planner over several calls: `make test-models`, `make soak`. They
//! are sequentially consistent, so they show what the protocol does, not what weak ordering does (loom's part).
#![cfg(shuttle)]

mod support;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;
use waterfill_board::{BoardPlanner, Heap, Port, Published, Shape, Source, Tally};

use support::{Batch, COST, count, expected_with};

/// Longer than a schedule takes.
const LONG: Duration = Duration::from_secs(3600);

/// Ranks and planner over a few calls.
#[derive(Clone, Copy)]
struct Scene {
    ranks: usize,
    calls: usize,
    /// One rank makes so many calls only.
    leaves_after: Option<(usize, usize)>,
    cap: Duration,
    patience: Duration,
}

/// `[call][set of ranks, by bits][rank]` the plan that must come if just those posted in time.
type Plans = Vec<Vec<Vec<Vec<u32>>>>;

impl Scene {
    fn shape(&self) -> Shape {
        Shape::new(self.ranks, self.ranks).unwrap()
    }

    fn calls_of(&self, rank: usize) -> usize {
        self.leaves_after
            .filter(|&(leaver, _)| leaver == rank)
            .map_or(self.calls, |(_, calls)| calls)
    }

    fn plans(&self) -> Plans {
        let of = |call, set: usize, rank| {
            let there: Vec<bool> = (0..self.ranks).map(|rank| set >> rank & 1 == 1).collect();
            // Ranks that did not post get no plan.
            if there[rank] { expected_with(self.shape(), call, rank, &there) } else { vec![] }
        };
        let sets = |call| {
            (0..1 << self.ranks)
                .map(|set| (0..self.ranks).map(|rank| of(call, set, rank)).collect())
                .collect()
        };
        (0..self.calls as u64).map(sets).collect()
    }

    /// Run one schedule; `whole` is whether every plan must be of all ranks.
    fn run(self, plans: &Arc<Plans>, whole: bool, ended: &Ended) {
        let board = Arc::new(Heap::new(self.shape()));
        let everybody = (1usize << self.ranks) - 1;
        // By call: the sets of ranks that all live plans seen so far may be of.
        let sets: Arc<Mutex<Vec<Option<Vec<usize>>>>> =
            Arc::new(Mutex::new(vec![None; self.calls]));
        let done = Arc::new(AtomicBool::new(false));
        let planner = {
            let (board, done) = (Arc::clone(&board), Arc::clone(&done));
            thread::spawn(move || self.plan(board, &done))
        };
        let ranks: Vec<_> = (0..self.ranks)
            .map(|rank| {
                let (board, plans, sets) =
                    (Arc::clone(&board), Arc::clone(plans), Arc::clone(&sets));
                thread::spawn(move || self.rank(rank, board, &plans, &sets))
            })
            .collect();
        let tallies: Vec<Tally> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        done.store(true, Ordering::SeqCst);
        let published = planner.join().unwrap();
        let mut live_calls = 0;
        for sets in sets.lock().unwrap().iter().flatten() {
            assert!(!sets.is_empty(), "two ranks' plans of one call are of different counts");
            assert!(!whole || sets.contains(&everybody), "somebody is missing in {sets:?}");
            live_calls += 1;
        }
        self.check_counts(&tallies, &published, live_calls, whole);
        ended.add(&tallies, &published);
    }

    fn plan(self, board: Arc<Heap>, done: &AtomicBool) -> Published {
        let mut planner = BoardPlanner::new(board, self.shape(), COST, self.patience).unwrap();
        while !done.load(Ordering::SeqCst) {
            if !planner.poll() {
                thread::yield_now();
            }
        }
        planner.published().clone()
    }

    fn rank(
        self,
        rank: usize,
        board: Arc<Heap>,
        plans: &Plans,
        sets: &Mutex<Vec<Option<Vec<usize>>>>,
    ) -> Tally {
        let mut port = Port::new(board, self.shape(), COST, rank).unwrap();
        let mut quotas = vec![0; self.ranks];
        for call in 0..self.calls_of(rank) {
            let batch = Batch::new(self.shape(), rank, call as u64);
            let source = port.exchange(batch.posted(), self.cap, &mut quotas).unwrap();
            assert_eq!(quotas.iter().sum::<u32>(), batch.tokens);
            if source == Source::Live {
                let fits = |&set: &usize| plans[call][set][rank] == quotas;
                let mut sets = sets.lock().unwrap();
                let known = sets[call].take().unwrap_or_else(|| (0..1 << self.ranks).collect());
                sets[call] = Some(known.into_iter().filter(fits).collect());
            }
        }
        port.tally().clone()
    }

    fn check_counts(&self, tallies: &[Tally], published: &Published, live: u64, whole: bool) {
        for (rank, tally) in tallies.iter().enumerate() {
            let calls = self.calls_of(rank) as u64;
            let tokens =
                (0..calls).map(|call| u64::from(Batch::new(self.shape(), rank, call).tokens));
            assert_eq!((tally.calls(), tally.torn), (calls, 0), "{tally:?}");
            assert_eq!(tally.tokens, tokens.sum::<u64>());
            let waits = tally.waits.buckets().iter().sum::<u64>();
            assert_eq!(waits, tally.live + tally.timed_out, "{tally:?}");
            assert!(!whole || tally.live == calls, "{tally:?}");
        }
        assert_eq!(published.refused, 0);
        assert!(published.plans() >= live && published.plans() <= self.calls as u64);
        assert!(!whole || published.partial == 0);
    }
}

/// How calls ended over all schedules: what was not met was not tested.
#[derive(Debug, Default)]
struct Ended([AtomicU64; 5]);

impl Ended {
    fn add(&self, tallies: &[Tally], published: &Published) {
        let sum = |of: fn(&Tally) -> u64| tallies.iter().map(of).sum();
        let ended = [sum(|t| t.live), sum(|t| t.timed_out), sum(|t| t.broken)];
        let all = ended.into_iter().chain([published.whole, published.partial]);
        self.0.iter().zip(all).for_each(|(total, more)| {
            total.fetch_add(more, Ordering::Relaxed);
        });
    }
}

/// Half of the schedules choose at random at each step, half by priorities that change at a few steps.
fn check(scene: Scene, whole: bool, schedules: u32) {
    let (plans, ended) = (Arc::new(scene.plans()), Arc::new(Ended::default()));
    let half = schedules as usize / 2;
    let run = {
        let ended = Arc::clone(&ended);
        move || scene.run(&plans, whole, &ended)
    };
    shuttle::check_random(run.clone(), half);
    shuttle::check_pct(run, half, 4);
    let [live, timed_out, broken, full, partial] =
        ended.0.each_ref().map(|total| total.load(Ordering::Relaxed));
    println!(
        "{} ranks, {schedules} schedules: {live} calls live, {timed_out} at the cap, {broken} broken; \
         {full} plans whole, {partial} partial",
        scene.ranks
    );
    assert!(whole || [live, timed_out, broken, full, partial].into_iter().all(|ended| ended > 0));
}

#[test]
fn two_ranks_who_have_time_get_the_plan_of_all_counts() {
    let scene = Scene { ranks: 2, calls: 6, leaves_after: None, cap: LONG, patience: LONG };
    check(scene, true, count(5000, 250_000));
}

#[test]
fn three_ranks_who_have_time_get_the_plan_of_all_counts() {
    let scene = Scene { ranks: 3, calls: 5, leaves_after: None, cap: LONG, patience: LONG };
    check(scene, true, count(5000, 250_000));
}

#[test]
fn two_ranks_in_a_hurry_get_no_plan_of_other_counts() {
    let (cap, patience) = (Duration::from_millis(1), Duration::from_millis(2));
    let scene = Scene { ranks: 2, calls: 9, leaves_after: None, cap, patience };
    check(scene, false, count(5000, 250_000));
}

#[test]
fn one_of_three_ranks_leaves_midway() {
    let (cap, patience) = (Duration::from_millis(3), Duration::from_millis(2));
    let scene = Scene { ranks: 3, calls: 6, leaves_after: Some((1, 2)), cap, patience };
    check(scene, false, count(5000, 250_000));
}
