//! The kernel's own source, run on the CPU, gives what the core gives, bit for bit: without a GPU.
//!
//! All of the source but ptx.cuh is compiled as C++ (`device.rs`), CUDA's threads being fibers (`threads.h`), and
//! launched as the runner launches it; accesses to shared memory that no barrier orders are errors (`races.h`). So a wrong
//! kernel is noticed wherever these tests run; defects that are planted in the source show that. What cannot be noticed
//! so: docs/gpu.md.

mod arithmetic;
mod batch;
mod device;
mod live;
mod move_up;
mod rank;

use std::ffi::OsString;

use waterfill_core::{Bf16, Weight};

use self::batch::AnyId;
use self::device::Emulated;
use self::live::{Live, Plan};
use self::rank::{Checked, Rank};
use crate::shape::{IdType, Shape, WeightType};

/// Both sides of what one block takes, of a warp, and of blocks that share the rest unevenly.
const ROWS: [usize; 12] = [0, 1, 7, 32, 100, 128, 256, 257, 300, 700, 1000, 2500];
/// Enough of them for a kernel that is wrong.
const FEW_ROWS: [usize; 5] = [7, 40, 256, 300, 700];
const LIVE_ROWS: [usize; 7] = [0, 1, 7, 40, 128, 300, 600];
const PLANS: [Plan; 13] = [
    Plan::Whole,
    Plan::Whole,
    Plan::Arriving,
    Plan::Arriving,
    Plan::AtLast,
    Plan::Missing,
    Plan::Partial,
    Plan::Late,
    Plan::None,
    Plan::Passed,
    Plan::WholeAndPassed,
    Plan::Deserted,
    Plan::Wrong,
];
/// Calls over one board: after which sequence, how many, and how many of them are late. From the start; over the
/// sequence's wrap, with a breaker that is to close there; and until tries are as seldom as they get.
const SCRIPTS: [(u32, usize, usize); 3] = [(0, 30, 0), (u32::MAX - 2, 12, 3), (128, 130, 130)];

/// Calls without a board, then some over boards.
fn checks<I: AnyId, W: Weight>(rank: &mut Rank, rows: &[usize]) -> Checked {
    for &rows in rows {
        rank.checks::<I, W>(rows).map_err(|error| format!("{rows} rows: {error}"))?;
    }
    for (by_expert, gathered) in [(true, false), (false, false), (true, true), (false, true)] {
        for script in SCRIPTS {
            checks_live::<I, W>(rank, by_expert, gathered, script).map_err(|error| {
                format!("counts by expert {by_expert}, gathered {gathered}, {error}")
            })?;
        }
    }
    rank.warms()
}

fn checks_live<I: AnyId, W: Weight>(
    rank: &mut Rank,
    by_expert: bool,
    gathered: bool,
    (last, calls, late): (u32, usize, usize),
) -> Checked {
    let mut live = Live::new(rank, by_expert, last);
    for call in 0..calls {
        let random = &mut live.rank.random;
        let (plan, rows) = match call < late {
            true => (Plan::Late, 1),
            false => (random.pick(&PLANS), random.pick(&LIVE_ROWS)),
        };
        live.calls::<I, W>(rows, plan, gathered)
            .map_err(|error| format!("call {call} after {last}, {plan:?}, {rows} rows: {error}"))?;
    }
    Ok(())
}

/// A shape's kernel, its source as `edit` gives it.
fn check(
    compiler: &OsString,
    shape: Shape,
    rows: &[usize],
    edit: impl Fn(String) -> String,
) -> Checked {
    let compile = |shape: &Shape, variant| Emulated::new(compiler, shape, variant, &edit);
    let mut rank = Rank::new(shape, &compile);
    let checked = match (shape.id, shape.weight) {
        (IdType::I32, WeightType::F32) => checks::<i32, f32>(&mut rank, rows),
        (IdType::I32, WeightType::Bf16) => checks::<i32, Bf16>(&mut rank, rows),
        (IdType::I64, WeightType::F32) => checks::<i64, f32>(&mut rank, rows),
        (IdType::I64, WeightType::Bf16) => checks::<i64, Bf16>(&mut rank, rows),
    };
    checked.map_err(|error| format!("{shape:?}, rank {}: {error}", rank.rank))
}

/// A test a shape: they run side by side.
macro_rules! shapes {
    ($($name:ident: $ranks:literal, $experts:literal, $top_k:literal, $id:ident, $weight:ident;)*) => {$(
        #[test]
        fn $name() {
            let Some(compiler) = device::compiler() else { return };
            let (id, weight) = (IdType::$id, WeightType::$weight);
            let shape = Shape { ranks: $ranks, experts: $experts, top_k: $top_k, id, weight };
            check(&compiler, shape, &ROWS, |source| source).unwrap();
        }
    )*};
}

shapes! {
    equals_the_core_on_1_rank: 1, 4, 1, I32, F32;
    equals_the_core_on_2_ranks: 2, 6, 8, I64, Bf16;
    equals_the_core_on_3_ranks: 3, 12, 6, I32, Bf16;
    equals_the_core_on_8_ranks: 8, 256, 6, I32, F32;
    equals_the_core_on_12_ranks: 12, 12, 8, I64, F32;
    equals_the_core_on_16_ranks: 16, 48, 7, I32, F32;
    equals_the_core_on_31_ranks: 31, 62, 1, I32, F32;
    equals_the_core_on_32_ranks: 32, 256, 8, I32, Bf16;
    equals_the_core_on_33_ranks: 33, 66, 6, I64, F32;
    equals_the_core_on_64_ranks: 64, 256, 6, I32, F32;
    equals_the_core_on_72_ranks: 72, 288, 8, I64, Bf16;
    equals_the_core_on_144_ranks: 144, 288, 6, I32, F32;
    equals_the_core_on_257_ranks: 257, 514, 32, I64, Bf16;
}

/// A defect: a piece of the source, what stands there instead, and a part of what has to be said of it.
type Defect<'a> = (&'a str, &'a str, &'a str);

const FEW_RANKS: Shape =
    Shape { ranks: 8, experts: 16, top_k: 6, id: IdType::I32, weight: WeightType::F32 };
const MANY_RANKS: Shape =
    Shape { ranks: 33, experts: 66, top_k: 6, id: IdType::I64, weight: WeightType::Bf16 };

/// The source with `wrong` where `right` stood.
fn plant(right: &str, wrong: &str) -> impl Fn(String) -> String {
    move |source| {
        assert_eq!(source.matches(right).count(), 1, "the source has no such piece: {right}");
        source.replace(right, wrong)
    }
}

/// Each defect, planted by itself, is noticed.
fn notices(shape: Shape, defects: &[Defect<'_>]) {
    notices_in(shape, &FEW_ROWS, defects);
}

fn notices_in(shape: Shape, rows: &[usize], defects: &[Defect<'_>]) {
    let Some(compiler) = device::compiler() else { return };
    for &(right, wrong, said) in defects {
        match check(&compiler, shape, rows, plant(right, wrong)) {
            Ok(()) => panic!("not noticed: {wrong:?} in place of {right:?}"),
            Err(error) => assert!(error.contains(said), "{wrong:?} for {right:?}: {error}"),
        }
    }
}

#[test]
fn notices_a_barrier_that_is_missing() {
    let after_sharing = "read_block(&b.quota_set, 0);\n    }\n    __syncthreads();\n}\n";
    notices(
        FEW_RANKS,
        &[
            // Whatever is said: clang before 15 does not tell of the writes before it.
            ("    __syncthreads();\n    number_call", "    number_call", ""),
            (
                "();\n#else\n    __syncthreads();\n#endif\n}\n#line",
                "();\n#else\n#endif\n}\n#line",
                "a race",
            ),
            (
                "tokens_before = before;\n        }\n    }\n    __syncthreads();",
                "tokens_before = before;\n        }\n    }",
                "a race",
            ),
            ("else __syncthreads();\n\n    Quotas &quotas", "\n    Quotas &quotas", "a race"),
            ("    sync_blocks();\n    add_blocks<2", "    add_blocks<2", "a race"),
            (
                "    sync_blocks();\n    add_blocks<2",
                "    __syncthreads();\n    add_blocks<2",
                "a race",
            ),
            ("        sync_blocks();\n        close_round", "        close_round", "a race"),
            ("    if (CLUSTERED) __syncthreads();\n#if", "#if", "a race"),
            ("most, warp());\n    __syncthreads();\n#else", "most, warp());\n#else", "a race"),
            ("quotas.left);\n    __syncthreads();", "quotas.left);", "a race"),
            ("{\n    sync_blocks();\n    if (block() > 0)", "{\n    if (block() > 0)", "a race"),
            (after_sharing, "read_block(&b.quota_set, 0);\n    }\n}\n", "a race"),
        ],
    );
    notices(
        MANY_RANKS,
        &[("    __syncthreads();\n    most = b.most", "    most = b.most", "a race")],
    );
}

#[test]
fn notices_what_only_memory_order_tells() {
    // On the CPU, where a thread goes on alone from one barrier to the next, most of these give the right ids.
    let races = |right, wrong| (right, wrong, "a race");
    notices(
        FEW_RANKS,
        &[
            races("    __syncwarp();\n", ""),
            races("    release_shared();\n", ""),
            races("atomicAdd(&b.tokens, tokens);", "b.tokens += tokens;"),
            races("atomicAdd(&s.loads[rank], 1u);", "s.loads[rank] += 1;"),
            races("atomicAdd(all + first[j], read[j].x);", "all[first[j]] += read[j].x;"),
        ],
    );
    notices(
        MANY_RANKS,
        &[
            races("atomicMax(&b.most[round], most_here);", "b.most[round] = most_here;"),
            races("atomicAdd(to + 1, four.y);", "to[1] += four.y;"),
        ],
    );
}

#[test]
fn notices_threads_that_do_not_come() {
    let clock = "__shfl_sync(ALL, stage(args, now_ns() - begun), 0)";
    let vote = "!__all_sync(ALL, (u32)(word >> 32) == sequence)";
    let most = "__reduce_max_sync(ALL, value)";
    notices(
        FEW_RANKS,
        &[
            ("    leave_blocks();\n    place_rest", "    place_rest", "without an arrival"),
            ("most > 0);\n    end_blocks();", "most > 0);", "ends without the wait"),
            (most, "__reduce_max_sync(lanes_before(), value)", "for some lanes"),
            (clock, "stage(args, now_ns() - begun)", ""),
            (vote, "(u32)(word >> 32) != sequence", "__shfl"),
        ],
    );
}

#[test]
fn notices_wrong_counts_and_ranks() {
    let padded = "row < rows.unpadded ? ids.id[k] : (ID)-1";
    let states = "s.states[row] = (u16)(token";
    notices(
        FEW_RANKS,
        &[
            (padded, "ids.id[k]", "ids"),
            ("i < unpadded ? rows.ids[i] : (ID)-1", "i < slots ? rows.ids[i] : (ID)-1", "ids"),
            ("args.cleared_bytes / sizeof(uint4)", "args.cleared_bytes / 2 / sizeof(uint4)", ""),
            ("bits_of(NO_RANK)", "bits_of(RANKS - 1)", "ids"),
            ("mask & ALL >> (WARP - RANKS)", "mask", "ids"),
            ("visits.add(k, rank) ? rank : NO_RANK", "rank", "ids"),
            ("lane() * most / BID_LEVELS, ranks", "(lane() + 1) * most / BID_LEVELS, ranks", "ids"),
            ("some & ALL << first", "some & ~1u << first", "ids"),
            ("(1u << 8 * (column - at)) - 1", "(1u << 8 * (column - at))", "ids"),
            ("at + 4 <= column; at += 4", "at + 4 < column; at += 4", ""),
            ("before && other[j] < block()", "before && other[j] <= block()", "ids"),
            ("(first + i) * most / BID_LEVELS", "(first + i + 1) * most / BID_LEVELS", "ids"),
            ("order + before < allowed", "order + before <= allowed", "ids"),
            ("s.until[middle] > place", "s.until[middle] >= place", "ids"),
            ("place >= quotas.home", "place > quotas.home", "ids"),
            ("s.granted_before[rank] += granted", "s.granted_before[rank] = granted", "ids"),
            ("b.tokens_before - b.granted_before", "b.tokens_before", "ids"),
            ("memory + args.table_bytes;", "memory + args.table_bytes + 2;", "misaligned"),
            (states, "s.states[row + 256] = (u16)(token", "of its shared memory"),
        ],
    );
}

#[test]
fn notices_wrong_writers() {
    let shape = Shape { ranks: 2, experts: 8, ..FEW_RANKS };
    notices_in(
        shape,
        &[2500, 2500, 2500],
        &[
            ("write_part(args, writer);", ";", "ids"),
            ("Rows rows(args, writer);\n    rows.pad(args);", "Rows rows(args, writer);", "ids"),
            ("Rows rows(args, writer);", "Rows rows(args, 0);", "ids"),
            ("if (!CLUSTERED || blockIdx.x < blocks()) expand", "expand", ""),
        ],
    );
}

#[test]
fn notices_wrong_plans() {
    let expert = "return (UNSIGNED_ID)id < args.experts";
    notices(
        MANY_RANKS,
        &[
            (expert, "return (u32)id < args.experts", "ids"),
            ("id < 0 ? id : (ID)-1", "id", "ids"),
            ("+ 512) >> 10", ") >> 10", "ids"),
            ("nearly + (more > 0)", "nearly", "ids"),
            ("if (next == level) return", "if (next > level) return", "does not end"),
            ("granted += CLUSTERED ? s", "granted = CLUSTERED ? s", "ids"),
            ("before && other[j] < block()", "before", "ids"),
            ("bool visit = true;", "bool visit = added != rank[0];", "counts"),
        ],
    );
}

#[test]
fn notices_wrong_words_and_waits() {
    let sum = "*sum = warp_sum_long(mine);";
    let look = "if (take(args, quotas, b.sequence, &sum)) break;";
    let clock = "u32 now = __shfl_sync(ALL, stage(args, now_ns() - begun), 0);";
    let (clock_first, look_first) =
        (format!("{clock}\n        {look}"), format!("{look}\n        {clock}"));
    let counts = "args.counts_at - args.rank * args.counts_stride";
    notices(
        FEW_RANKS,
        &[
            ("(u64)(sequence % args.ring)", "(u64)(sequence % 2)", ""),
            (counts, "args.counts_at", "the board"),
            (sum, "*sum = warp_sum((u32)mine);", ""),
            ("== all_tokens(b) ? TALLY_LIVE : TALLY_TORN", "? TALLY_LIVE : TALLY_TORN", ""),
            (&clock_first, &look_first, ""),
            ("BREAK_AFTER 2u", "BREAK_AFTER 3u", ""),
            ("MOST_SELDOM 6u", "MOST_SELDOM 5u", "the board"),
            ("seldom == 0 && is_without", "seldom == 0 && sequence > 1 && is_without", "the board"),
            ("last != 0 && (int)(last - sequence) >= 0", "last == sequence", ""),
            ("last != 0 && (int)(last - sequence) >= 0", "last != 0 && last >= sequence", ""),
            ("none ? 0 : deserted ?", "deserted ?", "sequence and failures"),
            ("&& stage != SPENT) return false", "&& stage != LATE) return false", ""),
            ("TALLY_TIMED_OUT && lane() ==", "TALLY_TIMED_OUT && WARP ==", "the board"),
            (
                "post_waits(args, b.sequence, b.waits);",
                "post_waits(args, b.sequence, 1);",
                "the board",
            ),
            ("    if (!args.words) {\n", "    if (true) {\n", "the board"),
        ],
    );
}
