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
