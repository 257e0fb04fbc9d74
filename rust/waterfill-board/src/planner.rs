//! The planner's end of the board: it reads every rank's counts, makes one plan, and publishes it.

use std::time::Duration;

use waterfill_core::{CostModel, Placement, Plan, Planner, Problem, Routed, score};

use crate::error::{Result, check_length};
use crate::layout::{RING, Shape};
use crate::port::EAGER_POLLS;
use crate::region::Region;
use crate::sync::Instant;
use crate::tally::Published;
use crate::word::{self, Sequence};

/// A rank that missed so many calls in a row is not waited for until it is seen again.
const GONE_AFTER: u32 = 2;

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
    /// `[R]` ranks whose counts of the next call were read.
    arrived: Vec<bool>,
    /// `[R]` calls in a row that each rank missed.
    missed: Vec<u32>,
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
        let (process, missed) = (std::process::id().into(), vec![0; ranks]);
        let published = Published { process, missed, ..Published::default() };
        published.show(region.words(), shape);
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
            missed: vec![0; ranks],
            tokens: vec![0; ranks],
            visits: vec![0; ranks * ranks],
            counts: vec![0; ranks * experts],
            routed: vec![0; experts],
            planner: Planner::new(),
            plan: Plan::new(),
            quotas: vec![0; ranks],
            published,
        })
    }

    /// What was published so far.
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// Go on at another call than the first.
    pub fn resume_at(&mut self, sequence: Sequence) {
        self.next = sequence;
    }

    /// Look at the board once. If the next call's counts are there of all ranks that are waited for, or
    /// the patience with late ones is spent, publish its plan; true if so.
    pub fn poll(&mut self) -> bool {
        let (mut all, mut enough, mut any) = (true, true, false);
        for rank in 0..self.shape.ranks {
            if !self.arrived[rank] {
                self.arrived[rank] = self.read(rank);
            }
            let arrived = self.arrived[rank];
            all &= arrived;
            enough &= arrived || self.is_gone(rank);
            any |= arrived;
        }
        if !any {
            self.idle = self.idle.wrapping_add(1);
            // Looking further takes longer than looking where the next counts should come; on a crowded core,
            // where a poll may come once in milliseconds, there is nothing to be saved.
            if !(self.idle.is_multiple_of(64) || self.idle > EAGER_POLLS) || !self.catch_up() {
                return false;
            }
            // At once: by the next poll the ring may have gone on again. One level deep, because `idle` is 0.
            return self.poll();
        }
        if !enough && self.begun.get_or_insert_with(Instant::now).elapsed() < self.patience {
            return false;
        }
        self.publish(all);
        self.go_on();
        true
    }

    /// Whether `rank` missed calls and has not been seen since. Counts of the last call that came too late
    /// for its plan show that the rank is back.
    fn is_gone(&self, rank: usize) -> bool {
        self.missed[rank] >= GONE_AFTER && !self.has_posted(self.next.previous(), rank)
    }

    /// Count what was done, and on to the next call.
    fn go_on(&mut self) {
        for (rank, &arrived) in self.arrived.iter().enumerate() {
            self.missed[rank] = if arrived { 0 } else { self.missed[rank].saturating_add(1) };
            self.published.missed[rank] += u64::from(!arrived);
        }
        self.published.show(self.region.words(), self.shape);
        self.arrived.fill(false);
        self.idle = 0;
        self.begun = None;
        self.next = self.next.next();
    }

    /// Whether all of a rank's words of a call are there, by the last: a rank writes them in order.
    fn has_posted(&self, sequence: Sequence, rank: usize) -> bool {
        let last = self.shape.counts(sequence.tag(), rank) + self.shape.posted() - 1;
        word::load(&self.region.words()[last], sequence).is_some()
    }

    /// Copy what `rank` posted for the next call; false as long as any of it is missing.
    fn read(&mut self, rank: usize) -> bool {
        if !self.has_posted(self.next, rank) {
            return false; // Nearly always one look tells.
        }
        let (ranks, experts) = (self.shape.ranks, self.shape.experts);
        let start = self.shape.counts(self.next.tag(), rank);
        let words = &self.region.words()[start..start + self.shape.posted()];
        let (tokens, words) = words.split_at(1);
        let (visits, counts) = words.split_at(ranks);
        // Every word is looked at, whatever the last one tells: nothing orders them.
        word::load_all(tokens, self.next, &mut self.tokens[rank..=rank])
            && word::load_all(visits, self.next, &mut self.visits[rank * ranks..][..ranks])
            && word::load_all(counts, self.next, &mut self.counts[rank * experts..][..experts])
    }

    /// Nobody posted the next call: if a later one stands in the ring, all went on without us (this
    /// process was stopped, or began late), so go on there. Only whole counts tell: one foreign word far
    /// ahead would send the planner to where no rank ever comes. True if it goes on there.
    fn catch_up(&mut self) -> bool {
        let mut later = self.next;
        for _ in 1..RING {
            later = later.next();
            for rank in 0..self.shape.ranks {
                let start = self.shape.counts(later.tag(), rank);
                let words = &self.region.words()[start..start + self.shape.posted()];
                let Some(found) = word::sequence(&words[0]) else { continue };
                if found.is_after(self.next)
                    && words.iter().all(|word| word::sequence(word) == Some(found))
                {
                    self.next = found;
                    self.idle = 0;
                    return true;
                }
            }
        }
        false
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
        if all {
            self.published.whole += 1
        } else {
            self.published.partial += 1
        }
        self.weigh();
    }

    /// The ranks' costs with shared rows at home and under the plan, for those who look from outside.
    fn weigh(&mut self) {
        let level = |shared| score::level(&self.placement, &self.cost, &self.routed, shared);
        if let (Ok(home), Ok(planned)) = (level(&self.tokens), level(self.plan.shared_rows())) {
            self.published.home = self.published.home.saturating_add(home.max);
            self.published.planned = self.published.planned.saturating_add(planned.max);
            self.published.mean = self.published.mean.saturating_add(planned.mean as u64);
        }
    }
}
