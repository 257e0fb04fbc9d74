//! What host and kernels exchange: `Args` and `State` of kernels/types.cuh and `MoveArgs` of kernels/move_up.cuh, field by field.

use std::mem::offset_of;

use waterfill_board::Outcome;

/// A struct that the kernels have too, under the same names.
macro_rules! with_layout {
    ($(#[$attribute:meta])* struct $name:ident { $(pub $field:ident: $type:ty,)* }) => {
        $(#[$attribute])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct $name { $(pub $field: $type,)* }

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
pub(crate) struct Layout {
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
        pub count: u64,
        pub rank_multiplier: u32,
        pub experts: u32,
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

/// Modes of a call: how it gets its quotas. A call of mode `COUNT` only counts.
pub(crate) const OWN: u32 = 0;
pub(crate) const LIVE: u32 = 1;
pub(crate) const GIVEN: u32 = 2;
pub(crate) const COUNT: u32 = 3;
