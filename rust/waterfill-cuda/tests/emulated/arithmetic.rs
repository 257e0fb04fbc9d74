//! What the kernel computes in few bits, at its largest: rows that no test could hold.

use cuda_emulator::{Edit, compiler};
use waterfill_cuda::internal::{Args, MAX_ROWS, MAX_TOP_K, launch_of};
use waterfill_cuda::{IdType, Shape, Variant, WeightType};

use super::batch::Random;
use super::defects;
use super::kernel::{self, ARITHMETIC};
use super::rank::{address, address_mut};

const LANES: usize = 32;
const LAUNCHES: usize = 4000;

/// A warp's question: a level for `bases` and `tokens`, and a share a lane.
struct Question {
    tokens: usize,
    bases: [usize; LANES],
    /// How many rows fit, until where, of how many.
    shares: [(usize, usize, usize); LANES],
}

impl Question {
    /// Sizes from one to the largest; half the shares a little above a whole number of rows.
    fn random(random: &mut Random) -> Self {
        let bits = random.below(21);
        let tokens = if random.rarely(8) { MAX_ROWS } else { 1 + random.below(1 << bits) };
        // All routed rows at one rank, or spread.
        let most = MAX_TOP_K * tokens;
        let all = random.below(LANES);
        let one_rank = random.rarely(4);
        let bases = std::array::from_fn(|rank| match one_rank {
            true => most * usize::from(rank == all),
            false => random.below(most / LANES + 1),
        });
        let shares = std::array::from_fn(|_| {
            let bits = random.below(31);
            let total = 1 + random.below(1 << bits);
            let fits = 1 + random.below(total.min(MAX_ROWS));
            let row = (random.below(fits + 1) * total).div_ceil(fits);
            let until = if random.rarely(2) { row + random.below(3) } else { random.below(total) };
            (fits, until.min(total), total)
        });
        Self { tokens, bases, shares }
    }

    fn words(&self) -> Vec<u32> {
        let bases = self.bases.iter().copied();
        let fits = self.shares.iter().map(|share| share.0);
        let until = self.shares.iter().map(|share| share.1);
        let total = self.shares.iter().map(|share| share.2);
        bases.chain(fits).chain(until).chain(total).map(|word| word as u32).collect()
    }

    /// The level, then the shares.
    fn answer(&self) -> Vec<u32> {
        let room = |level: usize| -> usize {
            self.bases.iter().map(|base| level.saturating_sub(*base)).sum()
        };
        let (mut least, mut most) = (1, 64 * MAX_ROWS);
        while least < most {
            let middle = usize::midpoint(least, most);
            if room(middle) >= self.tokens { most = middle } else { least = middle + 1 }
        }
        let shares = self.shares.iter().map(|(fits, until, total)| (fits * until).div_ceil(*total));
        std::iter::once(least).chain(shares).map(|word| word as u32).collect()
    }
}

/// The first question that is answered wrong.
fn checks(edits: &[Edit]) -> Result<(), String> {
    let Some(compiler) = compiler() else { return Ok(()) };
    let (id, weight) = (IdType::I32, WeightType::F32);
    let shape = Shape { ranks: LANES, experts: LANES, redundant: 0, top_k: MAX_TOP_K, id, weight };
    let variant = Variant { clustered: false, own_only: true };
    let mut kernel = kernel::compile(&compiler, &shape, variant, edits);
    let launch = kernel::launch(launch_of(&shape.geometry(1, 0)));
    let mut random = Random(1);
    for seed in 0..LAUNCHES {
        let question = Question::random(&mut random);
        let (asked, mut found) = (question.words(), vec![0; 1 + LANES]);
        let (quotas, words) = (address(&asked), address_mut(&mut found));
        let rows = question.tokens as u32;
        let args = Args { mode: ARITHMETIC, rows, quotas, words, ..Args::default() };
        // SAFETY: the arrays are as long as `kernel.rs` says for this mode; nothing else is looked at.
        unsafe { kernel.launch(launch, &args, seed as u32, &mut || ())? };
        let expected = question.answer();
        if let Some(at) = (0..=LANES).find(|&at| found[at] != expected[at]) {
            let what = at.checked_sub(1).map(|lane| question.shares[lane]);
            return Err(format!("{what:?}: {}, not {}", found[at], expected[at]));
        }
    }
    Ok(())
}

#[test]
fn levels_and_shares_are_exact() {
    checks(&[]).unwrap();
}

#[test]
fn notices_fewer_bits_and_corrections() {
    if compiler().is_none() {
        return;
    }
    for (edits, _) in defects::ARITHMETIC {
        assert!(checks(edits).is_err(), "not noticed: {edits:?}");
    }
}
