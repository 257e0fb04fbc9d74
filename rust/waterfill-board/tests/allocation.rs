//! A poll of the planner and a rank's end of a call allocate nothing once they have seen as large a layer.
#![cfg(not(any(loom, shuttle)))]

use std::sync::Arc;
use std::time::Duration;

use waterfill_board::{BoardPlanner, Heap, Outcome, Port, Posted, Shape};
use waterfill_core::{CostModel, ReplicaAssigner, ReplicaTable};
use waterfill_testing::{Counting, Random, allocations};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LONG: Duration = Duration::from_secs(60);
const TOP_K: usize = 6;
/// The first calls are one of each kind.
const KINDS: usize = 5;

/// All ranks of a board and its planner in one thread.
struct Ranks {
    planner: BoardPlanner<Arc<Heap>>,
    ports: Vec<Port<Arc<Heap>>>,
    quotas: Vec<u32>,
    assigner: ReplicaAssigner,
}

/// What one rank has: ids `[N, TOP_K]`, its rows for each physical expert, its tokens, its visits.
struct Batch {
    ids: Vec<i32>,
    counts: Vec<u32>,
    tokens: u32,
    visits: Vec<u32>,
}

impl Batch {
    /// Up to `most` tokens by chance; low experts are popular. Now and then a rank is idle.
    fn new(shape: Shape, most: usize, random: &mut Random) -> Self {
        let tokens = if random.rarely(6) { 0 } else { random.below(most) };
        let mut popular = || {
            let bound = random.below(shape.experts) + 1;
            random.below(bound)
        };
        let ids: Vec<i32> = (0..tokens * TOP_K).map(|_| popular() as i32).collect();
        let mut counts = vec![0; shape.experts];
        ids.iter().for_each(|&id| counts[id as usize] += 1);
        let visits = (0..shape.ranks).map(|_| random.below(tokens + 1) as u32).collect();
        Self { ids, counts, tokens: tokens as u32, visits }
    }

    fn posted(&self) -> Posted<'_> {
        Posted { tokens: self.tokens, visits: &self.visits, counts: &self.counts }
    }
}

impl Ranks {
    fn new(shape: Shape) -> Self {
        let board = Arc::new(Heap::new(shape));
        let cost = CostModel::Rows;
        let port = |rank| Port::new(Arc::clone(&board), shape, cost.clone(), rank).unwrap();
        Self {
            ports: (0..shape.ranks).map(port).collect(),
            planner: BoardPlanner::new(board, shape, cost.clone(), LONG).unwrap(),
            quotas: vec![0; shape.ranks],
            assigner: ReplicaAssigner::new(),
        }
    }

    /// One call, by the table that each rank has. A rank names replicas in its batch where the plan chose them.
    fn call<'a>(
        &mut self,
        batches: &mut [Batch],
        table_of: impl Fn(usize) -> Option<&'a Arc<ReplicaTable>>,
    ) {
        self.post(batches, &table_of);
        assert!(self.planner.poll());
        for (rank, (port, batch)) in self.ports.iter_mut().zip(batches).enumerate() {
            let outcome = port.finish(batch.posted(), LONG, &mut self.quotas).unwrap();
            assert_eq!(outcome, Outcome::Live);
            if let Some((table, quotas)) = table_of(rank).zip(port.replica_quotas()) {
                self.assigner.assign(table, quotas, &mut batch.ids, TOP_K).unwrap();
            }
        }
    }

    /// One call that the planner answers when all ranks have given up.
    fn call_in_vain(&mut self, batches: &[Batch]) {
        self.post(batches, |_| None);
        for (port, batch) in self.ports.iter_mut().zip(batches) {
            let outcome = port.finish(batch.posted(), Duration::ZERO, &mut self.quotas).unwrap();
            assert_eq!(outcome, Outcome::TimedOut);
        }
        assert!(self.planner.poll());
    }

    fn post<'a>(
        &mut self,
        batches: &[Batch],
        table_of: impl Fn(usize) -> Option<&'a Arc<ReplicaTable>>,
    ) {
        for (rank, (port, batch)) in self.ports.iter_mut().zip(batches).enumerate() {
            port.set_table(table_of(rank)).unwrap();
            port.post(batch.posted()).unwrap();
        }
    }
}

/// Layers with the last experts of each rank replicas of `shift` ranks further.
fn table(ranks: usize, logical: usize, redundant: usize, shift: usize) -> Arc<ReplicaTable> {
    let (own, more) = (logical / ranks, redundant / ranks);
    let expert = |physical: usize| {
        let (rank, place) = (physical / (own + more), physical % (own + more));
        let of = if place < own { rank } else { (rank + shift) % ranks };
        (of * own + place % own) as u32
    };
    let map: Vec<u32> = (0..ranks * (own + more)).map(expert).collect();
    Arc::new(ReplicaTable::new(ranks, &map).unwrap())
}

#[test]
fn calls_without_replicas_allocate_nothing() {
    for (ranks, experts) in [(4, 4), (4, 64), (32, 256)] {
        let shape = Shape::new(ranks, experts).unwrap();
        let (mut all, mut random) = (Ranks::new(shape), Random(1));
        for call in 0..40 {
            let mut batches: Vec<_> =
                (0..ranks).map(|_| Batch::new(shape, 600, &mut random)).collect();
            let found = allocations(|| match call % 2 {
                0 => all.call(&mut batches, |_| None),
                _ => all.call_in_vain(&batches),
            });
            assert!(call < KINDS || found == 0, "{found} in call {call} of {shape:?}");
        }
    }
}

#[test]
fn calls_with_replicas_allocate_nothing() {
    for (ranks, logical, redundant) in [(3, 6, 3), (4, 64, 16), (8, 256, 32), (32, 256, 32)] {
        let shape = Shape::with_redundant(ranks, logical + redundant, redundant).unwrap();
        let tables = [1, ranks - 1].map(|shift| table(ranks, logical, redundant, shift));
        for most in [8, 100, 2000] {
            let (mut all, mut random) = (Ranks::new(shape), Random(most as u64));
            all.planner.set_map(0, Arc::clone(&tables[0]));
            all.planner.set_map(5, Arc::clone(&tables[1]));
            for call in 0..40 {
                let mut batches: Vec<_> =
                    (0..ranks).map(|_| Batch::new(shape, most, &mut random)).collect();
                // Both layers, a layer without replicas, ranks with maps that differ, a planner that is late.
                let found = allocations(|| match call % KINDS {
                    layer @ (0 | 1) => all.call(&mut batches, |_| Some(&tables[layer])),
                    2 => all.call(&mut batches, |_| None),
                    3 => all.call(&mut batches, |rank| Some(&tables[rank % 2])),
                    _ => all.call_in_vain(&batches),
                });
                assert!(call < KINDS || found == 0, "{found} in call {call} of {shape:?}, {most}");
            }
            assert_eq!(all.planner.published().replicas, 16);
        }
    }
}
