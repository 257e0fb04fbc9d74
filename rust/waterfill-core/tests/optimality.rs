//! The plan equals an oracle that shares no code with it, on a hundred thousand random problems.
#![cfg(feature = "oracle")]

use waterfill_core::{
    CostModel, Placement, Plan, Planner, Problem, Roofline, Routed, Table, oracle,
};
use waterfill_testing::Random;

/// Mostly small, sometimes far larger: skew.
fn skewed(random: &mut Random, n: usize) -> u32 {
    let scale = 1 + random.below(n);
    (random.below(scale) * if random.rarely(8) { 8 } else { 1 }) as u32
}

struct Case {
    placement: Placement,
    cost: CostModel,
    routed: Vec<u32>,
    tokens: Vec<u32>,
    visits: Option<Vec<u32>>,
    eligible: Option<Vec<bool>>,
}

impl Case {
    fn random(random: &mut Random, ranks: usize, most_tokens: usize) -> Self {
        let experts = ranks * (1 + random.below(4));
        let cost = match random.below(4) {
            0 => CostModel::Roofline(Roofline::new(20.0, 0.08, 64).unwrap()),
            1 => CostModel::Table(Table::new(&[(4, 2.0), (9, 2.0), (40, 5.5)]).unwrap()),
            _ => CostModel::Rows,
        };
        let tokens: Vec<u32> = (0..ranks)
            .map(|_| if random.rarely(5) { 0 } else { skewed(random, most_tokens) })
            .collect();
        let visits = random.rarely(2).then(|| {
            let most = |s: usize| tokens[s] as usize + 1;
            (0..ranks * ranks).map(|i| random.below(most(i / ranks)) as u32).collect()
        });
        let eligible = random.rarely(3).then(|| {
            let mut mask: Vec<bool> = (0..ranks).map(|_| random.below(4) > 0).collect();
            mask[random.below(ranks)] = true;
            mask
        });
        let routed = (0..experts).map(|_| skewed(random, 2 * most_tokens)).collect();
        let placement = Placement::contiguous(ranks, experts).unwrap();
        Self { placement, cost, routed, tokens, visits, eligible }
    }

    fn problem(&self) -> Problem<'_> {
        Problem {
            placement: &self.placement,
            cost: &self.cost,
            routed: Routed::PerExpert(&self.routed),
            tokens: &self.tokens,
            visits: self.visits.as_deref(),
            eligible: self.eligible.as_deref(),
        }
    }

    fn bases(&self) -> Vec<u64> {
        let per_rank = self.routed.chunks(self.placement.experts_per_rank());
        per_rank.map(|e| e.iter().map(|&n| self.cost.cost(n.into())).sum()).collect()
    }

    /// Checks every law that a plan must keep; gives the optimum.
    fn check(&self, plan: &Plan, against_flow: bool) {
        let ranks = self.placement.ranks();
        let bases = self.bases();
        let eligible = self.eligible.clone().unwrap_or_else(|| vec![true; ranks]);
        let rows: u64 = self.tokens.iter().map(|&n| u64::from(n)).sum();
        let optimum = oracle::optimum(&self.cost, &bases, &eligible, rows);
        assert_eq!(plan.optimum(), optimum);

        let mut quotas = vec![0; ranks];
        let mut received = vec![0; ranks];
        let mut not_free = 0;
        for source in 0..ranks {
            plan.quotas_of(source, &mut quotas).unwrap();
            assert_eq!(
                quotas.iter().sum::<u32>(),
                self.tokens[source],
                "tokens of source {source}"
            );
            for (destination, &rows) in quotas.iter().enumerate() {
                received[destination] += rows;
                assert!(
                    rows == 0 || eligible[destination],
                    "{rows} rows to ineligible {destination}"
                );
                if let Some(visits) = self.visits.as_ref().filter(|_| source != destination) {
                    not_free +=
                        u64::from(rows.saturating_sub(visits[source * ranks + destination]));
                }
            }
        }
        assert_eq!(received, plan.shared_rows());
        let finish = bases.iter().zip(&received).map(|(b, &n)| b + self.cost.cost(n.into()));
        assert_eq!(finish.max(), Some(optimum), "the plan ends when it says");

        if let Some(visits) = self.visits.as_ref().filter(|_| against_flow) {
            let fits = |base: u64| self.cost.rows_within(optimum - base).min(rows) as u32;
            let room: Vec<u32> =
                bases.iter().zip(&eligible).map(|(&b, &e)| if e { fits(b) } else { 0 }).collect();
            assert_eq!(not_free, oracle::fewest_extra_copies(&self.tokens, &room, visits));
        }
    }
}

#[test]
fn equals_the_oracle_on_100_000_problems() {
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let mut flows = 0;
    for seed in 0..100_000u64 {
        let mut random = Random(seed);
        // Sizes that the oracle bears: many small problems, each size to 72 again and again.
        let ranks = 1 + if seed % 8 == 0 { seed as usize / 8 % 72 } else { random.below(12) };
        let case = Case::random(&mut random, ranks, if ranks > 12 { 12 } else { 24 });
        planner.live(&case.problem(), &mut plan).unwrap();
        let against_flow = ranks <= 8 && seed % 4 == 1;
        flows += u32::from(against_flow && case.visits.is_some());
        case.check(&plan, against_flow);
    }
    println!("100,000 problems: optimum = oracle; {flows} of them: extra copies = maximum flow");
    assert!(flows > 3_000);
}

#[test]
fn equals_the_oracle_up_to_1024_ranks() {
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let edges = [96, 100, 127, 128, 144, 255, 320, 512, 777, 1000, 1023, 1024];
    for seed in 0..150 {
        let mut random = Random(seed as u64);
        let any = 73 + random.below(952);
        let ranks = edges.get(seed).copied().unwrap_or(any);
        let case = Case::random(&mut random, ranks, 8);
        planner.live(&case.problem(), &mut plan).unwrap();
        case.check(&plan, false);
    }
}

#[test]
fn the_same_problem_gives_the_same_plan_whatever_was_planned_before() {
    let (mut used, mut plan) = (Planner::new(), Plan::new());
    for seed in 0..2_000 {
        let mut random = Random(seed);
        let ranks = 1 + random.below(20);
        let case = Case::random(&mut random, ranks, 30);
        used.live(&case.problem(), &mut plan).unwrap();
        let mut fresh = Plan::new();
        Planner::new().live(&case.problem(), &mut fresh).unwrap();
        assert_eq!(plan, fresh, "seed {seed}");
    }
}
