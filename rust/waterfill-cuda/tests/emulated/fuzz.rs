//! Boards, tables and maps of random words: no row gets another logical expert, where the server's own map is given.

use std::ffi::OsStr;
use std::sync::atomic::Ordering;

use cuda_emulator::Edit;
use waterfill_board::{Heap, Region};
use waterfill_cuda::internal::{Args, LIVE, ReplicaArgs, State, replica_args, with_board};
use waterfill_cuda::{IdType, Shape};

use super::batch::{AnyId, Batch, Random};
use super::kernel;
use super::rank::{Checked, Rank, address, address_mut};
use super::replicas::Layer;

/// So many boards.
pub fn checks(compiler: &OsStr, shape: Shape, boards: usize, edits: &[Edit]) -> Checked {
    let compile = |shape: &Shape, variant| kernel::compile(compiler, shape, variant, edits);
    let mut rank = Rank::new(shape, &compile);
    for board in 0..boards {
        let checked = match shape.id {
            IdType::I32 => keeps_experts::<i32>(&mut rank),
            IdType::I64 => keeps_experts::<i64>(&mut rank),
        };
        checked.map_err(|error| format!("board {board}: {error}"))?;
    }
    Ok(())
}

/// A word that may be anything, and often is nearly right.
fn word(random: &mut Random, shape: &Shape) -> u32 {
    match random.below(6) {
        0 => random.next() as u32,
        1 => random.pick(&[0, 1, u32::MAX, 1 << 31]),
        2 => shape.experts as u32,
        _ => random.below(2 * shape.redundant + 1) as u32,
    }
}

/// Some, all or none of the words are others.
fn spoil(random: &mut Random, shape: &Shape, words: &mut [u32]) {
    let times = random.pick(&[0, 1, 4, words.len()]);
    for _ in 0..times {
        let at = random.below(words.len());
        words[at] = word(random, shape);
    }
}

/// The server's map: the table's, or another one, also with numbers that are no experts.
fn spoil_map(random: &mut Random, logical: &mut [i64]) {
    let times = random.pick(&[0, 0, 1, 8]);
    for _ in 0..times {
        let (to, from) = (random.below(logical.len()), random.below(logical.len()));
        let number = logical[from];
        logical[to] = random.pick(&[number, number, number | 1 << 32, -1 - number, i64::MIN]);
    }
}

fn keeps_experts<I: AnyId>(rank: &mut Rank) -> Checked {
    let shape = rank.shape;
    let random = &mut rank.random;
    let mut layer = Layer::random(random, &shape);
    let rows = random.pick(&[1, 7, 40, 64]);
    let batch = Batch::<I, f32>::random(random, &shape, rows);
    let counted = batch.counted(&shape);
    // The plan: right, or nearly, or not at all; for the fingerprint that the table then has, mostly.
    let mut slots = layer.quotas(random, &counted.counts);
    spoil(random, &shape, &mut layer.words);
    spoil_map(random, &mut layer.logical);
    spoil(random, &shape, &mut slots);
    slots.resize_with(2 * shape.redundant, || word(random, &shape));
    let fingerprint = if random.rarely(8) { word(random, &shape) } else { layer.words[0] };
    let mut planned = vec![0; shape.ranks];
    if random.rarely(8) {
        spoil(random, &shape, &mut planned);
    }
    planned.push(fingerprint);
    planned.extend(slots);

    let board_shape =
        waterfill_board::Shape::with_redundant(shape.ranks, shape.experts, shape.redundant)
            .unwrap();
    let (board, mut state) = (Heap::new(board_shape), State::default());
    let at = board_shape.quotas(1, rank.rank);
    for (place, &value) in board.words()[at..].iter().zip(&planned) {
        // Relaxed: all in one thread.
        place.store(1 << 32 | u64::from(value), Ordering::Relaxed);
    }
    let blocks = if rank.random.rarely(8) { 2 } else { 1 };
    let cut = shape.replica_geometry(blocks, rows.div_ceil(blocks).next_multiple_of(32));
    let mut out = vec![i64::MIN; rows * shape.top_k];
    let unpadded = batch.unpadded.as_ref().map(|rows| address(std::slice::from_ref(rows)));
    let args = Args {
        mode: LIVE,
        ids: address(&batch.ids),
        rows: rows as u32,
        unpadded: unpadded.unwrap_or(0),
        ..with_board(rank.args(&mut state), &board_shape, address(board.words()))
    };
    let args = ReplicaArgs {
        table: address(&layer.words),
        logical: address(&layer.logical),
        out: address_mut(&mut out),
        moved: 1,
        ..replica_args(args, &cut)
    };
    rank.launch_replicas(&cut, args, &mut || ())?;
    for (i, &known) in batch.known.iter().enumerate() {
        let known: i64 = known.into();
        if known < 0 {
            continue;
        }
        // Back from past the shared experts.
        let each = (shape.experts / shape.ranks) as i64;
        let (chosen, found) = (out[i] - out[i] / (each + 1), out[i]);
        let is_expert = found % (each + 1) < each && (0..shape.experts as i64).contains(&chosen);
        let logical = |expert: i64| layer.logical[expert as usize];
        if chosen != known && (!is_expert || logical(chosen) != logical(known)) {
            return Err(format!("slot {i}: {chosen} is not of the logical expert of {known}"));
        }
    }
    Ok(())
}
