// This rank's end of a board with redundant experts: board.cuh's, where rows of jobs and each rank's others are posted in place of the
// rows of each expert, and with a plan that has replica quotas behind the quotas. Partner of each: waterfill-board's port.rs and planner.rs.
#pragma once

#include "types.cuh"
#include "board.cuh"

// At most so many jobs, which are replicated experts, as experts are redundant; and twice as many slots, which are their replicas.
static constexpr u32 SLOTS = 2 * REDUNDANT;
static constexpr u32 NO_JOB = REDUNDANT;
// No logical expert: none has a number that does not fit.
static constexpr u32 NO_LOGICAL = ALL;
// Words of a rank's part of a plan: quotas [RANKS], the fingerprint of the map that it was made for or 0, replica quotas [SLOTS].
static constexpr u32 PLAN_WORDS = RANKS + 1 + SLOTS;
// Words that a rank posts: tokens, visits [RANKS], loads [RANKS], which are the rows of each rank's experts without replicas, rows of
// each job [REDUNDANT], a bit for each expert without replicas that has rows [experts / 32, rounded up], the fingerprint of its map.
static constexpr u32 VISITS_AT = 1, LOADS_AT = VISITS_AT + RANKS, JOBS_AT = LOADS_AT + RANKS, ACTIVE_AT = JOBS_AT + REDUNDANT;
__device__ __forceinline__ u32 replica_posted(const Args &args) { return ACTIVE_AT + up(args.experts, WARP) + 1; }
// The bits, behind the counts.
__device__ __forceinline__ u32 *active_words(const Args &args, const Shared &s) { return s.counts + args.experts + 1; }
// Rows that are never reached: without padding it begins there.
static constexpr int NO_PADDING = 0x7fffffff;

// `ReplicaArgs` in src/args.rs, field by field.
struct ReplicaArgs {
    // Of these, ids, unpadded, words, board, state, sizes and places. In COUNT nothing is written but `words`; in OWN nothing at all.
    // `words` are as many as `replica_posted` says.
    Args args;
    const u32 *table;          // [2 + experts + REDUNDANT + 1 + SLOTS], as waterfill_core's `ReplicaTable::words` says.
    const long long *logical;  // [experts] the logical expert of each by the server's own map, or null.
    void *out;                 // [rows, TOP_K] of long long if `moved`, else of ID.  // DEFECT(replica-out)
    u32 *quotas;               // [RANKS] the board's quotas go there, or ALL for each without a plan; null if `moved`.
    u32 moved;                 // Whether ids go out past the shared experts, of a batch whose shared rows are not routed.
    u32 columns_bytes, next_bytes;  // From the start of dynamic shared memory.
    u32 layer_bytes;         // Likewise: [2 + experts + REDUNDANT + 1 + SLOTS] the table, and behind it the map [experts], as 32 bits each.
};

// What the threads of a block know of the layer's replicas. It begins as zeros.
struct Replicas {
    u32 all_rows[REDUNDANT];  // Rows of each job, in the first block.
    u32 rows[REDUNDANT];      // This block's, of a cluster.
    u32 before[REDUNDANT];    // Those of the blocks before this one.
    u32 until[SLOTS];         // Sums of the quotas of a job's slots, up to and with each.  // DEFECT(replica-until)
    u32 first[REDUNDANT + 1]; // The first slot of each job.
    u32 open[REDUNDANT + 1];  // The same for a job whose quotas add up; SLOTS for others, and for NO_JOB.
    u32 replica[SLOTS];       // The physical expert of each slot.
    u32 logical[SLOTS];       // Its logical one.
    u32 plan[PLAN_WORDS];     // As it was read last.
};

__device__ __forceinline__ u32 table_words(const ReplicaArgs &replica) { return 2 + replica.args.experts + REDUNDANT + 1 + SLOTS; }

// A layer's table and map in shared memory, where they are once all threads have kept what arrived.
__device__ __forceinline__ u32 *layer_words(const ReplicaArgs &replica) { return (u32 *)(shared_memory() + replica.layer_bytes); }

struct Table {
    const u32 *words, *logical;
    u32 experts, fingerprint, jobs;

    // Without a fingerprint there are no replicas.
    __device__ __forceinline__ Table(const ReplicaArgs &replica) {
        words = layer_words(replica);
        logical = words + table_words(replica);
        experts = replica.args.experts;
        fingerprint = words[0];
        jobs = fingerprint == 0 ? 0 : at_most(words[1], REDUNDANT);  // DEFECT(table-jobs)
    }

    __device__ __forceinline__ u32 job_of(u32 expert) const {
        u32 job = words[2 + expert];
        return job < jobs ? job : NO_JOB;
    }
    __device__ __forceinline__ u32 first(u32 job) const { return words[2 + experts + job]; }
    __device__ __forceinline__ u32 replica(u32 slot) const { return words[2 + experts + REDUNDANT + 1 + slot]; }
    __device__ __forceinline__ u32 logical_of(u32 expert) const { return logical[expert]; }
};

// A part of both on its way there, some words a thread. All loads of it are in flight at once, and together with those of the ids:
// a trip to global memory takes as long as several barriers, and to look into the table id by id took three.
struct Arriving {
    static constexpr u32 AT_ONCE = 5;
    u32 words[AT_ONCE];
    u64 logical[AT_ONCE];

    __device__ __forceinline__ void load(const ReplicaArgs &replica, u32 start) {
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            u32 i = start + j * blockDim.x;
            words[j] = i < table_words(replica) ? replica.table[i] : 0;
            logical[j] = replica.logical && i < replica.args.experts ? (u64)replica.logical[i] : 0;
        }
    }

    // A logical expert as a number of 32 bits.
    __device__ __forceinline__ void keep(const ReplicaArgs &replica, u32 start) const {
        u32 *to = layer_words(replica);
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            u32 i = start + j * blockDim.x;
            if (i < table_words(replica)) to[i] = words[j];
            if (i < replica.args.experts) to[table_words(replica) + i] = logical[j] < NO_LOGICAL ? (u32)logical[j] : NO_LOGICAL;  // DEFECT(logical-bits)
        }
    }
};

// All of both; `arriving` has the first part. Seen after the next barrier.
__device__ __forceinline__ void keep_layer(const ReplicaArgs &replica, Arriving &arriving) {
    u32 at_once = Arriving::AT_ONCE * blockDim.x;
    arriving.keep(replica, threadIdx.x);
#pragma unroll 1
    for (u32 start = threadIdx.x + at_once; start < table_words(replica); start += at_once) {  // DEFECT(keep-start)
        arriving.load(replica, start);
        arriving.keep(replica, start);  // DEFECT(keep-more)
    }
}

// What a warp that waits asks for, and what it found.
struct Wanted {
    const u64 *words;  // Where the plan is to be: found once, by a division.
    u32 fingerprint;  // Of the own table, or 0.
    u32 slots;        // Of the own table.
    u64 sum = 0;      // Of the quotas.
    bool fits = false;  // Whether the plan was made for the own table.
};

// A warp reads this rank's part of a call's plan into `plan`, in one go; false as long as any of it is missing. Replica quotas
// of another map are not waited for: the planner may have written none.
__device__ __forceinline__ bool take(const Args &args, u32 *plan, u32 sequence, Wanted &wanted) {
    static constexpr u32 CHUNKS_OF_PLAN = (PLAN_WORDS + WARP - 1) / WARP, AT_ONCE = CHUNKS_OF_PLAN < 8 ? CHUNKS_OF_PLAN : 8;
    const u64 *words = wanted.words;
    u32 end = RANKS + 1 + wanted.slots, fingerprint = 0;
    bool has_quotas = true, has_replicas = true;
    u64 mine = 0;
#pragma unroll 1
    for (u32 first = 0; first < end; first += AT_ONCE * WARP) {
        u64 word[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            u32 i = first + j * WARP + lane();
            word[j] = i < end ? load_relaxed(words + i) : (u64)sequence << 32;
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            u32 i = first + j * WARP + lane(), value = (u32)word[j];
            bool there = (u32)(word[j] >> 32) == sequence;
            if (i <= RANKS) has_quotas &= there;  // DEFECT(take-quotas)
            else has_replicas &= there;
            if (i < RANKS) mine += value;  // DEFECT(take-mine)
            if (i == RANKS) fingerprint = value;
            if (i < end) plan[i] = value;
        }
    }
    if (!__all_sync(ALL, has_quotas)) return false;
    wanted.fits = __shfl_sync(ALL, fingerprint, RANKS % WARP) == wanted.fingerprint && wanted.fingerprint != 0;  // DEFECT(take-fits)
    if (wanted.fits && !__all_sync(ALL, has_replicas)) return false;  // DEFECT(take-replicas)
    // Of up to 32 quotas a lane: each half's sum fits 32 bits.
    static constexpr u32 HALF = 27;
    wanted.sum = ((u64)warp_sum((u32)(mine >> HALF)) << HALF) + warp_sum((u32)mine & ((1u << HALF) - 1));  // DEFECT(replica-sum)
    return true;
}
