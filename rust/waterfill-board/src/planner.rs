//! The planner's end of the board: it reads every rank's counts, makes one plan, and publishes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use waterfill_core::{CostModel, Placement, Plan, Planner, Problem, Routed};

use crate::error::{Result, check_length};
use crate::layout::{RING, Shape};
use crate::port::pause;
use crate::region::Region;
use crate::word::{self, Sequence};

/// Numbers of plans made, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Plans from all ranks' counts.
    pub whole: u64,
    /// Plans without the ranks whose counts did not come in time.
    pub partial: u64,
    /// Calls without a plan: counts on the board that the core refuses.
    pub refused: u64,
}

/// Makes one plan a call for all ranks on a board. One a board: it alone writes quotas.
#[derive(Debug)]
pub struct BoardPlanner<R> {
    region: R,
    shape: Shape,
    placement: Placement,
    cost: CostModel,
    next: Sequence,
    /// How long a call waits for late ranks after its first counts came.
    patience: Duration,
    begun: Option<Instant>,
    /// Polls that found nobody.
    idle: u32,
    arrived: Vec<bool>,
    tokens: Vec<u32>,
    visits: Vec<u32>,
    /// `[R][P]` each rank's counts, until they are added up.
    counts: Vec<u32>,
    routed: Vec<u32>,
    planner: Planner,
    plan: Plan,
    quotas: Vec<u32>,
    published: Published,
}

impl<R: Region> BoardPlanner<R> {
    /// A planner whose first call will be [`Sequence::FIRST`].
    ///
    /// # Errors
    /// A region of another size than the shape's.
    pub fn new(region: R, shape: Shape, cost: CostModel, patience: Duration) -> Result<Self> {
        check_length("region", region.words().len(), shape.words())?;
        let (ranks, experts) = (shape.ranks, shape.experts);
        let placement = Placement::contiguous(ranks, experts)?;
        Ok(Self {
            region,
            shape,
            placement,
            cost,
            next: Sequence::FIRST,
            patience,
            begun: None,
            idle: 0,
            arrived: vec![false; ranks],
            tokens: vec![0; ranks],
            visits: vec![0; ranks * ranks],
            counts: vec![0; ranks * experts],
            routed: vec![0; experts],
            planner: Planner::new(),
            plan: Plan::new(),
            quotas: vec![0; ranks],
            published: Published::default(),
        })
    }

    /// What was published so far.
    pub fn published(&self) -> Published {
        self.published
    }

    /// Go on at another call than the first.
    pub fn resume_at(&mut self, sequence: Sequence) {
        self.next = sequence;
    }

    /// Look at the board once. If all ranks' counts of the next call are there, or the patience with
    /// late ones is spent, publish its plan; true if so.
    pub fn poll(&mut self) -> bool {
        let mut all = true;
        for rank in 0..self.shape.ranks {
            if !self.arrived[rank] {
                self.arrived[rank] = self.read(rank);
            }
            all &= self.arrived[rank];
        }
        if !all {
            if !self.arrived.contains(&true) {
                self.idle = self.idle.wrapping_add(1);
                // Looking further takes longer than looking where the next counts should come.
                if self.idle.is_multiple_of(64) {
                    self.catch_up();
                }
                return false;
            }
            if self.begun.get_or_insert_with(Instant::now).elapsed() < self.patience {
                return false;
            }
        }
        self.publish(all);
        self.arrived.fill(false);
        self.begun = None;
        self.next = self.next.next();
        true
    }

    /// Copy what `rank` posted for the next call; false as long as any of it is missing.
    fn read(&mut self, rank: usize) -> bool {
        let (ranks, experts) = (self.shape.ranks, self.shape.experts);
        let start = self.shape.counts(self.next.tag(), rank);
        let words = &self.region.words()[start..start + self.shape.posted()];
        let visits = &mut self.visits[rank * ranks..(rank + 1) * ranks];
        let counts = &mut self.counts[rank * experts..(rank + 1) * experts];
        let values = std::iter::once(&mut self.tokens[rank]).chain(visits).chain(counts);
        // From the last word on: a rank writes in order, so nearly always one read tells.
        let missing = words.last().is_some_and(|word| word::load(word, self.next).is_none());
        !missing
            && words.iter().zip(values).all(|(word, value)| {
                word::load(word, self.next).map(|read| *value = read).is_some()
            })
    }

    /// Nobody posted the next call: if a later one stands in the ring, all went on without us (this
    /// process was stopped, or began late), so go on there.
    fn catch_up(&mut self) {
        let mut later = self.next;
        for _ in 1..RING {
            later = later.next();
            for rank in 0..self.shape.ranks {
                let word = &self.region.words()[self.shape.counts(later.tag(), rank)];
                if let Some(found) = word::sequence(word).filter(|&found| found.is_after(self.next))
                {
                    self.next = found;
                    return;
                }
            }
        }
    }

    /// Plan with those that arrived, and write the quotas of each of them.
    fn publish(&mut self, all: bool) {
        let (ranks, experts) = (self.shape.ranks, self.shape.experts);
        for rank in (0..ranks).filter(|&rank| !self.arrived[rank]) {
            // Unknown is not empty: such a rank has no counts here, and is not eligible below.
            self.tokens[rank] = 0;
            self.visits[rank * ranks..(rank + 1) * ranks].fill(0);
            self.counts[rank * experts..(rank + 1) * experts].fill(0);
        }
        self.routed.fill(0);
        for counts in self.counts.chunks_exact(experts) {
            for (sum, &rows) in self.routed.iter_mut().zip(counts) {
                *sum = sum.saturating_add(rows);
            }
        }
        let problem = Problem {
            placement: &self.placement,
            cost: &self.cost,
            routed: Routed::PerExpert(&self.routed),
            tokens: &self.tokens,
            visits: Some(&self.visits),
            eligible: (!all).then_some(&self.arrived),
        };
        // Counts that are no counts can only come from a foreign writer; then nobody gets a plan.
        if self.planner.live(&problem, &mut self.plan).is_err() {
            self.published.refused += 1;
            return;
        }
        for rank in (0..ranks).filter(|&rank| self.arrived[rank]) {
            if self.plan.quotas_of(rank, &mut self.quotas).is_err() {
                continue;
            }
            let start = self.shape.quotas(self.next.tag(), rank);
            let words = &self.region.words()[start..start + ranks];
            for (word, &quota) in words.iter().zip(&self.quotas) {
                word::store(word, self.next, quota);
            }
        }
        if all { self.published.whole += 1 } else { self.published.partial += 1 }
    }
}

/// A planner on a thread of its own, which spins; it ends when this is dropped.
#[derive(Debug)]
pub struct PlannerThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Published>>,
}

impl PlannerThread {
    /// Start it.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn<R: Region + 'static>(mut planner: BoardPlanner<R>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = move || {
            let mut polls = 0u32;
            // Relaxed: a flag that guards nothing; partner: `join`. The join orders the rest.
            while !stopped.load(Ordering::Relaxed) {
                if planner.poll() {
                    polls = 0;
                } else {
                    polls = polls.wrapping_add(1);
                    pause(polls);
                }
            }
            planner.published()
        };
        let thread = std::thread::Builder::new().name("waterfill-planner".into()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// End the thread; gives what it published, nothing if it panicked.
    pub fn finish(mut self) -> Option<Published> {
        self.join()
    }

    fn join(&mut self) -> Option<Published> {
        // Relaxed: partner and reason at the load in `spawn`.
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take()?.join().ok()
    }
}

impl Drop for PlannerThread {
    fn drop(&mut self) {
        self.join();
    }
}
