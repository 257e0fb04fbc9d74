//! The kernel that moves ids up by themselves, against the core: all numbers of ranks, ids around every boundary.

use super::batch::{AnyId, Random, STRANGE, placement};
use super::device::{Emulated, MOVE_UP, compiler};
use super::plant;
use super::rank::{Checked, address, address_mut, same};
use crate::args::{Args, MoveArgs};
use crate::runner::{common_args, launch_of_ids, move_args};
use crate::shape::{IdType, MAX_EXPERTS, MOVE_THREADS, Shape, Variant, WeightType};

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
fn moves<I: AnyId>(kernel: &mut Emulated, random: &mut Random, shape: &Shape) -> Checked {
    let count = random.pick(&COUNTS);
    // A block more than there are, so that a kernel that goes on does so in these arrays.
    let ids = ids::<I>(random, shape, count + MOVE_THREADS);
    let is_known = |id: I| id.into() < shape.experts as i64;
    let known = |&id: &I| if is_known(id) { id } else { I::NONE };
    let known: Vec<I> = ids[..count].iter().map(known).collect();
    let mut moved = vec![UNTOUCHED; ids.len()];
    waterfill_core::move_up(&placement(shape), &known, 1, &mut moved[..count]).unwrap();
    // Without ids as the runner launches it once.
    for (count, expected) in [(count, &moved), (0, &vec![UNTOUCHED; ids.len()])] {
        let mut out = vec![UNTOUCHED; ids.len()];
        let args = MoveArgs {
            ids: address(&ids),
            out: address_mut(&mut out),
            count: count as u64,
            ..move_args(&common_args(shape, 0, 0))
        };
        launch(kernel, random, args, count.max(1))?;
        same("moved ids", &out, expected)?;
    }
    Ok(())
}

fn launch(kernel: &mut Emulated, random: &mut Random, mut args: MoveArgs, count: usize) -> Checked {
    let words = address_mut(std::slice::from_mut(&mut args));
    let args = Args { mode: MOVE_UP, words, ..Args::default() };
    // SAFETY: at `words` are its arguments; the caller holds their arrays, which have room for all threads.
    unsafe { kernel.launch(launch_of_ids(count), &args, random.next() as u32, &mut || ()) }
}

/// The kernel knows ranks and experts from its arguments alone, so one compilation is for all of them.
fn checks<I: AnyId>(id: IdType, edit: impl Fn(String) -> String) -> Checked {
    let Some(compiler) = compiler() else { return Ok(()) };
    let shape = |ranks: usize, each: usize| {
        let (experts, weight) = (ranks * each, WeightType::F32);
        Shape { ranks, experts, top_k: 8, id, weight }
    };
    let variant = Variant { clustered: false, own_only: true };
    let mut kernel = Emulated::new(&compiler, &shape(8, 32), variant, edit);
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
    checks::<i32>(IdType::I32, |source| source).unwrap();
}

#[test]
fn ids_of_64_bits_are_the_cores() {
    checks::<i64>(IdType::I64, |source| source).unwrap();
}

#[test]
fn notices_wrong_moves() {
    if compiler().is_none() {
        return;
    }
    let expert = "args.rank_multiplier), (UNSIGNED_ID)id < args.experts)";
    for (right, wrong) in [
        (expert, "args.rank_multiplier), (u32)id < args.experts)"),
        (expert, "args.rank_multiplier), (UNSIGNED_ID)id <= args.experts)"),
        (expert, "args.rank_multiplier), (UNSIGNED_ID)id < args.experts - 1)"),
        (expert, "args.rank_multiplier), id < (ID)args.experts)"),
        (expert, "args.rank_multiplier), id > 0 && id < args.experts)"),
        (expert, "args.rank_multiplier - 1), (UNSIGNED_ID)id < args.experts)"),
        ("__umulhi(2 * (u32)id, multiplier)", "__umulhi((u32)id, multiplier)"),
        ("id < 0 ? id : (ID)-1;", "id;"),
        ("id < 0 ? id : (ID)-1;", "(ID)-1;"),
        ("expert ? id + (ID)rank", "expert ? id + (ID)rank + 1"),
        ("if (i >= args.count) return;", ""),
        ("if (i >= args.count) return;", "if (i > args.count) return;"),
        ("if (i >= args.count) return;", "if (i + 1 >= args.count) return;"),
        ("(u64)blockIdx.x * MOVE_THREADS", "(u64)blockIdx.x * (MOVE_THREADS - 1)"),
    ] {
        let noticed = checks::<i64>(IdType::I64, plant(right, wrong)).is_err();
        assert!(noticed, "not noticed: {wrong:?} in place of {right:?}");
    }
    // Ids of 32 bits are written as 64.
    assert!(checks::<i32>(IdType::I32, plant("    long long *out; ", "    ID *out; ")).is_err());
}
