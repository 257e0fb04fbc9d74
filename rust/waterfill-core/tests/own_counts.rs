//! Quotas from one rank's own counts.

use waterfill_core::{
    CostModel, Error, OwnCounts, OwnPlanner, Placement, Plan, Planner, Problem, Roofline, Routed,
    Table, score,
};
use waterfill_testing::Random;

const COST: CostModel = CostModel::Rows;

fn quotas(
    placement: &Placement,
    source: usize,
    routed: &[u32],
    visits: &[u32],
    n: u32,
) -> Vec<u32> {
    let own = OwnCounts { placement, cost: &COST, source, routed, visits, tokens: n };
    let mut quotas = vec![7; placement.ranks()];
    OwnPlanner::new().plan(&own, &mut quotas).unwrap();
    quotas
}

#[test]
fn every_token_is_placed_and_few_go_where_most_rows_are() {
    for ranks in [1, 2, 3, 8, 12, 72, 1024] {
        let placement = Placement::contiguous(ranks, ranks * 2).unwrap();
        for (source, tokens) in [(0, 0), (ranks - 1, 1), (ranks / 2, 50), (0, 4096)] {
            let routed: Vec<u32> = (0..ranks * 2).map(|e| (e as u32 * 37) % 101).collect();
            let visits: Vec<u32> = (0..ranks).map(|r| (r as u32 * 13) % (tokens + 1)).collect();
            let quotas = quotas(&placement, source, &routed, &visits, tokens);
            assert_eq!(quotas.iter().sum::<u32>(), tokens, "{ranks} ranks, source {source}");
        }
    }
    let placement = Placement::contiguous(4, 4).unwrap();
    let quotas = quotas(&placement, 0, &[900, 1100, 200, 1000], &[500, 90, 400, 450], 1000);
    assert!(quotas[1] == 0 && quotas[2] > 3 * quotas[0] && quotas[0] > quotas[3], "{quotas:?}");
}

#[test]
fn visited_ranks_take_what_home_cannot() {
    let placement = Placement::contiguous(4, 4).unwrap();
    // Ranks 1 and 2 are as empty as each other; only 2 is visited.
    assert_eq!(quotas(&placement, 0, &[9000, 0, 0, 9000], &[1024, 0, 1024, 1024], 1024)[1], 0);
}

#[test]
fn equal_sources_do_not_all_round_up_at_the_same_rank() {
    // Every source sees the same counts and has 40 tokens for 31 ranks below the first one.
    let placement = Placement::contiguous(32, 32).unwrap();
    let routed: Vec<u32> = (0..32).map(|r| if r == 0 { 200 } else { 10 }).collect();
    let mut received = [0; 32];
    for source in 0..32 {
        let quotas = quotas(&placement, source, &routed, &[0; 32], 40);
        received.iter_mut().zip(quotas).for_each(|(sum, quota)| *sum += quota);
    }
    let (least, most) = (received[1..].iter().min().unwrap(), received.iter().max().unwrap());
    assert!(most - least <= 32 + 8, "one token a source at most: {received:?}");
}

#[test]
fn refusals_name_the_numbers_and_write_nothing() {
    let placement = Placement::contiguous(4, 8).unwrap();
    let own = OwnCounts {
        placement: &placement,
        cost: &COST,
        source: 1,
        routed: &[1; 8],
        visits: &[1; 4],
        tokens: 3,
    };
    let refused = |own: OwnCounts, mut quotas: Vec<u32>| {
        let before = quotas.clone();
        let error = OwnPlanner::new().plan(&own, &mut quotas).unwrap_err();
        assert_eq!(quotas, before);
        error
    };
    let wrong = refused(OwnCounts { source: 4, ..own }, vec![9; 4]);
    assert!(matches!(wrong, Error::Rank { rank: 4, ranks: 4, .. }));
    let wrong = refused(OwnCounts { routed: &[1; 7], ..own }, vec![9; 4]);
    assert!(matches!(wrong, Error::Length { found: 7, expected: 8, .. }));
    let wrong = refused(OwnCounts { visits: &[1; 3], ..own }, vec![9; 4]);
    assert!(matches!(wrong, Error::Length { found: 3, expected: 4, .. }));
    let wrong = refused(own, vec![9; 5]);
    assert!(matches!(wrong, Error::Length { found: 5, expected: 4, .. }));
}

#[test]
fn the_most_tokens_that_a_count_holds_are_placed_exactly() {
    for ranks in [8, 1024] {
        let placement = Placement::contiguous(ranks, ranks).unwrap();
        let mut routed = vec![0; ranks];
        routed[0] = 4_000_000_000;
        let visits = vec![u32::MAX; ranks];
        let quotas = quotas(&placement, 0, &routed, &visits, u32::MAX);
        assert_eq!(quotas.iter().map(|&quota| u64::from(quota)).sum::<u64>(), u64::from(u32::MAX));
    }
}

#[test]
fn costs_that_sums_could_not_hold_are_refused_with_the_number() {
    let placement = Placement::contiguous(2, 2).unwrap();
    let cost = CostModel::Roofline(Roofline::new(0.0, 1e9, 1).unwrap());
    let own = OwnCounts {
        placement: &placement,
        cost: &cost,
        source: 0,
        routed: &[1_000_000, 5],
        visits: &[0; 2],
        tokens: 3,
    };
    let refused = OwnPlanner::new().plan(&own, &mut [0; 2]);
    assert!(matches!(refused, Err(Error::TooLarge { limit: 4_503_599_627_370_496, .. })));
    let problem = Problem {
        placement: &placement,
        cost: &cost,
        routed: Routed::PerExpert(&[1_000_000, 5]),
        tokens: &[3, 0],
        visits: None,
        eligible: None,
    };
    let mut plan = Plan::new();
    assert!(matches!(Planner::new().live(&problem, &mut plan), Err(Error::TooLarge { .. })));
    let wrong = score::max_and_mean(&placement, &cost, &[1_000_000, 5], &[3, 0]);
    assert!(matches!(wrong, Err(Error::TooLarge { .. })));
}

#[test]
fn costs_are_those_of_a_layer_in_which_every_rank_has_as_much() {
    let placement = Placement::contiguous(2, 2).unwrap();
    let refused = |row_us| {
        let cost = CostModel::Roofline(Roofline::new(0.0, row_us, 1).unwrap());
        let (routed, visits) = (&[1, 0], &[0; 2]);
        let own =
            OwnCounts { placement: &placement, cost: &cost, source: 0, routed, visits, tokens: 1 };
        OwnPlanner::new().plan(&own, &mut [0; 2]).is_err()
    };
    // One routed and one shared row a rank: an expert may have 2 rows, and a rank 4.
    assert!(refused(4.6e9 / 6.0) && !refused(4.5e9 / 6.0));
}

#[test]
fn tokens_that_visit_nowhere_and_find_no_room_of_their_rank_are_placed() {
    let models = [COST, CostModel::Roofline(Roofline::new(0.0, 1.0, 1).unwrap())];
    let mut random = Random(3);
    for cost in &models {
        for _ in 0..2000 {
            let ranks = 2 + random.below(7);
            let placement = Placement::contiguous(ranks, ranks).unwrap();
            let routed: Vec<u32> = (0..ranks).map(|_| random.below(9) as u32).collect();
            let (source, tokens) = (random.below(ranks), random.below(4) as u32);
            let visits = &vec![0; ranks];
            let own =
                OwnCounts { placement: &placement, cost, source, routed: &routed, visits, tokens };
            let mut quotas = vec![0; ranks];
            OwnPlanner::new().plan(&own, &mut quotas).unwrap();
            assert_eq!(quotas.iter().sum::<u32>(), tokens, "{routed:?} from {source}, {cost:?}");
        }
    }
}

/// Each rank's counts of 64 experts and visits: the same few experts are liked by all, others by this rank.
fn skewed(random: &mut Random, placement: &Placement, tokens: u32) -> Vec<(Vec<u32>, Vec<u32>)> {
    let liked: Vec<usize> = (0..64).map(|_| 1 + random.below(8) * random.below(8)).collect();
    (0..placement.ranks())
        .map(|_| {
            let weights: Vec<usize> = liked.iter().map(|&all| all + random.below(20)).collect();
            let all = weights.iter().sum();
            let (mut ids, mut drawn) = (Vec::new(), [false; 64]);
            for _ in 0..tokens {
                drawn.fill(false);
                while drawn.iter().filter(|&&taken| taken).count() < 6 {
                    let mut place = random.below(all);
                    let fits = |&weight: &usize| {
                        let here = place < weight;
                        place = place.saturating_sub(weight);
                        here
                    };
                    drawn[weights.iter().position(fits).unwrap()] = true;
                }
                ids.extend((0..64).filter(|&expert| drawn[expert as usize]));
            }
            let (mut counts, mut visits) = (vec![0; 64], vec![0; placement.ranks()]);
            waterfill_core::count::<i32>(placement, &ids, 6, &mut counts, &mut visits).unwrap();
            (counts, visits)
        })
        .collect()
}

#[test]
fn whatever_rows_cost_own_counts_are_no_worse_than_home_over_many_layers() {
    let roofline = |w, row, tile| CostModel::Roofline(Roofline::new(w, row, tile).unwrap());
    let measured = Table::new(&[(16, 19.0), (256, 25.0), (512, 41.0), (768, 62.5)]).unwrap();
    let models = [
        CostModel::Rows,
        roofline(2.0, 0.1, 8),
        roofline(20.0, 0.08, 64),
        roofline(1.0, 0.5, 1),
        CostModel::Table(measured),
    ];
    let mut random = Random(7);
    for (ranks, tokens) in [(8, 8), (8, 64), (8, 512), (16, 8), (16, 128), (32, 8), (32, 64)] {
        let placement = Placement::contiguous(ranks, 64).unwrap();
        let layers: Vec<_> = (0..12).map(|_| skewed(&mut random, &placement, tokens)).collect();
        for cost in &models {
            let (mut home, mut own) = (0, 0);
            for sources in &layers {
                let mut routed = vec![0; 64];
                let mut received = vec![0; ranks];
                for (source, (counts, visits)) in sources.iter().enumerate() {
                    routed.iter_mut().zip(counts).for_each(|(sum, rows)| *sum += rows);
                    let counts = OwnCounts {
                        placement: &placement,
                        cost,
                        source,
                        routed: counts,
                        visits,
                        tokens,
                    };
                    let mut quotas = vec![0; ranks];
                    OwnPlanner::new().plan(&counts, &mut quotas).unwrap();
                    assert_eq!(quotas.iter().sum::<u32>(), tokens);
                    received.iter_mut().zip(quotas).for_each(|(sum, rows)| *sum += rows);
                }
                let max = |shared: &[u32]| {
                    score::max_and_mean(&placement, cost, &routed, shared).unwrap().max
                };
                home += max(&vec![tokens; ranks]);
                own += max(&received);
            }
            println!(
                "EP{ranks}, {tokens} tokens, {cost:?}: {:.4} of home",
                own as f64 / home as f64
            );
            assert!(own <= home, "EP{ranks}, {tokens} tokens, {cost:?}: {own} > {home}");
        }
    }
}

#[test]
fn whatever_rows_cost_every_token_is_placed_at_the_most_that_counts_and_costs_hold() {
    let roofline = |w, row, tile| CostModel::Roofline(Roofline::new(w, row, tile).unwrap());
    let table = |points: &[(u64, f64)]| CostModel::Table(Table::new(points).unwrap());
    let models = [
        roofline(0.0, 0.0004, 1),
        roofline(1000.0, 0.0004, 65536),
        table(&[(1, 0.0001), (u64::from(u32::MAX), 1e6)]),
        table(&[(u64::from(u32::MAX), 1.0)]),
    ];
    let mut random = Random(11);
    let mut planner = OwnPlanner::new();
    for ranks in [1, 3, 8, 1024] {
        let placement = Placement::contiguous(ranks, ranks).unwrap();
        for cost in &models {
            for skew in [1, 2, 1 << 31] {
                let most = u64::from(u32::MAX) / ranks as u64;
                let mut routed: Vec<u32> =
                    (0..ranks).map(|_| (random.below(most as usize + 1) / skew) as u32).collect();
                routed[random.below(ranks)] = most as u32;
                let visits: Vec<u32> = (0..ranks).map(|_| random.below(1 << 32) as u32).collect();
                let source = random.below(ranks);
                let tokens = u32::MAX;
                let own = OwnCounts {
                    placement: &placement,
                    cost,
                    source,
                    routed: &routed,
                    visits: &visits,
                    tokens,
                };
                let (mut quotas, mut again) = (vec![7; ranks], vec![7; ranks]);
                planner.plan(&own, &mut quotas).unwrap();
                OwnPlanner::new().plan(&own, &mut again).unwrap();
                assert_eq!(quotas, again, "a planner that was used before plans the same");
                let sum: u64 = quotas.iter().map(|&quota| u64::from(quota)).sum();
                assert_eq!(sum, u64::from(tokens), "{ranks} ranks, {cost:?}, skew {skew}");
            }
        }
    }
}
