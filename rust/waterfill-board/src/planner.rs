//! The planner's end of the board: it reads every rank's counts, makes one plan, and publishes it.

use std::time::Duration;

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use waterfill_core::{
    CostModel, Placement, Plan, Planner, Problem, ReplicaCounts, ReplicaQuotas, ReplicaTable,
    Routed, check_length,
};

use crate::error::{Error, Result};
use crate::gathered::Gathered;
use crate::histogram::Waits;
use crate::layout::{RING, Shape};
use crate::maps::{Maps, NewMap};
use crate::presence::{End, Held, Presence};
use crate::region::Region;
use crate::sync::Instant;
use crate::tally::{Published, show_seen};
use crate::wait::{EAGER_POLLS, LOOK};
use crate::word::{self, Sequence};

/// A rank that missed so many calls in a row is not waited for until it is seen again.
const SILENT_AFTER: u32 = 2;
/// Once in so many calls the ranks are told anew what has no plan: a word that is half the numbers old would be taken for one
/// of a call to come.
const RENEW: u32 = 1 << 20;

/// What becomes of a call whose first counts are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    Plan,
    NoPlan(Why),
}

/// Why a call has no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Late,
    Silent,
    GivenUp,
    Refused,
}

/// Makes one plan a call for all ranks on a board. One a board: it alone writes quotas.
///
/// A plan is of the counts of all ranks that live, or there is none and every rank takes own counts: one that is made
/// without a rank that is merely late sends it rows that it has no room for.
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
    started: Instant,
    /// `[R]` when each rank's counts were found, in nanoseconds after `started`; none where they were not, or the last to
    /// come.
    found_at: Vec<Option<u64>>,
    /// `[R]` how long each rank's counts waited for an answer.
    waits: Vec<Waits>,
    /// Polls that found nobody.
    idle: u32,
    /// `[R]` ranks whose counts of the next call were read.
    arrived: Vec<bool>,
    /// `[R]` ranks whose processes were seen to be gone.
    gone: Vec<bool>,
    /// When the kernel was last asked who is gone.
    looked: Option<Instant>,
    /// `[R]` calls in a row that each rank missed.
    missed: Vec<u32>,
    gathered: Gathered,
    /// `[P]` the counts of all ranks, where plans do not choose among replicas.
    routed: Vec<u32>,
    /// The same where they do.
    reduced: ReplicaCounts,
    planner: Planner,
    plan: Plan,
    quotas: Vec<u32>,
    maps: Maps,
    /// Maps that other threads send. The lock is this planner's alone: it makes the receiver one that may be shared.
    sent: Option<Mutex<Receiver<NewMap>>>,
    replica_quotas: ReplicaQuotas,
    published: Published,
    watched: Result<Option<Held>>,
}

impl<R: Region> BoardPlanner<R> {
    /// A planner whose first call will be [`Sequence::FIRST`]. `patience`: how long a call waits for a living rank's
    /// counts, from its first counts on; less than the ranks' cap, or they give the planner up before it answers.
    ///
    /// # Errors
    /// A region of another size than the shape's, or another cost model than [`CostModel::Rows`] where plans choose among
    /// replicas.
    pub fn new(region: R, shape: Shape, cost: CostModel, patience: Duration) -> Result<Self> {
        check_length("region", region.words().len(), shape.words())?;
        if shape.redundant > 0 && !matches!(cost, CostModel::Rows) {
            return Err(Error::CostWithReplicas { redundant: shape.redundant });
        }
        let (ranks, experts) = (shape.ranks, shape.experts);
        let placement = Placement::contiguous(ranks, experts)?;
        let (process, missed) = (std::process::id().into(), vec![0; ranks]);
        let published = Published { process, missed, ..Published::default() };
        published.show(region.words(), shape);
        let watched = region.hold(End::Planner);
        Ok(Self {
            region,
            shape,
            placement,
            cost,
            next: Sequence::FIRST,
            patience,
            begun: None,
            started: Instant::now(),
            found_at: vec![None; ranks],
            waits: vec![Waits::default(); ranks],
            idle: 0,
            arrived: vec![false; ranks],
            gone: vec![false; ranks],
            looked: None,
            missed: vec![0; ranks],
            gathered: Gathered::new(shape),
            routed: vec![0; if shape.redundant > 0 { 0 } else { experts }],
            reduced: ReplicaCounts::new(),
            planner: Planner::new(),
            plan: Plan::new(),
            quotas: vec![0; ranks],
            maps: Maps::default(),
            sent: None,
            replica_quotas: ReplicaQuotas::new(),
            published,
            watched,
        })
    }

    /// Why the ranks cannot see whether this process lives, if they can't: should it end, each waits to its cap twice.
    pub fn unwatched(&self) -> Option<&crate::Error> {
        self.watched.as_ref().err()
    }

    /// What was published so far.
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// From now on the replicas of `layer` are those of this table, in which ranks have to agree with the planner by its
    /// fingerprint. A table of another shape than the board's is never used.
    pub fn set_map(&mut self, layer: usize, table: Arc<ReplicaTable>) {
        self.maps.set(layer, table);
    }

    /// Take maps from there too, at the first call whose ranks name one that is not known.
    pub(crate) fn take_maps_from(&mut self, sent: Receiver<NewMap>) {
        self.sent = Some(Mutex::new(sent));
    }

    /// Go on at another call than the first.
    pub fn resume_at(&mut self, sequence: Sequence) {
        self.next = sequence;
    }

    /// Look at the board once. If the next call's counts are there of all ranks that live, publish its plan; if
    /// they cannot come, or not within the patience, tell all ranks that it has none. True if either.
    pub fn poll(&mut self) -> bool {
        let (mut any, mut fresh) = (false, false);
        for rank in 0..self.shape.ranks {
            if !self.arrived[rank] && self.read(rank) {
                (self.arrived[rank], fresh) = (true, true);
            }
            any |= self.arrived[rank];
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
        let verdict = self.judge(fresh);
        match verdict {
            Verdict::Wait => {
                if fresh {
                    self.note_arrivals();
                }
                return false;
            }
            Verdict::Plan => self.publish(),
            Verdict::NoPlan(why) => self.refuse(why),
        }
        self.go_on(verdict);
        true
    }

    /// `fresh`: counts were found at this look.
    fn judge(&mut self, fresh: bool) -> Verdict {
        if self.is_complete() {
            return self.unless_given_up();
        }
        let waited = self.begun.get_or_insert_with(Instant::now).elapsed();
        // Not at every look: nobody gives up so soon, unless before its counts came.
        if (fresh || waited >= LOOK) && self.unless_given_up() != Verdict::Plan {
            return Verdict::NoPlan(Why::GivenUp);
        }
        let silent = self.missing().any(|rank| self.is_silent(rank));
        if silent || waited >= LOOK.min(self.patience) {
            self.look_for_the_gone();
        }
        // Both anew: those that are gone are not missing any more.
        if self.is_complete() {
            Verdict::Plan
        } else if self.missing().any(|rank| self.is_silent(rank)) {
            Verdict::NoPlan(Why::Silent)
        } else if waited >= self.patience {
            Verdict::NoPlan(Why::Late)
        } else {
            Verdict::Wait
        }
    }

    /// Ranks that live, as far as is known, and whose counts are not there.
    fn missing(&self) -> impl Iterator<Item = usize> {
        (0..self.shape.ranks).filter(|&rank| !self.arrived[rank] && !self.gone[rank])
    }

    fn is_complete(&self) -> bool {
        self.missing().next().is_none()
    }

    /// A plan, unless a rank does not wait for it, or has gone on to a later call.
    fn unless_given_up(&self) -> Verdict {
        let given_up = |rank| {
            let last = &self.region.words()[self.last_word(self.next, rank)];
            word::load_any(last).is_some_and(|(found, waits)| {
                if found == self.next { waits != 1 } else { found.is_after(self.next) }
            })
        };
        if (0..self.shape.ranks).any(|rank| !self.gone[rank] && given_up(rank)) {
            return Verdict::NoPlan(Why::GivenUp);
        }
        Verdict::Plan
    }

    /// Whether `rank` missed calls and has not been seen since. Counts of the last call that came when it was
    /// over show that the rank is back.
    fn is_silent(&self, rank: usize) -> bool {
        self.missed[rank] >= SILENT_AFTER && !self.has_posted(self.next.previous(), rank)
    }

    /// Ask the kernel for those that are missing, but no more often than is of use.
    fn look_for_the_gone(&mut self) {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        self.looked = Some(Instant::now());
        for rank in 0..self.shape.ranks {
            if !self.arrived[rank] {
                self.gone[rank] = self.region.presence(End::Rank(rank)) == Presence::Gone
                    // What a process posted before it ended is on the board.
                    && !self.has_posted(self.next, rank);
            }
        }
    }

    /// Count what was done, and on to the next call.
    fn go_on(&mut self, verdict: Verdict) {
        for rank in 0..self.shape.ranks {
            let arrived = self.arrived[rank];
            // Whoever posts a call that it had missed, late as it may be, is looked for again.
            let is_back = self.missed[rank] > 0 && self.has_posted(self.next.previous(), rank);
            self.gone[rank] &= !arrived && !is_back;
            if arrived {
                self.missed[rank] = 0;
            } else if self.is_missed(rank, verdict) {
                self.missed[rank] = self.missed[rank].saturating_add(1);
                self.published.missed[rank] += 1;
            }
        }
        self.published.show(self.region.words(), self.shape);
        self.count_waits();
        if self.next.tag().is_multiple_of(RENEW) {
            self.say_without_plan(self.next);
        }
        self.arrived.fill(false);
        self.idle = 0;
        self.begun = None;
        self.next = self.next.next();
    }

    /// Whether the call was ended because of `rank`, whose counts are not there. One that is not waited for at all ends before
    /// ranks come that are in time.
    fn is_missed(&self, rank: usize, verdict: Verdict) -> bool {
        match verdict {
            Verdict::NoPlan(Why::Silent) => self.is_silent(rank),
            Verdict::NoPlan(Why::GivenUp) => false,
            _ => true,
        }
    }

    /// The clock is not read for counts that are the last to come: the answer would wait for it.
    fn note_arrivals(&mut self) {
        let now = nanoseconds_since(self.started);
        for (found_at, &arrived) in self.found_at.iter_mut().zip(&self.arrived) {
            if arrived && found_at.is_none() {
                *found_at = Some(now);
            }
        }
    }

    /// After the answer is written, so that nobody waits for this.
    fn count_waits(&mut self) {
        let now = nanoseconds_since(self.started);
        for rank in (0..self.shape.ranks).filter(|&rank| self.arrived[rank]) {
            let waited = self.found_at[rank].take().map_or(0, |found_at| now - found_at);
            let changed = self.waits[rank].add(waited);
            let longest = self.waits[rank].longest();
            show_seen(self.region.words(), self.shape, rank, longest, changed);
        }
    }

    /// Whether all of a rank's words of a call are there, by the last: a rank writes them in order.
    fn has_posted(&self, sequence: Sequence, rank: usize) -> bool {
        word::load(&self.region.words()[self.last_word(sequence, rank)], sequence).is_some()
    }

    fn last_word(&self, sequence: Sequence, rank: usize) -> usize {
        self.shape.counts(sequence.tag(), rank) + self.shape.posted_waits()
    }

    /// Copy what `rank` posted for the next call; false as long as any of it is missing.
    fn read(&mut self, rank: usize) -> bool {
        if !self.has_posted(self.next, rank) {
            return false; // Nearly always one look tells.
        }
        let start = self.shape.counts(self.next.tag(), rank);
        // The last word, whether it waits, may change later: it is looked at when all others are there.
        let words = &self.region.words()[start..start + self.shape.posted_waits()];
        self.gathered.read(words, self.next, rank)
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
                    // Whoever is behind waits for none of the calls that were left out.
                    self.say_without_plan(found.previous());
                    return true;
                }
            }
        }
        false
    }

    /// Tell all ranks that this call has no plan.
    fn refuse(&mut self, why: Why) {
        let count = match why {
            Why::Late => &mut self.published.late,
            Why::Silent => &mut self.published.silent,
            Why::GivenUp => &mut self.published.given_up,
            Why::Refused => &mut self.published.refused,
        };
        *count += 1;
        self.say_without_plan(self.next);
    }

    /// Tell all ranks that no call up to `sequence` has a plan but those whose quotas are there.
    fn say_without_plan(&self, sequence: Sequence) {
        for rank in 0..self.shape.ranks {
            let word = &self.region.words()[self.shape.without_plan(rank)];
            word::store_last(word, sequence, 0);
        }
    }

    /// Plan with those that arrived, and write the quotas of each of them.
    fn publish(&mut self) {
        let all = self.arrived.iter().all(|&arrived| arrived);
        for rank in (0..self.shape.ranks).filter(|&rank| !self.arrived[rank]) {
            self.gathered.forget(rank);
        }
        let table = self.table();
        let placement = table.as_deref().map_or(&self.placement, ReplicaTable::placement);
        let routed = if self.shape.redundant == 0 {
            self.gathered.add_up(&mut self.routed);
            Routed::PerExpert(&self.routed)
        } else {
            self.gathered.reduce(placement, table.is_some(), &mut self.reduced);
            Routed::Reduced(&self.reduced)
        };
        let problem = Problem {
            placement,
            cost: &self.cost,
            routed,
            tokens: &self.gathered.tokens,
            visits: Some(&self.gathered.visits),
            eligible: (!all).then_some(&self.arrived),
        };
        let planned = match &table {
            Some(table) => self.planner.replicas(&problem, &mut self.plan).and_then(|()| {
                self.replica_quotas.divide(table, &self.gathered.jobs, self.plan.replica_rows())
            }),
            None => self.planner.live(&problem, &mut self.plan),
        };
        // Counts that are no counts can only come from a foreign writer; then nobody gets a plan.
        if planned.is_err() {
            return self.refuse(Why::Refused);
        }
        for rank in (0..self.shape.ranks).filter(|&rank| self.arrived[rank]) {
            if self.plan.quotas_of(rank, &mut self.quotas).is_ok() {
                self.write(rank, table.as_deref());
            }
        }
        self.published.replicas += u64::from(table.is_some());
        if all {
            self.published.whole += 1
        } else {
            self.published.partial += 1
        }
        self.weigh();
    }

    /// Write `rank`'s part of the plan: `self.quotas`, and those of its replicas.
    fn write(&self, rank: usize, table: Option<&ReplicaTable>) {
        let start = self.shape.quotas(self.next.tag(), rank);
        let words = &self.region.words()[start..start + self.shape.planned()];
        let (quotas, words) = words.split_at(self.shape.ranks);
        word::store_all(quotas, self.next, &self.quotas);
        let Some((fingerprint, words)) = words.split_first() else { return };
        if let Some(table) = table {
            let (slots, unused) = words.split_at(table.slots());
            word::store_all(slots, self.next, self.replica_quotas.of(rank));
            // A rank whose table has the same fingerprint and more slots must not wait for them: it refuses the sums.
            unused.iter().for_each(|word| word::store(word, self.next, 0));
            word::store(fingerprint, self.next, table.fingerprint());
        } else {
            word::store(fingerprint, self.next, 0);
        }
    }

    /// The replicas of this call's layer, if all ranks whose counts are there have the same map, and it is known here.
    fn table(&mut self) -> Option<Arc<ReplicaTable>> {
        let mut posted =
            self.gathered.fingerprints.iter().zip(&self.arrived).filter(|&(_, &arrived)| arrived);
        let (&fingerprint, _) = posted.next()?;
        if fingerprint == 0 || posted.any(|(&other, _)| other != fingerprint) {
            return None;
        }
        let shape = self.shape;
        let found = self.maps.find(fingerprint).or_else(|| {
            // After the counts were read: whoever sent a map before they were posted has sent it by now.
            let sent = self.sent.as_ref()?.lock().ok()?;
            self.maps.take(&sent);
            self.maps.find(fingerprint)
        });
        found.filter(|table| {
            let placement = table.placement();
            let sizes = (placement.ranks(), placement.physical_experts(), table.redundant());
            sizes == (shape.ranks, shape.experts, shape.redundant)
        })
    }

    /// The ranks' costs with shared rows at home and replicas as the plan began, and under the plan, for those who look from
    /// outside.
    fn weigh(&mut self) {
        let costs = |routed: &[u64], shared: &[u32]| {
            let cost = |(&routed, &shared): (&u64, &u32)| routed + self.cost.cost(shared.into());
            let costs = routed.iter().zip(shared).map(cost);
            costs.fold((0, 0), |(max, sum), cost| (cost.max(max), sum + cost))
        };
        let (home, _) = costs(self.plan.start_costs(), &self.gathered.tokens);
        let (planned, sum) = costs(self.plan.routed_costs(), self.plan.shared_rows());
        self.published.home = self.published.home.saturating_add(home);
        self.published.planned = self.published.planned.saturating_add(planned);
        let mean = sum / self.shape.ranks as u64;
        self.published.mean = self.published.mean.saturating_add(mean);
    }
}

fn nanoseconds_since(begun: Instant) -> u64 {
    Instant::now().duration_since(begun).as_nanos() as u64
}
