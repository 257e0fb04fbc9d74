// Ids to ranks, routed columns out, and counts: of this block, then of all.
#pragma once

#include "types.cuh"
#include "cluster.cuh"
#include "token.cuh"
#include "move_up.cuh"

// A block's rows in the arrays.
struct Rows {
    const ID *ids;
    const WEIGHT *weights;
    ID *out_ids;
    WEIGHT *out_weights;
    u32 first, count;
    u32 unpadded;  // Those before the padding.

    // The rows of the block that is number `block` of those that share them.
    __device__ __forceinline__ Rows(const Args &args, u32 block) {
        first = at_most(block * args.rows_per_block, args.rows);
        count = unpadded = at_most(args.rows_per_block, args.rows - first);
        ids = args.ids + (u64)first * TOP_K;
        weights = args.weights + (u64)first * TOP_K;
        out_ids = args.out_ids + (u64)first * (TOP_K + 1);
        out_weights = args.out_weights + (u64)first * (TOP_K + 1);
    }

    __device__ __forceinline__ void pad(const Args &args) {
        if (!args.unpadded) return;
        int end = *args.unpadded;
        if (end < (int)(first + count)) unpadded = end < (int)first ? 0 : end - first;
    }
};

// The ids of a token, all in flight at once.
struct Ids {
    ID id[TOP_K];

    __device__ __forceinline__ void load(const Rows &rows, u32 row) {
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) id[k] = row < rows.count ? rows.ids[row * TOP_K + k] : (ID)-1;
    }
};

// NO_RANK for what names no expert. Without a branch.
__device__ __forceinline__ u32 rank_of(const Args &args, ID id) {
    u32 rank = rank_of_expert(id, args.rank_multiplier);
    return (UNSIGNED_ID)id < args.experts ? rank : NO_RANK;  // DEFECT(rank-of-id)
}

// A warp counts its 32 tokens, and keeps which ranks they visit; they are pending from here on. What names no rank is
// counted at NO_RANK: a branch around each addition takes longer than all of them.
__device__ __forceinline__ void count_tokens(const Args &args, const Shared &s, Block &b, const Rows &rows, u32 row, Ids &ids) {
    Visits visits;
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        ids.id[k] = row < rows.unpadded ? ids.id[k] : (ID)-1;  // DEFECT(count-padding)
        u32 rank = rank_of(args, ids.id[k]);
        atomicAdd(&s.loads[rank], 1u);  // DEFECT(count-loads)
        atomicAdd(&s.visits[visits.add(k, rank) ? rank : NO_RANK], 1u);  // DEFECT(count-visits)
    }
    if (args.posts_experts) {
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) atomicAdd(&s.counts[(UNSIGNED_ID)ids.id[k] < args.experts ? (u32)ids.id[k] : args.experts], 1u);
    }
    bool token = visits.any();
    visits.store(s.visited + row * Visits::WORDS);
    s.states[row] = (u16)(token ? PENDING : NOBODY);  // DEFECT(token-state)
    u32 tokens = __popc(__ballot_sync(ALL, token));
    if (lane() == 0) atomicAdd(&b.tokens, tokens);  // DEFECT(count-tokens)
}

// Slots that a thread has in flight at once: of memory's latency, one is paid a batch.
static constexpr u32 BATCH = TOP_K < 8 ? TOP_K : 8;

// Each routed slot's id goes out moved up by its rank, its weight as it is: by `threads` threads, of which this is
// number `thread`, side by side.
__device__ __forceinline__ void write_routed(const Args &args, const Rows &rows, u32 thread, u32 threads) {
    u32 slots = rows.count * TOP_K, unpadded = rows.unpadded * TOP_K;
#pragma unroll 1
    for (u32 base = thread; base < slots; base += BATCH * threads) {
        ID ids[BATCH];
        WEIGHT weights[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            u32 i = base + j * threads;
            ids[j] = i < unpadded ? rows.ids[i] : (ID)-1;  // DEFECT(write-padding)
            weights[j] = i < unpadded ? rows.weights[i] : (WEIGHT)0;
        }
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            u32 i = base + j * threads, rank = rank_of(args, ids[j]), out = i + i / TOP_K;
            if (i >= slots) break;
            bool expert = rank != NO_RANK;
            rows.out_ids[out] = moved_up(ids[j], rank, expert);
            rows.out_weights[out] = expert ? weights[j] : (WEIGHT)0;
        }
    }
}

// All that a writer does: block `writer` of them writes the rows of the first cluster's block of that number.
__device__ __forceinline__ void write_part(const Args &args, u32 writer) {
    Rows rows(args, writer);  // DEFECT(writer-rows)
    rows.pad(args);  // DEFECT(writer-padding)
    write_routed(args, rows, threadIdx.x, blockDim.x);
}

// Tokens of all blocks, once they are gathered.
__device__ __forceinline__ u32 all_tokens(const Block &b) { return CLUSTERED ? b.all_tokens : b.tokens; }

// Sum all blocks' counts, in each of them, for all of its threads.
__device__ __forceinline__ void gather(const Shared &s, Block &b) {
#if CLUSTERED
    sync_blocks();  // DEFECT(gather-sync)
    add_blocks<2 * ENTRIES>(s.loads, s.all_loads, nullptr);
    if (warp() == warps() - 1) {
        u32 tokens = lane() < blocks() ? read_block(&b.tokens, lane()) : 0;
        u32 all = warp_sum(tokens), before = warp_sum(lane() < block() ? tokens : 0);
        if (lane() == 0) {
            b.all_tokens = all;
            b.tokens_before = before;
        }
    }
    __syncthreads();  // DEFECT(gather-barrier)
#else
    __syncthreads();  // DEFECT(gather-barrier-of-one-block)
#endif
}
