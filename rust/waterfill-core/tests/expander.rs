//! A rank's call in one, against its parts one after the other.

use waterfill_core::{
    Assigner, Bf16, CostModel, Error, Expander, Id, OwnCounts, OwnPlanner, Placement, Rows,
    RowsMut, Weight, count,
};
use waterfill_testing::Random;

const TOP_K: usize = 6;

/// Rows of ids with empty slots and padding.
fn batch<I: Id>(placement: &Placement, rows: usize, seed: u32) -> Vec<I> {
    let mut random = Random(seed.into());
    let mut place = |at: usize| {
        let none = random.rarely(11) || (at / TOP_K + seed as usize).is_multiple_of(9);
        let id = random.below(placement.physical_experts()) as u32;
        if none { I::NONE } else { I::from_low(id) }
    };
    (0..rows * TOP_K).map(&mut place).collect()
}

fn is_the_sum_of_its_parts<I: Id + std::fmt::Debug, W: Weight + std::fmt::Debug + PartialEq>() {
    for (ranks, experts) in [(1, 4), (8, 256), (72, 288)] {
        let placement = Placement::contiguous(ranks, experts).unwrap();
        let (cost, rank) = (CostModel::Rows, ranks / 2);
        let mut expander = Expander::new(placement.clone(), cost.clone(), rank).unwrap();
        let mut own_planner = OwnPlanner::new();
        for (seed, rows) in [(1, 300), (2, 0), (3, 7), (4, 1024)] {
            let ids: Vec<I> = batch(&placement, rows, seed);
            let weights: Vec<W> = (0..ids.len()).map(|i| W::from_f32(i as f32 / 64.0)).collect();
            let routed = Rows { ids: &ids, weights: &weights, top_k: TOP_K };
            let empty = || (vec![I::NONE; rows * 7], vec![W::ZERO; rows * 7]);

            let (mut wide, mut wide_weights) = empty();
            let out = RowsMut { ids: &mut wide, weights: &mut wide_weights };
            let learn = |own: &OwnCounts, quotas: &mut [u32]| own_planner.plan(own, quotas);
            expander.expand(routed, 0.4, out, learn).unwrap();

            let (mut counts, mut visits) = (vec![0; experts], vec![0; ranks]);
            let tokens = count(&placement, &ids, TOP_K, &mut counts, &mut visits).unwrap();
            let (routed_rows, visits) = (&counts[..], &visits[..]);
            let own = OwnCounts {
                placement: &placement,
                cost: &cost,
                source: rank,
                routed: routed_rows,
                visits,
                tokens,
            };
            let mut quotas = vec![0; ranks];
            OwnPlanner::new().plan(&own, &mut quotas).unwrap();
            let (mut expected, mut expected_weights) = empty();
            let out = RowsMut { ids: &mut expected, weights: &mut expected_weights };
            Assigner::new().expand(&placement, rank, routed, &quotas, 0.4, out).unwrap();

            assert_eq!(expander.quotas(), quotas);
            assert_eq!((wide, wide_weights), (expected, expected_weights), "{ranks}, {rows}");
        }
    }
}

#[test]
fn a_call_is_the_sum_of_its_parts() {
    is_the_sum_of_its_parts::<i32, f32>();
    is_the_sum_of_its_parts::<i32, Bf16>();
    is_the_sum_of_its_parts::<i64, f32>();
    is_the_sum_of_its_parts::<i64, Bf16>();
}

#[test]
fn a_refusal_writes_nothing_and_one_of_ids_is_before_anything_is_learned() {
    let placement = Placement::contiguous(2, 4).unwrap();
    let refused = Expander::new(placement.clone(), CostModel::Rows, 2).unwrap_err();
    assert_eq!(refused, Error::Rank { name: "rank", rank: 2, ranks: 2 });
    let mut expander = Expander::new(placement, CostModel::Rows, 1).unwrap();
    let mut call = |ids: &[i32; 2], sent: [u32; 2], length: usize| {
        let (mut out_ids, mut out_weights) = (vec![9; length], vec![9.0; length]);
        let out = RowsMut { ids: &mut out_ids, weights: &mut out_weights };
        let routed = Rows { ids, weights: &[0.5f32; 2], top_k: 1 };
        let mut learned = false;
        let result = expander.expand(routed, 1.0, out, |_, quotas| {
            learned = true;
            quotas.copy_from_slice(&sent);
            Ok::<(), Error>(())
        });
        let untouched = out_ids.iter().all(|&id| id == 9) && out_weights.iter().all(|&w| w == 9.0);
        (result, learned, untouched)
    };
    let too_large = Error::ExpertId { row: 1, column: 0, value: 4, physical_experts: 4 };
    assert_eq!(call(&[0, 4], [1, 1], 4), (Err(too_large), false, true));
    let short = Error::Length { name: "out_ids", found: 3, expected: 4 };
    assert_eq!(call(&[0, 3], [1, 1], 3), (Err(short), false, true));
    let three = Error::Quotas { source: 1, quotas: 3, tokens: 2 };
    assert_eq!(call(&[0, 3], [1, 2], 4), (Err(three), true, true));
    assert_eq!(call(&[0, 3], [1, 1], 4), (Ok(()), true, false));
}
