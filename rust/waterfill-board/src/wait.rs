//! How whoever waits at the board does so: when it keeps its core, reads the clock, and asks who lives.

use std::time::Duration;

/// Whoever waits asks the kernel so often whether those that it waits for live.
pub(crate) const LOOK: Duration = Duration::from_millis(1);
/// Looks at the board before a waiter lets others have its core: a few microseconds.
pub(crate) const EAGER_POLLS: u32 = 256;

/// Whether a waiter reads the clock after `polls` looks. A reading takes about as long as a look, so at first only every 16th
/// look has one. Once the waiter lets others have the core between looks, each may be milliseconds after the last, so all have one.
pub(crate) fn reads_clock(polls: u32) -> bool {
    #[cfg(not(any(loom, shuttle)))]
    if polls > EAGER_POLLS {
        return true;
    }
    // Schedules in which a cap is spent are rare enough without a long row of looks.
    polls.is_multiple_of(if cfg!(shuttle) { 2 } else { 16 })
}

/// Between two looks at the board. Ranks and planner may share a core, so no waiter keeps it for long.
pub(crate) fn pause(polls: u32) {
    #[cfg(loom)]
    {
        let _ = polls;
        loom::thread::yield_now();
    }
    #[cfg(shuttle)]
    {
        let _ = polls;
        shuttle::thread::yield_now();
    }
    #[cfg(not(any(loom, shuttle)))]
    if polls > EAGER_POLLS {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}
