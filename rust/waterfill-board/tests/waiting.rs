//! Rank processes that are late, stopped, busy for seconds, killed: every call's plan is of all that live, or every
//! rank goes on with its own counts. And who is gone, as it is seen from everywhere.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use waterfill_board::{
    BoardPlanner, End, Observer, Outcome, Pace, PlannerThread, Port, Posted, Presence, Region,
    Segment, Shape, Snapshot,
};
use waterfill_core::{OwnCounts, OwnPlanner, Placement};
use waterfill_testing::Random;

use support::process::{fork, wait};
use support::{Batch, COST, count, expected_with};

const RUN: u128 = 5;
const RANKS: usize = 4;
/// As a server has them, but shorter.
const CAP: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_millis(350);

fn shape() -> Shape {
    Shape::new(RANKS, 16).unwrap()
}

/// One test that forks at a time. Together their busy processes would want more cores than there are, and the
/// child of one test's fork has copies of the locks of the others' ends, so that who left still looks here.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn name(test: &str) -> String {
    format!("waterfill-test-{}-{test}", std::process::id())
}

fn signal(process: libc::pid_t, signal: i32) {
    // SAFETY: a process of this test that was not waited for yet.
    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
}

/// What keeps a rank from its next call.
fn disturb(rank: usize, call: u64) {
    let mut random = Random((rank as u64) << 32 | call);
    if random.rarely(200) {
        thread::sleep(Duration::from_micros(random.below(50_000) as u64));
    }
    match (rank, call) {
        // As a rank that compiles a kernel.
        (2, 5000) => thread::sleep(Duration::from_secs(2)),
        (1, 2000) => {
            let stopped = std::process::id() as i32;
            fork(|| {
                thread::sleep(Duration::from_secs(3));
                signal(stopped, libc::SIGCONT);
                true
            });
            signal(stopped, libc::SIGSTOP);
        }
        (3, 8000) => signal(std::process::id() as i32, libc::SIGKILL),
        _ => (),
    }
}

/// How one rank's call ended.
#[derive(Clone, Debug, PartialEq)]
struct Ended {
    live: bool,
    quotas: Vec<u32>,
}

/// What follows in a layer: no rank goes on before all that live have come as far. `progress`: words of a board of its own.
fn dispatch(board: &impl Region, progress: &impl Region, rank: usize, call: u64) {
    let of_rank = |rank: usize| &progress.words()[shape().ring() + rank];
    of_rank(rank).store(call + 1, Ordering::Release);
    for other in 0..RANKS {
        while of_rank(other).load(Ordering::Acquire) <= call
            && board.presence(End::Rank(other)) != Presence::Gone
        {
            thread::yield_now();
        }
    }
}

/// Make the calls as one rank, and write down how each ended.
fn make_calls(
    board: &Arc<Segment>,
    progress: &Segment,
    rank: usize,
    calls: u64,
    mut notes: File,
) -> bool {
    let board = Arc::clone(board);
    let mut port = Port::new(Arc::clone(&board), shape(), COST, rank).unwrap();
    assert!(port.unwatched().is_none());
    let mut quotas = vec![0; RANKS];
    for call in 0..calls {
        disturb(rank, call);
        let batch = Batch::new(shape(), rank, call);
        let outcome = port.exchange(batch.posted(), CAP, &mut quotas).unwrap();
        let line: Vec<String> = quotas.iter().map(u32::to_string).collect();
        writeln!(notes, "{call} {outcome:?} {}", line.join(" ")).unwrap();
        dispatch(&board, progress, rank, call);
    }
    true
}

/// By call: how it ended on each rank that came to its end.
fn read_notes(folder: &str) -> BTreeMap<u64, BTreeMap<usize, Ended>> {
    let mut found: BTreeMap<u64, BTreeMap<usize, Ended>> = BTreeMap::new();
    for rank in 0..RANKS {
        for line in fs::read_to_string(format!("{folder}/{rank}")).unwrap().lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let quotas = words[2..].iter().map(|word| word.parse().unwrap()).collect();
            let ended = Ended { live: words[1] == "Live", quotas };
            found.entry(words[0].parse().unwrap()).or_default().insert(rank, ended);
        }
    }
    found
}

/// Own counts' quotas of a call.
fn own(rank: usize, call: u64) -> Vec<u32> {
    let placement = Placement::contiguous(RANKS, shape().experts).unwrap();
    let batch = Batch::new(shape(), rank, call);
    let counts = OwnCounts {
        placement: &placement,
        cost: &COST,
        source: rank,
        routed: &batch.counts,
        visits: &batch.visits,
        tokens: batch.tokens,
    };
    let mut quotas = vec![0; RANKS];
    OwnPlanner::new().plan(&counts, &mut quotas).unwrap();
    quotas
}

/// Rows of the slowest of the ranks that live, if these are the quotas of each of them.
fn slowest(call: u64, quotas: &BTreeMap<usize, Vec<u32>>) -> u32 {
    let each = shape().experts / RANKS;
    let batches: Vec<Batch> = quotas.keys().map(|&rank| Batch::new(shape(), rank, call)).collect();
    let rows = |rank: usize| {
        let experts = rank * each..(rank + 1) * each;
        let routed: u32 = batches.iter().flat_map(|b| &b.counts[experts.clone()]).sum();
        routed + quotas.values().map(|quotas| quotas[rank]).sum::<u32>()
    };
    quotas.keys().map(|&rank| rows(rank)).max().unwrap()
}

/// True if the call was live.
fn check_call(call: u64, ended: &BTreeMap<usize, Ended>) -> bool {
    let live = ended.values().filter(|ended| ended.live).count();
    let used = ended.iter().map(|(&rank, ended)| (rank, ended.quotas.clone())).collect();
    let alone = ended.keys().map(|&rank| (rank, own(rank, call))).collect();
    // Own counts know of no dead rank, and send it rows that then nobody here has.
    if ended.len() == RANKS {
        assert!(slowest(call, &used) <= slowest(call, &alone), "call {call}: worse than alone");
    }
    if live == 0 {
        assert_eq!(used, alone, "call {call}: own counts");
        return false;
    }
    assert_eq!(live, ended.len(), "call {call} is live on some ranks only: {ended:?}");
    let plan = |there: &[bool]| -> BTreeMap<usize, Vec<u32>> {
        ended.keys().map(|&rank| (rank, expected_with(shape(), call, rank, there))).collect()
    };
    let all = plan(&[true; RANKS]);
    let living: Vec<bool> = (0..RANKS).map(|rank| ended.contains_key(&rank)).collect();
    let of_living = plan(&living);
    // A rank that was killed in this call may have posted before.
    assert!(used == all || used == of_living, "call {call}: {ended:?}");
    true
}

#[test]
fn a_plan_is_of_all_that_live_or_every_rank_goes_on_alone() {
    let _alone = alone();
    let calls = u64::from(count(10_000, 100_000));
    let name = name("waiting");
    let folder = format!("{}/{name}", std::env::temp_dir().display());
    fs::create_dir_all(&folder).unwrap();
    let board = Segment::create(&name, shape(), RUN).unwrap();
    let progress = Segment::create(&format!("{name}-progress"), shape(), RUN).unwrap();
    progress.unlink().unwrap();
    let children: Vec<_> = (0..RANKS)
        .map(|rank| {
            fork(|| {
                let notes = File::create(format!("{folder}/{rank}")).unwrap();
                let board = Arc::new(Segment::attach(&name, shape(), RUN).unwrap());
                make_calls(&board, &progress, rank, calls, notes)
            })
        })
        .collect();
    let planners = Segment::attach(&name, shape(), RUN).unwrap();
    let planner = BoardPlanner::new(planners, shape(), COST, PATIENCE).unwrap();
    let planner = PlannerThread::spawn(planner, Pace::Park).unwrap();
    for (rank, child) in children.into_iter().enumerate() {
        let status = wait(child);
        let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
        assert!(if rank == 3 { killed } else { status == 0 }, "rank {rank}: {status:#x}");
    }
    board.unlink().unwrap();
    let published = planner.finish().unwrap();
    let notes = read_notes(&folder);
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(notes.len() as u64, calls);
    let without: Vec<u64> = notes
        .iter()
        .filter(|(call, ended)| !check_call(**call, ended))
        .map(|(&call, _)| call)
        .collect();
    println!("{calls} calls, all live on all ranks or on none, on none {without:?}; {published:?}");
    // Delays below the patience cost no plan; the stopped and the busy rank cost one, the killed one none. A busy machine may
    // keep a rank or the planner from its core for a whole cap.
    let unexpected = published.none() - 2;
    assert!(unexpected <= 2 * calls / 10_000 && published.refused == 0, "{published:?}");
    assert!(published.partial >= calls - 8000 - 1 - unexpected, "{published:?}");
    assert_eq!(without.len() as u64, published.none());
    assert!(without.contains(&2000) && without.contains(&5000), "{without:?}");
}

fn pair() -> Shape {
    Shape::new(2, 2).unwrap()
}

fn attach(name: &str) -> Segment {
    Segment::attach(name, pair(), RUN).unwrap()
}

/// One call of a rank without tokens.
fn idle_call(port: &mut Port<Segment>) -> Outcome {
    let posted = Posted { tokens: 0, visits: &[0; 2], counts: &[0; 2] };
    port.exchange(posted, CAP, &mut [0; 2]).unwrap()
}

/// Rank 1, which makes idle calls until it is killed.
fn go_on(name: &str) -> bool {
    let mut port = Port::new(attach(name), pair(), COST, 1).unwrap();
    loop {
        idle_call(&mut port);
    }
}

#[test]
fn from_a_peers_death_to_the_first_call_that_does_not_wait_it_takes_milliseconds() {
    let _alone = alone();
    let name = name("death");
    let mut taken = Vec::new();
    for _ in 0..count(20, 500) {
        let board = Segment::create(&name, pair(), RUN).unwrap();
        let child = fork(|| go_on(&name));
        let planner = BoardPlanner::new(attach(&name), pair(), COST, PATIENCE).unwrap();
        let planner = PlannerThread::spawn(planner, Pace::Park).unwrap();
        let mut port = Port::new(attach(&name), pair(), COST, 0).unwrap();
        while idle_call(&mut port) != Outcome::Live {}
        signal(child, libc::SIGKILL);
        let killed = Instant::now();
        // A process ends in its own time; the first call that ends without it is the last that waits for it.
        while Snapshot::of(&board, pair()).unwrap().planner.partial == 0 {
            assert_eq!(idle_call(&mut port), Outcome::Live, "{:?}", port.tally());
        }
        taken.push(killed.elapsed());
        wait(child);
        board.unlink().unwrap();
        planner.finish().unwrap();
    }
    taken.sort_unstable();
    let median = taken[taken.len() / 2];
    println!("{} deaths: median {median:?}, longest {:?}", taken.len(), taken[taken.len() - 1]);
    // A millisecond or two are seen; a busy machine may keep the planner from its core for some more.
    assert!(median < Duration::from_millis(50), "{taken:?}");
}

#[test]
fn who_is_gone_is_seen_from_everywhere_and_a_stopped_one_lives() {
    let _alone = alone();
    let name = name("presence");
    let board = Segment::create(&name, pair(), RUN).unwrap();
    let observer = Observer::attach(board.path()).unwrap();
    let looks = || {
        let seen = observer.snapshot();
        assert_eq!(seen.presence[1], board.presence(End::Rank(1)));
        assert_eq!(seen.planner_presence, board.presence(End::Planner));
        (seen.presence[1], seen.planner_presence)
    };
    let until = |wanted| {
        let begun = Instant::now();
        while looks().0 != wanted {
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", looks());
            thread::sleep(Duration::from_millis(1));
        }
    };
    assert_eq!(looks(), (Presence::Unwatched, Presence::Unwatched), "nobody came yet");
    let child = fork(|| go_on(&name));
    until(Presence::Here);
    signal(child, libc::SIGSTOP);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(looks().0, Presence::Here, "stopped is not gone");
    signal(child, libc::SIGKILL);
    // Not waited for: a zombie is gone all the same.
    until(Presence::Gone);
    wait(child);
    let planner = BoardPlanner::new(attach(&name), pair(), COST, PATIENCE).unwrap();
    assert!(planner.unwatched().is_none());
    assert_eq!(looks().1, Presence::Here);
    let second = BoardPlanner::new(attach(&name), pair(), COST, PATIENCE).unwrap();
    let refused = second.unwatched().unwrap().to_string();
    assert!(refused.contains("which another process has"), "{refused}");
    drop(planner);
    assert_eq!(looks().1, Presence::Gone);
    board.unlink().unwrap();
}

#[test]
fn who_cannot_be_watched_is_not_taken_for_gone() {
    let _alone = alone();
    let name = name("unwatched");
    let board = Segment::create(&name, pair(), RUN).unwrap();
    let child = fork(|| {
        let boards = [attach(&name), attach(&name)];
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: changes only what this process may open from now on.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const none) }, 0);
        let [ports, planners] = boards;
        let port = Port::new(ports, pair(), COST, 1).unwrap();
        let planner = BoardPlanner::new(planners, pair(), COST, PATIENCE).unwrap();
        let refused = [port.unwatched(), planner.unwatched()];
        refused.iter().all(|refused| refused.is_some_and(|e| e.to_string().contains("once more")))
            && [End::Rank(1), End::Planner].map(|end| board.presence(end))
                == [Presence::Unwatched; 2]
    });
    assert_eq!(wait(child), 0);
    assert_eq!(board.presence(End::Rank(1)), Presence::Unwatched);
    board.unlink().unwrap();
}

#[test]
fn the_child_of_a_fork_does_not_keep_its_dead_parent_alive() {
    let _alone = alone();
    for leaves in [false, true] {
        let name = name(if leaves { "fork-leaves" } else { "fork-stays" });
        let board = Segment::create(&name, pair(), RUN).unwrap();
        // The grandchild's parent ends; the grandchild, which has copies of its open files, goes on.
        let child = fork(|| {
            let port = Port::new(attach(&name), pair(), COST, 1).unwrap();
            // SAFETY: the grandchild touches nothing that another thread could have had, and ends by itself.
            if unsafe { libc::fork() } == 0 {
                if leaves {
                    waterfill_board::leave_in_child();
                }
                thread::sleep(Duration::from_millis(500));
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) };
            }
            thread::sleep(Duration::from_millis(50));
            port.unwatched().is_none()
        });
        assert_eq!(wait(child), 0);
        let expected = if leaves { Presence::Gone } else { Presence::Here };
        let begun = Instant::now();
        while leaves && board.presence(End::Rank(1)) != expected && begun.elapsed() < CAP {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(board.presence(End::Rank(1)), expected);
        board.unlink().unwrap();
    }
}
