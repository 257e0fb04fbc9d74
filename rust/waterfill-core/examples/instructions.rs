//! One layer's work, over and over, for a counter of instructions: `instructions CASE REPETITIONS`.

use std::hint::black_box;

use waterfill_core::{
    Assigner, CostModel, Placement, Plan, Planner, Problem, Routed, Rows, RowsMut, Table, count,
};
use waterfill_testing::Random;

/// Ids `[rows, 6]`, low ones more popular, of one source; integers only, so that machines agree.
fn ids(rows: u64, experts: usize, source: u64) -> Vec<i32> {
    let mut random = Random(source * 2 + 1);
    let mut draw = || random.below(experts);
    (0..rows * 6).map(|i| if i % 4 == 0 { draw().min(draw()) } else { draw() } as i32).collect()
}

fn plan(ranks: usize, experts: usize, cost: CostModel, with_visits: bool, times: u64) {
    let placement = Placement::contiguous(ranks, experts).unwrap();
    let (mut routed, mut all_visits) = (vec![0u32; experts], Vec::new());
    let (mut counts, mut visits) = (vec![0; experts], vec![0; ranks]);
    for source in 0..ranks as u64 {
        let ids = ids(256, experts, source);
        count(&placement, &ids, 6, &mut counts, &mut visits).unwrap();
        routed.iter_mut().zip(&counts).for_each(|(sum, rows)| *sum += rows);
        all_visits.extend_from_slice(&visits);
    }
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let problem = Problem {
        placement: &placement,
        cost: &cost,
        routed: Routed::PerExpert(&routed),
        tokens: &vec![256; ranks],
        visits: with_visits.then_some(&all_visits),
        eligible: None,
    };
    for _ in 0..times {
        planner.live(black_box(&problem), &mut plan).unwrap();
    }
}

/// 32 ranks; the first 32 of 256 experts have a replica each, far from the first one.
fn joint(times: u64) {
    let logical = |p: u32| if p % 9 == 8 { p / 9 } else { p - p / 9 };
    let placement = Placement::replicated(32, &(0..288).map(logical).collect::<Vec<_>>()).unwrap();
    let mut routed = vec![0; 288];
    ids(32 * 256, 288, 0).iter().for_each(|&id| routed[id as usize] += 1);
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let problem = Problem {
        placement: &placement,
        cost: &CostModel::Rows,
        routed: Routed::PerExpert(&routed),
        tokens: &[256; 32],
        visits: None,
        eligible: None,
    };
    for _ in 0..times {
        planner.joint(black_box(&problem), &mut plan).unwrap();
    }
}

fn expand(times: u64) {
    let placement = Placement::contiguous(8, 256).unwrap();
    let ids = ids(4096, 256, 0);
    let (weights, quotas) = (vec![0.25f32; ids.len()], [128, 384, 448, 576, 608, 640, 640, 672]);
    let (mut out_ids, mut out_weights) = (vec![0; 4096 * 7], vec![0.0; 4096 * 7]);
    let mut assigner = Assigner::new();
    for _ in 0..times {
        let routed = Rows { ids: black_box(&ids), weights: &weights, top_k: 6 };
        let out = RowsMut { ids: &mut out_ids, weights: &mut out_weights };
        assigner.expand(&placement, 0, routed, &quotas, 0.4, out).unwrap();
    }
}

fn count_ids(times: u64) {
    let placement = Placement::contiguous(8, 256).unwrap();
    let ids = ids(4096, 256, 0);
    let (mut counts, mut visits) = (vec![0; 256], vec![0; 8]);
    for _ in 0..times {
        count(&placement, black_box(&ids), 6, &mut counts, &mut visits).unwrap();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, case, times] = &arguments[..] else { panic!("give CASE REPETITIONS") };
    let times = times.parse().expect("REPETITIONS is a number");
    let curve = [(256, 22.0), (512, 41.0), (768, 62.0), (1024, 82.0), (4096, 330.0)];
    match case.as_str() {
        "plan-8" => plan(8, 8, CostModel::Rows, true, times),
        "plan-72" => plan(72, 72, CostModel::Rows, true, times),
        "plan-1024" => plan(1024, 1024, CostModel::Rows, false, times),
        "plan-table-8x256" => {
            plan(8, 256, CostModel::Table(Table::new(&curve).unwrap()), false, times);
        }
        "joint-32x288" => joint(times),
        "count-4096x6" => count_ids(times),
        "expand-4096x6" => expand(times),
        other => panic!("no case {other}"),
    }
}
