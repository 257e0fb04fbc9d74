//! The planner on a thread of its own: no Python, no CUDA, no signals; it looks at the board until it is ended.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use waterfill_core::ReplicaTable;

use crate::layout::Shape;
use crate::maps::NewMap;
use crate::planner::BoardPlanner;
use crate::presence::{End, Presence};
use crate::region::Region;
use crate::sync::{AtomicBool, Instant, Ordering};
use crate::tally::Published;
use crate::wait::pause;

/// How the thread passes the time between calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// It never sleeps, on a core that is its own (the number of one pins it there).
    Spin(Option<usize>),
    /// As [`Spin`](Self::Spin) as long as calls keep coming; without one for `AWAKE` it sleeps, longer the
    /// longer, and takes under a hundredth of a core after a second. [`PlannerThread::wake`] wakes it before the next call.
    Park,
}

/// Without a call for so long, a parking planner sleeps: longer than a busy server takes from one call to the next.
const AWAKE: Duration = Duration::from_millis(100);
/// A sleep is the time without a call over this, up to the longest.
const SLEEP_PART: u32 = 125;
const LONGEST_SLEEP: Duration = Duration::from_millis(8);
/// How often [`PlannerWatch`] asks.
const WATCH: Duration = Duration::from_millis(5);

/// A planner's thread; it ends when this is dropped. The child of a fork has the handle but not the thread:
/// there dropping does nothing, and [`finish`](Self::finish) gives nothing.
#[derive(Debug)]
pub struct PlannerThread {
    thread: Background<Published>,
    woken: Arc<AtomicBool>,
    maps: Sender<NewMap>,
}

/// A thread that tells this rank's kernel when the planner's process is gone, which a kernel cannot ask; it ends when
/// this is dropped, or with the planner. A [`Port`](crate::Port) asks by itself.
#[derive(Debug)]
pub struct PlannerWatch(#[allow(dead_code)] Background<()>); // Dropped, never used.

/// A thread that runs until it is told to stop.
#[derive(Debug)]
struct Background<T> {
    process: u32,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

impl PlannerThread {
    /// Start it.
    ///
    /// # Errors
    /// The system gives no thread, or does not let it be pinned to that core.
    pub fn spawn<R: Region + 'static>(
        mut planner: BoardPlanner<R>,
        pace: Pace,
    ) -> std::io::Result<Self> {
        let woken = Arc::new(AtomicBool::new(false));
        let wakes = Arc::clone(&woken);
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let (maps, sent) = std::sync::mpsc::channel();
        planner.take_maps_from(sent);
        let run = move |stop: &AtomicBool| {
            let ready = pin(pace);
            let failed = ready.is_err();
            // The receiver waits below; if it is gone, so is the caller.
            let _ = tell.send(ready);
            if failed {
                planner.published().clone()
            } else {
                plan_until(planner, pace, stop, &wakes)
            }
        };
        let thread = Background::spawn("waterfill-planner", run)?;
        let started = Self { thread, woken, maps };
        told.recv().unwrap_or_else(|_| Err(std::io::Error::other("the planner's thread ended")))?;
        Ok(started)
    }

    /// Before a call is posted: the planner is awake for the next `AWAKE`, by which the counts come.
    pub fn wake(&self) {
        // Relaxed: a flag that guards nothing. Partner: the load in `plan_until`.
        self.woken.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread.thread {
            thread.thread().unpark();
        }
    }

    /// [`BoardPlanner::set_map`], before the next call that is posted afterwards.
    pub fn set_map(&self, layer: usize, table: Arc<ReplicaTable>) {
        // The receiver is gone only with the thread, whose plans nobody waits for then.
        let _ = self.maps.send((layer, table));
    }

    /// End the thread; gives what it published, nothing if it panicked.
    pub fn finish(mut self) -> Option<Published> {
        self.thread.join()
    }
}

impl PlannerWatch {
    /// Start it, for `rank` on `region`.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn<R: Region + 'static>(
        region: R,
        shape: Shape,
        rank: usize,
    ) -> std::io::Result<Self> {
        let run = move |stop: &AtomicBool| {
            // Relaxed: as in `plan_until`.
            while !stop.load(Ordering::Relaxed) {
                if region.presence(End::Planner) == Presence::Gone {
                    // Release: what the planner wrote before it ended is seen. Partner: the acquire in kernels/board.cuh.
                    region.words()[shape.deserted(rank)].store(1, Ordering::Release);
                    return;
                }
                std::thread::park_timeout(WATCH);
            }
        };
        Ok(Self(Background::spawn("waterfill-watch", run)?))
    }
}

impl<T: Send + 'static> Background<T> {
    fn spawn(
        name: &str,
        run: impl FnOnce(&AtomicBool) -> T + Send + 'static,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        // A thread inherits the mask of whoever starts it: signals are for others, Python among them.
        let thread = signals::blocked(|| {
            std::thread::Builder::new().name(name.into()).spawn(move || run(&stopped))
        })?;
        Ok(Self { process: std::process::id(), stop, thread: Some(thread) })
    }
}

impl<T> Background<T> {
    fn join(&mut self) -> Option<T> {
        // Relaxed: partner and reason at the load in `plan_until`.
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take()?;
        thread.thread().unpark();
        if std::process::id() != self.process {
            // Waiting for a thread that this process does not have would never end.
            std::mem::forget(thread);
            return None;
        }
        thread.join().ok()
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.join();
    }
}

fn plan_until<R: Region>(
    mut planner: BoardPlanner<R>,
    pace: Pace,
    stop: &AtomicBool,
    woken: &AtomicBool,
) -> Published {
    let (mut polls, mut last) = (0u32, Instant::now());
    // Relaxed: a flag that guards nothing; partner: `Background::join`. The join orders the rest.
    while !stop.load(Ordering::Relaxed) {
        if planner.poll() {
            (polls, last) = (0, Instant::now());
            // Relaxed: as below. Whoever woke it has its answer.
            woken.store(false, Ordering::Relaxed);
            continue;
        }
        polls = polls.wrapping_add(1);
        if pace == Pace::Park && polls.is_multiple_of(16) && last.elapsed() > AWAKE {
            std::thread::park_timeout((last.elapsed() / SLEEP_PART).min(LONGEST_SLEEP));
            // Relaxed: as above; partner: `wake`. The counts of the call that woke it may take a while to come.
            if woken.swap(false, Ordering::Relaxed) {
                last = Instant::now();
            }
        } else {
            pause(polls);
        }
    }
    planner.published().clone()
}

fn pin(pace: Pace) -> std::io::Result<()> {
    let Pace::Spin(Some(core)) = pace else { return Ok(()) };
    if core >= rustix::thread::CpuSet::MAX_CPU {
        return Err(std::io::Error::other(format!(
            "core {core}: give one below {}",
            rustix::thread::CpuSet::MAX_CPU
        )));
    }
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores).map_err(|error| {
        std::io::Error::other(format!("pinning the planner's thread to core {core}: {error}"))
    })
}

/// Blocking all signals while a thread is started: std and rustix have no safe call for it.
#[allow(unsafe_code)]
mod signals {
    use std::mem::MaybeUninit;

    /// Run with all signals blocked in this thread, then as before.
    pub fn blocked<T>(run: impl FnOnce() -> T) -> T {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: both sets are valid for writes, and `all` is initialised by the first call before the
        // second reads it. Neither call can fail with these arguments.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        }
        let result = run();
        // SAFETY: `before` was written by the call above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
        result
    }
}
