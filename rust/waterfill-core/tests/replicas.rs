//! Replicas as a server chooses them: the rule, each source's part of a plan, and the ids that come of it.

use waterfill_core::{
    CostModel, Placement, Plan, Planner, Problem, ReplicaCounts, ReplicaQuotas, ReplicaTable,
    Routed, WEIGHTS_AS_ROWS, choose_replicas,
};
use waterfill_testing::Random;

/// A layer of one step: its map, and each source's ids.
struct Layer {
    table: ReplicaTable,
    logical: Vec<u32>,
    top_k: usize,
    /// `[R]` of `[N, top_k]`
    ids: Vec<Vec<i32>>,
}

impl Layer {
    fn random(random: &mut Random, most_tokens: usize) -> Self {
        let ranks = 1 + random.below(8);
        let physical = ranks * (1 + random.below(6));
        let experts = 1 + random.below(physical);
        let mut logical: Vec<u32> = (0..experts as u32).collect();
        logical.extend((experts..physical).map(|_| random.below(experts) as u32));
        random.shuffle(&mut logical);
        let top_k = 1 + random.below(8);
        let of_rank = |random: &mut Random| {
            let slots = random.below(most_tokens) * top_k;
            // Some experts are hot, some slots name none.
            let id = |random: &mut Random| match random.below(8) {
                0 => -1,
                1..4 => random.below(1 + physical / 4) as i32,
                _ => random.below(physical) as i32,
            };
            (0..slots).map(|_| id(random)).collect()
        };
        let ids = (0..ranks).map(|_| of_rank(random)).collect();
        Self { table: ReplicaTable::new(ranks, &logical).unwrap(), logical, top_k, ids }
    }

    fn counts(&self) -> Vec<u32> {
        self.ids.iter().flat_map(|ids| self.counts_of(ids)).collect()
    }

    fn counts_of(&self, ids: &[i32]) -> Vec<u32> {
        let mut counts = vec![0; self.logical.len()];
        ids.iter().filter(|&&id| id >= 0).for_each(|&id| counts[id as usize] += 1);
        counts
    }
}

fn sum_of_ranks(counts: &[u32], experts: usize) -> Vec<u32> {
    (0..experts).map(|e| counts.iter().skip(e).step_by(experts).sum()).collect()
}

/// `[R, redundant]` what sources post of the jobs: past the table's last anything.
fn of_jobs(table: &ReplicaTable, counts: &[u32]) -> Vec<u32> {
    let (mut reduced, redundant) = (ReplicaCounts::new(), table.redundant());
    let sources = counts.chunks_exact(table.placement().physical_experts());
    let post = |counts: &[u32]| {
        reduced.reduce(table.placement(), counts).unwrap();
        let mut jobs = reduced.jobs().to_vec();
        jobs.resize(redundant, u32::MAX);
        jobs
    };
    sources.flat_map(post).collect()
}

fn problem<'a>(placement: &'a Placement, routed: &'a [u32], tokens: &'a [u32]) -> Problem<'a> {
    let (cost, routed) = (&CostModel::Rows, Routed::PerExpert(routed));
    Problem { placement, cost, routed, tokens, visits: None, eligible: None }
}

/// The slowest rank's time and its active experts, as the rule has it, counted anew.
fn slowest(placement: &Placement, rows: &[u32]) -> u64 {
    let time = |rows: &u32| if *rows == 0 { 0 } else { WEIGHTS_AS_ROWS.max((*rows).into()) };
    let of_rank = |experts: &[u32]| experts.iter().map(time).sum();
    rows.chunks_exact(placement.experts_per_rank()).map(of_rank).max().unwrap()
}

#[test]
fn every_rank_ends_with_the_plans_rows_and_every_token_with_its_experts() {
    let (mut random, mut planner, mut plan) = (Random(22), Planner::new(), Plan::new());
    let mut quotas = ReplicaQuotas::new();
    let mut moved = 0;
    for _ in 0..if cfg!(debug_assertions) { 300 } else { 3000 } {
        let layer = Layer::random(&mut random, 120);
        let placement = layer.table.placement();
        let (counts, experts) = (layer.counts(), layer.logical.len());
        let routed = sum_of_ranks(&counts, experts);
        planner
            .replicas(&problem(placement, &routed, &vec![0; placement.ranks()]), &mut plan)
            .unwrap();
        quotas.divide(&layer.table, &of_jobs(&layer.table, &counts), plan.replica_rows()).unwrap();
        let mut rows = vec![0; experts];
        for (source, given) in layer.ids.iter().enumerate() {
            let mut ids = given.clone();
            choose_replicas(&layer.table, quotas.of(source), &mut ids, layer.top_k).unwrap();
            for (&before, &after) in given.iter().zip(&ids) {
                let logical = |id: i32| usize::try_from(id).map(|id| layer.logical[id]);
                assert_eq!(logical(before).ok(), logical(after).ok());
                moved += u32::from(before != after);
            }
            rows.iter_mut().zip(layer.counts_of(&ids)).for_each(|(sum, rows)| *sum += rows);
        }
        assert_eq!(rows, plan.replica_rows());
    }
    assert!(moved > 1000, "{moved}");
}

#[test]
fn the_rule_takes_the_faster_of_both_plans() {
    let (mut random, mut planner) = (Random(5), Planner::new());
    let (mut plan, mut joint, mut single) = (Plan::new(), Plan::new(), Plan::new());
    let (mut split, mut kept, mut worse) = (0, 0, 0);
    for case in 0..2000 {
        // From a few rows an expert to thousands.
        let most = 4 << random.below(12);
        let layer = Layer::random(&mut random, 2);
        let placement = layer.table.placement();
        let routed: Vec<u32> = layer.logical.iter().map(|_| random.below(most) as u32).collect();
        let tokens = vec![0; placement.ranks()];
        let problem = problem(placement, &routed, &tokens);
        planner.replicas(&problem, &mut plan).unwrap();
        planner.joint(&problem, &mut joint).unwrap();
        planner.single_replica(&problem, &mut single).unwrap();
        let [mine, joint, single] =
            [&plan, &joint, &single].map(|plan| slowest(placement, plan.replica_rows()));
        // Where many rows an expert decide alone, the split is not compared. The other plan's search is shorter here.
        let best = if most > 1000 { joint } else { joint.min(single) };
        worse += u32::from(mine * 100 > best * 102);
        assert!(mine * 10 <= best * 12, "case {case}: {mine}, {joint}, {single}");
        split += u32::from(mine < single);
        kept += u32::from(mine < joint);
    }
    assert!(split > 100 && kept > 100 && worse < 40, "{split} {kept} {worse}");
}

#[test]
fn few_rows_stay_together_and_many_are_split() {
    // Experts 0 and 1 on both ranks.
    let table = ReplicaTable::new(2, &[0, 1, 2, 0, 1, 3]).unwrap();
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    let mut rows = |routed: &[u32]| {
        planner.replicas(&problem(table.placement(), routed, &[0, 0]), &mut plan).unwrap();
        plan.replica_rows().to_vec()
    };
    let kept = rows(&[8, 9, 5, 7, 6, 4]);
    assert!(matches!(kept[..], [15, 0, 5, 0, 15, 4] | [0, 15, 5, 15, 0, 4]), "{kept:?}: one each");
    assert_eq!(rows(&[4000, 1000, 3000, 0, 0, 2000]).iter().take(3).sum::<u32>(), 5000);
}

#[test]
fn a_sources_rows_go_to_its_own_rank_first() {
    let table = ReplicaTable::new(3, &[0, 1, 0, 2, 0, 3]).unwrap();
    let mut quotas = ReplicaQuotas::new();
    // Sources with 10, 20 and 30 rows of expert 0; its replicas on ranks 0 to 2 are to have 25, 15 and 20.
    let counts = [10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 30, 0, 0, 0];
    quotas.divide(&table, &of_jobs(&table, &counts), &[25, 0, 15, 0, 20, 0]).unwrap();
    assert_eq!([quotas.of(0), quotas.of(1), quotas.of(2)], [[10, 0, 0], [5, 15, 0], [10, 0, 20]]);
}

/// A layer with so many rows for each physical expert, and the reduced form of them.
fn counted(
    random: &mut Random,
    rows: impl Fn(&mut Random) -> u32,
) -> (Layer, Vec<u32>, ReplicaCounts) {
    let layer = Layer::random(random, 2);
    let routed: Vec<u32> = layer.logical.iter().map(|_| rows(random)).collect();
    let mut reduced = ReplicaCounts::new();
    reduced.reduce(layer.table.placement(), &routed).unwrap();
    (layer, routed, reduced)
}

#[test]
fn counts_per_expert_and_reduced_ones_give_one_plan() {
    let (mut random, mut planner) = (Random(9), Planner::new());
    let (mut per_expert, mut reduced_plan, mut kept) = (Plan::new(), Plan::new(), 0);
    for _ in 0..2000 {
        let most = 4 << random.below(12);
        let (layer, routed, reduced) = counted(&mut random, |random| random.below(most) as u32);
        let placement = layer.table.placement();
        let tokens: Vec<u32> = (0..placement.ranks()).map(|_| random.below(most) as u32).collect();
        let mut eligible: Vec<bool> = tokens.iter().map(|_| random.below(4) > 0).collect();
        eligible[0] = true;
        let problem = Problem { eligible: Some(&eligible), ..problem(placement, &routed, &tokens) };
        planner.replicas(&problem, &mut per_expert).unwrap();
        let problem = Problem { routed: Routed::Reduced(&reduced), ..problem };
        planner.replicas(&problem, &mut reduced_plan).unwrap();
        let may_take = |&p: &u32| eligible[placement.rank_of(p as usize)];
        let can_move: Vec<bool> =
            placement.jobs().map(|replicas| replicas.iter().any(may_take)).collect();
        for (physical, &rows) in routed.iter().enumerate() {
            let (all, of_jobs) = (per_expert.replica_rows(), reduced_plan.replica_rows());
            match layer.table.job_of(physical) {
                Some(job) if can_move[job] => assert_eq!(all[physical], of_jobs[physical]),
                Some(_) => assert_eq!(all[physical], rows),
                None => assert_eq!((all[physical], of_jobs[physical]), (rows, 0)),
            }
        }
        let of_eligible = |plan: &Plan| {
            let costs = plan.routed_costs().iter().zip(&eligible);
            costs.filter(|&(_, &eligible)| eligible).map(|(&cost, _)| cost).collect::<Vec<_>>()
        };
        assert_eq!(of_eligible(&per_expert), of_eligible(&reduced_plan));
        if can_move.contains(&false) {
            kept += 1;
            continue;
        }
        assert_eq!(per_expert.optimum(), reduced_plan.optimum());
        assert_eq!(per_expert.routed_costs(), reduced_plan.routed_costs());
        assert_eq!(per_expert.transfers(), reduced_plan.transfers());
    }
    assert!((100..1000).contains(&kept), "{kept}");
}

#[test]
fn experts_that_no_eligible_rank_has_stay_as_routed() {
    // Expert 0 twice on rank 0, and expert 1 on ranks 0 and 1: neither may move where rank 2 alone is eligible.
    let table = ReplicaTable::new(3, &[0, 0, 1, 1, 2, 3, 4, 4, 5]).unwrap();
    let (placement, routed, tokens) = (table.placement(), [10, 0, 7, 2, 1, 1, 5, 0, 3], [0; 3]);
    let eligible = Some(&[false, false, true][..]);
    let problem = Problem { eligible, ..problem(placement, &routed, &tokens) };
    let mut plan = Plan::new();
    for plan_of in [Planner::joint, Planner::single_replica, Planner::replicas] {
        plan_of(&mut Planner::new(), &problem, &mut plan).unwrap();
        assert_eq!(plan.replica_rows(), routed);
        assert_eq!((plan.start_costs(), plan.routed_costs()), (&[17, 4, 8][..], &[17, 4, 8][..]));
    }
    let mut reduced = ReplicaCounts::new();
    reduced.reduce(placement, &routed).unwrap();
    let problem = Problem { routed: Routed::Reduced(&reduced), ..problem };
    Planner::new().replicas(&problem, &mut plan).unwrap();
    assert_eq!(plan.replica_rows(), [5, 5, 5, 4, 0, 0, 5, 0, 0], "nothing tells how they were");
}

#[test]
fn reduced_counts_lose_nothing_where_all_rows_are_few_or_many() {
    let (mut random, mut planner) = (Random(10), Planner::new());
    let (mut plan, mut other) = (Plan::new(), Plan::new());
    let most_active = |placement: &Placement, rows: &[u32]| {
        let of_rank = |rows: &[u32]| rows.iter().filter(|&&rows| rows > 0).count();
        rows.chunks_exact(placement.experts_per_rank()).map(of_rank).max().unwrap()
    };
    for _ in 0..1000 {
        let (layer, routed, _) = counted(&mut random, |random| random.below(4) as u32);
        let (placement, tokens) = (layer.table.placement(), vec![0; layer.ids.len()]);
        let few = problem(placement, &routed, &tokens);
        planner.replicas(&few, &mut plan).unwrap();
        planner.single_replica(&few, &mut other).unwrap();
        // An expert's weights take longer than its rows: all that counts is how many experts are active.
        let [mine, best] = [&plan, &other].map(|plan| most_active(placement, plan.replica_rows()));
        assert_eq!(mine, best);
        assert_eq!(slowest(placement, plan.replica_rows()), best as u64 * WEIGHTS_AS_ROWS);

        let at_least = |random: &mut Random| 4 * WEIGHTS_AS_ROWS as u32 + random.below(3000) as u32;
        let (layer, routed, _) = counted(&mut random, at_least);
        let (placement, tokens) = (layer.table.placement(), vec![100; layer.ids.len()]);
        let many = problem(placement, &routed, &tokens);
        planner.replicas(&many, &mut plan).unwrap();
        planner.joint(&many, &mut other).unwrap();
        assert_eq!(plan.optimum(), other.optimum(), "exact, from wherever it starts");
    }
}

#[test]
fn rows_that_were_not_told_of_are_divided_evenly_first() {
    // Expert 0 on ranks 0, 1 and 2.
    let table = ReplicaTable::new(3, &[0, 1, 0, 2, 0, 3]).unwrap();
    let mut reduced = ReplicaCounts::new();
    reduced.reduce(table.placement(), &[0, 10, 11, 20, 0, 30]).unwrap();
    let routed = Routed::Reduced(&reduced);
    let tokens = [0; 3];
    let problem = Problem { routed, ..problem(table.placement(), &[], &tokens) };
    let (mut planner, mut plan) = (Planner::new(), Plan::new());
    planner.live(&problem, &mut plan).unwrap();
    assert_eq!((plan.start_costs(), plan.routed_costs()), (&[14, 24, 33][..], &[14, 24, 33][..]));
    planner.joint(&problem, &mut plan).unwrap();
    assert_eq!((plan.start_costs(), plan.optimum()), (&[14, 24, 33][..], 30));
    let problem = Problem { eligible: Some(&[true, true, false]), ..problem };
    planner.live(&problem, &mut plan).unwrap();
    assert_eq!(plan.replica_rows(), [6, 0, 5, 0, 0, 0], "none to a rank that is not eligible");
    let model = CostModel::Roofline(waterfill_core::Roofline::new(11.2, 0.061, 64).unwrap());
    let problem = Problem { cost: &model, ..problem };
    for plan_of in [Planner::live, Planner::joint, Planner::single_replica, Planner::replicas] {
        let refused = plan_of(&mut planner, &problem, &mut plan).unwrap_err();
        assert_eq!(refused, waterfill_core::Error::NeedsExpertCounts);
    }
}
