//! One rank's end of the board: it posts its counts and takes its quotas.

use std::sync::Arc;
use std::time::Duration;

use waterfill_core::{
    CostModel, OwnCounts, OwnPlanner, Placement, ReplicaCounts, ReplicaTable, check_length,
    check_rank,
};

use crate::error::Result;
use crate::layout::Shape;
use crate::outcome::Outcome;
use crate::presence::{End, Held, Presence};
use crate::region::Region;
use crate::sync::Instant;
use crate::tally::Tally;
use crate::wait::{LOOK, pause, reads_clock};
use crate::word::{self, Sequence};

/// What one rank knows of one layer and step.
#[derive(Clone, Copy, Debug)]
pub struct Posted<'a> {
    /// Its tokens: rows with at least one valid id.
    pub tokens: u32,
    /// `[R]` how many of them visit each rank.
    pub visits: &'a [u32],
    /// `[P]` their rows for each physical expert.
    pub counts: &'a [u32],
}

/// After so many calls in a row that the planner did not answer, a rank stops waiting.
pub const BREAK_AFTER: u32 = 2;
/// A broken rank that waits in vain again and again tries one call in 2 to the power of this at least: about
/// one a forward pass of a large model.
pub const MOST_SELDOM: u32 = 6;

/// A rank's end of the board. One a rank: it alone writes the rank's counts.
///
/// The child of a fork must not go on with it, because two processes would then write as one rank: the
/// others' quotas would still add up, but to counts that nobody has. It is not checked here, where asking
/// the system for the process would cost a good part of a call; whoever may be forked checks it.
#[derive(Debug)]
pub struct Port<R> {
    region: R,
    shape: Shape,
    placement: Placement,
    cost: CostModel,
    rank: usize,
    last: Sequence,
    own: OwnPlanner,
    tally: Tally,
    failures: u32,
    /// Whether the call that was posted last waits for its plan.
    waits: bool,
    taken: Vec<u32>,
    /// The table of the call at hand.
    table: Option<Arc<ReplicaTable>>,
    /// What the call at hand posts of its counts, where plans choose among replicas.
    reduced: ReplicaCounts,
    /// `[redundant]` 0, for jobs past the table's last.
    no_jobs: Vec<u32>,
    /// `[2 * redundant]` the quotas of its slots.
    replica_quotas: Vec<u32>,
    /// Whether the last call's plan has such quotas for that table.
    has_replica_quotas: bool,
    watched: Result<Option<Held>>,
}

impl<R: Region> Port<R> {
    /// The end of `rank`; its first call will be [`Sequence::FIRST`].
    ///
    /// # Errors
    /// A region of another size than the shape's, a rank outside the group.
    pub fn new(region: R, shape: Shape, cost: CostModel, rank: usize) -> Result<Self> {
        check_length("region", region.words().len(), shape.words())?;
        check_rank("rank", rank as i64, shape.ranks)?;
        let placement = Placement::contiguous(shape.ranks, shape.experts)?;
        let tally = Tally::announce(&region, shape, rank);
        let watched = region.hold(End::Rank(rank));
        let (last, own) = (Sequence::NONE, OwnPlanner::new());
        Ok(Self {
            region,
            shape,
            placement,
            cost,
            rank,
            last,
            own,
            tally,
            failures: 0,
            waits: false,
            taken: vec![0; shape.ranks],
            table: None,
            reduced: ReplicaCounts::new(),
            no_jobs: vec![0; shape.redundant],
            replica_quotas: vec![0; 2 * shape.redundant],
            has_replica_quotas: false,
            watched,
        })
    }

    /// Why the others cannot see whether this process lives, if they can't: should it end, they wait to the planner's
    /// patience twice, and have no plans from then on.
    pub fn unwatched(&self) -> Option<&crate::Error> {
        self.watched.as_ref().err()
    }

    /// How the calls so far ended.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The replicas of the layer whose call comes next; none where replicas are not chosen. All ranks have to say the same.
    ///
    /// # Errors
    /// A table of other numbers of ranks, physical or redundant experts than the board's.
    pub fn set_table(&mut self, table: Option<&Arc<ReplicaTable>>) -> Result<()> {
        if let Some(table) = table {
            let placement = table.placement();
            check_length("ranks of the table", placement.ranks(), self.shape.ranks)?;
            let experts = placement.physical_experts();
            check_length("experts of the table", experts, self.shape.experts)?;
            let redundant = table.redundant();
            check_length("redundant experts of the table", redundant, self.shape.redundant)?;
        }
        self.table = table.cloned();
        self.has_replica_quotas = false;
        Ok(())
    }

    /// `[slots]` this rank's rows for each replica in the last call, if its plan chose replicas of the table that was set.
    #[must_use]
    pub fn replica_quotas(&self) -> Option<&[u32]> {
        let table = self.table.as_ref().filter(|_| self.has_replica_quotas)?;
        Some(&self.replica_quotas[..table.slots()])
    }

    /// Go on after another call than none: tests of wrap-around do, and a rank that joins late.
    pub fn resume_after(&mut self, sequence: Sequence) {
        self.last = sequence;
    }

    /// Post this call's counts, wait for the plan at most `cap`, and write this rank's quotas, `[R]`.
    ///
    /// The quotas always add up to the tokens: where no plan came, they are from own counts.
    ///
    /// # Errors
    /// Arrays of other lengths, sums of 2^32 rows or more. Nothing is posted then, and the call does
    /// not count: make it again with what fits, or the ranks' calls are out of step.
    pub fn exchange(
        &mut self,
        posted: Posted,
        cap: Duration,
        quotas: &mut [u32],
    ) -> Result<Outcome> {
        check_length("quotas", quotas.len(), self.shape.ranks)?;
        self.post(posted)?;
        self.finish(posted, cap, quotas)
    }

    /// The first half of [`exchange`](Self::exchange): post this call's counts.
    ///
    /// # Errors
    /// As there.
    pub fn post(&mut self, posted: Posted) -> Result<()> {
        self.own_counts(posted).check()?;
        if self.shape.redundant > 0 {
            let placement = self.table.as_ref().map_or(&self.placement, |table| table.placement());
            self.reduced.reduce(placement, posted.counts)?;
        }
        self.last = self.last.next();
        self.waits = self.failures < BREAK_AFTER || self.tries_again();
        self.write(posted);
        Ok(())
    }

    /// Whether a broken rank waits again: once the planner has answered its last call, late as it was.
    /// One that waited so in vain, as for a planner that is slow and always late, tries ever more seldom.
    fn tries_again(&self) -> bool {
        let seldom = 1 << (self.failures - BREAK_AFTER).min(MOST_SELDOM);
        self.last.tag().is_multiple_of(seldom) && self.is_without_plan(self.last.previous())
    }

    /// Whether the planner has said that the call `sequence` has no plan, or a later one.
    fn is_without_plan(&self, sequence: Sequence) -> bool {
        let word = &self.region.words()[self.shape.without_plan(self.rank)];
        word::sequence_first(word).is_some_and(|last| last.has_reached(sequence))
    }

    /// The second half of [`exchange`](Self::exchange), with the counts that were posted last.
    ///
    /// # Errors
    /// As there, but a call that was posted does count.
    pub fn finish(&mut self, posted: Posted, cap: Duration, quotas: &mut [u32]) -> Result<Outcome> {
        self.finish_with(posted, cap, quotas, || ())
    }

    /// [`finish`](Self::finish), doing something else between the looks at the board: the rank beside whom
    /// no planner's thread runs polls its planner there.
    ///
    /// # Errors
    /// As there.
    pub fn finish_with(
        &mut self,
        posted: Posted,
        cap: Duration,
        quotas: &mut [u32],
        meanwhile: impl FnMut(),
    ) -> Result<Outcome> {
        check_length("quotas", quotas.len(), self.shape.ranks)?;
        self.has_replica_quotas = false;
        let begun = Instant::now();
        let outcome = self.wait(begun, cap, posted.tokens, quotas, meanwhile);
        self.has_replica_quotas &= outcome == Outcome::Live;
        self.count(outcome, posted.tokens, begun.elapsed());
        if outcome != Outcome::Live {
            let mut own = std::mem::take(&mut self.own);
            let planned = own.plan(&self.own_counts(posted), quotas);
            self.own = own;
            planned?;
        }
        Ok(outcome)
    }

    fn count(&mut self, outcome: Outcome, tokens: u32, waited: Duration) {
        let tally = &mut self.tally;
        tally.ended[outcome] += 1;
        tally.tokens += u64::from(tokens);
        let wait = (outcome != Outcome::Broken).then(|| tally.waits.add(waited.as_nanos() as u64));
        tally.show(self.region.words(), self.shape, self.rank, wait);
    }

    fn own_counts<'a>(&'a self, posted: Posted<'a>) -> OwnCounts<'a> {
        OwnCounts {
            placement: &self.placement,
            cost: &self.cost,
            source: self.rank,
            routed: posted.counts,
            visits: posted.visits,
            tokens: posted.tokens,
        }
    }

    fn write(&self, posted: Posted) {
        let sequence = self.last;
        let start = self.shape.counts(sequence.tag(), self.rank);
        let mut words = &self.region.words()[start..start + self.shape.posted()];
        let mut put = |values: &[u32]| {
            let (these, rest) = words.split_at(values.len());
            word::store_all(these, sequence, values);
            words = rest;
        };
        put(&[posted.tokens]);
        put(posted.visits);
        if self.shape.redundant == 0 {
            put(posted.counts);
        } else {
            let fingerprint = self.table.as_ref().map_or(0, |table| table.fingerprint());
            let jobs = self.reduced.jobs();
            put(self.reduced.loads());
            put(jobs);
            put(&self.no_jobs[jobs.len()..]);
            put(self.reduced.active());
            put(&[fingerprint]);
        }
        put(&[self.waits.into()]);
    }

    /// Tell the planner that this rank has its own quotas: then no other is to have a plan, if it is not too late.
    fn give_up(&self) {
        let last = self.shape.counts(self.last.tag(), self.rank) + self.shape.posted_waits();
        word::store(&self.region.words()[last], self.last, 0);
    }

    /// Take the plan when it comes; leaves `quotas` as they are if none does that fits.
    fn wait(
        &mut self,
        begun: Instant,
        cap: Duration,
        tokens: u32,
        quotas: &mut [u32],
        mut meanwhile: impl FnMut(),
    ) -> Outcome {
        let sequence = self.last;
        if !self.waits {
            meanwhile();
            return Outcome::Broken;
        }
        let (mut polls, mut look_at) = (0u32, LOOK);
        loop {
            // The clock first: a rank that was kept from running past its cap looks once more, as the plan may have come.
            let waited = (polls > 0 && reads_clock(polls)).then(|| begun.elapsed());
            if self.take(sequence) {
                break;
            }
            if self.is_without_plan(sequence) {
                // A plan that came before this was said of a later call is seen by now.
                if self.take(sequence) {
                    break;
                }
                self.failures = 0;
                return Outcome::NoPlan;
            }
            if waited.is_some_and(|waited| waited >= cap) {
                self.give_up();
                self.failures = self.failures.saturating_add(1);
                return Outcome::TimedOut;
            }
            if let Some(waited) = waited.filter(|&waited| waited >= look_at) {
                look_at = waited + LOOK;
                if self.region.presence(End::Planner) == Presence::Gone && !self.take(sequence) {
                    self.failures = self.failures.max(BREAK_AFTER);
                    return Outcome::Broken;
                }
            }
            meanwhile();
            polls = polls.wrapping_add(1);
            pause(polls);
        }
        self.failures = 0;
        // A foreign byte on the board must not become a wrong assignment.
        if self.taken.iter().map(|&quota| u64::from(quota)).sum::<u64>() != u64::from(tokens) {
            return Outcome::Torn;
        }
        quotas.copy_from_slice(&self.taken);
        Outcome::Live
    }

    /// Read this rank's part of a plan into `taken` and `replica_quotas`; false as long as any of it is missing.
    fn take(&mut self, sequence: Sequence) -> bool {
        let start = self.shape.quotas(sequence.tag(), self.rank);
        let words = &self.region.words()[start..start + self.shape.planned()];
        let (quotas, words) = words.split_at(self.shape.ranks);
        if !word::load_all(quotas, sequence, &mut self.taken) {
            return false;
        }
        let Some((fingerprint, words)) = words.split_first() else { return true };
        let Some(fingerprint) = word::load(fingerprint, sequence) else { return false };
        // Of another map than this rank's: its quotas say nothing here.
        let table = self.table.as_ref().filter(|table| table.fingerprint() == fingerprint);
        self.has_replica_quotas = table.is_some();
        table.is_none_or(|table| {
            let slots = table.slots();
            word::load_all(&words[..slots], sequence, &mut self.replica_quotas[..slots])
        })
    }
}
