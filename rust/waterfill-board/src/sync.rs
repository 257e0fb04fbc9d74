//! The one door to atomics and to the clock, so that loom and shuttle can take their place.
//! `make lint-rust` closes the others: it builds the crate as loom and shuttle do, where no type of clippy.toml is left.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::time::Instant;

#[cfg(any(loom, shuttle))]
pub(crate) use model::Instant;

/// Time in a model: each look at how much has passed takes a millisecond, so what comes too late is up
/// to the schedule alone, and a schedule can be run again.
#[cfg(any(loom, shuttle))]
mod model {
    use std::cell::Cell;
    use std::time::Duration;

    // loom and shuttle run all threads of a model on one thread of the system.
    thread_local!(static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) });

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Instant(Duration);

    impl Instant {
        pub(crate) fn now() -> Self {
            Self(NOW.get())
        }

        pub(crate) fn duration_since(&self, earlier: Self) -> Duration {
            self.0 - earlier.0
        }

        pub(crate) fn elapsed(&self) -> Duration {
            NOW.set(NOW.get() + Duration::from_millis(1));
            NOW.get() - self.0
        }
    }
}
