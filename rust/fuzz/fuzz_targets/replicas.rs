//! Replicas of any small layer: the split is the optimum, the parts of the sources add up, ids keep their experts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use waterfill_core::{
    CostModel, Plan, Planner, Problem, ReplicaCounts, ReplicaQuotas, ReplicaTable, Routed,
    choose_replicas, oracle,
};

fuzz_target!(|data: &[u8]| {
    let [ranks, each, top_k, data @ ..] = data else { return };
    let (ranks, each) = (usize::from(ranks % 5) + 1, usize::from(each % 4) + 1);
    let (physical, top_k) = (ranks * each, usize::from(top_k % 4) + 1);
    if data.len() < physical + ranks {
        return;
    }
    let (map, data) = data.split_at(physical);
    let (tokens, data) = data.split_at(ranks);
    let logical: Vec<u32> = map.iter().map(|&byte| u32::from(byte) % physical as u32).collect();
    let Ok(table) = ReplicaTable::new(ranks, &logical) else { return };
    // The ids of each source; some name no expert.
    let rows = data.len() / top_k / ranks;
    let id = |&byte: &u8| if byte == u8::MAX { -1 } else { i32::from(byte) % physical as i32 };
    let ids: Vec<Vec<i32>> = (0..ranks)
        .map(|rank| data[rank * rows * top_k..][..rows * top_k].iter().map(id).collect())
        .collect();
    let mut counts = vec![0; ranks * physical];
    for (source, ids) in ids.iter().enumerate() {
        ids.iter()
            .filter(|&&id| id >= 0)
            .for_each(|&id| counts[source * physical + id as usize] += 1);
    }
    let routed: Vec<u32> =
        (0..physical).map(|expert| counts.iter().skip(expert).step_by(physical).sum()).collect();
    let tokens: Vec<u32> = tokens.iter().map(|&byte| byte.into()).collect();
    let placement = table.placement();
    let problem = Problem {
        placement,
        cost: &CostModel::Rows,
        routed: Routed::PerExpert(&routed),
        tokens: &tokens,
        visits: None,
        eligible: None,
    };
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    planner.joint(&problem, &mut plan).unwrap();
    let everyone = (1u32 << ranks) - 1;
    let mut jobs = vec![(tokens.iter().map(|&n| u64::from(n)).sum(), everyone)];
    let fixed = vec![0; ranks];
    for expert in 0..placement.logical_experts() as u32 {
        let replicas = (0..physical).filter(|&p| logical[p] == expert);
        let rows: u64 = replicas.clone().map(|p| u64::from(routed[p])).sum();
        let allowed = replicas.fold(0u32, |set, p| set | 1 << placement.rank_of(p));
        jobs.push((rows, allowed));
    }
    let best = oracle::joint_optimum(&jobs, &fixed);
    assert_eq!(plan.optimum(), best);

    planner.replicas(&problem, &mut plan).unwrap();
    let (mut quotas, mut of_source, mut jobs) =
        (ReplicaQuotas::new(), ReplicaCounts::new(), Vec::new());
    for (source, counts) in counts.chunks_exact(physical).enumerate() {
        of_source.reduce(placement, counts).unwrap();
        jobs.extend_from_slice(of_source.jobs());
        jobs.resize((source + 1) * table.redundant(), 0);
    }
    quotas.divide(&table, &jobs, plan.replica_rows()).unwrap();
    let mut sums = vec![0; physical];
    for (source, given) in ids.iter().enumerate() {
        let mut chosen = given.clone();
        choose_replicas(&table, quotas.of(source), &mut chosen, top_k).unwrap();
        for (&before, &after) in given.iter().zip(&chosen) {
            assert_eq!(before < 0, after < 0);
            if before >= 0 {
                assert_eq!(logical[before as usize], logical[after as usize]);
                sums[after as usize] += 1;
            }
        }
    }
    assert_eq!(sums, plan.replica_rows());
});
