//! Joint plans against the exact optimum of small problems, over every set of ranks.
#![cfg(feature = "oracle")]

use waterfill_core::{CostModel, Placement, Plan, Planner, Problem, Roofline, Routed, oracle};
use waterfill_testing::Random;

struct Case {
    placement: Placement,
    logical: Vec<u32>,
    routed: Vec<u32>,
    tokens: Vec<u32>,
    eligible: Vec<bool>,
}

impl Case {
    /// Up to 8 ranks; every logical expert somewhere, the other slots replicas of any, in any order.
    fn random(random: &mut Random, most_rows: usize) -> Self {
        let ranks = 1 + random.below(8);
        let physical = ranks * (1 + random.below(4));
        let experts = 1 + random.below(physical);
        let mut logical: Vec<u32> = (0..experts as u32).collect();
        logical.extend((experts..physical).map(|_| random.below(experts) as u32));
        random.shuffle(&mut logical);
        let mut eligible: Vec<bool> = (0..ranks).map(|_| random.below(6) > 0).collect();
        eligible[random.below(ranks)] = true;
        Self {
            placement: Placement::replicated(ranks, &logical).unwrap(),
            routed: (0..physical).map(|_| random.below(most_rows) as u32).collect(),
            tokens: (0..ranks).map(|_| random.below(most_rows) as u32).collect(),
            logical,
            eligible,
        }
    }

    fn problem<'a>(&'a self, cost: &'a CostModel) -> Problem<'a> {
        Problem {
            placement: &self.placement,
            cost,
            routed: Routed::PerExpert(&self.routed),
            tokens: &self.tokens,
            visits: None,
            eligible: Some(&self.eligible),
        }
    }

    fn rows_by_logical(&self, rows: &[u32]) -> Vec<u32> {
        let mut sums = vec![0; self.placement.logical_experts()];
        self.logical.iter().zip(rows).for_each(|(&logical, rows)| sums[logical as usize] += rows);
        sums
    }

    /// The same with the ranks listed, for more than 32 of them. All are eligible.
    fn listed_jobs(&self) -> (Vec<(u64, Vec<usize>)>, Vec<u64>) {
        let ranks = self.placement.ranks();
        let mut fixed = vec![0; ranks];
        let mut jobs =
            vec![(self.tokens.iter().map(|&n| u64::from(n)).sum(), (0..ranks).collect())];
        for expert in 0..self.placement.logical_experts() as u32 {
            let replicas = (0..self.logical.len()).filter(|&p| self.logical[p] == expert);
            let rows = replicas.clone().map(|p| u64::from(self.routed[p])).sum();
            let allowed: Vec<_> = replicas.map(|p| self.placement.rank_of(p)).collect();
            match allowed[..] {
                [rank] => fixed[rank] += rows,
                _ => jobs.push((rows, allowed)),
            }
        }
        (jobs, fixed)
    }

    /// The jobs, as rows and the ranks allowed; and each rank's rows that nobody may move.
    fn jobs(&self) -> (Vec<(u64, u32)>, Vec<u64>) {
        let ranks = self.placement.ranks();
        let mut fixed = vec![0; ranks];
        let everyone = (0..ranks).filter(|&r| self.eligible[r]).fold(0, |set, r| set | 1 << r);
        let mut jobs = vec![(self.tokens.iter().map(|&n| u64::from(n)).sum(), everyone)];
        for expert in 0..self.placement.logical_experts() as u32 {
            let at = |&p: &usize| self.logical[p] == expert;
            let replicas: Vec<usize> = (0..self.logical.len()).filter(at).collect();
            let on = |p: usize| 1 << self.placement.rank_of(p);
            let allowed = replicas.iter().fold(0, |set, &p| set | on(p)) & everyone;
            if replicas.len() == 1 || allowed == 0 {
                replicas.iter().for_each(|&p| {
                    fixed[self.placement.rank_of(p)] += u64::from(self.routed[p]);
                });
            } else {
                jobs.push((replicas.iter().map(|&p| u64::from(self.routed[p])).sum(), allowed));
            }
        }
        (jobs, fixed)
    }
}

/// Every law but the optimum.
fn check_laws(case: &Case, cost: &CostModel, plan: &Plan) {
    let split = plan.replica_rows();
    assert_eq!(case.rows_by_logical(split), case.rows_by_logical(&case.routed), "rows of experts");
    let shared: u32 = plan.shared_rows().iter().sum();
    assert_eq!(shared, case.tokens.iter().sum::<u32>());
    let per_rank = case.placement.experts_per_rank();
    let mut slowest = 0;
    for (rank, &shared) in plan.shared_rows().iter().enumerate() {
        let experts = rank * per_rank..(rank + 1) * per_rank;
        let costs = experts.clone().map(|p| cost.cost(split[p].into()));
        slowest = slowest.max(costs.sum::<u64>() + cost.cost(shared.into()));
        if !case.eligible[rank] {
            assert_eq!(shared, 0, "shared rows on ineligible rank {rank}");
            for p in experts {
                assert!(split[p] <= case.routed[p], "expert {p} gained on ineligible rank {rank}");
            }
        }
    }
    assert_eq!(plan.optimum(), slowest, "the plan ends when it says");
}

#[test]
fn is_near_the_exact_optimum_and_no_row_goes_to_a_rank_that_is_not_eligible() {
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let (mut met, mut most_over) = (0, 0);
    for seed in 0..100_000 {
        let case = Case::random(&mut Random(seed), 400);
        planner.joint(&case.problem(&CostModel::Rows), &mut plan).unwrap();
        check_laws(&case, &CostModel::Rows, &plan);
        let (jobs, fixed) = case.jobs();
        let over = plan.optimum() - oracle::joint_optimum(&jobs, &fixed);
        met += u32::from(over == 0);
        most_over = most_over.max(over);
    }
    assert!(met == 100_000, "{met} met, {most_over} rows over");
    println!("100,000 joint problems: {met} at the optimum, at most {most_over} rows over it");
}

#[test]
fn is_the_exact_optimum_of_many_ranks_in_whole_rows() {
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    for (seed, (ranks, redundant)) in
        [(8, 32), (16, 16), (16, 48), (32, 32), (64, 64)].repeat(8).into_iter().enumerate()
    {
        let random = &mut Random(seed as u64);
        let experts = 256;
        let mut logical: Vec<u32> = (0..experts).collect();
        logical.extend((0..redundant).map(|_| random.below(experts as usize) as u32));
        (1..logical.len()).for_each(|i| logical.swap(i, random.below(i + 1)));
        // Popularity falls as one over the place: the hottest expert alone is more than a rank's share.
        let most = [40, 4000][seed % 2];
        let case = Case {
            placement: Placement::replicated(ranks, &logical).unwrap(),
            routed: logical
                .iter()
                .map(|_| (most / (1 + random.below(experts as usize))) as u32)
                .collect(),
            tokens: (0..ranks).map(|_| random.below(most) as u32 / 50).collect(),
            logical,
            eligible: vec![true; ranks],
        };
        planner.joint(&case.problem(&CostModel::Rows), &mut plan).unwrap();
        check_laws(&case, &CostModel::Rows, &plan);
        let (jobs, fixed) = case.listed_jobs();
        assert_eq!(plan.optimum(), oracle::joint_optimum_by_flow(&jobs, &fixed), "seed {seed}");
    }
}

#[test]
fn is_never_slower_than_shared_rows_alone() {
    let (mut planner, mut joint, mut live) = (Planner::new(), Plan::new(), Plan::new());
    let roofline = CostModel::Roofline(Roofline::new(20.0, 0.08, 64).unwrap());
    let mut worse = [0, 0];
    for seed in 0..20_000 {
        let mut case = Case::random(&mut Random(seed), 400);
        // Rows on a rank that is not eligible stay there in one plan and leave it in the other.
        case.eligible.fill(true);
        for (index, cost) in [&CostModel::Rows, &roofline].into_iter().enumerate() {
            planner.joint(&case.problem(cost), &mut joint).unwrap();
            planner.live(&case.problem(cost), &mut live).unwrap();
            check_laws(&case, cost, &joint);
            worse[index] += u32::from(joint.optimum() > live.optimum());
        }
    }
    assert_eq!(worse, [0, 0]);
}

/// How many of each rank's experts have rows, at most.
fn most_active(case: &Case, rows: &[u32]) -> u64 {
    let active = |experts: &[u32]| experts.iter().filter(|&&rows| rows > 0).count() as u64;
    rows.chunks(case.placement.experts_per_rank()).map(active).max().unwrap()
}

#[test]
fn one_replica_an_expert_has_the_fewest_active_experts_and_costs_little_more_than_the_least() {
    let cost = CostModel::Roofline(Roofline::new(20.0, 0.4, 32).unwrap());
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let (mut met, mut worst, mut over, mut seeds) = (0, 1.0f64, 0, 0);
    for seed in 0..100_000 {
        let mut case = Case::random(&mut Random(seed), 60);
        case.tokens.fill(0);
        case.eligible.fill(true);
        let (mut jobs, mut fixed) = (Vec::new(), vec![(0, 0); case.placement.ranks()]);
        for expert in 0..case.placement.logical_experts() as u32 {
            let replicas = (0..case.logical.len()).filter(|&p| case.logical[p] == expert);
            let rows: u64 = replicas.clone().map(|p| u64::from(case.routed[p])).sum();
            let allowed = replicas.fold(0u32, |set, p| set | 1 << case.placement.rank_of(p));
            if rows > 0 && allowed.count_ones() == 1 {
                let held = &mut fixed[allowed.trailing_zeros() as usize];
                *held = (held.0 + 1, held.1 + cost.cost(rows));
            } else if rows > 0 {
                jobs.push((cost.cost(rows), allowed));
            }
        }
        if jobs.iter().map(|job| f64::from(job.1.count_ones()).log2()).sum::<f64>() > 13.0 {
            continue;
        }
        seeds += 1;
        planner.single_replica(&case.problem(&cost), &mut plan).unwrap();
        check_laws(&case, &cost, &plan);
        let (active, least) = oracle::single_replica_optimum(&jobs, &fixed);
        assert_eq!(most_active(&case, plan.replica_rows()), active, "seed {seed}");
        let ratio = plan.optimum() as f64 / least as f64;
        over += u32::from(ratio > 1.02);
        worst = worst.max(ratio);
        met += u32::from(plan.optimum() == least);
    }
    println!("{seeds} problems: {met} at the least cost, {over} over 2%, at most {worst:.4}");
    assert!(worst <= 1.02);
}
