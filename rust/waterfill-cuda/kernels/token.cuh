// Which ranks a token visits, and the one that it bids for.
#pragma once

#include "types.cuh"

#if RANKS <= 32
// A bit a rank.
struct Visits {
    static constexpr u32 WORDS = 1;  // DEFECT(visit-bits)
    u32 mask = 0;

    // Slot k is at `rank`, or at NO_RANK. Gives whether it is the token's first slot there.
    __device__ __forceinline__ bool add(u32, u32 rank) {
        u32 bit = (u32)(1ull << rank);
        bool visit = (mask & bit) == 0;
        mask |= bit;
        return visit;
    }

    // At NO_RANK is a bit too, while there is room.
    __device__ __forceinline__ bool any() const { return (mask & ALL >> (WARP - RANKS)) != 0; }  // DEFECT(any-visit)
    __device__ __forceinline__ void store(u32 *words) const { words[0] = mask; }
    __device__ __forceinline__ void load(const u32 *words) { mask = words[0]; }

    // The nearest rank from `first` on and around of those above the level, else of those that are open.
    __device__ __forceinline__ u32 wanted(const Quotas &quotas, u32, u32 level, u32 first) const {
        u32 high = mask & quotas.levels[level], open = mask & quotas.levels[0];
        u32 some = high != 0 ? high : open, after = some & ALL << first;  // DEFECT(nearest-rank)
        u32 rank = __ffs(after != 0 ? after : some) - 1;
        return some != 0 ? rank : NO_RANK;
    }
};

// Levels of rows left, for the bids of a round: lane l brings rank l's. In parts, by a warp each, or all by one.
static constexpr u32 LEVEL_PARTS = LEAST_WARPS;
__device__ __forceinline__ void open_levels(Quotas &quotas, u32 left, u32 most, u32 part) {
    static constexpr u32 LEVELS_A_PART = BID_LEVELS / LEVEL_PARTS;
    static_assert(BID_LEVELS % LEVEL_PARTS == 0, "every level is in a part");
    u32 first = part * LEVELS_A_PART, mine = 0;
#pragma unroll
    for (u32 i = 0; i < LEVELS_A_PART; ++i) {
        u32 ranks = __ballot_sync(ALL, left > (first + i) * most / BID_LEVELS);  // DEFECT(level-of-part)
        if (lane() == i) mine = ranks;
    }
    if (lane() < LEVELS_A_PART) quotas.levels[first + lane()] = mine;
}

__device__ __forceinline__ void open_levels(Quotas &quotas, u32 left, u32 most) {
    if (RANKS > BID_LEVELS / 2) {
#pragma unroll
        for (u32 part = 0; part < LEVEL_PARTS; ++part) open_levels(quotas, left, most, part);
        return;
    }
    // Of fewer ranks each level is made by a lane, from all ranks' rows.
    static_assert(BID_LEVELS == WARP, "a lane a level");
    u32 above = lane() * most / BID_LEVELS, ranks = 0;  // DEFECT(level-of-lane)
    // Whether one is more than the other by the difference's sign: comparisons are more predicates than there are.
#pragma unroll
    for (u32 rank = 0; rank < RANKS; ++rank) ranks |= (above - __shfl_sync(ALL, left, rank)) >> 31 << rank;
    quotas.levels[lane()] = ranks;
}
#else
// The rank of each slot, two a word.
struct Visits {
    static constexpr u32 WORDS = (TOP_K + 1) / 2;
    u32 rank[2 * WORDS];

    __device__ __forceinline__ bool add(u32 k, u32 added) {
        rank[k] = added;
        bool visit = true;  // DEFECT(first-visit)
#pragma unroll
        for (u32 before = 0; before < k; ++before) visit &= rank[before] != added;
        return visit;
    }

    __device__ __forceinline__ bool any() const {
        u32 least = NO_RANK;
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) least = at_most(least, rank[k]);
        return least < NO_RANK;
    }

    __device__ __forceinline__ void store(u32 *words) const {
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) words[i] = rank[2 * i] | (2 * i + 1 < TOP_K ? rank[2 * i + 1] : NO_RANK) << 16;
    }

    __device__ __forceinline__ void load(const u32 *words) {
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            u32 pair = words[i];
            rank[2 * i] = pair & 0xffff;
            rank[2 * i + 1] = pair >> 16;
        }
    }

    __device__ __forceinline__ u32 wanted(const Quotas &quotas, u32 most, u32 level, u32 first) const {
        u32 above = level * most / BID_LEVELS, rows[TOP_K], best = ALL;
        // Loads first: none waits for another.
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) rows[k] = quotas.left[rank[k]];
        // The least distance, with its rank.
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) {
            u32 distance = rank[k] - first;
            distance = at_most(distance, distance + RANKS);
            u32 key = (distance + (rows[k] > above ? 0 : 1 << RANK_BITS)) << RANK_BITS | rank[k];
            best = at_most(best, rows[k] > 0 ? key : ALL);
        }
        return best == ALL ? NO_RANK : best & ((1 << RANK_BITS) - 1);
    }
};

__device__ __forceinline__ void open_levels(Quotas &, u32, u32) {}
#endif
