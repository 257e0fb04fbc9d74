//! What host and kernels exchange: `Args` and `State` of kernels/types.cuh, `MoveArgs` of kernels/move_up.cuh and `ReplicaArgs` of
//! kernels/replica_board.cuh, field by field; and what a launch has of it.

use std::mem::offset_of;

use waterfill_board::{Outcome, RING};

use crate::driver::Launch;
use crate::shape::{Geometry, MOVE_THREADS, ReplicaGeometry, Shape, WeightType};

/// A struct that the kernels have too, under the same names.
macro_rules! with_layout {
    ($(#[$attribute:meta])* struct $name:ident { $(pub $field:ident: $type:ty,)* }) => {
        $(#[$attribute])*
        #[allow(missing_docs, reason = "kernels/ says what each is")]
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name { $(pub $field: $type,)* }

        impl $name {
            /// Its name, its bytes, and the offset and the bytes of each field by its name.
            pub const LAYOUT: Layout = Layout {
                name: stringify!($name),
                bytes: size_of::<Self>(),
                fields: &[$((stringify!($field), offset_of!(Self, $field), size_of::<$type>())),*],
            };
        }
    };
}

/// Where the fields of a struct are.
#[derive(Debug)]
pub struct Layout {
    name: &'static str,
    bytes: usize,
    fields: &'static [(&'static str, usize, usize)],
}

impl Layout {
    /// What has to be true of the struct in C++: of all of it, then of each field.
    pub fn claims(&self) -> (String, Vec<String>) {
        let Self { name, bytes, fields } = self;
        let of_field = |(field, offset, bytes): &(&str, usize, usize)| {
            format!(
                "__builtin_offsetof({name}, {field}) == {offset} && sizeof({name}::{field}) == {bytes}"
            )
        };
        (format!("sizeof({name}) == {bytes}"), fields.iter().map(of_field).collect())
    }
}

with_layout! {
    /// The one argument of `expand_topk`.
    struct Args {
        pub ids: u64,
        pub weights: u64,
        pub out_ids: u64,
        pub out_weights: u64,
        pub unpadded: u64,
        pub quotas: u64,
        pub words: u64,
        pub board: u64,
        pub state: u64,
        pub cap_ns: u64,
        pub rank_multiplier: u32,
        pub rows: u32,
        pub rows_per_block: u32,
        pub rank: u32,
        pub experts: u32,
        pub experts_per_rank: u32,
        pub shared_weight: u32,
        pub mode: u32,
        pub counts_at: u32,
        pub quotas_at: u32,
        pub slot_words: u32,
        pub ring: u32,
        pub posts_experts: u32,
        pub counts_stride: u32,
        pub tally_at: u32,
        pub without_plan_at: u32,
        pub deserted_at: u32,
        pub cleared_bytes: u32,
        pub table_bytes: u32,
        pub table_stride: u32,
        pub counts_bytes: u32,
        pub ranks_bytes: u32,
        pub visited_bytes: u32,
        pub states_bytes: u32,
        pub writers: u32,
    }
}

with_layout! {
    /// The one argument of `move_up`.
    struct MoveArgs {
        pub ids: u64,
        pub out: u64,
        pub primaries: u64,
        pub logical: u64,
        pub count: u64,
        pub rank_multiplier: u32,
        pub experts: u32,
    }
}

with_layout! {
    /// The one argument of `choose_replicas`.
    struct ReplicaArgs {
        pub args: Args,
        pub table: u64,
        pub logical: u64,
        pub out: u64,
        pub quotas: u64,
        pub moved: u32,
        pub columns_bytes: u32,
        pub next_bytes: u32,
        pub layer_bytes: u32,
    }
}

with_layout! {
    /// What a runner keeps on the device between calls.
    struct State {
        pub last: u32,
        pub failures: u32,
        pub tally: [u64; Outcome::COUNT],
    }
}

/// A call's mode is how it gets its quotas: this one takes those from own counts.
pub const OWN: u32 = 0;
/// From the board, if they come in time.
pub const LIVE: u32 = 1;
/// From the caller.
pub const GIVEN: u32 = 2;
/// It needs none: it only counts.
pub const COUNT: u32 = 3;

/// What all calls of a rank have in common; at `state` is its [`State`].
pub fn common_args(shape: &Shape, rank: usize, state: u64) -> Args {
    let experts_per_rank = shape.experts / shape.ranks;
    Args {
        state,
        rank_multiplier: (1u32 << 31).div_ceil(experts_per_rank as u32),
        rank: rank as u32,
        experts: shape.experts as u32,
        experts_per_rank: experts_per_rank as u32,
        ..Args::default()
    }
}

/// To cut a call so.
pub fn with_cut(args: Args, cut: &Geometry) -> Args {
    Args {
        rows_per_block: cut.rows_per_block as u32,
        cleared_bytes: if args.posts_experts == 0 { cut.counts_at } else { cut.ranks_at } as u32,
        table_bytes: cut.table_at as u32,
        table_stride: cut.table_stride as u32,
        counts_bytes: cut.counts_at as u32,
        ranks_bytes: cut.ranks_at as u32,
        visited_bytes: cut.visited_at as u32,
        states_bytes: cut.states_at as u32,
        writers: cut.writers as u32,
        ..args
    }
}

/// To take part in a board of this shape, whose first word the device finds at `address`.
pub fn with_board(args: Args, shape: &waterfill_board::Shape, address: u64) -> Args {
    let rank = args.rank as usize;
    Args {
        board: address,
        counts_at: shape.counts(0, rank) as u32,
        quotas_at: shape.quotas(0, rank) as u32,
        slot_words: (shape.counts(1, rank) - shape.counts(0, rank)) as u32,
        ring: RING as u32,
        posts_experts: u32::from(!shape.has_counts_per_rank()),
        counts_stride: shape.counts_stride() as u32,
        tally_at: shape.calls_of(rank) as u32,
        without_plan_at: shape.without_plan(rank) as u32,
        deserted_at: shape.deserted(rank) as u32,
        ..args
    }
}

/// A weight's bits.
pub fn weight_bits(kind: WeightType, weight: f32) -> u32 {
    match kind {
        WeightType::F32 => weight.to_bits(),
        WeightType::Bf16 => {
            let bf16: waterfill_core::Bf16 = waterfill_core::Weight::from_f32(weight);
            bf16.0.into()
        }
    }
}

/// To move no ids, with these sizes.
pub fn move_args(args: &Args) -> MoveArgs {
    let Args { rank_multiplier, experts, .. } = *args;
    MoveArgs { rank_multiplier, experts, ..MoveArgs::default() }
}

/// To choose replicas in a call that is cut so, with what `args` says of the call.
pub fn replica_args(args: Args, cut: &ReplicaGeometry) -> ReplicaArgs {
    let args = Args {
        rows_per_block: cut.rows_per_block as u32,
        cleared_bytes: cut.next_at as u32,
        counts_bytes: cut.counts_at as u32,
        ..args
    };
    ReplicaArgs {
        args,
        columns_bytes: cut.columns_at as u32,
        next_bytes: cut.next_at as u32,
        layer_bytes: cut.layer_at as u32,
        ..ReplicaArgs::default()
    }
}

/// The launch of such a call.
pub fn launch_of_replicas(cut: &ReplicaGeometry) -> Launch {
    let ReplicaGeometry { blocks, threads, shared_bytes, .. } = *cut;
    Launch { blocks, cluster: blocks, threads, shared_bytes }
}

/// The launch of a call that is cut so.
pub fn launch_of(cut: &Geometry) -> Launch {
    let (blocks, cluster) = (cut.blocks + cut.writers, cut.blocks);
    Launch { blocks, cluster, threads: cut.threads, shared_bytes: cut.shared_bytes }
}

/// A thread an id. So many ids that a grid has too few blocks would take terabytes.
pub fn launch_of_ids(count: usize) -> Launch {
    Launch {
        blocks: count.div_ceil(MOVE_THREADS),
        cluster: 1,
        threads: MOVE_THREADS,
        shared_bytes: 0,
    }
}
