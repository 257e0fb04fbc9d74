//! One call of all ranks, one after the other in one thread: the work without its waits.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use waterfill_board::{BoardPlanner, Heap, Outcome, Port, Posted, Shape};
use waterfill_core::CostModel;

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

criterion_group!(benches, calls);
criterion_main!(benches);
