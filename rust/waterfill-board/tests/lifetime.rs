//! The planner's thread and the process it lives in: forks, signals, exits, what it costs when idle, and that
//! nothing grows.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use waterfill_board::{
    BoardPlanner, Heap, Observer, Outcome, Pace, PlannerThread, Port, Posted, Segment, Shape,
};

use support::process::{fork, in_child, wait};
use support::{Batch, COST, count};

const LONG: Duration = Duration::from_secs(60);

fn start(pace: Pace) -> (Arc<Heap>, Shape, PlannerThread) {
    let shape = Shape::new(2, 2).unwrap();
    let board = Arc::new(Heap::new(shape));
    let planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    (board, shape, PlannerThread::spawn(planner, pace).unwrap())
}

/// One test at a time: each looks for the one planner's thread of the process.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file of the planner's thread in /proc, if there is one.
fn of_planner(file: &str) -> Option<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let mut planners = tasks.filter(|t| {
        fs::read_to_string(t.join("comm")).is_ok_and(|c| c.starts_with("waterfill-plan"))
    });
    fs::read_to_string(planners.next()?.join(file)).ok()
}

#[test]
fn a_forks_child_does_not_wait_for_a_thread_it_does_not_have() {
    let _alone = alone();
    let (_board, _, planner) = start(Pace::Park);
    let mut planner = Some(planner);
    for finish in [true, false] {
        assert!(in_child(|| {
            // SAFETY: a child that hangs is ended by the alarm.
            unsafe { libc::alarm(10) };
            let planner = planner.take().unwrap();
            !finish || planner.finish().is_none()
        }));
    }
    assert!(planner.take().unwrap().finish().is_some());
}

#[test]
fn the_planners_thread_takes_no_signal() {
    let _alone = alone();
    let (_board, _, planner) = start(Pace::Park);
    let status = of_planner("status").unwrap();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
    let blocked = u64::from_str_radix(blocked.trim(), 16).unwrap();
    for signal in (1..32).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
        assert!(blocked >> (signal - 1) & 1 == 1, "signal {signal} in {blocked:#x}");
    }
    planner.finish().unwrap();
    assert!(in_child(|| {
        let _planner = start(Pace::Spin(None));
        // SAFETY: both sets are made before they are read; the signal goes to this process, where only the
        // planner's thread could take it.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::kill(libc::getpid(), libc::SIGTERM);
            thread::sleep(Duration::from_millis(20));
            libc::sigpending(&raw mut set);
            libc::sigismember(&raw const set, libc::SIGTERM) == 1
        }
    }));
}

/// A process with a planner's thread, in a wait that does not end; `exits` after a moment, or never.
fn waiting(exits: bool) -> bool {
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: changes only this process; a shell may have started the tests with these ignored.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let (board, shape, _planner) = start(Pace::Spin(None));
    if exits {
        thread::spawn(|| {
            thread::sleep(Duration::from_millis(3));
            // SAFETY: ends the process, as the end of an interpreter would, while others wait.
            unsafe { libc::_exit(7) }
        });
    }
    let mut port = Port::new(board, shape, COST, 0).unwrap();
    let posted = Posted { tokens: 0, visits: &[0; 2], counts: &[0; 2] };
    port.exchange(posted, LONG, &mut [0; 2]).is_ok()
}

#[test]
fn a_process_ends_at_once_in_the_midst_of_a_wait() {
    let _alone = alone();
    let ways = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGKILL, 0];
    for way in ways.into_iter().cycle().take(count(10, 200) as usize) {
        let child = fork(|| waiting(way == 0));
        thread::sleep(Duration::from_millis(4));
        let begun = Instant::now();
        if way != 0 {
            // SAFETY: the child is this process's own and was not waited for yet.
            assert_eq!(unsafe { libc::kill(child, way) }, 0);
        }
        let status = wait(child);
        let ended =
            if way == 0 { libc::WEXITSTATUS(status) == 7 } else { libc::WTERMSIG(status) == way };
        assert!(ended && begun.elapsed() < Duration::from_secs(5), "{way}: {status:#x}");
    }
}

#[test]
fn dropping_it_ends_the_thread() {
    let _alone = alone();
    for _ in 0..count(10, 200) {
        drop(start(Pace::Park));
        assert_eq!(of_planner("comm"), None);
    }
}

#[test]
fn a_parked_planner_takes_hardly_any_of_a_core() {
    let _alone = alone();
    let (_board, _, planner) = start(Pace::Park);
    thread::sleep(Duration::from_secs(1));
    // User and system time in ticks of 10 ms, after the name in brackets.
    let ticks = || -> u64 {
        let stat = of_planner("stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
        fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    };
    let (before, begun) = (ticks(), Instant::now());
    thread::sleep(Duration::from_secs(count(3, 60).into()));
    let part = (ticks() - before) as f64 * 0.01 / begun.elapsed().as_secs_f64();
    println!("a parked planner: {:.2}% of a core over {:?}", part * 100.0, begun.elapsed());
    assert!(part <= 0.02, "{part}");
    planner.finish().unwrap();
}

#[test]
fn a_woken_planner_is_awake_when_the_counts_come() {
    let _alone = alone();
    let shape = Shape::new(1, 1).unwrap();
    let board = Arc::new(Heap::new(shape));
    let planner = BoardPlanner::new(Arc::clone(&board), shape, COST, LONG).unwrap();
    let planner = PlannerThread::spawn(planner, Pace::Park).unwrap();
    let mut port = Port::new(board, shape, COST, 0).unwrap();
    let posted = Posted { tokens: 1, visits: &[1], counts: &[1] };
    let mut first_after_a_second = |wakes: bool| {
        thread::sleep(Duration::from_secs(1));
        if wakes {
            planner.wake();
        }
        // As a kernel that is launched behind others.
        thread::sleep(Duration::from_millis(20));
        let begun = Instant::now();
        port.exchange(posted, LONG, &mut [0]).unwrap();
        begun.elapsed()
    };
    let [mut woken, mut asleep] =
        [true, false].map(|wakes| [0; 5].map(|_| first_after_a_second(wakes)));
    woken.sort_unstable();
    asleep.sort_unstable();
    println!("the first call after a second: {woken:?} if woken, else {asleep:?}");
    assert!(woken[2] < Duration::from_millis(1), "{woken:?}");
    planner.finish().unwrap();
}

/// Pages in memory and open files of a process.
fn size(process: libc::pid_t) -> (u64, usize) {
    let statm = fs::read_to_string(format!("/proc/{process}/statm")).unwrap();
    let pages = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    (pages, fs::read_dir(format!("/proc/{process}/fd")).unwrap().count())
}

const BETWEEN_CALLS: Duration = Duration::from_micros(500);

/// Calls with mixed tokens, kept together by the clock, now and then a pause; until it is killed.
fn exchange_for_ever(board: Segment, shape: Shape, rank: usize, begun: Instant) -> bool {
    let mut port = Port::new(board, shape, COST, rank).unwrap();
    let mut quotas = vec![0; shape.ranks];
    for call in 0.. {
        let due = begun + BETWEEN_CALLS * u32::try_from(call).unwrap();
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let batch = Batch::new(shape, rank, call);
        port.exchange(batch.posted(), Duration::from_millis(2), &mut quotas).unwrap();
        assert_eq!(quotas.iter().sum::<u32>(), batch.tokens);
        if (call + rank as u64 * 97).is_multiple_of(1009) {
            thread::sleep(Duration::from_millis(call % 5));
        }
    }
    true
}

#[test]
fn eight_processes_with_stalls_do_not_grow() {
    let _alone = alone();
    let seconds = std::env::var("SOAK_SECONDS").map_or(3, |text| text.parse().unwrap());
    let (shape, name) =
        (Shape::new(8, 32).unwrap(), format!("waterfill-test-{}-soak", std::process::id()));
    let board = Segment::create(&name, shape, 1).unwrap();
    let attach = || Segment::attach(&name, shape, 1).unwrap();
    let boards: Vec<_> = (0..8).map(|_| attach()).collect();
    let begun = Instant::now();
    let children: Vec<_> = boards
        .into_iter()
        .enumerate()
        .map(|(rank, board)| fork(move || exchange_for_ever(board, shape, rank, begun)))
        .collect();
    let patience = Duration::from_micros(500);
    let planner = BoardPlanner::new(attach(), shape, COST, patience).unwrap();
    let planner = PlannerThread::spawn(planner, Pace::Park).unwrap();
    let observer = Observer::attach(board.path()).unwrap();
    board.unlink().unwrap();
    let everybody: Vec<_> = children.iter().copied().chain([std::process::id() as i32]).collect();
    let sizes = || everybody.iter().map(|&process| size(process)).collect::<Vec<_>>();
    let mut early = None;
    for round in 0usize.. {
        let child = children[round * 5 % 8];
        let signal = |signal| {
            // SAFETY: the child is this process's own and was not waited for yet.
            assert_eq!(unsafe { libc::kill(child, signal) }, 0, "a rank has ended");
        };
        signal(libc::SIGSTOP);
        thread::sleep(Duration::from_millis(1 + round as u64 * 7 % 20));
        signal(libc::SIGCONT);
        thread::sleep(Duration::from_millis(30));
        if begun.elapsed().as_secs() * 3 >= seconds {
            early.get_or_insert_with(sizes);
        }
        if begun.elapsed().as_secs() >= seconds {
            break;
        }
    }
    let (early, late) = (early.unwrap(), sizes());
    for ((pages, files), (pages_late, files_late)) in early.into_iter().zip(late) {
        assert!(
            pages_late <= pages + 64 && files_late == files,
            "{pages}+{files}: {pages_late}+{files_late}"
        );
    }
    for child in children {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::kill(child, libc::SIGKILL) }, 0);
        assert_eq!(libc::WTERMSIG(wait(child)), libc::SIGKILL);
    }
    let seen = observer.snapshot();
    let sum = |outcome| seen.ranks.iter().map(|tally| tally.ended[outcome]).sum::<u64>();
    println!(
        "{seconds} s, 8 processes: {} calls live, {} at the cap, {} broken; {} plans whole, {} partial",
        sum(Outcome::Live),
        sum(Outcome::TimedOut),
        sum(Outcome::Broken),
        seen.planner.whole,
        seen.planner.partial
    );
    assert!(
        seen.ranks
            .iter()
            .all(|tally| tally.ended[Outcome::Live] > 0 && tally.ended[Outcome::Torn] == 0)
    );
    assert_eq!(planner.finish().unwrap().refused, 0);
}
