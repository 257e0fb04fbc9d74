//! What a runner is made for, and how a call of so many rows is cut into blocks.

use waterfill_core::{ReplicaTable, bids};

use crate::error::{Error, Result};

/// Width of expert ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdType {
    /// 32 bits.
    I32,
    /// 64 bits.
    I64,
}

/// Type of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
}

impl IdType {
    /// The type of ids of so many bits.
    #[must_use]
    pub fn of_bits(bits: usize) -> Option<Self> {
        match bits {
            32 => Some(Self::I32),
            64 => Some(Self::I64),
            _ => None,
        }
    }
}

impl WeightType {
    /// The type of weights of so many bits.
    #[must_use]
    pub fn of_bits(bits: usize) -> Option<Self> {
        match bits {
            32 => Some(Self::F32),
            16 => Some(Self::Bf16),
            _ => None,
        }
    }
}

/// What a runner is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// EP size.
    pub ranks: usize,
    /// Physical experts over all ranks.
    pub experts: usize,
    /// Those beyond one for each logical expert, where plans choose among replicas; else 0.
    pub redundant: usize,
    /// Routed experts of a token, 1 to 32.
    pub top_k: usize,
    /// Their ids.
    pub id: IdType,
    /// Their weights.
    pub weight: WeightType,
}

/// Which of a shape's kernels. They are compiled apart because instructions that a call jumps over cost it time too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// For a cluster of blocks, from compute capability 9.0 on; else for one block.
    pub clustered: bool,
    /// For calls whose quotas are from own counts alone; else for all.
    pub own_only: bool,
}

/// The most routed experts of a token.
pub const MAX_TOP_K: usize = 32;
/// Physical experts; the kernel's division of ids by experts a rank is exact while their square is below 2^31.
pub const MAX_EXPERTS: usize = 1 << 15;
/// Rows of one call; sums of routed rows and rooms fit 32 bits below it.
pub const MAX_ROWS: usize = 1 << 20;
/// Rows up to which one block takes them all, if it has room: a cluster's barriers cost more than it saves.
const BLOCK: usize = 256;
/// Rows of each block of a cluster, while there are blocks.
const CLUSTERED_BLOCK: usize = 128;
const LEAST_THREADS: usize = LEAST_WARPS * WARP;
/// Warps of the smallest block.
pub(crate) const LEAST_WARPS: usize = 4;
/// Threads of the largest block.
pub(crate) const MOST_THREADS: usize = 1024;
/// Warps beyond those with rows, while there are threads: one waits for quotas while another plans.
const PLANNING_WARPS: usize = 2;
pub(crate) const WARP: usize = 32;
/// Threads of a block that moves ids up, one id each.
pub const MOVE_THREADS: usize = 256;
/// Shared memory for what the threads of a block tell each other: `Block` in kernels/types.cuh.
pub(crate) const BLOCK_BYTES: usize = 128;
/// Rows of a cluster's block up to which it writes their routed columns itself, as it can while it plans; a second cluster
/// writes those of larger ones, which would take longer.
const WRITTEN_BY_BLOCK: usize = 256;
/// Arrays of a word a rank, and one more, in shared memory: those of `Zeros` in kernels/types.cuh, those of these that only a
/// cluster's blocks have, and those of `PerRank`.
const ZERO_ARRAYS: usize = 2 + ROUNDS;
const CLUSTER_ARRAYS: usize = 3 + 2 * ROUNDS;
const RANK_ARRAYS: usize = 2;
/// Two `Quotas` of `PerRank`: an array like those and some words each.
const QUOTAS: usize = 2;
const QUOTA_WORDS: usize = 2 + bids::BID_LEVELS as usize;
const ROUNDS: usize = bids::ROUNDS as usize;
/// Arrays of a word a job, and of a word a slot, of `Replicas` in kernels/replica_board.cuh.
const JOB_ARRAYS: usize = 5;
const SLOT_ARRAYS: usize = 4;

/// One call's blocks and their shared memory, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks that work together.
    pub blocks: usize,
    /// Blocks of a second cluster, or none.
    pub writers: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Rows of a block, but for the last ones.
    pub rows_per_block: usize,
    /// The table of bids, `[ROUNDS, ENTRIES, table_stride]`.
    pub table_at: usize,
    /// Bytes of a row of the table, a column each: an odd number of 16-byte groups, so that rows meet in no bank.
    pub table_stride: usize,
    /// Counts of rows by expert.
    pub counts_at: usize,
    /// `PerRank` of kernels/types.cuh.
    pub ranks_at: usize,
    /// The ranks that each token visits.
    pub visited_at: usize,
    /// The state of each token.
    pub states_at: usize,
    /// All of it.
    pub shared_bytes: usize,
}

/// The same for the kernel that chooses replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaGeometry {
    /// Blocks that work together.
    pub blocks: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Rows of a block, but for the last ones.
    pub rows_per_block: usize,
    /// Counts of rows by expert, and bits of active ones.
    pub counts_at: usize,
    /// Rows of each job by warp's rows, `[rows_per_block / 32, redundant]`.
    pub columns_at: usize,
    /// The number of each job's next row, `[warps, redundant]`; what is before it begins as zeros.
    pub next_at: usize,
    /// The layer's table, and behind it the logical expert of each physical one.
    pub layer_at: usize,
    /// All of it.
    pub shared_bytes: usize,
}

/// A cut whose blocks take so much shared memory.
trait SharedBytes {
    fn shared_bytes(&self) -> usize;
}

impl SharedBytes for Geometry {
    fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }
}

impl SharedBytes for ReplicaGeometry {
    fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }
}

impl Geometry {
    /// The same for a call that writes no rows.
    pub fn without_writers(self) -> Self {
        Self { writers: 0, ..self }
    }
}

impl Shape {
    /// What can be refused without a device.
    ///
    /// # Errors
    /// Ranks or experts that the core refuses, more than 32,768 experts, none that is not redundant, a top-k outside 1 to 32.
    pub fn check(&self) -> Result<()> {
        waterfill_core::Placement::contiguous(self.ranks, self.experts)?;
        if self.redundant >= self.experts {
            let Self { redundant, experts, .. } = self;
            return Err(Error::Argument(format!(
                "{redundant} redundant of {experts} experts: give fewer, one of each logical expert is none"
            )));
        }
        if self.experts > MAX_EXPERTS {
            let text = format!("{} experts: give {MAX_EXPERTS} at most", self.experts);
            return Err(Error::Argument(text));
        }
        if !(1..=MAX_TOP_K).contains(&self.top_k) {
            let text =
                format!("top_k {}: give 1 to {MAX_TOP_K} routed experts a token", self.top_k);
            return Err(Error::Argument(text));
        }
        Ok(())
    }

    /// How `rows` rows are cut, with up to `most_blocks` blocks of `shared_bytes` each: into as few as are fast, or into
    /// more where so few have no room.
    ///
    /// # Errors
    /// More rows than any number of blocks has room for.
    #[doc(hidden)]
    pub fn cut(&self, rows: usize, most_blocks: usize, shared_bytes: usize) -> Result<Geometry> {
        self.cut_with(rows, most_blocks, shared_bytes, |blocks, rows| self.geometry(blocks, rows))
    }

    /// The same for the kernel that chooses replicas.
    ///
    /// # Errors
    /// As there.
    #[doc(hidden)]
    pub fn cut_replicas(
        &self,
        rows: usize,
        most_blocks: usize,
        shared_bytes: usize,
    ) -> Result<ReplicaGeometry> {
        self.cut_with(rows, most_blocks, shared_bytes, |blocks, rows| {
            self.replica_geometry(blocks, rows)
        })
    }

    fn cut_with<G: SharedBytes>(
        &self,
        rows: usize,
        most_blocks: usize,
        shared_bytes: usize,
        geometry: impl Fn(usize, usize) -> G,
    ) -> Result<G> {
        let each = if rows <= BLOCK { BLOCK } else { CLUSTERED_BLOCK };
        let fewest = rows.div_ceil(each).clamp(1, most_blocks);
        let cut_into =
            |blocks: usize| geometry(blocks, rows.div_ceil(blocks).next_multiple_of(WARP));
        let fits = |cut: &G| rows <= MAX_ROWS && cut.shared_bytes() <= shared_bytes;
        (fewest..=most_blocks).map(cut_into).find(fits).ok_or_else(|| {
            let redundant = match self.redundant {
                0 => String::new(),
                redundant => format!(" ({redundant} of them redundant)"),
            };
            Error::Argument(format!(
                "{rows} rows of top {} over {} ranks and {} experts{redundant}: they take {} bytes of shared memory in each \
                 of {most_blocks} blocks, the device has {shared_bytes}; give fewer rows a call (never more than {MAX_ROWS})",
                self.top_k, self.ranks, self.experts, cut_into(most_blocks).shared_bytes()
            ))
        })
    }

    /// One block, or a cluster of them, with so many rows each.
    #[doc(hidden)]
    pub fn geometry(&self, blocks: usize, rows_per_block: usize) -> Geometry {
        let rows = rows_per_block.max(WARP);
        let table_at = (BLOCK_BYTES + self.zero_bytes(blocks > 1)).next_multiple_of(16);
        let table_stride = ((rows / WARP).div_ceil(16) | 1) * 16;
        let counts_at = table_at + ROUNDS * self.entries() * table_stride;
        let ranks_at = (counts_at + 4 * (self.experts + 1)).next_multiple_of(16);
        let visited_at = (ranks_at + self.per_rank_bytes()).next_multiple_of(16);
        let states_at = visited_at + 4 * rows * self.visit_words();
        Geometry {
            blocks,
            writers: if blocks > 1 && rows_per_block > WRITTEN_BY_BLOCK { blocks } else { 0 },
            threads: threads_of(rows_per_block),
            rows_per_block,
            table_at,
            table_stride,
            counts_at,
            ranks_at,
            visited_at,
            states_at,
            shared_bytes: states_at + 2 * rows,
        }
    }

    /// The same for the kernel that chooses replicas.
    #[doc(hidden)]
    pub fn replica_geometry(&self, blocks: usize, rows_per_block: usize) -> ReplicaGeometry {
        let threads = threads_of(rows_per_block);
        let counts_at = self.replicas_at(blocks > 1) + self.replicas_bytes();
        // And what names no expert, and the bits of the active ones.
        let columns_at = counts_at + 4 * (self.experts + 1 + self.experts.div_ceil(WARP));
        let columns = rows_per_block / WARP;
        let next_at = (columns_at + 4 * columns * self.redundant).next_multiple_of(16);
        let layer_at = next_at + 4 * threads / WARP * self.redundant;
        let table_words = ReplicaTable::words_of(self.experts, self.redundant);
        let shared_bytes = layer_at + 4 * (table_words + self.experts);
        ReplicaGeometry {
            blocks,
            threads,
            rows_per_block,
            counts_at,
            columns_at,
            next_at,
            layer_at,
            shared_bytes,
        }
    }

    /// Where `Replicas` of kernels/replica_board.cuh is.
    pub(crate) fn replicas_at(&self, clustered: bool) -> usize {
        (BLOCK_BYTES + self.zero_bytes(clustered)).next_multiple_of(16)
    }

    /// Bytes of `Replicas`.
    pub(crate) fn replicas_bytes(&self) -> usize {
        let of_jobs = JOB_ARRAYS * self.redundant + 2;
        let of_slots = SLOT_ARRAYS * 2 * self.redundant;
        4 * (of_jobs + of_slots + self.ranks + 1)
    }

    /// Entries of an array of a word a rank, and one more: `ENTRIES` in kernels/types.cuh, as which all below are asserted to be.
    fn entries(&self) -> usize {
        (self.ranks + 1).next_multiple_of(4)
    }

    /// Bytes of `Zeros`.
    pub(crate) fn zero_bytes(&self, clustered: bool) -> usize {
        4 * (ZERO_ARRAYS + if clustered { CLUSTER_ARRAYS } else { 0 }) * self.entries()
    }

    /// Bytes of `PerRank`.
    pub(crate) fn per_rank_bytes(&self) -> usize {
        4 * (RANK_ARRAYS * self.entries() + QUOTAS * (self.entries() + QUOTA_WORDS))
    }

    /// Words of the ranks that a token visits, a bit a rank or 16 bits a slot: `Visits::WORDS` in kernels/token.cuh.
    pub(crate) fn visit_words(&self) -> usize {
        if self.ranks <= WARP { 1 } else { self.top_k.div_ceil(2) }
    }
}

fn threads_of(rows_per_block: usize) -> usize {
    (rows_per_block + PLANNING_WARPS * WARP).clamp(LEAST_THREADS, MOST_THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED_BYTES: usize = 227 << 10;

    fn shape(ranks: usize, experts: usize, top_k: usize) -> Shape {
        let (id, weight) = (IdType::I32, WeightType::F32);
        Shape { ranks, experts, redundant: 0, top_k, id, weight }
    }

    #[test]
    fn usual_calls_fit_and_cover_their_rows() {
        for (ranks, experts) in
            [(1, 256), (8, 256), (72, 288), (144, 288), (256, 256), (1024, 1024)]
        {
            for rows in [0, 1, 31, 128, 1000, 1024, 1025, 4096, 16384] {
                for blocks in [8, 16] {
                    let cut = shape(ranks, experts, 8).cut(rows, blocks, SHARED_BYTES);
                    if ranks == 1024 && rows == 16384 && blocks == 8 {
                        continue;
                    }
                    let cut = cut.unwrap();
                    assert!(cut.blocks * cut.rows_per_block >= rows, "{rows} rows: {cut:?}");
                    assert!(cut.threads <= 1024 && cut.threads.is_multiple_of(WARP));
                }
            }
        }
    }

    #[test]
    fn calls_that_choose_replicas_fit() {
        for (ranks, experts, redundant) in [(4, 288, 32), (64, 320, 64), (128, 1152, 128)] {
            for rows in [0, 1, 128, 256, 4096, 16384] {
                let shape = Shape { redundant, ..shape(ranks, experts, 8) };
                // The least that a device with clusters has, and one block where it has none.
                let cut = shape.cut_replicas(rows, 8, SHARED_BYTES).unwrap();
                assert!(cut.blocks * cut.rows_per_block >= rows, "{rows} rows: {cut:?}");
                assert!(rows > 256 || shape.cut_replicas(rows, 1, 64 << 10).is_ok(), "{rows} rows");
                // The table and the map are all there.
                let layer = 4 * (2 + experts + redundant + 1 + 2 * redundant + experts);
                assert_eq!(cut.shared_bytes, cut.layer_at + layer);
            }
        }
    }

    #[test]
    fn one_block_has_no_room_taken_by_what_only_clusters_need() {
        assert!(shape(1024, 4096, 8).cut(256, 1, 99 << 10).is_ok());
        assert!(shape(512, 1 << 15, 8).cut(64, 1, 163 << 10).is_ok());
    }

    #[test]
    fn a_call_with_no_room_in_one_block_is_cut_into_more() {
        let large = shape(256, 1 << 15, 32);
        let shared_bytes = large.geometry(1, 256).shared_bytes - 1;
        let cut = |rows| large.cut(rows, 16, shared_bytes);
        assert_eq!(cut(224).unwrap().blocks, 1);
        assert!(cut(256).unwrap().blocks > 1);
        // So a call that fits has room however many of its rows are left away.
        let most = (1..1 << 14).rev().find(|&rows| cut(rows).is_ok()).unwrap();
        assert!(most > 256 && (1..most).all(|rows| cut(rows).is_ok()), "{most}");
    }

    #[test]
    fn ids_are_divided_exactly() {
        for each in (1..200).chain([255, 256, 257, 4095, 4096, 16384, MAX_EXPERTS]) {
            let multiplier = u64::from((1u32 << 31).div_ceil(each as u32));
            for id in 0..MAX_EXPERTS as u64 {
                assert_eq!((2 * id * multiplier) >> 32, id / each as u64, "{id} / {each}");
            }
        }
    }

    #[test]
    fn refusals_have_the_numbers() {
        let text = shape(8, 1 << 16, 8).check().unwrap_err().to_string();
        assert!(text.contains("65536 experts"), "{text}");
        let text = shape(8, 256, 33).check().unwrap_err().to_string();
        assert!(text.contains("top_k 33"), "{text}");
        let text = shape(8, 250, 8).check().unwrap_err().to_string();
        assert!(text.contains("250"), "{text}");
        let text = shape(8, 256, 8).cut(1 << 21, 8, SHARED_BYTES).unwrap_err().to_string();
        assert!(text.contains("2097152 rows"), "{text}");
    }
}
