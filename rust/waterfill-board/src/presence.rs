//! Who of a board's processes lives, by what the kernel says: not by process ids, which mean nothing in another
//! PID namespace.
//!
//! Each end of a board holds a lock on a byte of the segment's file. The lock is of an open file description of
//! the end's own (`F_OFD_SETLK`), so the kernel frees it when the process ends, however it ends, and everybody
//! who has the file can ask for it. Before it is held nobody can tell whether the process lives: an end that
//! holds its lock says so in a word of the board.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result, system};

/// Whoever writes to a board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A rank, which posts counts.
    Rank(usize),
    /// The one that makes the plans.
    Planner,
}

/// What is known of the process at an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It lives, stopped or not.
    Here,
    /// It ended, or left the board.
    Gone,
    /// It did not come yet, or cannot be watched.
    Unwatched,
}

/// A lock on an end's byte, held until this is dropped or the process ends.
///
/// The child of a fork has a copy of it, which keeps the lock from being freed with this process:
/// [`leave_in_child`] is for the child.
#[derive(Debug)]
pub struct Held {
    /// Open as long as the lock is held; none in a fork's child that left.
    _file: Arc<Mutex<Option<OwnedFd>>>,
}

/// What this process holds, for the children of its forks.
static HELD: Mutex<Vec<Weak<Mutex<Option<OwnedFd>>>>> = Mutex::new(Vec::new());

/// Lock the byte `at` of `file`, whose segment was at `path`, by a description of its own.
///
/// # Errors
/// Another end has it, or the system refuses: it has no `/proc`, or no such locks on this file system.
pub(crate) fn hold(file: &OwnedFd, at: usize, path: &Path) -> Result<Held> {
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    let own = rustix::fs::open(again, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| system(path, "opening the segment once more", error))?;
    fcntl(&own, FcntlArg::F_OFD_SETLK(&byte(at))).map_err(|error| {
        let call = match error {
            Errno::EAGAIN | Errno::EACCES => "locking this end's byte, which another process has",
            _ => "locking this end's byte",
        };
        Error::System { path: path.into(), call, source: error.into() }
    })?;
    let file = Arc::new(Mutex::new(Some(own)));
    if let Ok(mut held) = HELD.lock() {
        held.retain(|other| other.strong_count() > 0);
        held.push(Arc::downgrade(&file));
    }
    Ok(Held { _file: file })
}

/// Whether anybody holds the byte `at` through another description than `file`; none if that cannot be asked.
pub(crate) fn is_held(file: &OwnedFd, at: usize) -> Option<bool> {
    let mut found = byte(at);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).ok()?;
    Some(i32::from(found.l_type) != libc::F_UNLCK)
}

/// In the child of a fork: give up its copies of what the parent holds, so that the parent's end is seen.
pub fn leave_in_child() {
    // Another thread of the parent may have had a lock of these at the fork: then its copies stay.
    let Ok(held) = HELD.try_lock() else { return };
    for file in held.iter().filter_map(Weak::upgrade) {
        if let Ok(mut file) = file.try_lock() {
            file.take();
        }
    }
}

fn byte(at: usize) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at as libc::off_t,
        l_len: 1,
        l_pid: 0, // Of these locks it has to be.
    }
}
