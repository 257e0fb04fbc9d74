//! The kernel that moves ids up by themselves, against the core: all numbers of ranks, ids around every boundary.

use cuda_emulator::{Edit, Kernel, compiler};
use waterfill_cuda::internal::{Args, MAX_EXPERTS, MOVE_THREADS, MoveArgs};
use waterfill_cuda::internal::{common_args, launch_of_ids, move_args};
use waterfill_cuda::{IdType, Shape, Variant, WeightType};

use super::batch::{AnyId, Random, STRANGE, placement};
use super::defects;
use super::kernel::{self, MOVE_UP};
use super::rank::{Checked, address, address_mut, same};

/// Both sides of a block and of two.
const COUNTS: [usize; 8] =
    [1, 31, MOVE_THREADS - 1, MOVE_THREADS, MOVE_THREADS + 1, 511, 512, 1000];

/// What the output holds before the launch.
const UNTOUCHED: i64 = 0x5a5a_5a5a_5a5a_5a5a;

/// Ids of experts that are their rank's first or last, of other experts, and of none.
fn ids<I: AnyId>(random: &mut Random, shape: &Shape, count: usize) -> Vec<I> {
    let (each, experts) = (shape.experts / shape.ranks, shape.experts as i64);
    // In 32 bits there are no others.
    let strange: Vec<I> = STRANGE.iter().filter_map(|&id| I::try_from(id).ok()).collect();
    let mut id = || {
        let first = (random.below(shape.ranks) * each) as i64;
        let expert = match random.below(8) {
            0 => first,
            1 => first + each as i64 - 1,
            2 => random.pick(&[0, each as i64 - 1, experts - 1]),
            3 => random.pick(&[experts, experts + 1, experts + each as i64]),
            4 => return random.pick(&strange),
            _ => random.below(shape.experts) as i64,
        };
        I::try_from(expert).unwrap_or(I::NONE)
    };
    (0..count).map(|_| id()).collect()
}

/// One launch gives what the core gives where ids past the last expert are -1, and writes nothing behind it.
fn moves<I: AnyId>(kernel: &mut Kernel, random: &mut Random, shape: &Shape) -> Checked {
    let count = random.pick(&COUNTS);
    // A block more than there are, so that a kernel that goes on does so in these arrays.
    let ids = ids::<I>(random, shape, count + MOVE_THREADS);
    let is_known = |id: I| id.into() < shape.experts as i64;
    let known = |&id: &I| if is_known(id) { id } else { I::NONE };
    let known: Vec<I> = ids[..count].iter().map(known).collect();
    // Tables of primaries in one case of two: right ones, ones of other experts, and ones of none.
    let experts = shape.experts;
    // Two more, for a kernel that looks past the last expert.
    let mut logical: Vec<i64> =
        (0..experts).map(|_| random.below(experts.div_ceil(2)) as i64).collect();
    logical.extend([0, 0]);
    let primary = |random: &mut Random| {
        let past = experts + random.below(2);
        (if random.below(4) == 0 { past } else { random.below(experts) }) as u32
    };
    let primaries: Vec<u32> = (0..experts).map(|_| primary(random)).collect();
    let has_primaries = random.below(2) == 0;
    let known: Vec<I> = known
        .into_iter()
        .map(|id| {
            let Ok(expert) = usize::try_from(id.into()) else { return id };
            let primary = primaries[expert] as usize;
            let same = primary < experts && logical[primary] == logical[expert];
            if has_primaries && same { I::from_low(primary as u32) } else { id }
        })
        .collect();
    let mut moved = vec![UNTOUCHED; ids.len()];
    waterfill_core::move_up(&placement(shape), &known, 1, &mut moved[..count]).unwrap();
    // Without ids as the runner launches it once.
    for (count, expected) in [(count, &moved), (0, &vec![UNTOUCHED; ids.len()])] {
        let mut out = vec![UNTOUCHED; ids.len()];
        let args = MoveArgs {
            ids: address(&ids),
            out: address_mut(&mut out),
            primaries: if has_primaries { address(&primaries) } else { 0 },
            logical: address(&logical),
            count: count as u64,
            ..move_args(&common_args(shape, 0, 0))
        };
        launch(kernel, random, args, count.max(1))?;
        same("moved ids", &out, expected)?;
    }
    Ok(())
}

fn launch(kernel: &mut Kernel, random: &mut Random, mut args: MoveArgs, count: usize) -> Checked {
    let words = address_mut(std::slice::from_mut(&mut args));
    let args = Args { mode: MOVE_UP, words, ..Args::default() };
    // SAFETY: at `words` are its arguments; the caller holds their arrays, which have room for all threads.
    unsafe {
        kernel.launch(kernel::launch(launch_of_ids(count)), &args, random.next() as u32, &mut || ())
    }
}

/// The kernel knows ranks and experts from its arguments alone, so one compilation is for all of them.
fn checks<I: AnyId>(id: IdType, edits: &[Edit]) -> Checked {
    let Some(compiler) = compiler() else { return Ok(()) };
    let shape = |ranks: usize, each: usize| {
        let (experts, weight) = (ranks * each, WeightType::F32);
        Shape { ranks, experts, redundant: 0, top_k: 8, id, weight }
    };
    let variant = Variant { clustered: false, own_only: true };
    let mut kernel = kernel::compile(&compiler, &shape(8, 32), variant, edits);
    let mut random = Random(7);
    for ranks in 1..=waterfill_core::MAX_RANKS {
        let most = MAX_EXPERTS / ranks;
        for each in [1, 2.min(most), 1 + random.below(most), most] {
            let shape = shape(ranks, each);
            shape.check().unwrap();
            moves::<I>(&mut kernel, &mut random, &shape)
                .map_err(|error| format!("{ranks} ranks of {each} experts: {error}"))?;
        }
    }
    Ok(())
}

#[test]
fn ids_of_32_bits_are_the_cores() {
    checks::<i32>(IdType::I32, &[]).unwrap();
}

#[test]
fn ids_of_64_bits_are_the_cores() {
    checks::<i64>(IdType::I64, &[]).unwrap();
}

#[test]
fn notices_wrong_moves() {
    if compiler().is_none() {
        return;
    }
    for (edits, _) in defects::MOVES {
        assert!(checks::<i64>(IdType::I64, edits).is_err(), "not noticed: {edits:?}");
    }
    for (edits, _) in defects::MOVES_OF_32_BITS {
        assert!(checks::<i32>(IdType::I32, edits).is_err(), "not noticed: {edits:?}");
    }
}
