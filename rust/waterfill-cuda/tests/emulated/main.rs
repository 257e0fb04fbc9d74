//! The kernel's own source, run on the CPU, gives what the core gives, bit for bit: without a GPU.
//!
//! The emulator compiles and runs it (`cuda-emulator`, whose README says what it cannot detect); it is launched as the runner
//! launches it. So a wrong kernel is noticed wherever these tests run; defects that are planted in the source show that.

mod arithmetic;
mod batch;
mod defects;
mod fuzz;
mod kernel;
mod live;
mod move_up;
mod rank;
mod replicas;

use std::ffi::OsStr;

use cuda_emulator::{Defect, Edit, Kernel, compiler, marks};
use waterfill_core::{Bf16, Weight};
use waterfill_cuda::internal::FILES;
use waterfill_cuda::{IdType, Shape, Variant, WeightType};

use self::batch::AnyId;
use self::live::{Live, Plan};
use self::rank::{Checked, Rank};

/// Both sides of what one block takes, of a warp, and of blocks that share the rest unevenly.
const ROWS: [usize; 12] = [0, 1, 7, 32, 100, 128, 256, 257, 300, 700, 1000, 2500];
/// Enough of them for a kernel that is wrong.
const FEW_ROWS: [usize; 5] = [7, 40, 256, 300, 700];
const LIVE_ROWS: [usize; 7] = [0, 1, 7, 40, 128, 300, 600];
/// The last in more blocks than one, or in one that has more rows than threads.
const REPLICA_ROWS: [usize; 8] = [0, 1, 7, 40, 128, 300, 600, 1200];
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

/// The same where replicas are chosen. How seldom a rank tries is the same code, so few calls are late.
const REPLICA_SCRIPTS: [(u32, usize, usize); 2] = [(0, 50, 0), (u32::MAX - 2, 40, 3)];

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

/// Calls that choose replicas.
fn checks_replicas<I: AnyId>(rank: &mut Rank, rows: &[usize]) -> Checked {
    for &rows in rows {
        for moved in [false, true] {
            rank.counts_for_replicas::<I>(rows, moved)
                .map_err(|error| format!("{rows} rows, moved {moved}: {error}"))?;
        }
    }
    for gathered in [false, true] {
        for (last, calls, late) in REPLICA_SCRIPTS {
            let mut live = Live::new(rank, true, last);
            for call in 0..calls {
                let random = &mut live.rank.random;
                let (plan, rows) = match call < late {
                    true => (Plan::Late, 1),
                    false => (random.pick(&PLANS), random.pick(rows)),
                };
                live.chooses::<I>(rows, plan, gathered).map_err(|error| {
                    format!("gathered {gathered}, call {call} after {last}, {plan:?}, {rows} rows: {error}")
                })?;
            }
        }
    }
    rank.warms_choice()
}

/// A shape's kernel, with a defect.
fn check(compiler: &OsStr, shape: Shape, rows: &[usize], edits: &[Edit]) -> Checked {
    let compile = |shape: &Shape, variant| kernel::compile(compiler, shape, variant, edits);
    let mut rank = Rank::new(shape, &compile);
    if shape.redundant > 0 {
        let checked = match shape.id {
            IdType::I32 => checks_replicas::<i32>(&mut rank, rows),
            IdType::I64 => checks_replicas::<i64>(&mut rank, rows),
        };
        return checked.map_err(|error| format!("{shape:?}, rank {}: {error}", rank.rank));
    }
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
            let Some(compiler) = compiler() else { return };
            let (id, weight) = (IdType::$id, WeightType::$weight);
            let shape = Shape { ranks: $ranks, experts: $experts, redundant: 0, top_k: $top_k, id, weight };
            check(&compiler, shape, &ROWS, &[]).unwrap();
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

/// The same with redundant experts.
macro_rules! shapes_with_replicas {
    ($($name:ident: $ranks:literal, $experts:literal, $redundant:literal, $top_k:literal, $id:ident;)*) => {$(
        #[test]
        fn $name() {
            let Some(compiler) = compiler() else { return };
            let (ranks, experts, redundant, top_k) = ($ranks, $experts, $redundant, $top_k);
            let (id, weight) = (IdType::$id, WeightType::F32);
            let shape = Shape { ranks, experts, redundant, top_k, id, weight };
            check(&compiler, shape, &REPLICA_ROWS, &[]).unwrap();
        }
    )*};
}

shapes_with_replicas! {
    chooses_as_the_core_on_1_rank: 1, 5, 2, 1, I32;
    chooses_as_the_core_on_2_ranks: 2, 4, 1, 2, I64;
    chooses_as_the_core_on_4_ranks: 4, 20, 16, 8, I32;
    chooses_as_the_core_on_8_ranks: 8, 288, 32, 8, I32;
    chooses_as_the_core_on_16_ranks: 16, 48, 16, 6, I64;
    chooses_as_the_core_on_33_ranks: 33, 66, 40, 9, I32;
    chooses_as_the_core_on_64_ranks: 64, 320, 64, 8, I64;
    chooses_as_the_core_on_257_ranks: 257, 514, 100, 3, I32;
    chooses_as_the_core_of_1024_experts: 8, 1024, 96, 4, I32;
}

const FEW_RANKS: Shape = Shape {
    ranks: 8,
    experts: 16,
    redundant: 0,
    top_k: 6,
    id: IdType::I32,
    weight: WeightType::F32,
};
const REPLICAS: Shape = Shape {
    ranks: 4,
    experts: 20,
    redundant: 10,
    top_k: 6,
    id: IdType::I64,
    weight: WeightType::F32,
};
const MANY_RANKS: Shape = Shape {
    ranks: 33,
    experts: 66,
    redundant: 0,
    top_k: 6,
    id: IdType::I64,
    weight: WeightType::Bf16,
};

/// Each defect, planted by itself, is noticed.
fn notices(shape: Shape, defects: &[Defect]) {
    notices_in(shape, &FEW_ROWS, defects);
}

fn notices_in(shape: Shape, rows: &[usize], defects: &[Defect]) {
    let Some(compiler) = compiler() else { return };
    for (edits, said) in defects {
        match check(&compiler, shape, rows, edits) {
            Ok(()) => panic!("not noticed: {edits:?}"),
            Err(error) => assert!(error.contains(said), "{edits:?}: {error}"),
        }
    }
}

#[test]
fn notices_a_barrier_that_is_missing() {
    notices(FEW_RANKS, defects::BARRIERS);
    notices(MANY_RANKS, defects::BARRIERS_OF_MANY);
}

#[test]
fn notices_what_only_memory_order_tells() {
    notices(FEW_RANKS, defects::ORDER);
    notices(MANY_RANKS, defects::ORDER_OF_MANY);
}

#[test]
fn notices_threads_that_do_not_come() {
    notices(FEW_RANKS, defects::THREADS);
}

#[test]
fn notices_wrong_counts_and_ranks() {
    notices(FEW_RANKS, defects::COUNTS);
}

#[test]
fn notices_wrong_writers() {
    let shape = Shape { ranks: 2, experts: 8, ..FEW_RANKS };
    notices_in(shape, &[2500, 2500, 2500], defects::WRITERS);
}

#[test]
fn notices_wrong_plans() {
    notices(MANY_RANKS, defects::PLANS);
}

#[test]
fn notices_wrong_words_and_waits() {
    notices(FEW_RANKS, defects::WORDS);
}

const REPLICA_FEW_ROWS: [usize; 4] = [7, 40, 300, 700];

#[test]
fn notices_a_choice_of_replicas_out_of_order() {
    notices_in(REPLICAS, &REPLICA_FEW_ROWS, defects::REPLICA_ORDER);
}

#[test]
fn notices_wrong_words_of_replicas() {
    notices_in(REPLICAS, &REPLICA_FEW_ROWS, defects::REPLICA_WORDS);
}

#[test]
fn notices_wrong_choices_of_replicas() {
    notices_in(REPLICAS, &REPLICA_FEW_ROWS, defects::CHOICES);
}

#[test]
fn notices_a_table_that_is_not_all_there() {
    let shape = Shape { ranks: 2, experts: 600, redundant: 40, ..REPLICAS };
    notices_in(shape, &REPLICA_FEW_ROWS, defects::LARGE_TABLES);
}

#[test]
fn no_board_or_table_changes_a_rows_logical_expert() {
    let Some(compiler) = compiler() else { return };
    fuzz::checks(&compiler, REPLICAS, 5000, &[]).unwrap();
    fuzz::checks(&compiler, Shape { id: IdType::I32, top_k: 2, ..REPLICAS }, 5000, &[]).unwrap();
}

#[test]
fn notices_rows_at_another_logical_expert() {
    let Some(compiler) = compiler() else { return };
    for (edits, said) in defects::SAFETY {
        match fuzz::checks(&compiler, REPLICAS, 5000, edits) {
            Ok(()) => panic!("not noticed: {edits:?}"),
            Err(error) => assert!(error.contains(said), "{edits:?}: {error}"),
        }
    }
}

#[test]
fn every_marked_line_has_a_defect() {
    let mut marked: Vec<_> = FILES.iter().flat_map(|(_, text)| marks(text)).collect();
    let edits = defects::ALL.iter().copied().flatten().flat_map(|(edits, _)| *edits);
    let mut planted: Vec<_> = edits.map(|edit| edit.mark).collect();
    marked.sort_unstable();
    planted.sort_unstable();
    planted.dedup();
    assert_eq!(marked, planted);
}

const ONE_BLOCK: Variant = Variant { clustered: false, own_only: true };
const CLUSTER: Variant = Variant { clustered: true, own_only: false };

#[test]
fn structs_and_arrays_that_are_not_the_hosts_do_not_compile() {
    let Some(compiler) = compiler() else { return };
    for variant in [ONE_BLOCK, CLUSTER] {
        for (edits, said) in defects::LAYOUTS {
            refuses(&compiler, &FEW_RANKS, variant, edits, said);
        }
    }
    for (edits, said) in defects::REPLICA_LAYOUTS {
        refuses(&compiler, &REPLICAS, CLUSTER, edits, said);
    }
}

fn refuses(compiler: &OsStr, shape: &Shape, variant: Variant, edits: &[Edit], said: &str) {
    let source = kernel::source(shape, variant).plant(edits);
    let error = Kernel::compile(compiler, &source).expect_err("it compiles");
    assert!(error.contains(said), "{edits:?}: {error}");
}

#[test]
fn every_file_includes_what_it_uses() {
    let Some(compiler) = compiler() else { return };
    for (name, _) in FILES {
        let source = kernel::alone(name, &REPLICAS, CLUSTER);
        Kernel::compile(&compiler, &source).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
