//! Starting on a shared segment: killed at every system call of it, refused by every field, on memory that is
//! full, tiny or not there, by other users; and nothing is written, nothing stays.
#![cfg(not(any(loom, shuttle)))]

mod support;

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use waterfill_board::{BoardPlanner, Observer, Outcome, Port, Posted, Region, Segment, Shape};

use support::process::{become_nobody, fork, in_child, is_root, wait};
use support::{COST, count};

const RUN: u128 = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321;

/// One test at a time: a child made by one would keep open, and locked, what another has open.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shape() -> Shape {
    Shape::new(2, 8).unwrap()
}

fn name(test: &str) -> String {
    format!("waterfill-test-{}-{test}", std::process::id())
}

fn path(name: &str) -> PathBuf {
    Path::new("/dev/shm").join(name)
}

/// The names in /dev/shm that begin like `name`.
fn names(name: &str) -> Vec<String> {
    let names = fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|found| found.into_string().ok()).filter(|f| f.starts_with(name)).collect()
}

/// All of a start, a wait without a planner, and the end.
fn start_and_wait(name: &str) -> bool {
    let board = Segment::create(name, shape(), RUN).unwrap();
    let attached = Segment::attach(name, shape(), RUN).unwrap();
    board.unlink().unwrap();
    let mut port = Port::new(attached, shape(), COST, 1).unwrap();
    let posted = Posted { tokens: 0, visits: &[0; 2], counts: &[0; 8] };
    port.exchange(posted, Duration::from_micros(200), &mut [0; 2]).is_ok()
}

fn trace(request: libc::c_uint, child: libc::pid_t, data: i32) {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: the requests used here read and write no memory of this process.
    let result = unsafe { libc::ptrace(request, child, none, i64::from(data)) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Run a start in a child and kill it as it enters or leaves a system call for the `stops`th time; false
/// if it ended before.
fn killed_at(name: &str, stops: u32) -> bool {
    let child = fork(|| {
        trace(libc::PTRACE_TRACEME, 0, 0);
        // SAFETY: stops this process until its parent lets it go on.
        unsafe { libc::raise(libc::SIGSTOP) };
        start_and_wait(name)
    });
    assert!(libc::WIFSTOPPED(wait(child)));
    for _ in 0..stops {
        trace(libc::PTRACE_SYSCALL, child, 0);
        let status = wait(child);
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0);
            return false;
        }
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
    }
    // SAFETY: the child is this process's own and was not waited for yet.
    assert_eq!(unsafe { libc::kill(child, libc::SIGKILL) }, 0);
    assert!(libc::WIFSIGNALED(wait(child)));
    true
}

#[test]
fn killed_at_any_system_call_of_its_start_it_leaves_nothing_after_the_next_start() {
    let _alone = alone();
    let (killed, other) = (name("killed"), name("next"));
    let (mut points, mut left) = (0, 0);
    for round in 0..count(3, 100) {
        let mut stops = 1;
        while killed_at(&killed, stops) {
            for found in names(&killed) {
                if let Err(error) = Segment::attach(&found, shape(), RUN) {
                    // Another test's start may have taken the name away; a half-made segment had none.
                    assert!(error.to_string().contains("No such file"), "{error}");
                }
                left += 1;
            }
            Segment::create(&other, shape(), RUN).unwrap().unlink().unwrap();
            assert_eq!(names(&killed), [""; 0], "stop {stops} of round {round}");
            stops += 1;
        }
        points += stops - 1;
    }
    println!("killed {points} times; {left} names were left until the next start");
    assert!(points > 50 && left > 0);
}

/// Header words and what may stand there instead: (word, value).
fn mutations(header: &[u64]) -> Vec<(usize, u64)> {
    let [magic, ranks, experts, redundant, words, low, high] = header[..7].try_into().unwrap();
    vec![
        (0, 0),
        (0, magic + 1),
        (0, magic - 1),
        (0, magic.swap_bytes()),
        (0, magic ^ 1 << 56),
        (1, 0),
        (1, ranks - 1),
        (1, ranks + 1),
        (1, 1025),
        (1, u64::MAX),
        (2, 0),
        (2, experts - 1),
        (2, experts + 1),
        (2, experts * 2),
        (2, u64::MAX),
        (3, redundant + 1),
        (3, experts),
        (3, u64::MAX),
        (4, 0),
        (4, words - 1),
        (4, words + 1),
        (4, u64::MAX),
        (5, 0),
        (5, low ^ 1),
        (5, high),
        (6, high ^ 1 << 63),
        (6, low),
    ]
}

fn as_words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
}

fn refused<T>(result: waterfill_board::Result<T>) -> String {
    result.err().expect("refused").to_string()
}

#[test]
fn every_mutated_header_is_refused_by_every_opener_without_a_write() {
    let _alone = alone();
    let name = name("mutated");
    let board = Segment::create(&name, shape(), RUN).unwrap();
    let whole = fs::read(path(&name)).unwrap();
    let mutations = mutations(&as_words(&whole));
    assert_eq!(mutations.len(), 27);
    for (word, value) in mutations {
        let mut bytes = whole.clone();
        bytes[word * 8..][..8].copy_from_slice(&value.to_ne_bytes());
        fs::write(path(&name), &bytes).unwrap();
        refused(Segment::attach(&name, shape(), RUN));
        assert!(refused(Segment::create(&name, shape(), RUN)).contains("File exists"));
        // Who looks from outside does not know the run; a run more or less is a board all the same. So is one with one
        // redundant expert, which is as large here.
        let seen = Observer::attach(&path(&name));
        assert_eq!(seen.is_ok(), word >= 5 || (word, value) == (3, 1), "word {word}: {value:#x}");
        assert_eq!(fs::read(path(&name)).unwrap(), bytes, "written to");
    }
    board.unlink().unwrap();
}

#[test]
fn another_runs_segment_is_refused_however_it_got_there() {
    let _alone = alone();
    let (name, copy) = (name("runs"), name("replayed"));
    for restart in 0..u128::from(count(50, 500)) {
        let board = Segment::create(&name, shape(), RUN + restart).unwrap();
        let bytes = fs::read(path(&name)).unwrap();
        let mut file =
            File::options().write(true).create_new(true).mode(0o600).open(path(&copy)).unwrap();
        // Other tests start boards too, and would take away what nobody holds a lock on.
        file.lock().unwrap();
        file.write_all(&bytes).unwrap();
        assert!(Segment::attach(&copy, shape(), RUN + restart).is_ok(), "the same run");
        let error = refused(Segment::attach(&copy, shape(), RUN + restart + 1));
        assert!(error.contains("run token, low"), "{error}");
        // Without the lock the next start takes the copy away; the board stays.
        drop(file);
        Segment::create(&format!("{name}-next"), shape(), RUN).unwrap().unlink().unwrap();
        assert!(!path(&copy).exists() && path(&name).exists());
        board.unlink().unwrap();
    }
}

#[test]
fn the_name_of_a_dead_creator_is_free_again_whatever_its_process_was() {
    let _alone = alone();
    let name = name("dead");
    assert!(in_child(|| Segment::create(&name, shape(), RUN).is_ok()));
    refused(Segment::attach(&name, shape(), RUN ^ 1));
    Segment::create(&name, shape(), RUN ^ 1).unwrap().unlink().unwrap();
}

/// A board with a planner and two ranks, which make `calls` live calls.
fn serve(board: &Segment, name: &str, run: u128, calls: u64) {
    let attached = Segment::attach(name, shape(), run).unwrap();
    let mut planner = BoardPlanner::new(attached, shape(), COST, Duration::ZERO).unwrap();
    let [mut port, mut peer] = [0, 1].map(|rank| {
        let attached = Segment::attach(name, shape(), run).unwrap();
        Port::new(attached, shape(), COST, rank).unwrap()
    });
    for _ in 0..calls {
        let posted = Posted { tokens: 9, visits: &[9; 2], counts: &[4; 8] };
        peer.post(posted).unwrap();
        port.post(posted).unwrap();
        let mut quotas = [0; 2];
        let meanwhile = || {
            planner.poll();
        };
        let outcome = port.finish_with(posted, Duration::from_secs(9), &mut quotas, meanwhile);
        assert_eq!((outcome.unwrap(), quotas), (Outcome::Live, [9, 0]));
    }
    assert_eq!(
        Observer::attach(board.path()).unwrap().snapshot().ranks[0].ended[Outcome::Live],
        calls
    );
}

#[test]
fn two_servers_of_one_user_do_not_meet() {
    let _alone = alone();
    let names = [name("server-a"), name("server-b")];
    let runs = [RUN, RUN ^ 1];
    let boards = [0, 1].map(|i| Segment::create(&names[i], shape(), runs[i]).unwrap());
    for (i, calls) in [(0, 7), (1, 3)] {
        assert!(refused(Segment::attach(&names[i], shape(), runs[1 - i])).contains("run token"));
        serve(&boards[i], &names[i], runs[i], calls);
    }
    for board in boards {
        board.unlink().unwrap();
    }
}

#[test]
fn the_mode_is_owner_only_under_any_umask() {
    let _alone = alone();
    let name = name("umask");
    for mask in [0, 0o077, 0o777] {
        assert!(in_child(|| {
            // SAFETY: changes only this process's mask.
            unsafe { libc::umask(mask) };
            let board = Segment::create(&name, shape(), RUN).unwrap();
            let mode = fs::metadata(path(&name)).unwrap().mode();
            board.unlink().unwrap();
            mode & 0o7777 == 0o600
        }));
    }
}

#[test]
fn other_users_segments_are_refused_and_left_alone() {
    let _alone = alone();
    if !is_root() {
        println!("skipped: only root may become another user");
        return;
    }
    let (ours, theirs) = (name("ours"), name("theirs"));
    let board = Segment::create(&ours, shape(), RUN).unwrap();
    let as_nobody = |text: &str| {
        in_child(|| {
            assert!(become_nobody());
            let seen = refused(Observer::attach(&path(&ours)));
            refused(Segment::attach(&ours, shape(), RUN)).contains(text) && seen.contains(text)
        })
    };
    let before = fs::read(path(&ours)).unwrap();
    assert!(as_nobody("opening the segment failed: Permission denied"));
    fs::set_permissions(path(&ours), Permissions::from_mode(0o666)).unwrap();
    assert!(as_nobody("owner is 0x0, not 0xfffe"));
    assert_eq!(fs::read(path(&ours)).unwrap(), before);
    board.unlink().unwrap();
    // The reverse: root could open anything, and must not. A dead creator's name is its user's to remove.
    assert!(in_child(|| become_nobody() && Segment::create(&theirs, shape(), RUN).is_ok()));
    let before = fs::read(path(&theirs)).unwrap();
    assert!(refused(Segment::attach(&theirs, shape(), RUN)).contains("owner is 0xfffe, not 0x0"));
    assert!(refused(Observer::attach(&path(&theirs))).contains("owner is 0xfffe, not 0x0"));
    assert!(refused(Segment::create(&theirs, shape(), RUN)).contains("File exists"));
    assert_eq!(fs::read(path(&theirs)).unwrap(), before);
    fs::remove_file(path(&theirs)).unwrap();
}

/// In a child, with a /dev/shm of its own; none if the system does not allow that.
fn on_own_memory(options: &str, flags: libc::c_ulong, body: impl FnOnce() -> bool) -> Option<bool> {
    let at = |text: &str| std::ffi::CString::new(text).unwrap();
    let (tmpfs, root, folder, options) = (at("tmpfs"), at("/"), at("/dev/shm"), at(options));
    let own = || {
        let nothing = std::ptr::null::<libc::c_void>();
        let private = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: all strings end with 0 and outlive the calls; the mounts are this child's alone.
        unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(nothing.cast(), root.as_ptr(), nothing.cast(), private, nothing) == 0
                && libc::mount(
                    tmpfs.as_ptr(),
                    folder.as_ptr(),
                    tmpfs.as_ptr(),
                    flags,
                    options.as_ptr().cast(),
                ) == 0
        }
    };
    if !in_child(own) {
        println!("skipped: this system does not allow a /dev/shm of one's own");
        return None;
    }
    Some(in_child(|| own() && body()))
}

/// A board of more than a megabyte.
fn large() -> Shape {
    Shape::new(8, 8192).unwrap()
}

fn creating(shape: Shape) -> String {
    refused(Segment::create("board", shape, RUN))
}

#[test]
fn full_tiny_and_strange_memory_is_an_error_or_works_never_a_dead_process() {
    let _alone = alone();
    const NONE_LEFT: &str = "reserving the board's memory failed: No space left on device";
    let full = || creating(large()).contains(NONE_LEFT) && names("").is_empty();
    let filled = || {
        let rest = fs::write(path("rest"), vec![1; 2 << 20]);
        rest.is_err() && creating(shape()).contains(NONE_LEFT) && names("") == ["rest"]
    };
    // Just enough, and every word of it can be written to.
    let tiny = || {
        let board = Segment::create("board", shape(), RUN).unwrap();
        board.words().iter().for_each(|word| word.store(!0, Ordering::Relaxed));
        true
    };
    let no_files =
        || creating(shape()).contains("making the segment's file failed: No space left on device");
    let read_only = || creating(shape()).contains("Read-only file system");
    let works = || Segment::create("board", shape(), RUN).is_ok();
    let private = || {
        become_nobody()
            && creating(shape()).contains("making the segment's file failed: Permission denied")
    };
    let pages = format!("size={}", (shape().words() * 8).next_multiple_of(4096));
    let cases: [(&str, libc::c_ulong, &dyn Fn() -> bool); 7] = [
        ("size=1m", 0, &full),
        ("size=1m", 0, &filled),
        (&pages, 0, &tiny),
        ("nr_inodes=1", 0, &no_files),
        ("", libc::MS_RDONLY, &read_only),
        ("", libc::MS_NOEXEC | libc::MS_NOSUID | libc::MS_NODEV, &works),
        ("mode=0700", 0, &private),
    ];
    for (case, (options, flags, body)) in cases.into_iter().enumerate() {
        match on_own_memory(options, flags, body) {
            Some(fine) => assert!(fine, "case {case}: {options}"),
            None => return,
        }
    }
}

#[test]
fn limits_of_the_process_are_errors() {
    let _alone = alone();
    let name = name("limited");
    let limited = |resource, limit: u64, text: &str| {
        in_child(|| {
            let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            // SAFETY: changes only this process; past a file's size limit comes a signal, else an error.
            unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                assert_eq!(libc::setrlimit(resource, &raw const limit), 0);
            }
            refused(Segment::create(&name, large(), RUN)).contains(text)
        })
    };
    assert!(limited(libc::RLIMIT_NOFILE, 3, "making the segment's file failed: Too many"));
    assert!(limited(
        libc::RLIMIT_FSIZE,
        4096,
        "reserving the board's memory failed: File too large"
    ));
    assert!(limited(libc::RLIMIT_AS, 4096, "mapping the board failed: Cannot allocate memory"));
    assert_eq!(names(&name), [""; 0]);
}
