//! Ranks as processes on a shared segment: exchanged, killed, stopped, refused, and nothing left behind.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::fs::{self, OpenOptions, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};

use waterfill_board::{
    BoardPlanner, Outcome, Pace, PlannerThread, Port, Posted, RING, Segment, Shape,
};

use support::process::{fork, wait};
use support::{Batch, COST, count, expected};

const RUN: u128 = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321;
const CAP: Duration = Duration::from_micros(500);

fn shape() -> Shape {
    Shape::new(2, 8).unwrap()
}

fn name(test: &str) -> String {
    format!("waterfill-test-{}-{test}", std::process::id())
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/dev/shm").join(name)
}

fn exchange(port: &mut Port<Segment>, call: u32, cap: Duration) -> Outcome {
    let tokens = call % 50;
    let (visits, counts) = ([tokens / 2; 2], [tokens; 8]);
    let mut quotas = [0; 2];
    let posted = Posted { tokens, visits: &visits, counts: &counts };
    let outcome = port.exchange(posted, cap, &mut quotas).unwrap();
    assert_eq!(quotas[0] + quotas[1], tokens);
    outcome
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(since.as_nanos()).unwrap()
}

/// Ranks of a model call in step because of its other work; here a clock keeps them together. A rank that
/// is behind makes up for it, and does not sleep: on an idle core that may take longer than a call.
fn wait_for_call(begun: u64, call: u32) {
    const BETWEEN_CALLS: u64 = 200_000;
    match (begun + u64::from(call) * BETWEEN_CALLS).saturating_sub(now()) {
        0 => std::thread::yield_now(),
        early => std::thread::sleep(Duration::from_nanos(early)),
    }
}

/// Not a test: what a rank process runs. It exchanges until it is killed, and says when it began.
#[test]
#[ignore = "the other tests start it in a process of its own"]
fn rank_process() {
    let Ok(name) = std::env::var("WATERFILL_TEST_BOARD") else { return };
    let board = Segment::attach(&name, shape(), RUN).unwrap();
    let begun: u64 = std::env::var("WATERFILL_TEST_BEGUN").unwrap().parse().unwrap();
    let mut port = Port::new(board, shape(), COST, 1).unwrap();
    println!("\nattached");
    for call in 0.. {
        wait_for_call(begun, call);
        exchange(&mut port, call, CAP);
    }
}

/// This program once more. One for another machine is started by what `make test-emulated` names.
fn this_program() -> Command {
    let program = std::env::current_exe().unwrap();
    let Ok(emulator) = std::env::var("WATERFILL_TEST_EMULATOR") else {
        return Command::new(program);
    };
    let mut words = emulator.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words).arg(program);
    command
}

/// Start a rank process and wait until it is attached; its calls begin at `begun`.
fn start_rank(name: &str, begun: u64) -> Child {
    let mut child = this_program()
        .args(["--exact", "rank_process", "--ignored", "--nocapture"])
        .env("WATERFILL_TEST_BOARD", name)
        .env("WATERFILL_TEST_BEGUN", begun.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "attached"));
    child
}

/// One test with busy processes at a time: together they would want more cores than there are.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A board, its planner, a rank process that is attached, and this process's end; the name is gone.
fn start(name: &str, begun: u64) -> (PlannerThread, Child, Port<Segment>) {
    let board = Segment::create(name, shape(), RUN).unwrap();
    let planners = Segment::attach(name, shape(), RUN).unwrap();
    let planner = BoardPlanner::new(planners, shape(), COST, CAP / 5).unwrap();
    let planner = PlannerThread::spawn(planner, Pace::Park).unwrap();
    let child = start_rank(name, begun);
    board.unlink().unwrap();
    assert!(!path(name).exists());
    (planner, child, Port::new(board, shape(), COST, 0).unwrap())
}

fn signal(child: &Child, signal: Signal) {
    let process = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(process, signal).unwrap();
}

#[test]
fn a_peer_killed_at_any_moment_costs_its_share_and_nothing_else() {
    let _alone = alone();
    let name = name("kill");
    for round in 0..count(10, 1000) {
        let origin = now();
        let (planner, mut child, mut port) = start(&name, origin);
        let begun = Instant::now();
        let (mut call, mut killed, mut live_after) = (0, false, 0);
        while live_after < 200 {
            wait_for_call(origin, call);
            let outcome = exchange(&mut port, call, CAP);
            call += 1;
            if !killed
                && begun.elapsed() > Duration::from_micros(u64::from(1000 + round * 777 % 5000))
            {
                child.kill().unwrap();
                killed = true;
            }
            live_after += u32::from(killed && outcome == Outcome::Live);
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", port.tally());
        }
        child.wait().unwrap();
        let published = planner.finish().unwrap();
        // The killed one may have posted a few calls ahead: those plans are whole.
        assert!(published.partial >= 200 - RING as u64, "{published:?}");
        assert!(!path(&name).exists());
    }
}

#[test]
fn a_stopped_peer_is_waited_for_no_longer_than_the_cap_and_comes_back() {
    let _alone = alone();
    const CALLS: u32 = 50;
    let name = name("stop");
    let origin = now();
    let (planner, mut child, mut port) = start(&name, origin);
    let (mut call, mut longest, mut back) = (0, Duration::ZERO, 0);
    let toggles = count(40, 10_000);
    for toggle in 0..toggles {
        signal(&child, if toggle % 2 == 0 { Signal::STOP } else { Signal::CONT });
        let tally = port.tally().clone();
        for _ in 0..CALLS {
            wait_for_call(origin, call);
            let begun = Instant::now();
            exchange(&mut port, call, CAP);
            longest = longest.max(begun.elapsed());
            call += 1;
        }
        // Away: two calls wait for it, for the planner's patience each, and the others do not.
        let waited = port.tally().ended[Outcome::TimedOut] - tally.ended[Outcome::TimedOut];
        assert!(waited <= u64::from(CALLS) / 2, "{waited} calls of {CALLS} waited to the cap");
        back += u64::from(toggle % 2 == 1);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (tally, published) = (port.tally().clone(), planner.finish().unwrap());
    assert_eq!(tally.calls(), u64::from(call));
    assert_eq!(tally.ended[Outcome::Torn], 0, "{tally:?}");
    // Together again each time it came back; a machine that is busy elsewhere may lose some.
    assert!(published.whole > back, "{back} times back, and together too seldom: {published:?}");
    println!(
        "{toggles} toggles: {} live, {} at the cap, {} broken; longest call {longest:?}; {} plans whole, {} partial",
        tally.ended[Outcome::Live],
        tally.ended[Outcome::TimedOut],
        tally.ended[Outcome::Broken],
        published.whole,
        published.partial
    );
}

#[test]
fn a_segment_is_refused_by_the_field_that_does_not_fit() {
    let name = name("refused");
    let board = Segment::create(&name, shape(), RUN).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path(&name)).unwrap();
    let mut whole = vec![0; shape().words() * 8];
    file.read_exact_at(&mut whole, 0).unwrap();
    let refusal = |shape, run| match Segment::attach(&name, shape, run) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted"),
    };
    let expect = |text: &str| {
        let refused = refusal(shape(), RUN);
        assert!(refused.contains(text) && refused.contains(&name), "{refused}");
    };
    assert!(refusal(Shape::new(2, 64).unwrap(), RUN).contains("size in bytes"));
    assert!(refusal(shape(), RUN ^ 1).contains("run token, low"));
    assert!(refusal(shape(), RUN ^ 1 << 100).contains("run token, high"));
    let fields = [
        "magic and version",
        "ranks",
        "experts",
        "redundant",
        "words",
        "run token, low",
        "run token, high",
    ];
    for (word, field) in fields.into_iter().enumerate() {
        for byte in 0..8 {
            let at = word * 8 + byte;
            file.write_all_at(&[whole[at] ^ 1], at as u64).unwrap();
            expect(&format!("{field} is"));
            file.write_all_at(&whole[at..=at], at as u64).unwrap();
        }
    }
    fs::set_permissions(path(&name), Permissions::from_mode(0o666)).unwrap();
    expect("mode is");
    fs::set_permissions(path(&name), Permissions::from_mode(0o600)).unwrap();
    file.set_len(whole.len() as u64 - 1).unwrap();
    expect("size in bytes");
    file.set_len(0).unwrap();
    expect("size in bytes");
    file.set_len(whole.len() as u64).unwrap();
    file.write_all_at(&whole, 0).unwrap();
    assert!(Segment::attach(&name, shape(), RUN).is_ok(), "whole again");

    let again = Segment::create(&name, shape(), RUN).unwrap_err().to_string();
    assert!(again.contains("creating the segment failed: File exists"), "{again}");
    board.unlink().unwrap();
    board.unlink().unwrap();
    expect("opening the segment failed: No such file");
    symlink("/dev/null", path(&name)).unwrap();
    expect("opening the segment failed");
    assert!(Segment::create(&name, shape(), RUN).is_err());
    fs::remove_file(path(&name)).unwrap();
    fs::create_dir(path(&name)).unwrap();
    assert!(Segment::attach(&name, shape(), RUN).is_err());
    fs::remove_dir(path(&name)).unwrap();
    for bad in ["", "a/b", "..", "/tmp/a"] {
        assert!(Segment::create(bad, shape(), RUN).unwrap_err().to_string().contains("naming"));
    }
}

#[test]
fn more_than_there_is_memory_for_is_an_error_not_a_dead_process() {
    let name = name("full");
    // 1024 ranks with a million experts: 34 GB, which is not tried where it is there.
    let shape = Shape::new(1024, 1 << 20).unwrap();
    let free = Command::new("df").args(["--output=avail", "-B1", "/dev/shm"]).output().unwrap();
    let free = String::from_utf8(free.stdout).unwrap();
    let free: usize = free.lines().nth(1).unwrap().trim().parse().unwrap();
    if free > shape.words() * 8 {
        println!("skipped: {free} bytes are free in /dev/shm");
        return;
    }
    let error = Segment::create(&name, shape, RUN).unwrap_err().to_string();
    assert!(error.contains("reserving the board's memory failed"), "{error}");
    assert!(!path(&name).exists());
}

/// Calls after which the counts come again.
const CYCLE: u64 = 64;

/// `rank` makes `calls` calls; each plan must be the core's for just those counts.
fn check_plans(mut port: Port<Segment>, rank: usize, calls: u64, mut meanwhile: impl FnMut()) {
    let batches: Vec<_> = (0..CYCLE).map(|call| Batch::new(shape(), rank, call)).collect();
    let plans: Vec<_> = (0..CYCLE).map(|call| expected(shape(), call, rank)).collect();
    let mut quotas = [0; 2];
    for call in 0..calls {
        let at = (call % CYCLE) as usize;
        let (posted, long) = (batches[at].posted(), Duration::from_secs(60));
        port.post(posted).unwrap();
        let outcome = port.finish_with(posted, long, &mut quotas, &mut meanwhile).unwrap();
        assert_eq!((outcome, &quotas[..]), (Outcome::Live, &plans[at][..]), "call {call}");
    }
}

#[test]
fn between_processes_every_plan_is_the_cores_for_that_call() {
    let _alone = alone();
    let name = name("litmus");
    let calls = u64::from(count(50_000, 5_000_000));
    let board = Segment::create(&name, shape(), RUN).unwrap();
    let [planners, others] = [0; 2].map(|_| Segment::attach(&name, shape(), RUN).unwrap());
    board.unlink().unwrap();
    let child = fork(|| {
        check_plans(Port::new(others, shape(), COST, 1).unwrap(), 1, calls, || ());
        true
    });
    let patience = Duration::from_secs(60);
    let mut planner = BoardPlanner::new(planners, shape(), COST, patience).unwrap();
    let port = Port::new(board, shape(), COST, 0).unwrap();
    check_plans(port, 0, calls, || {
        planner.poll();
    });
    assert_eq!(wait(child), 0);
    assert_eq!(planner.published().whole, calls);
}
