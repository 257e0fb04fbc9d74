//! What one layer's decision takes: plan, assign, expand. Workspaces are reused, as in serving.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use waterfill_core::{
    Assigner, CostModel, Placement, Plan, Planner, Problem, Routed, Rows, RowsMut, Table, count,
};
use waterfill_testing::Random;

/// Ids `[rows, 6]` of one source; squaring makes low ids popular.
fn ids(rows: u64, experts: u64, source: u64) -> Vec<i32> {
    let mut random = Random(source);
    let mut draw = || random.below(1000) as f64 / 1000.0;
    (0..rows * 6).map(|_| (draw().powf(1.15) * experts as f64) as i32).collect()
}

/// One layer of `ranks` sources with `rows` tokens each.
struct Layer {
    placement: Placement,
    cost: CostModel,
    routed: Vec<u32>,
    tokens: Vec<u32>,
    visits: Option<Vec<u32>>,
}

impl Layer {
    fn new(placement: Placement, cost: CostModel, rows: u32, with_visits: bool) -> Self {
        let (ranks, experts) = (placement.ranks(), placement.physical_experts());
        let (mut routed, mut all_visits) = (vec![0; experts], Vec::new());
        let (mut counts, mut visits) = (vec![0; experts], vec![0; ranks]);
        for source in 0..ranks as u64 {
            let ids = ids(rows.into(), experts as u64, source);
            count(&placement, &ids, 6, &mut counts, &mut visits).unwrap();
            routed.iter_mut().zip(&counts).for_each(|(sum, n)| *sum += n);
            all_visits.extend_from_slice(&visits);
        }
        let visits = with_visits.then_some(all_visits);
        Self { placement, cost, routed, tokens: vec![rows; ranks], visits }
    }

    fn problem(&self) -> Problem<'_> {
        Problem {
            placement: &self.placement,
            cost: &self.cost,
            routed: Routed::PerExpert(&self.routed),
            tokens: &self.tokens,
            visits: self.visits.as_deref(),
            eligible: None,
        }
    }
}

fn plans(criterion: &mut Criterion) {
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    for (ranks, with_visits) in [(8, false), (8, true), (72, false), (72, true), (1024, false)] {
        let placement = Placement::contiguous(ranks, ranks).unwrap();
        let layer = Layer::new(placement, CostModel::Rows, 256, with_visits);
        let name = format!("plan/{ranks}{}", if with_visits { "+visits" } else { "" });
        criterion.bench_function(&name, |b| {
            b.iter(|| planner.live(black_box(&layer.problem()), &mut plan).unwrap());
        });
    }
    let curve = [(256, 22.0), (512, 41.0), (768, 62.0), (1024, 82.0), (4096, 330.0)];
    let table = CostModel::Table(Table::new(&curve).unwrap());
    let layer = Layer::new(Placement::contiguous(8, 256).unwrap(), table, 256, false);
    criterion.bench_function("plan/table-8x256", |b| {
        b.iter(|| planner.live(black_box(&layer.problem()), &mut plan).unwrap());
    });
    // The 32 most popular of 256 experts have a replica each, far from the first one.
    let map: Vec<u32> = (0..288u32).map(|p| if p % 9 == 8 { p / 9 } else { p - p / 9 }).collect();
    let placement = Placement::replicated(32, &map).unwrap();
    let layer = Layer::new(placement, CostModel::Rows, 256, false);
    criterion.bench_function("joint/32+32", |b| {
        b.iter(|| planner.joint(black_box(&layer.problem()), &mut plan).unwrap());
    });
}

fn expansion(criterion: &mut Criterion) {
    const ROWS: usize = 4096;
    let placement = Placement::contiguous(8, 256).unwrap();
    let layer = Layer::new(placement.clone(), CostModel::Rows, ROWS as u32, true);
    let mut plan = Plan::new();
    Planner::new().live(&layer.problem(), &mut plan).unwrap();
    let mut quotas = vec![0; 8];
    plan.quotas_of(0, &mut quotas).unwrap();
    let ids = ids(ROWS as u64, 256, 0);
    let weights = vec![0.25f32; ids.len()];
    let (mut out_ids, mut out_weights) = (vec![0; ROWS * 7], vec![0.0; ROWS * 7]);
    let mut assigner = Assigner::new();
    criterion.bench_function("assign+expand/4096x6", |b| {
        b.iter(|| {
            let routed = Rows { ids: black_box(&ids), weights: &weights, top_k: 6 };
            let out = RowsMut { ids: &mut out_ids, weights: &mut out_weights };
            assigner.expand(&placement, 0, routed, &quotas, 0.4, out).unwrap();
        });
    });
}

criterion_group!(benches, plans, expansion);
criterion_main!(benches);
