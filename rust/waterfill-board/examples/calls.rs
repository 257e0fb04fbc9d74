//! Calls between real processes: `calls RANKS CALLS [inline|spin] [EXPERTS]` prints one JSON line.
//!
//! Each rank is a process, pinned to a core of its own where there are enough; a call is one of
//! [`Port::exchange`]: post the counts, merge, plan, read the quotas. `inline`: the leader plans while it
//! waits; `spin`: a thread of its process does. `benches/exchange.py` runs this beside gloo.

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use waterfill_board::{BoardPlanner, Outcome, Pace, PlannerThread, Port, Posted, Segment, Shape};
use waterfill_core::CostModel;

const RUN: u128 = 7;
const CAP: Duration = Duration::from_millis(100);
const WARM_UP: u32 = 2000;
const CHILD: &str = "WATERFILL_ROUNDS_CHILD";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |index: usize, default: usize| {
        arguments.get(index).map_or(default, |text| text.parse().expect("a number"))
    };
    let (ranks, calls) = (number(1, 2), number(2, 100_000) as u32);
    let inline = arguments.get(3).is_none_or(|pace| pace == "inline");
    let shape = Shape::new(ranks, number(4, ranks)).expect("experts that divide over the ranks");
    if let Ok(child) = std::env::var(CHILD) {
        let (rank, name) = child.split_once(' ').expect("rank and name");
        let board = Segment::attach(name, shape, RUN).expect("a board");
        run(board, shape, rank.parse().expect("a rank"), calls, None);
        return;
    }
    let name = format!("waterfill-calls-{}", std::process::id());
    let board = Segment::create(&name, shape, RUN).expect("a board");
    let planners = Segment::attach(&name, shape, RUN).expect("the planner's board");
    let planner = BoardPlanner::new(planners, shape, CostModel::Rows, CAP / 2).expect("a planner");
    let children: Vec<Child> = (1..ranks).map(|rank| start(&name, rank)).collect();
    let (planner, thread) = if inline {
        (Some(planner), None)
    } else {
        (None, Some(PlannerThread::spawn(planner, Pace::Spin(None)).expect("a thread")))
    };
    let mut waits = run(board, shape, 0, calls, planner);
    for mut child in children {
        assert!(child.wait().expect("a child").success());
    }
    let _ = std::fs::remove_file(format!("/dev/shm/{name}"));
    drop(thread);
    waits.sort_unstable();
    let at = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    println!(
        "{{\"ranks\": {ranks}, \"calls\": {calls}, \"p50_us\": {:.3}, \"p99_us\": {:.3}, \"p999_us\": {:.3}}}",
        at(0.5),
        at(0.99),
        at(0.999)
    );
}

fn start(name: &str, rank: usize) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(std::env::args().skip(1))
        .env(CHILD, format!("{rank} {name}"))
        .spawn()
        .expect("a process")
}

/// Make the calls as one rank; gives how long each took.
fn run(
    board: Segment,
    shape: Shape,
    rank: usize,
    calls: u32,
    mut planner: Option<BoardPlanner<Segment>>,
) -> Vec<Duration> {
    pin(rank, shape.ranks);
    let mut port = Port::new(board, shape, CostModel::Rows, rank).expect("a port");
    let mut quotas = vec![0; shape.ranks];
    let visits = vec![90; shape.ranks];
    let mut waits = Vec::with_capacity(calls as usize);
    let mut live = 0;
    for call in 0..WARM_UP + calls {
        let tokens = 100 + (call + rank as u32 * 7) % 50;
        let counts: Vec<u32> =
            (0..shape.experts as u32).map(|e| (e * 37 + call + rank as u32) % 97).collect();
        let posted = Posted { tokens, visits: &visits, counts: &counts };
        let begun = Instant::now();
        port.post(posted).expect("counts that fit");
        let meanwhile = || {
            planner.as_mut().map(BoardPlanner::poll);
        };
        let outcome = port.finish_with(posted, CAP, &mut quotas, meanwhile).expect("quotas");
        let taken = begun.elapsed();
        assert_eq!(quotas.iter().sum::<u32>(), tokens);
        if call >= WARM_UP {
            waits.push(taken);
            live += u32::from(outcome == Outcome::Live);
        }
    }
    assert!(live >= calls - calls / 1000, "{live} of {calls} calls were live");
    waits
}

/// To a core of its own, if there are enough.
fn pin(rank: usize, ranks: usize) {
    let allowed = rustix::thread::sched_getaffinity(None).expect("an affinity");
    let cores: Vec<usize> =
        (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
    if cores.len() >= ranks {
        let mut one = rustix::thread::CpuSet::new();
        one.set(cores[rank]);
        rustix::thread::sched_setaffinity(None, &one).expect("pinning");
    }
}
