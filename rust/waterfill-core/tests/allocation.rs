//! A call that reuses its workspace allocates nothing.

use waterfill_core::{
    Assigner, CostModel, Error, Expander, OwnCounts, OwnPlanner, Placement, Plan, Planner, Problem,
    ReplicaCounts, ReplicaQuotas, ReplicaTable, Roofline, Routed, Rows, RowsMut, Table, count,
};
use waterfill_testing::{Counting, allocations};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Two experts a rank; the last expert of each rank is a replica of the next rank's first.
fn pairs(ranks: usize) -> Vec<u32> {
    (0..2 * ranks as u32).map(|p| p.div_ceil(2) % ranks as u32).collect()
}

#[test]
fn second_calls_allocate_nothing() {
    let roofline = CostModel::Roofline(Roofline::new(20.0, 0.08, 64).unwrap());
    let table = CostModel::Table(Table::new(&[(16, 20.0), (256, 41.0)]).unwrap());
    for ranks in [1, 8, 72] {
        let placement = Placement::replicated(ranks, &pairs(ranks)).unwrap();
        let ids: Vec<i32> = (0..600).map(|i| i * i % 37 % (2 * ranks as i32)).collect();
        let (mut counts, mut visits) = (vec![0; 2 * ranks], vec![0; ranks]);
        let tokens = count(&placement, &ids, 6, &mut counts, &mut visits).unwrap();
        let all_visits = visits.repeat(ranks);
        let (mut planner, mut plan) = (Planner::new(), Plan::new());
        let (mut own_planner, mut assigner) = (OwnPlanner::new(), Assigner::new());
        let mut quotas = vec![0; ranks];
        let weights = vec![0.5f32; ids.len()];
        let (mut out_ids, mut out_weights) = (vec![0; 700], vec![0.0; 700]);
        for cost in [&CostModel::Rows, &roofline, &table] {
            let mut expander = Expander::new(placement.clone(), cost.clone(), 0).unwrap();
            let mut layer = || {
                let every = [tokens; 72];
                let problem = Problem {
                    placement: &placement,
                    cost,
                    routed: Routed::PerExpert(&counts),
                    tokens: &every[..ranks],
                    visits: Some(&all_visits),
                    eligible: None,
                };
                planner.joint(&problem, &mut plan).unwrap();
                planner.single_replica(&problem, &mut plan).unwrap();
                planner.live(&problem, &mut plan).unwrap();
                let own = OwnCounts {
                    placement: &placement,
                    cost,
                    source: 0,
                    routed: &counts,
                    visits: &visits,
                    tokens,
                };
                own_planner.plan(&own, &mut quotas).unwrap();
                plan.quotas_of(0, &mut quotas).unwrap();
                let routed = Rows { ids: &ids, weights: &weights, top_k: 6 };
                let out = RowsMut { ids: &mut out_ids, weights: &mut out_weights };
                assigner.expand(&placement, 0, routed, &quotas, 0.4, out).unwrap();
                let out = RowsMut { ids: &mut out_ids, weights: &mut out_weights };
                let home = |own: &OwnCounts, quotas: &mut [u32]| {
                    quotas[0] = own.tokens;
                    Ok::<(), Error>(())
                };
                expander.expand(routed, 0.4, out, home).unwrap();
            };
            layer();
            assert_eq!(allocations(&mut layer), 0, "{ranks} ranks, {cost:?}");
        }
    }
}

#[test]
fn second_plans_of_replicas_allocate_nothing() {
    let roofline = CostModel::Roofline(Roofline::new(20.0, 0.08, 64).unwrap());
    for ranks in [1, 8, 72] {
        let table = ReplicaTable::new(ranks, &pairs(ranks)).unwrap();
        let placement = table.placement();
        let tokens = vec![50; ranks];
        // Rows that stay together, rows for which both ways are tried, and rows that are split.
        for most in [20, 600, 9000] {
            let (mut planner, mut plan) = (Planner::new(), Plan::new());
            let (mut reduced, mut quotas) = (ReplicaCounts::new(), ReplicaQuotas::new());
            let rows: Vec<u32> = (0..2 * ranks as u32).map(|i| i * i * most % 37 + most).collect();
            let mut layer = || {
                let problem = Problem {
                    placement,
                    cost: &roofline,
                    routed: Routed::PerExpert(&rows),
                    tokens: &tokens,
                    visits: None,
                    eligible: None,
                };
                planner.replicas(&problem, &mut plan).unwrap();
                reduced.reduce(placement, &rows).unwrap();
                let (cost, routed) = (&CostModel::Rows, Routed::Reduced(&reduced));
                planner.replicas(&Problem { cost, routed, ..problem }, &mut plan).unwrap();
                // As many jobs as redundant experts. All rows are of one source.
                let mut jobs = [0; 72 * 72];
                jobs[..ranks].copy_from_slice(reduced.jobs());
                quotas.divide(&table, &jobs[..ranks * ranks], plan.replica_rows()).unwrap();
            };
            layer();
            assert_eq!(allocations(&mut layer), 0, "{ranks} ranks, {most} rows an expert");
        }
    }
}

/// A way to plan that a [`Planner`] has.
type Way = fn(&mut Planner, &Problem, &mut Plan) -> Result<(), Error>;

#[test]
fn plans_after_the_least_one_allocate_nothing() {
    let table = CostModel::Table(Table::new(&[(16, 20.0), (256, 41.0)]).unwrap());
    let ways: [Way; 4] =
        [Planner::live, Planner::joint, Planner::single_replica, Planner::replicas];
    for ranks in [3, 8, 72] {
        let placement = Placement::replicated(ranks, &pairs(ranks)).unwrap();
        for cost in [&CostModel::Rows, &table] {
            for has_visits in [false, true] {
                for way in ways {
                    plan_after_the_least_one(&placement, cost, has_visits, way);
                }
            }
        }
    }
}

/// In the first plan one rank alone is eligible and nobody has a token; later ones move as many rows as they can.
fn plan_after_the_least_one(placement: &Placement, cost: &CostModel, has_visits: bool, way: Way) {
    let ranks = placement.ranks();
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let mut found = |rows: &[u32], tokens: &[u32], visits: &[u32], eligible: Option<&[bool]>| {
        let (routed, visits) = (Routed::PerExpert(rows), has_visits.then_some(visits));
        let problem = Problem { placement, cost, routed, tokens, visits, eligible };
        allocations(|| way(&mut planner, &problem, &mut plan).unwrap())
    };
    let mut eligible = vec![false; ranks];
    eligible[0] = true;
    let mut tokens = vec![0; ranks];
    found(&vec![0; 2 * ranks], &tokens, &vec![0; ranks * ranks], Some(&eligible));
    // Rows that stay together, rows for which both ways are tried, and rows that are split.
    for most in [20, 600, 9000] {
        let rows: Vec<u32> = (0..2 * ranks as u32).map(|i| i * i % 37 * most / 37).collect();
        // The tokens of one rank go to all others, then those of more.
        for (source, more) in [(0, 9000), (1, 50), (ranks - 1, 600)] {
            tokens[source] = more;
            let part = |cell: usize| tokens[cell / ranks] * (cell as u32 % 3) / 3;
            let visits: Vec<u32> = (0..ranks * ranks).map(part).collect();
            let found = found(&rows, &tokens, &visits, None);
            assert_eq!(found, 0, "{ranks} ranks, {cost:?}, {most} rows, {tokens:?}, {has_visits}");
        }
    }
}

#[test]
fn own_quotas_after_the_least_ones_allocate_nothing() {
    let roofline = CostModel::Roofline(Roofline::new(20.0, 0.08, 64).unwrap());
    for ranks in [3, 8, 72] {
        let placement = Placement::contiguous(ranks, 2 * ranks).unwrap();
        for cost in [&CostModel::Rows, &roofline] {
            let (mut planner, mut quotas) = (OwnPlanner::new(), vec![0; ranks]);
            let mut found = |routed: &[u32], tokens| {
                let visits = &vec![tokens / 2; ranks];
                let own =
                    OwnCounts { placement: &placement, cost, source: 0, routed, visits, tokens };
                allocations(|| planner.plan(&own, &mut quotas).unwrap())
            };
            // At first nothing is worth moving.
            found(&vec![0; 2 * ranks], 0);
            let rows: Vec<u32> = (0..2 * ranks as u32).map(|i| 40 * (i % 7)).collect();
            assert_eq!(found(&rows, 600), 0, "{ranks} ranks, {cost:?}");
            assert!(quotas[0] < 600, "some are moved: {quotas:?}");
        }
    }
}
