//! Random batches, and what the core makes of them.

use waterfill_core::{Assigner, CostModel, Id, OwnCounts, OwnPlanner, Placement, Rows, RowsMut};
use waterfill_core::{Weight, count};
use waterfill_cuda::Shape;

/// Splitmix64.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// One time in `times`.
    pub fn rarely(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in 1..values.len() {
            values.swap(i, self.below(i + 1));
        }
    }

    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// Ids that name no expert, in 32 or in 64 bits; some have an expert's low bits.
pub const STRANGE: [i64; 10] = [
    -1,
    -2,
    i32::MIN as i64,
    i32::MAX as i64,
    1 << 31,
    1 << 32,
    (1 << 32) + 5,
    1 << 62,
    -(1 << 32) + 5,
    i64::MIN,
];

/// `i32` or `i64`.
pub trait AnyId: Id + TryFrom<i64> {}
impl<I: Id + TryFrom<i64>> AnyId for I {}

/// A rank's routed rows.
#[derive(Debug)]
pub struct Batch<I, W> {
    pub ids: Vec<I>,
    pub weights: Vec<W>,
    /// Rows at or past it are padding.
    pub unpadded: Option<i32>,
    pub shared_weight: f32,
    pub rows: usize,
    /// The ids as the core takes them: -1 where an id is past the last expert, or in padding.
    pub known: Vec<I>,
}

/// What the core counts of a batch.
#[derive(Debug)]
pub struct Counted {
    pub tokens: u32,
    pub visits: Vec<u32>,
    /// By expert.
    pub counts: Vec<u32>,
    /// By rank.
    pub loads: Vec<u32>,
}

impl<I: AnyId, W: Weight> Batch<I, W> {
    /// Experts more or less popular; padding and empty slots or none; often an end of the unpadded rows.
    pub fn random(random: &mut Random, shape: &Shape, rows: usize) -> Self {
        let (popular, clean) = (random.pick(&[1.0, 1.5, 4.0]), random.rarely(3));
        let id = |value: i64| I::try_from(value).unwrap_or(I::NONE);
        let mut ids = Vec::with_capacity(rows * shape.top_k);
        for _ in 0..rows {
            let padding = !clean && random.rarely(9);
            for _ in 0..shape.top_k {
                let part = random.below(1 << 24) as f64 / f64::from(1 << 24);
                let expert = (part.powf(popular) * shape.experts as f64) as i64;
                let empty = padding || (!clean && random.rarely(12));
                let strange = random.pick(&STRANGE);
                let past = (shape.experts + random.below(2)) as i64;
                ids.push(id(match (empty, random.below(4)) {
                    (true, 0) => strange,
                    (true, 1) => past,
                    (true, _) => -1,
                    _ => expert,
                }));
            }
        }
        // Any bits are a weight.
        let mut weight = || W::from_f32(f32::from_bits(random.next() as u32));
        let weights = (0..rows * shape.top_k).map(|_| weight()).collect();
        let unpadded = random.rarely(3).then(|| random.below(rows + 40) as i32 - 20);
        let shared_weight = random.pick(&[0.4, 1.0, -0.0, f32::INFINITY]);
        let first_padded = unpadded.map_or(rows, |unpadded| unpadded.max(0) as usize);
        let known = |(i, &id): (usize, &I)| {
            let expert = i / shape.top_k < first_padded && id.into() < shape.experts as i64;
            if expert { id } else { I::NONE }
        };
        let known = ids.iter().enumerate().map(known).collect();
        Self { ids, weights, unpadded, shared_weight, rows, known }
    }

    pub fn counted(&self, shape: &Shape) -> Counted {
        let (mut counts, mut visits) = (vec![0; shape.experts], vec![0; shape.ranks]);
        let placement = placement(shape);
        let tokens = count(&placement, &self.known, shape.top_k, &mut counts, &mut visits).unwrap();
        let each = placement.experts_per_rank();
        let loads = counts.chunks_exact(each).map(|counts| counts.iter().sum()).collect();
        Counted { tokens, visits, counts, loads }
    }

    /// Expanded ids and weights.
    pub fn expanded(&self, shape: &Shape, rank: usize, quotas: &[u32]) -> (Vec<I>, Vec<W>) {
        let slots = self.rows * (shape.top_k + 1);
        let (mut ids, mut weights) = (vec![I::NONE; slots], vec![W::ZERO; slots]);
        let routed = Rows { ids: &self.known, weights: &self.weights, top_k: shape.top_k };
        let out = RowsMut { ids: &mut ids, weights: &mut weights };
        Assigner::new()
            .expand(&placement(shape), rank, routed, quotas, self.shared_weight, out)
            .unwrap();
        (ids, weights)
    }
}

impl Counted {
    /// Quotas from own counts.
    pub fn own_quotas(&self, shape: &Shape, source: usize) -> Vec<u32> {
        let (placement, cost) = (placement(shape), CostModel::Rows);
        let (routed, visits, tokens) = (&self.counts[..], &self.visits[..], self.tokens);
        let own = OwnCounts { placement: &placement, cost: &cost, source, routed, visits, tokens };
        let mut quotas = vec![0; shape.ranks];
        OwnPlanner::new().plan(&own, &mut quotas).unwrap();
        quotas
    }

    /// Quotas that add up to the tokens: a third or nearly none at home, the others on some or all of the ranks.
    pub fn random_quotas(&self, random: &mut Random, home: usize) -> Vec<u32> {
        let mut quotas = vec![0; self.visits.len()];
        let (first, some) = (random.below(quotas.len()), 1 + random.below(quotas.len()));
        let at_home = random.pick(&[3, 3, 50]);
        for _ in 0..self.tokens {
            let rank = (first + random.below(some)) % quotas.len();
            quotas[if random.rarely(at_home) { home } else { rank }] += 1;
        }
        quotas
    }

    /// What a rank posts on a board with counts by expert, or by rank.
    pub fn posted(&self, by_expert: bool) -> Vec<u32> {
        let counts = if by_expert { &self.counts } else { &self.loads };
        [&[self.tokens], &self.visits[..], counts].concat()
    }
}

pub fn placement(shape: &Shape) -> Placement {
    Placement::contiguous(shape.ranks, shape.experts).unwrap()
}
