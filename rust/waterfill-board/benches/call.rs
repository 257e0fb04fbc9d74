//! One call of all ranks, one after the other in one thread: the work without its waits.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use waterfill_board::{BoardPlanner, Heap, Outcome, Port, Posted, Shape};
use waterfill_core::{CostModel, ReplicaTable};
use waterfill_testing::Random;

const LONG: Duration = Duration::from_secs(60);

fn calls(criterion: &mut Criterion) {
    for (ranks, experts) in
        [(2, 2), (2, 256), (8, 8), (8, 256), (16, 16), (32, 32), (64, 64), (64, 256)]
    {
        let shape = Shape::new(ranks, experts).unwrap();
        let board = Arc::new(Heap::new(shape));
        let port = |rank| Port::new(Arc::clone(&board), shape, CostModel::Rows, rank).unwrap();
        let mut ports: Vec<_> = (0..ranks).map(port).collect();
        let mut planner =
            BoardPlanner::new(Arc::clone(&board), shape, CostModel::Rows, LONG).unwrap();
        let counts: Vec<Vec<u32>> = (0..ranks)
            .map(|rank| (0..experts).map(|e| ((e * 37 + rank * 101) % 97) as u32).collect())
            .collect();
        let (visits, mut quotas) = (vec![90; ranks], vec![0; ranks]);
        let posted = |rank: usize| Posted { tokens: 256, visits: &visits, counts: &counts[rank] };
        criterion.bench_function(&format!("call/{ranks}x{experts}"), |b| {
            b.iter(|| {
                for (rank, port) in ports.iter_mut().enumerate() {
                    port.post(black_box(posted(rank))).unwrap();
                }
                assert!(planner.poll());
                for (rank, port) in ports.iter_mut().enumerate() {
                    let outcome = port.finish(posted(rank), LONG, &mut quotas).unwrap();
                    assert_eq!(outcome, Outcome::Live);
                }
            });
        });
    }
}

/// The same with redundant experts: each rank's last ones are replicas of experts of the next rank.
fn calls_with_replicas(criterion: &mut Criterion) {
    for (ranks, logical, redundant, most) in [
        (4, 64, 16, 3),
        (4, 64, 16, 1200),
        (4, 256, 32, 3),
        (4, 256, 32, 1200),
        (8, 256, 32, 3),
        (8, 256, 32, 1200),
        (32, 256, 32, 3),
        (32, 256, 32, 1200),
        (64, 256, 64, 3),
        (64, 256, 64, 1200),
    ] {
        let experts = logical + redundant;
        let (own, more) = (logical / ranks, redundant / ranks);
        let expert = |physical: usize| {
            let (rank, place) = (physical / (own + more), physical % (own + more));
            let of = if place < own { rank } else { (rank + 1) % ranks };
            (of * own + place % own) as u32
        };
        let map: Vec<u32> = (0..experts).map(expert).collect();
        let table = Arc::new(ReplicaTable::new(ranks, &map).unwrap());
        let shape = Shape::with_redundant(ranks, experts, redundant).unwrap();
        let board = Arc::new(Heap::new(shape));
        let port = |rank| Port::new(Arc::clone(&board), shape, CostModel::Rows, rank).unwrap();
        let mut ports: Vec<_> = (0..ranks).map(port).collect();
        let mut planner =
            BoardPlanner::new(Arc::clone(&board), shape, CostModel::Rows, LONG).unwrap();
        planner.set_map(0, Arc::clone(&table));
        ports.iter_mut().for_each(|port| port.set_table(Some(&table)).unwrap());
        // Rows of a source for an expert; low experts are popular.
        let mut random = Random(1);
        let counts: Vec<Vec<u32>> = (0..ranks)
            .map(|_| {
                let mut popular =
                    |e: usize| random.below(most * 8 * logical / (ranks * (e + 32)) + 1);
                (0..experts).map(|p| popular(map[p] as usize) as u32).collect()
            })
            .collect();
        let (visits, mut quotas) = (vec![0; ranks], vec![0; ranks]);
        let posted = |rank: usize| Posted { tokens: 0, visits: &visits, counts: &counts[rank] };
        let kind = if most < 100 { "decode" } else { "prefill" };
        let name = format!("call/{ranks}x{logical}+{redundant}-{kind}");
        // The planner's part alone: a poll plans, and posting for the next call is not timed.
        criterion.bench_function(&name, |b| {
            b.iter_custom(|times| {
                let mut planned = Duration::ZERO;
                for _ in 0..times {
                    for (rank, port) in ports.iter_mut().enumerate() {
                        port.post(black_box(posted(rank))).unwrap();
                    }
                    let begun = Instant::now();
                    assert!(planner.poll());
                    planned += begun.elapsed();
                    for (rank, port) in ports.iter_mut().enumerate() {
                        let outcome = port.finish(posted(rank), LONG, &mut quotas).unwrap();
                        assert_eq!(outcome, Outcome::Live);
                    }
                }
                planned
            });
        });
    }
}

criterion_group!(benches, calls, calls_with_replicas);
criterion_main!(benches);
