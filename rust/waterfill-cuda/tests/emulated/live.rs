//! One rank's calls over a board, each compared with those of the board's own crate over another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use waterfill_board::{End, Heap, Outcome, Port, Posted, Presence, Region, Sequence};
use waterfill_core::{CostModel, Weight};
use waterfill_cuda::internal::{Args, LIVE, State, with_board};

use super::batch::{AnyId, Batch, Counted};
use super::rank::{Checked, Rank, address, same};

/// What is on the board when a rank looks for its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// It is there.
    Whole,
    /// Nothing of this call is.
    Missing,
    /// All but one word are.
    Partial,
    /// Nothing of this call is; the planner has answered the last one.
    Late,
    /// The planner has said that this call has none.
    None,
    /// It has said so of a later call, and has none for this one.
    Passed,
    /// It has said so of a later call, and has one for this one.
    WholeAndPassed,
    /// Nothing is, and the planner's process is gone.
    Deserted,
    /// Quotas that do not add up.
    Wrong,
    /// It comes word by word while the rank waits, in any order.
    Arriving,
    /// It comes while the rank reads the clock that says that its cap is over.
    AtLast,
}

/// A board whose planner may be gone.
pub struct Watched {
    heap: Heap,
    deserted: AtomicBool,
}

impl Region for Watched {
    fn words(&self) -> &[AtomicU64] {
        self.heap.words()
    }

    fn presence(&self, _end: End) -> Presence {
        // Relaxed: all in one thread.
        let gone = self.deserted.load(Ordering::Relaxed);
        if gone { Presence::Gone } else { Presence::Here }
    }
}

/// A rank's calls over two boards with the same words: the kernel at one, a port of the board's own crate at the other.
pub struct Live<'a, 'b> {
    pub rank: &'a mut Rank<'b>,
    shape: waterfill_board::Shape,
    board: Arc<Heap>,
    expected: Arc<Watched>,
    pub port: Port<Arc<Watched>>,
    state: State,
    sequence: Sequence,
    /// Waits in a row that ended at the cap.
    failures: u32,
    /// Calls that waited.
    waited: u64,
    /// What comes to the kernel's board while it waits: places and words.
    arriving: Vec<(usize, u64)>,
}

impl<'a, 'b> Live<'a, 'b> {
    /// The first call comes after `last`.
    pub fn new(rank: &'a mut Rank<'b>, by_expert: bool, last: u32) -> Self {
        let counts = if by_expert { rank.shape.experts } else { rank.shape.ranks };
        let (ranks, redundant) = (rank.shape.ranks, rank.shape.redundant);
        let shape = waterfill_board::Shape::with_redundant(ranks, counts, redundant).unwrap();
        let deserted = AtomicBool::new(false);
        let expected = Arc::new(Watched { heap: Heap::new(shape), deserted });
        let mut port = Port::new(Arc::clone(&expected), shape, CostModel::Rows, rank.rank).unwrap();
        if let Some(last) = Sequence::from_tag(last) {
            port.resume_after(last);
        }
        let sequence = Sequence::from_tag(last).map_or(Sequence::FIRST, Sequence::next);
        let state = State { last, ..State::default() };
        Self {
            rank,
            shape,
            board: Arc::new(Heap::new(shape)),
            expected,
            port,
            state,
            sequence,
            failures: 0,
            waited: 0,
            arriving: Vec::new(),
        }
    }

    /// One call; `gathered`: all ranks' words come by a collective.
    pub fn calls<I: AnyId, W: Weight>(
        &mut self,
        rows: usize,
        plan: Plan,
        gathered: bool,
    ) -> Checked {
        let batch = Batch::<I, W>::random(&mut self.rank.random, &self.rank.shape, rows);
        let counted = batch.counted(&self.rank.shape);
        let right = counted.random_quotas(&mut self.rank.random, self.rank.rank);
        let planned = if plan == Plan::Wrong { self.rank.wrong(&right) } else { right };
        let posted = gathered.then(|| counted.posted(!self.shape.has_counts_per_rank()));
        self.run(plan, &counted, &planned, posted.as_deref(), |live, args, (_, quotas), arrives| {
            live.rank.expands(&batch, args, quotas, arrives)
        })
    }

    /// A call whose plan, if it has one, is `planned`. If `posted` is given, all ranks' words come by a collective, and these
    /// are this one's. `launch` makes the kernel's call and compares what it writes; it is told how the port's call ended, with
    /// the quotas that it goes on with.
    pub fn run(
        &mut self,
        plan: Plan,
        counted: &Counted,
        planned: &[u32],
        posted: Option<&[u32]>,
        launch: impl FnOnce(&mut Self, Args, (Outcome, &[u32]), &mut dyn FnMut()) -> Checked,
    ) -> Checked {
        self.plant(plan, planned);
        let gathered = posted.is_some();
        let words = posted.map(|posted| self.gather(posted));
        let deserted = plan == Plan::Deserted;
        // Relaxed: all in one thread.
        self.expected.deserted.store(deserted, Ordering::Relaxed);
        store(&self.board, self.shape.deserted(self.rank.rank), deserted.into());
        let cap = if deserted { Duration::MAX } else { Duration::ZERO };
        let before = self.waited;
        let (outcome, quotas) = self.exchange(counted, cap);
        if gathered {
            self.tell_of_others(self.waited > before);
        }
        let cap_ns = match plan {
            Plan::Arriving | Plan::Deserted => u64::MAX,
            Plan::AtLast => 0,
            _ => self.rank.random.pick(&[0, 1, 20_000]),
        };
        let args = Args {
            mode: LIVE,
            words: words.as_ref().map_or(0, |words| address(words)),
            cap_ns,
            ..self.args()
        };
        let args = with_board(args, &self.shape, address(self.board.words()));
        let (board, mut arriving) = (Arc::clone(&self.board), std::mem::take(&mut self.arriving));
        // A warp reads the clock 32 times between two looks at the board: so that some words of replicas come at each.
        let each = if self.shape.redundant > 0 { 8 } else { 1 };
        let mut looks = 0;
        let mut arrives = || {
            looks += 1;
            // Each lane of a warp reads the clock when the wait begins.
            let come = if plan == Plan::AtLast && looks > 32 { arriving.len() } else { 1 };
            let comes = plan != Plan::Arriving || looks % each == 0;
            if comes && (plan == Plan::Arriving || looks > 32) {
                arriving
                    .drain(..come.min(arriving.len()))
                    .for_each(|(at, word)| store(&board, at, word));
            }
        };
        launch(self, args, (outcome, &quotas), &mut arrives)?;
        // To a rank that did not wait.
        arriving.into_iter().for_each(|(at, word)| store(&board, at, word));
        self.compares()?;
        self.sequence = self.sequence.next();
        Ok(())
    }

    fn args(&mut self) -> Args {
        self.rank.args(&mut self.state)
    }

    /// By the port: the words it posts, how it ends, the quotas it goes on with.
    fn exchange(&mut self, counted: &Counted, cap: Duration) -> (Outcome, Vec<u32>) {
        let by_expert = !self.shape.has_counts_per_rank();
        let counts = if by_expert { &counted.counts } else { &counted.loads };
        let posted = Posted { tokens: counted.tokens, visits: &counted.visits, counts };
        let mut quotas = vec![0; self.shape.ranks];
        let outcome = self.port.exchange(posted, cap, &mut quotas).unwrap();
        match outcome {
            Outcome::TimedOut => self.failures += 1,
            Outcome::Live | Outcome::Torn | Outcome::NoPlan => self.failures = 0,
            // After two calls that were not answered, or at once where the planner is gone.
            Outcome::Broken => self.failures = self.failures.max(2),
        }
        self.waited += u64::from(outcome != Outcome::Broken);
        (outcome, quotas)
    }

    fn plant(&mut self, plan: Plan, planned: &[u32]) {
        let sequence = self.sequence;
        let without_plan = match plan {
            Plan::Late => Some(previous(sequence)),
            Plan::None => Some(sequence),
            Plan::Passed | Plan::WholeAndPassed => Some(sequence.next()),
            _ => None,
        };
        // Anew each time: what was said of a later call may not be so in the next one.
        let (at, said) = (self.shape.without_plan(self.rank.rank), without_plan);
        let said = said.map_or(0, |last| word(last, 0));
        store(&self.expected.heap, at, said);
        store(&self.board, at, said);
        let nothing = [Plan::Missing, Plan::Late, Plan::None, Plan::Passed, Plan::Deserted];
        if nothing.contains(&plan) {
            return;
        }
        let start = self.shape.quotas(sequence.tag(), self.rank.rank);
        let words = planned.iter().map(|&value| word(sequence, value));
        let mut words: Vec<_> = words.enumerate().map(|(i, word)| (start + i, word)).collect();
        self.rank.random.shuffle(&mut words);
        // Behind the quotas is the fingerprint of the plan's map: the last to come, or the one that does not, more often.
        if planned.len() > self.shape.ranks && self.rank.random.rarely(3) {
            let at = start + self.shape.ranks;
            words.sort_by_key(|&(place, _)| place == at);
        }
        if plan == Plan::Partial {
            words.pop();
        }
        words.iter().for_each(|&(at, word)| store(&self.expected.heap, at, word));
        if matches!(plan, Plan::Arriving | Plan::AtLast) {
            self.arriving = words;
        } else {
            words.iter().for_each(|&(at, word)| store(&self.board, at, word));
        }
    }

    /// All ranks' words, any but this one's; and at the port's board as the kernel is to post them.
    fn gather(&mut self, posted: &[u32]) -> Vec<u32> {
        let mut gathered = Vec::new();
        for rank in 0..self.shape.ranks {
            let mut words = posted.to_vec();
            if rank != self.rank.rank {
                words.fill_with(|| self.rank.random.next() as u32);
                let start = self.shape.counts(self.sequence.tag(), rank);
                for (i, &value) in words.iter().enumerate() {
                    store(&self.expected.heap, start + i, word(self.sequence, value));
                }
            }
            gathered.extend(words);
        }
        gathered
    }

    /// At the port's board, as the kernel is to post it for all: whether this rank waits, which a wait to the cap takes back.
    fn tell_of_others(&self, waited: bool) {
        let last = |rank| self.shape.counts(self.sequence.tag(), rank) + self.shape.posted() - 1;
        // Relaxed: all in one thread.
        let own = self.expected.words()[last(self.rank.rank)].load(Ordering::Relaxed) as u32;
        let waits = u32::from(waited).max(own);
        for rank in (0..self.shape.ranks).filter(|&rank| rank != self.rank.rank) {
            store(&self.expected.heap, last(rank), word(self.sequence, waits));
        }
    }

    /// Both boards, but for the port's own figures; and the state.
    fn compares(&self) -> Checked {
        let load = |board: &Heap| -> Vec<u64> {
            board.words().iter().map(|word| word.load(Ordering::Relaxed)).collect()
        };
        let (shape, rank) = (&self.shape, self.rank.rank);
        let tally = self.port.tally().ended.0;
        let found = load(&self.board);
        let mut expected = load(&self.expected.heap);
        let without_plan = expected[shape.without_plan(rank)];
        expected[..shape.ring()].fill(0);
        expected[shape.calls_of(rank)..][..tally.len()].copy_from_slice(&tally);
        expected[shape.without_plan(rank)] = without_plan;
        expected[shape.deserted(rank)] = found[shape.deserted(rank)];
        same("the board", &found, &expected)?;
        same("the tally", &self.state.tally, &tally)?;
        let expected = [self.sequence.tag(), self.failures];
        same("sequence and failures", &[self.state.last, self.state.failures], &expected)
    }
}

fn previous(sequence: Sequence) -> Sequence {
    Sequence::from_tag(sequence.tag() - 1)
        .or(Sequence::from_tag(u32::MAX))
        .expect("neither tag is 0")
}

fn word(sequence: Sequence, value: u32) -> u64 {
    u64::from(sequence.tag()) << 32 | u64::from(value)
}

fn store(board: &Heap, at: usize, word: u64) {
    // Relaxed: all in one thread.
    board.words()[at].store(word, Ordering::Relaxed);
}
