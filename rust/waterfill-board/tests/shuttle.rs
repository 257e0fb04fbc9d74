//! Random schedules of ranks and the planner over several calls: `make test-models`, `make soak`. They
//! are sequentially consistent, so they show what the protocol does, not what weak ordering does (loom's part).
#![cfg(shuttle)]

mod support;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;
use waterfill_board::{
    BoardPlanner, End, Heap, Outcome, Port, Presence, Published, Region, Shape, Tally,
};

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
    /// Whether the planner can see that it left.
    watched: bool,
    cap: Duration,
    patience: Duration,
}

/// A board at which it can be seen which ranks left.
struct Watched {
    heap: Heap,
    watched: bool,
    gone: Vec<AtomicBool>,
}

impl Region for Watched {
    fn words(&self) -> &[shuttle::sync::atomic::AtomicU64] {
        self.heap.words()
    }

    fn presence(&self, end: End) -> Presence {
        match end {
            _ if !self.watched => Presence::Unwatched,
            End::Rank(rank) if self.gone[rank].load(Ordering::SeqCst) => Presence::Gone,
            _ => Presence::Here,
        }
    }
}

/// What is seen of one call.
#[derive(Clone, Default)]
struct Seen {
    /// The sets of ranks that all live plans seen so far may be of, by bits; none as long as there is no such plan.
    sets: Option<Vec<usize>>,
    /// How the call ended, on each rank that made it.
    ended: Vec<Outcome>,
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
    fn run(self, plans: &Arc<Plans>, whole: bool, ended: &Met) {
        let gone = (0..self.ranks).map(|_| AtomicBool::new(false)).collect();
        let heap = Heap::new(self.shape());
        let board = Arc::new(Watched { heap, watched: self.watched, gone });
        let seen = Arc::new(Mutex::new(vec![Seen::default(); self.calls]));
        let done = Arc::new(AtomicBool::new(false));
        let planner = {
            let (board, done) = (Arc::clone(&board), Arc::clone(&done));
            thread::spawn(move || self.plan(board, &done))
        };
        let ranks: Vec<_> = (0..self.ranks)
            .map(|rank| {
                let (board, plans, seen) =
                    (Arc::clone(&board), Arc::clone(plans), Arc::clone(&seen));
                thread::spawn(move || self.rank(rank, &board, &plans, &seen))
            })
            .collect();
        let tallies: Vec<Tally> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        done.store(true, Ordering::SeqCst);
        let published = planner.join().unwrap();
        let mut live_calls = 0;
        for (call, seen) in seen.lock().unwrap().iter().enumerate() {
            live_calls += u64::from(seen.sets.is_some());
            self.check_call(call, seen, whole);
        }
        self.check_counts(&tallies, &published, live_calls, whole);
        ended.add(&tallies, &published);
    }

    /// A live plan is of all that live, and then no rank was told that there is none, nor went on without a wait.
    fn check_call(&self, call: usize, seen: &Seen, whole: bool) {
        let Some(sets) = &seen.sets else { return };
        assert!(!sets.is_empty(), "two ranks' plans of one call are of different counts");
        let everybody = (1usize << self.ranks) - 1;
        let left = self.leaves_after.filter(|&(_, calls)| self.watched && call >= calls);
        let living = left.map_or(everybody, |(leaver, _)| everybody & !(1 << leaver));
        assert!(sets.contains(&everybody) || sets.contains(&living), "call {call}: {sets:?}");
        assert!(!whole || sets.contains(&everybody), "somebody is missing in {sets:?}");
        let apart = |ended: &&Outcome| matches!(ended, Outcome::NoPlan | Outcome::Broken);
        assert_eq!(seen.ended.iter().find(apart), None, "call {call}: {:?}", seen.ended);
    }

    fn plan(self, board: Arc<Watched>, done: &AtomicBool) -> Published {
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
        board: &Arc<Watched>,
        plans: &Plans,
        seen: &Mutex<Vec<Seen>>,
    ) -> Tally {
        let mut port = Port::new(Arc::clone(board), self.shape(), COST, rank).unwrap();
        let mut quotas = vec![0; self.ranks];
        for (call, plans) in plans.iter().enumerate().take(self.calls_of(rank)) {
            let batch = Batch::new(self.shape(), rank, call as u64);
            let outcome = port.exchange(batch.posted(), self.cap, &mut quotas).unwrap();
            assert_eq!(quotas.iter().sum::<u32>(), batch.tokens);
            let seen = &mut seen.lock().unwrap()[call];
            seen.ended.push(outcome);
            if outcome == Outcome::Live {
                let fits = |&set: &usize| plans[set][rank] == quotas;
                let known = seen.sets.take().unwrap_or_else(|| (0..1 << self.ranks).collect());
                seen.sets = Some(known.into_iter().filter(fits).collect());
            }
        }
        if self.calls_of(rank) < self.calls {
            board.gone[rank].store(true, Ordering::SeqCst);
        }
        port.tally().clone()
    }

    fn check_counts(&self, tallies: &[Tally], published: &Published, live: u64, whole: bool) {
        for (rank, tally) in tallies.iter().enumerate() {
            let calls = self.calls_of(rank) as u64;
            let tokens =
                (0..calls).map(|call| u64::from(Batch::new(self.shape(), rank, call).tokens));
            assert_eq!((tally.calls(), tally.ended[Outcome::Torn]), (calls, 0), "{tally:?}");
            assert_eq!(tally.tokens, tokens.sum::<u64>());
            let waits = tally.waits.buckets().iter().sum::<u64>();
            assert_eq!(
                waits,
                tally.ended[Outcome::Live]
                    + tally.ended[Outcome::NoPlan]
                    + tally.ended[Outcome::TimedOut],
                "{tally:?}"
            );
            assert!(!whole || tally.ended[Outcome::Live] == calls, "{tally:?}");
        }
        assert_eq!(published.refused, 0);
        assert!(published.plans() >= live && published.plans() <= self.calls as u64);
        assert!(!whole || published.partial == 0);
    }
}

/// How calls ended over all schedules: what was not met was not tested.
#[derive(Debug, Default)]
struct Met([AtomicU64; 6]);

impl Met {
    fn add(&self, tallies: &[Tally], published: &Published) {
        let sum = |outcome| tallies.iter().map(|tally| tally.ended[outcome]).sum();
        let ended = [Outcome::Live, Outcome::NoPlan, Outcome::TimedOut, Outcome::Broken].map(sum);
        let all = ended.into_iter().chain([published.whole, published.partial]);
        self.0.iter().zip(all).for_each(|(total, more)| {
            total.fetch_add(more, Ordering::Relaxed);
        });
    }
}

/// Half of the schedules choose at random at each step, half by priorities that change at a few steps.
fn check(scene: Scene, must: &[usize], schedules: u32) {
    let whole = must == WHOLE;
    let (plans, ended) = (Arc::new(scene.plans()), Arc::new(Met::default()));
    let half = schedules as usize / 2;
    let run = {
        let ended = Arc::clone(&ended);
        move || scene.run(&plans, whole, &ended)
    };
    shuttle::check_random(run.clone(), half);
    shuttle::check_pct(run, half, 4);
    let ended = ended.0.each_ref().map(|total| total.load(Ordering::Relaxed));
    let [live, none, timed_out, broken, full, partial] = ended;
    println!(
        "{} ranks, {schedules} schedules: {live} calls live, {none} without a plan, {timed_out} at the cap, \
         {broken} broken; {full} plans whole, {partial} partial",
        scene.ranks
    );
    assert!(must.iter().all(|&way| ended[way] > 0), "{ended:?}: none of one of {must:?}");
}

/// Ways in which calls and plans end, as `Met` counts them.
const WHOLE: &[usize] = &[0, 4];
const HURRIED: &[usize] = &[0, 1, 2, 3, 4];
const LEFT_OUT: &[usize] = &[0, 4, 5];
const UNSEEN: &[usize] = &[0, 1, 4];

fn scene(ranks: usize, calls: usize) -> Scene {
    Scene { ranks, calls, leaves_after: None, watched: true, cap: LONG, patience: LONG }
}

#[test]
fn two_ranks_who_have_time_get_the_plan_of_all_counts() {
    check(scene(2, 6), WHOLE, count(5000, 250_000));
}

#[test]
fn three_ranks_who_have_time_get_the_plan_of_all_counts() {
    check(scene(3, 5), WHOLE, count(5000, 250_000));
}

#[test]
fn two_ranks_in_a_hurry_get_the_plan_of_all_counts_or_none() {
    // The planner's patience outlasts the caps, so it comes when ranks have given it up.
    let cap = Duration::from_millis(1);
    check(Scene { cap, ..scene(2, 9) }, HURRIED, count(5000, 250_000));
}

#[test]
fn one_of_three_ranks_leaves_midway_and_is_left_out() {
    let patience = Duration::from_millis(50);
    let scene = Scene { leaves_after: Some((1, 2)), patience, ..scene(3, 6) };
    check(scene, LEFT_OUT, count(5000, 250_000));
}

#[test]
fn one_of_three_ranks_leaves_midway_unseen_and_there_is_no_plan_without_it() {
    let patience = Duration::from_millis(2);
    let scene = Scene { leaves_after: Some((1, 2)), watched: false, patience, ..scene(3, 6) };
    check(scene, UNSEEN, count(5000, 250_000));
}
