//! Plans of any small problem against the slow, obvious optimum.
#![no_main]

use libfuzzer_sys::fuzz_target;
use waterfill_core::{CostModel, Placement, Plan, Planner, Problem, Routed, oracle};

fuzz_target!(|data: &[u8]| {
    let [ranks, mask, data @ ..] = data else { return };
    let ranks = usize::from(ranks % 6) + 1;
    if data.len() < 2 * ranks + ranks * ranks {
        return;
    }
    let take = |from: usize, n: usize| -> Vec<u32> {
        data[from..from + n].iter().map(|&byte| byte.into()).collect()
    };
    let routed = take(0, ranks);
    let tokens: Vec<u32> = take(ranks, ranks).iter().map(|n| n % 32).collect();
    let mut visits = take(2 * ranks, ranks * ranks);
    visits.iter_mut().enumerate().for_each(|(i, visit)| *visit = (*visit).min(tokens[i / ranks]));
    let mut eligible: Vec<bool> = (0..ranks).map(|rank| mask >> rank & 1 == 1).collect();
    eligible[usize::from(*mask) % ranks] = true;
    let placement = Placement::contiguous(ranks, ranks).unwrap();
    let problem = Problem {
        placement: &placement,
        cost: &CostModel::Rows,
        routed: Routed::PerExpert(&routed),
        tokens: &tokens,
        visits: Some(&visits),
        eligible: Some(&eligible),
    };
    let mut plan = Plan::new();
    Planner::new().live(&problem, &mut plan).unwrap();
    let bases: Vec<u64> = routed.iter().map(|&rows| rows.into()).collect();
    let rows = tokens.iter().map(|&n| u64::from(n)).sum();
    let best = oracle::optimum(&CostModel::Rows, &bases, &eligible, rows);
    assert_eq!(plan.optimum(), best);
    let mut quotas = vec![0; ranks];
    let mut extra = 0;
    let room: Vec<u32> = (0..ranks)
        .map(|r| if eligible[r] { (best - bases[r]).min(rows) as u32 } else { 0 })
        .collect();
    for source in 0..ranks {
        plan.quotas_of(source, &mut quotas).unwrap();
        assert_eq!(quotas.iter().sum::<u32>(), tokens[source]);
        for (rank, &quota) in quotas.iter().enumerate().filter(|&(rank, _)| rank != source) {
            extra += u64::from(quota.saturating_sub(visits[source * ranks + rank]));
        }
    }
    for (rank, &rows) in plan.shared_rows().iter().enumerate() {
        assert!(rows <= room[rank], "rank {rank} got {rows}");
    }
    assert_eq!(extra, oracle::fewest_extra_copies(&tokens, &room, &visits));
});
