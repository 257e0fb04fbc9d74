// Values, states, arguments and arrays of the kernels.
//
// The host defines (src/source.rs): CLUSTERED (0: one block), OWN_ONLY (1: for calls of mode OWN alone), RANKS, TOP_K, ID and
// UNSIGNED_ID (int or long long), WEIGHT (unsigned or unsigned short: bits are copied, never computed with), and the constants
// that the kernels have in common with other crates. Behind the kernels it asserts that structs and arrays are as it has them.
#pragma once

#include "ptx.cuh"

static constexpr u32 ALL = 0xffffffffu;
// Ranks are below 1024. A slot without an expert, or a token without a destination, has rank NO_RANK, at which no quota
// has rows: so nobody has to ask.
static constexpr u32 RANK_BITS = 10;
static_assert(RANKS <= 1 << RANK_BITS, "each has a number of so many bits");
static constexpr u32 NO_RANK = RANKS;
// RANKS and one more, rounded up to a multiple of four: so that four are read at once.
static constexpr u32 ENTRIES = (RANKS + 4) / 4 * 4;
// States of a token that are neither a rank nor a bid (assign.cuh): without a rank yet; no token, but padding.
static constexpr u32 PENDING = 0x7ffe;
static constexpr u32 NOBODY = 0x7fff;

// How a call gets its quotas.
enum Mode : u32 { OWN = MODE_OWN, LIVE = MODE_LIVE, GIVEN = MODE_GIVEN, COUNT = MODE_COUNT };
// How a call ended: waterfill-board's `Outcome`.
enum Outcome : u32 {
    TALLY_LIVE = OUTCOME_LIVE,
    TALLY_NO_PLAN = OUTCOME_NO_PLAN,
    TALLY_TIMED_OUT = OUTCOME_TIMED_OUT,
    TALLY_BROKEN = OUTCOME_BROKEN,
    TALLY_TORN = OUTCOME_TORN,
};

// What a runner keeps on the device between calls; `State` in src/args.rs.
struct State {
    u32 last;             // The sequence of the last call; 0 before the first.
    u32 failures;         // Calls in a row that the planner did not answer.
    u64 tally[OUTCOMES];  // Calls by Outcome.  // DEFECT(state-tally)
};

// `Args` in src/args.rs, field by field.
struct Args {
    const ID *ids;           // [rows, TOP_K]
    const WEIGHT *weights;   // [rows, TOP_K]
    ID *out_ids;             // [rows, TOP_K + 1]; for COUNT null, and nothing is expanded.
    WEIGHT *out_weights;     // [rows, TOP_K + 1]
    const int *unpadded;     // Rows at or past it are padding; null: none are.
    const u32 *quotas;       // [RANKS], for GIVEN.
    // [posted(args)] for COUNT: what this rank would post is written there. [RANKS, posted(args)] for LIVE: what all
    // ranks would post, and this one posts for all; null: for itself.
    u32 *words;
    u64 *board;              // For LIVE: the board's words, in registered host memory.
    State *state;
    u64 cap_ns;              // The longest wait for a plan.
    u32 rank_multiplier;     // id / experts_per_rank = 2 * id * multiplier >> 32.
    u32 rows, rows_per_block;  // DEFECT(args-rows)
    u32 rank, experts, experts_per_rank;  // DEFECT(args-rank)
    u32 shared_weight;       // Its bits.
    u32 mode;
    // The board: words from its start to this rank's counts and quotas in the first slot of the ring.
    u32 counts_at, quotas_at, slot_words, ring, posts_experts;
    u32 counts_stride;       // Words from a rank's counts to the next one's.
    u32 tally_at;            // Words from the board's start to this rank's calls by Outcome.
    u32 without_plan_at;     // To the planner's word on the last call that has no plan.
    u32 deserted_at;         // To the word that is not 0 once the planner's process is gone.
    // Bytes from the start of dynamic shared memory that begin as zeros, and to each array of `Shared`.
    u32 cleared_bytes, table_bytes, table_stride, counts_bytes, ranks_bytes, visited_bytes, states_bytes;
    u32 writers;             // Blocks after the first cluster's, which write the routed columns in its stead.
};

// Which of two sets of quotas: planned from own counts; taken from the board, or as given.
enum QuotaSet : u32 { PLANNED = 0, TAKEN = 1 };

// Rows of quotas, open for bids.
struct Quotas {
    u32 left[ENTRIES];       // Rows still to be met; 0 at home.
    u32 home;                // Those of the home quota.  // DEFECT(quotas-home)
    u32 most;                // Most rows anywhere but at home.
    u32 levels[BID_LEVELS];  // A bit a rank, if a word has room for them: those with more left than level / BID_LEVELS of the most.
};

// What the threads of a block tell each other.
struct Block {
    u32 sequence;        // Of this call.
    u32 failures;        // As of its start, see State.
    u32 waits;           // Whether it waits for its plan.
    u32 quota_set;       // The QuotaSet that holds.
    u32 tokens;          // Rows with a valid id.
    u32 all_tokens;      // Those of all blocks.
    u32 tokens_before;   // Those of the blocks before this one.
    u32 most[ROUNDS];    // Most rows left anywhere but at home, after each round.
    u32 granted_before;  // Bids of the blocks before this one that were granted.
};
static_assert(sizeof(Block) <= BLOCK_BYTES, "src/shape.rs leaves room for it");

// The arrays of dynamic shared memory whose length is known here, in two parts. An array of ENTRIES has one for NO_RANK, which
// anybody may write and nobody counts on, but in `Quotas::left`, where it is 0, and in the first round's table, where the pending
// are in the end.
//
// These begin as zeros.
struct Zeros {
    u32 loads[ENTRIES];                 // Rows routed to each rank.
    u32 visits[ENTRIES];                // Tokens that visit each rank.  // DEFECT(zeros-visits)
    u32 bids[ROUNDS * ENTRIES];         // Bids of each round for each rank.
#if CLUSTERED
    u32 all_loads[ENTRIES];             // Those of all blocks.
    u32 all_visits[ENTRIES];
    u32 granted_before[ENTRIES];        // How many bids of the blocks before this one were granted.
    u32 all_bids[ROUNDS * ENTRIES];
    u32 bids_before[ROUNDS * ENTRIES];  // Those of the blocks before this one.
#endif
};

// These do not.
struct PerRank {
    u32 allowed[ENTRIES];  // How many of this block's bids of the last round are granted.
    u32 until[ENTRIES];    // Sums of the rows left in the end.
    Quotas quotas[2];      // By QuotaSet.
};

// A block's dynamic shared memory.
struct Shared {
    Block *block;
    // Of `Zeros`. One block's loads, visits and bids are all, and it has none before it.
    u32 *loads, *visits, *bids, *all_loads, *all_visits, *granted_before, *all_bids, *bids_before;
    u8 *table;     // [ROUNDS, ENTRIES, table_stride] bids by destination and warp's rows; in the end [0, NO_RANK] has the pending
    u32 *counts;   // [experts + 1] rows routed to each expert, where the board has counts an expert. The choice of replicas has
                   // them too, but its board does not: there the bits of active experts follow them, see `active_words`.
    // Of `PerRank`.
    u32 *allowed, *until;
    Quotas *quotas;
    u32 *visited;  // [rows_per_block, Visits::WORDS] the ranks that each token visits, see token.cuh
    u16 *states;   // [rows_per_block] the state of each token, see assign.cuh
};

// Pointers by offsets from the one base, each by itself: so that the compiler knows them to be shared memory.
__device__ __forceinline__ Shared shared_arrays(const Args &args) {
    u8 *memory = shared_memory();
    Zeros *zeros = (Zeros *)(memory + BLOCK_BYTES);
    PerRank *ranks = (PerRank *)(memory + args.ranks_bytes);
    Shared s;
    s.block = (Block *)memory;
    s.loads = zeros->loads;
    s.visits = zeros->visits;
    s.bids = zeros->bids;
#if CLUSTERED
    s.all_loads = zeros->all_loads;
    s.all_visits = zeros->all_visits;
    s.granted_before = zeros->granted_before;
    s.all_bids = zeros->all_bids;
    s.bids_before = zeros->bids_before;
#else
    s.all_loads = s.loads;
    s.all_visits = s.visits;
    s.all_bids = s.bids;
    s.granted_before = s.bids_before = nullptr;
#endif
    s.table = memory + args.table_bytes;  // DEFECT(table-at)
    s.counts = (u32 *)(memory + args.counts_bytes);
    s.allowed = ranks->allowed;
    s.until = ranks->until;
    s.quotas = ranks->quotas;
    s.visited = (u32 *)(memory + args.visited_bytes);
    s.states = (u16 *)(memory + args.states_bytes);
    return s;
}

__device__ __forceinline__ u32 mode_of(const Args &args) { return OWN_ONLY ? OWN : args.mode; }
__device__ __forceinline__ u32 lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp() { return threadIdx.x / WARP; }
__device__ __forceinline__ u32 warps() { return blockDim.x / WARP; }
// Of the last two warps, which most often have no rows, one waits for the plan while the other plans from own counts.
__device__ __forceinline__ bool is_waiting_warp() { return warp() == warps() - 2; }
__device__ __forceinline__ u32 lanes_before() { return (1u << lane()) - 1; }
// value / divisor, rounded up.
__device__ __forceinline__ u32 up(u32 value, u32 divisor) { return (value + divisor - 1) / divisor; }
__device__ __forceinline__ u32 at_most(u32 a, u32 b) { return a < b ? a : b; }
__device__ __forceinline__ u32 at_least(u32 a, u32 b) { return a > b ? a : b; }

__device__ __forceinline__ u32 warp_sum(u32 value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL, value);
#else
    for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
#endif
}

__device__ __forceinline__ u32 warp_max(u32 value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL, value);  // DEFECT(warp-max)
#else
    for (u32 step = WARP / 2; step > 0; step /= 2) value = at_least(value, __shfl_xor_sync(ALL, value, step));
    return value;
#endif
}

__device__ __forceinline__ u64 warp_sum_long(u64 value) {
    for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// The sum over this lane and those before it, of `lanes` that may not be 0.
__device__ __forceinline__ u32 warp_prefix(u32 value, u32 lanes = WARP) {
#pragma unroll
    for (u32 step = 1; step < lanes; step *= 2) {
        u32 before = __shfl_up_sync(ALL, value, step);
        if (lane() >= step) value += before;
    }
    return value;
}
