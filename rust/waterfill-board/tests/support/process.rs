//! Processes made by fork: what a child of this very process may and may not do.
#![allow(dead_code, reason = "no test uses all of it")]

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Fork; the child runs `body` and ends with 0 if it gives true, 1 if not, 2 if it panics.
pub fn fork(body: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child shares no thread with this process; it allocates, which glibc allows after a fork,
    // and ends without running anything of this process that stands at exit.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // SAFETY: the child of a test that fails, and does not wait for it, is not to go on for ever.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let code = catch_unwind(AssertUnwindSafe(body)).map_or(2, |fine| i32::from(!fine));
        // SAFETY: ends this process; nothing is used after it.
        unsafe { libc::_exit(code) };
    }
    child
}

/// Wait until `child` ends or stops; gives the status as `waitpid` does.
pub fn wait(child: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child, "{}", std::io::Error::last_os_error());
    status
}

/// Run `body` in a child; whether it gave true.
pub fn in_child(body: impl FnOnce() -> bool) -> bool {
    wait(fork(body)) == 0
}

/// Whether a call of the system that gives -1 for an error succeeded.
pub fn done(result: impl Into<i64>) -> bool {
    result.into() == 0
}

/// Become the user and group `nobody`; for root.
pub fn become_nobody() -> bool {
    const NOBODY: u32 = 65534;
    // SAFETY: changes only this process's rights.
    unsafe {
        done(libc::setgroups(0, std::ptr::null()))
            && done(libc::setgid(NOBODY))
            && done(libc::setuid(NOBODY))
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
