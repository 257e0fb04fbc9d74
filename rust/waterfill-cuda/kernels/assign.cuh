// Tokens to quotas, in rounds: waterfill_core's assign.rs, for all tokens at once.
//
// A token's state is its rank, PENDING, NOBODY (padding), or a bid: BID | order << 10 | destination, `order`
// being its place among the bids of its 32 rows for that destination.
#pragma once

#include "types.cuh"
#include "cluster.cuh"
#include "token.cuh"
#include "count.cuh"
#include "own.cuh"

static constexpr u32 BID = 0x8000;

__device__ constexpr u32 bits_of(u32 value) { return value == 0 ? 0 : 1 + bits_of(value / 2); }

// The lanes of the same rank: a ballot a bit, which takes less than __match_any_sync for this few bits.
__device__ __forceinline__ u32 same_rank(u32 rank) {
    u32 same = ALL;
#pragma unroll
    for (u32 bit = 0; bit < bits_of(NO_RANK); ++bit) {  // DEFECT(same-rank)
        u32 votes = __ballot_sync(ALL, rank >> bit & 1);
        same &= rank >> bit & 1 ? votes : ~votes;
    }
    return same;
}

// A round's bids for one destination, by warp's rows.
__device__ __forceinline__ u8 *columns_of(const Args &args, const Shared &s, u32 round, u32 rank) {
    return s.table + (round * ENTRIES + rank) * args.table_stride;
}

static constexpr u32 ONES = 0x01010101;

// The bids of the columns before `column`.
__device__ __forceinline__ u32 sum_before(const u8 *columns, u32 column) {
    u32 sum = 0, at = 0;
#pragma unroll 1
    for (; at + 16 <= column; at += 16) {
        uint4 words = *(const uint4 *)(columns + at);
        sum = __dp4a(words.x, ONES, __dp4a(words.y, ONES, __dp4a(words.z, ONES, __dp4a(words.w, ONES, sum))));
    }
#pragma unroll 1
    for (; at + 4 <= column; at += 4) sum = __dp4a(*(const u32 *)(columns + at), ONES, sum);  // DEFECT(sum-fours)
    u32 before = (1u << 8 * (column - at)) - 1;  // DEFECT(sum-last)
    return __dp4a(*(const u32 *)(columns + at) & before, ONES, sum);
}

// A token's state once the bids of a round are closed: they are granted in the order of the tokens, or it is pending again.
__device__ __forceinline__ u32 settled(const Args &args, const Shared &s, u32 state, u32 column, u32 round) {
    bool bids = state & BID;
    // The others ask at NO_RANK: without a branch.
    u32 rank = bids ? state & ((1 << RANK_BITS) - 1) : NO_RANK, order = state >> RANK_BITS & (WARP - 1);
    u32 allowed = s.allowed[rank], before = sum_before(columns_of(args, s, round, rank), column);
    u32 then = order + before < allowed ? rank : PENDING;  // DEFECT(settle)
    return bids ? then : state;
}

// A warp's bids for its 32 rows from `base` on, once those of the round before are settled.
__device__ __forceinline__ void bid(const Args &args, const Shared &s, const Quotas &quotas, const Rows &rows, u32 base, u32 round,
                                    u32 most) {
    u32 column = base / WARP, row = base + lane(), in_all = rows.first + row;
    u32 level = __umulhi(in_all * STEP_LEVEL + round * ROUND_LEVEL, BID_LEVELS);
    u32 first = __umulhi(in_all * STEP_TURN + round * ROUND_TURN, RANKS);
    Visits visits;
    visits.load(s.visited + row * Visits::WORDS);
    u32 state = s.states[row];
    u32 rank = visits.wanted(quotas, most, level, first);
    if (round > 0) state = settled(args, s, state, column, round - 1);
    rank = state == PENDING ? rank : NO_RANK;
    u32 same = same_rank(rank), order = __popc(same & lanes_before());
    s.states[row] = (u16)(rank == NO_RANK ? state : BID | order << RANK_BITS | rank);
    if (rank == NO_RANK || order > 0) return;
    columns_of(args, s, round, rank)[column] = (u8)__popc(same);
    atomicAdd(&s.bids[round * ENTRIES + rank], (u32)__popc(same));
}

// The bids of a round at one rank, where `left` rows are left: how many of this block's are granted. Gives what is left then.
__device__ __forceinline__ u32 grant(const Shared &s, Quotas &quotas, u32 round, u32 rank, u32 left, bool writes) {
    u32 at = round * ENTRIES + rank, granted = CLUSTERED ? at_most(left, s.bids_before[at]) : 0;
    u32 rest = left - at_most(left, s.all_bids[at]);
    if (writes) {
        if (CLUSTERED) s.granted_before[rank] += granted;  // DEFECT(granted-before)
        s.allowed[rank] = left - granted;
        quotas.left[rank] = rest;
    }
    return rest;
}

// Close the bids of a round. Up to 32 ranks, `left` is what is left at rank `lane()`; of more nobody has it but `quotas`. Gives
// the most that is left anywhere but at home.
__device__ __forceinline__ void close_round(const Shared &s, Block &b, Quotas &quotas, u32 round, u32 &left, u32 &most) {
    u32 first = round * ENTRIES;
    add_blocks<ENTRIES>(s.bids + first, s.all_bids + first, s.bids_before + first);
    if (CLUSTERED) __syncthreads();  // DEFECT(round-sums-barrier)
#if RANKS <= 32
    // Every warp for itself, so that each can make some of the levels.
    if (lane() < RANKS) left = grant(s, quotas, round, lane(), left, warp() == 0);
    most = warp_max(left);
    if (round + 1 < ROUNDS && warp() < LEVEL_PARTS) open_levels(quotas, left, most, warp());
    __syncthreads();  // DEFECT(round-levels-barrier)
#else
#pragma unroll 1
    for (u32 chunk = warp() * WARP; chunk < RANKS; chunk += blockDim.x) {
        u32 rank = chunk + lane();
        u32 most_here = warp_max(rank < RANKS ? grant(s, quotas, round, rank, quotas.left[rank], true) : 0);
        if (lane() == 0) atomicMax(&b.most[round], most_here);  // DEFECT(round-most)
    }
    __syncthreads();  // DEFECT(round-most-barrier)
    most = b.most[round];
#endif
}

// Gives the last round, the first one where there was none; then `most` is what is left anywhere but at home, at most.
__device__ __forceinline__ u32 run_rounds(const Args &args, const Shared &s, Block &b, Quotas &quotas, const Rows &rows, u32 &most) {
    u32 round = 0, left = RANKS <= WARP ? quotas.left[at_most(lane(), NO_RANK)] : 0;
    most = quotas.most;
#pragma unroll 1
    for (; round < ROUNDS && most > 0; ++round) {
#pragma unroll 1
        for (u32 base = warp() * WARP; base < rows.count; base += blockDim.x) bid(args, s, quotas, rows, base, round, most);
        sync_blocks();  // DEFECT(round-sync)
        close_round(s, b, quotas, round, left, most);
    }
    return at_least(round, 1) - 1;
}

// Sums of the rows left anywhere but at home, up to and with each rank, into `until`, and of the bids of the blocks before
// this one that were granted. By one warp.
__device__ __forceinline__ void sum_left(const Shared &s, Block &b, const u32 *left) {
    static constexpr u32 LANES = RANKS < WARP ? RANKS : WARP;
    Entries until;
    u32 sum = 0, granted = 0;
    // Loads first, then the sums of all chunks side by side: none waits for another.
    for_each([&](u32 chunk, u32 rank) {
        until[chunk] = left[rank];
        granted += CLUSTERED ? s.granted_before[rank] : 0;  // DEFECT(granted-sum)
    });
#pragma unroll UNROLLED
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) until[chunk] = warp_prefix(chunk * WARP + lane() < RANKS ? until[chunk] : 0, LANES);
#pragma unroll UNROLLED
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        u32 rank = chunk * WARP + lane(), all = __shfl_sync(ALL, until[chunk], LANES - 1);
        if (rank < RANKS) s.until[rank] = sum + until[chunk];
        sum += all;
    }
    granted = CLUSTERED ? warp_sum(granted) : 0;
    if (lane() == 0) b.granted_before = granted;
}

// Where rows are left anywhere but at home: the pending tokens of each warp's rows, and sums of what is left.
__device__ __forceinline__ void count_pending(const Args &args, const Shared &s, Block &b, const Quotas &quotas, const Rows &rows, u32 last) {
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows.count; base += blockDim.x) {
        u32 row = base + lane();
        u32 state = settled(args, s, s.states[row], base / WARP, last);
        u32 pending = __popc(__ballot_sync(ALL, state == PENDING));
        s.states[row] = (u16)state;
        if (lane() == 0) columns_of(args, s, 0, NO_RANK)[base / WARP] = (u8)pending;
    }
    if (warp() == warps() - 1) sum_left(s, b, quotas.left);
    __syncthreads();  // DEFECT(pending-barrier)
}

// The rank of the token that is number `place` among those that found no room at home.
__device__ __forceinline__ u32 leftover(const Shared &s, u32 place) {
    u32 least = 0, most = RANKS - 1;
    while (least < most) {
        u32 middle = (least + most) / 2;
        if (s.until[middle] > place) most = middle;  // DEFECT(leftover)
        else least = middle + 1;
    }
    return least;
}

// Tokens without a rank: at home while rows are left there, then wherever some are. Then the last column.
// If none are left anywhere else, there are as many at home as such tokens.
__device__ __forceinline__ void place_rest(const Args &args, const Shared &s, Block &b, const Quotas &quotas, const Rows &rows,
                                           u32 last, bool anywhere) {
    if (anywhere) count_pending(args, s, b, quotas, rows, last);
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows.count; base += blockDim.x) {
        u32 column = base / WARP, row = base + lane(), out = row * (TOP_K + 1) + TOP_K;
        u32 state = s.states[row];
        if (!anywhere) state = settled(args, s, state, column, last);
        u32 rank = state == PENDING ? args.rank : state;
        if (anywhere) {
            u32 place = __popc(__ballot_sync(ALL, state == PENDING) & lanes_before());
            place += sum_before(columns_of(args, s, 0, NO_RANK), column) + (CLUSTERED ? b.tokens_before - b.granted_before : 0);  // DEFECT(place-before)
            if (state == PENDING && place >= quotas.home) rank = leftover(s, place - quotas.home);  // DEFECT(home-is-full)
        }
        if (row >= rows.count) continue;
        bool token = state != NOBODY;
        rows.out_ids[out] = token ? (ID)(rank * (args.experts_per_rank + 1) + args.experts_per_rank) : (ID)-1;
        rows.out_weights[out] = token ? (WEIGHT)args.shared_weight : (WEIGHT)0;
    }
}
