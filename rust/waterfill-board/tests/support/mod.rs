//! What ranks post in a call, and the plan that must come of it.
#![allow(dead_code, reason = "no test uses all of it")]

pub mod process;

#[cfg(not(any(loom, shuttle)))]
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(not(any(loom, shuttle)))]
use waterfill_board::{End, Presence, Region};
use waterfill_board::{Posted, Shape};
use waterfill_core::{CostModel, Placement, Plan, Planner, Problem, Routed};
use waterfill_testing::Random;

pub const COST: CostModel = CostModel::Rows;

/// A board in memory at which ranks and planner leave when a test says so.
#[cfg(not(any(loom, shuttle)))]
pub struct Watched {
    heap: waterfill_board::Heap,
    ranks: Vec<AtomicBool>,
    planner: AtomicBool,
}

#[cfg(not(any(loom, shuttle)))]
impl Watched {
    pub fn new(shape: Shape) -> Self {
        let ranks = (0..shape.ranks).map(|_| AtomicBool::new(false)).collect();
        Self { heap: waterfill_board::Heap::new(shape), ranks, planner: AtomicBool::new(false) }
    }

    pub fn leave(&self, end: End) {
        self.has_left(end).store(true, Ordering::SeqCst);
    }

    pub fn come_back(&self, end: End) {
        self.has_left(end).store(false, Ordering::SeqCst);
    }

    fn has_left(&self, end: End) -> &AtomicBool {
        match end {
            End::Rank(rank) => &self.ranks[rank],
            End::Planner => &self.planner,
        }
    }
}

#[cfg(not(any(loom, shuttle)))]
impl Region for Watched {
    fn words(&self) -> &[AtomicU64] {
        self.heap.words()
    }

    fn presence(&self, end: End) -> Presence {
        let left = self.has_left(end).load(Ordering::SeqCst);
        if left { Presence::Gone } else { Presence::Here }
    }
}

/// `few` in the tests, `many` under `make soak`.
pub fn count(few: u32, many: u32) -> u32 {
    if std::env::var_os("WATERFILL_SOAK").is_some() { many } else { few }
}

/// What a rank posts in a call, from a generator seeded with both; some ranks are idle now and then.
pub struct Batch {
    pub tokens: u32,
    pub visits: Vec<u32>,
    pub counts: Vec<u32>,
}

impl Batch {
    pub fn new(shape: Shape, rank: usize, call: u64) -> Self {
        let mut random = Random((rank as u64) << 32 | call);
        let mut draw = |below: u32| random.below(below as usize) as u32;
        let tokens = if draw(5) == 0 { 0 } else { draw(300) };
        let visits = (0..shape.ranks).map(|_| draw(tokens + 1)).collect();
        let most = tokens * 2 + 1;
        Self { tokens, visits, counts: (0..shape.experts).map(|_| draw(most)).collect() }
    }

    pub fn posted(&self) -> Posted<'_> {
        Posted { tokens: self.tokens, visits: &self.visits, counts: &self.counts }
    }

    fn nothing(shape: Shape) -> Self {
        Self { tokens: 0, visits: vec![0; shape.ranks], counts: vec![0; shape.experts] }
    }
}

/// The core's plan of a call in which everybody posted.
pub fn expected(shape: Shape, call: u64, rank: usize) -> Vec<u32> {
    expected_with(shape, call, rank, &vec![true; shape.ranks])
}

/// The core's plan of a call in which `there` posted.
pub fn expected_with(shape: Shape, call: u64, rank: usize, there: &[bool]) -> Vec<u32> {
    let placement = Placement::contiguous(shape.ranks, shape.experts).unwrap();
    let batch = |rank| {
        if there[rank] { Batch::new(shape, rank, call) } else { Batch::nothing(shape) }
    };
    let batches: Vec<Batch> = (0..shape.ranks).map(batch).collect();
    let routed: Vec<u32> =
        (0..shape.experts).map(|e| batches.iter().map(|b| b.counts[e]).sum()).collect();
    let tokens: Vec<u32> = batches.iter().map(|b| b.tokens).collect();
    let visits: Vec<u32> = batches.iter().flat_map(|b| b.visits.clone()).collect();
    let problem = Problem {
        placement: &placement,
        cost: &COST,
        routed: Routed::PerExpert(&routed),
        tokens: &tokens,
        visits: Some(&visits),
        eligible: Some(there),
    };
    let (mut plan, mut quotas) = (Plan::new(), vec![0; shape.ranks]);
    Planner::new().live(&problem, &mut plan).unwrap();
    plan.quotas_of(rank, &mut quotas).unwrap();
    quotas
}
