// The plan from own counts, by one warp: waterfill_core's own.rs for CostModel::Rows, number by number.
// Entry i, of lane i % 32, is rank (source + i) % RANKS, so entry 0 is home.
// A source has at most 2^20 rows (src/shape.rs), so their routed rows, and 1024 ranks' rooms, fit 32 bits.
#pragma once

#include "types.cuh"
#include "token.cuh"
#include "count.cuh"

static constexpr u32 LEAST_TRUST = LEAST_TENTHS * 1024 / 10;

static constexpr u32 CHUNKS = (RANKS + WARP - 1) / WARP;
// In registers, while they last.
static constexpr u32 UNROLLED = CHUNKS <= 8 ? CHUNKS : 1;

// A lane's entries, one of each chunk of 32 ranks; past the last rank nobody asks for them.
struct Entries {
    u32 value[CHUNKS];

    __device__ __forceinline__ u32 &operator[](u32 chunk) { return value[chunk]; }
};

// Call `visit(chunk, i)` for this lane's entries.
template <typename Visit>
__device__ __forceinline__ void for_each(Visit visit) {
#pragma unroll UNROLLED
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        u32 i = chunk * WARP + lane();
        if (i < RANKS) visit(chunk, i);
    }
}

// The same with something of each added up over the warp.
template <typename Value>
__device__ __forceinline__ u32 sum_of(Value value) {
    u32 sum = 0;
    for_each([&](u32 chunk, u32 i) { sum += value(chunk, i); });
    return warp_sum(sum);
}

__device__ __forceinline__ u32 rank_at(const Args &args, u32 i) {
    u32 rank = args.rank + i;
    return at_most(rank, rank - RANKS);
}

// value / divisor, rounded up, for a value below 2^20 and a divisor below 2^26: by a division that is inexact, but by less than
// the quotient is from the next whole number. A whole number may come out as the one below.
__device__ __forceinline__ u32 up_approximately(u32 value, u32 divisor) {
    u32 down = (u32)__fdividef((float)value, (float)divisor);
    return down + (down * divisor < value);
}

// 2^32 / (lane + 1), rounded up; 0 for the first lane, instead of 2^32.
__device__ __forceinline__ u32 lane_inverse() { return ALL / (lane() + 1) + 1; }

// Loads as far as own counts tell them, shrunk towards their mean; gives their sum.
__device__ __forceinline__ u32 estimate(const Args &args, const Shared &s, Entries &bases) {
    for_each([&](u32 chunk, u32 i) { bases[chunk] = s.all_loads[rank_at(args, i)]; });
    u32 mean = sum_of([&](u32 chunk, u32) { return bases[chunk]; }) / RANKS;
    // floor(1024 mean / (mean + HALF_TRUSTED)), in 32 bits.
    u32 trust = at_least(1024 - up_approximately(1024 * HALF_TRUSTED, mean + HALF_TRUSTED), LEAST_TRUST);
    return sum_of([&](u32 chunk, u32) {
        u32 load = bases[chunk], apart = load < mean ? mean - load : load - mean;
        u32 part = (u32)(((u64)apart * trust + 512) >> 10);  // DEFECT(trust-rounding)
        bases[chunk] = load < mean ? mean - part : mean + part;
        return bases[chunk];
    });
}

// The smallest level with room for `tokens` rows, at least one. The ranks up to a base need a level by
// themselves; the least of these is the level. `inverse` is `lane_inverse`: exact, because rows are below 2^26 and
// divisors at most 32. So a base and a count of one fit a word, and their sums too.
__device__ __forceinline__ u32 level_of_few(Entries &bases, u32 tokens, u32 inverse) {
    static constexpr u32 ONE = 1u << 26;  // DEFECT(level-one)
    static_assert(TOP_K <= 32, "2^20 rows of them, and what rounding adds, are less than ONE");
    u32 mine = bases[0] + ONE, up_to_mine = 0;
#pragma unroll
    for (u32 i = 0; i < at_most(RANKS, WARP); ++i) {
        u32 base = __shfl_sync(ALL, mine, i);
        up_to_mine += base <= mine ? base : 0;
    }
    u32 below = up_to_mine / ONE;
    // Rounded up; where there is one, `inverse` has no room for it.
    u32 last = tokens + up_to_mine % ONE - 1, down = __umulhi(last, __shfl_sync(ALL, inverse, below - 1));  // DEFECT(level-down)
    u32 level = (below == 1 ? last : down) + 1;
    return ~warp_max(lane() < RANKS ? ~level : 0);
}

// The same by Newton's method from above, for more ranks.
__device__ __forceinline__ u32 level_of_many(Entries &bases, u32 tokens, u32 sum) {
    u32 level = up(tokens + sum, RANKS);
    while (true) {
        u32 below = sum_of([&](u32 chunk, u32) { return bases[chunk] < level ? 1u : 0u; });
        u32 under = sum_of([&](u32 chunk, u32) { return bases[chunk] < level ? bases[chunk] : 0; });
        u32 next = up(tokens + under, below);
        if (next == level) return level;  // DEFECT(newton-end)
        level = next;
    }
}

// ceil(fits * until / total), a share of `fits` rows, without a division; `ratio` is fits / total, nearly.
// A share is at most 2^20 rows. The floats are off by less than 2^-21 of it: three roundings of 2^-24, and a division that is off by
// two units in the last place. That is less than half a row. `nearly` is cut off to whole rows, so the exact share is between
// nearly - 1/2 and nearly + 3/2. Hence `more` is between -total / 2 and 3/2 total, and fits 32 bits, as a total is at most 2^30.
__device__ __forceinline__ u32 share(u32 fits, u32 until, u32 total, float ratio) {
    u32 nearly = (u32)((float)until * ratio);
    int more = (int)(fits * until - nearly * total);
    return nearly + (more > 0) + (more > (int)total);  // DEFECT(share)
}

// Add rows to `own` in proportion to the capacities; gives how many fitted.
__device__ __forceinline__ u32 spread(u32 rows, Entries &capacities, Entries &own) {
    u32 before = 0;
#pragma unroll UNROLLED
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        u32 i = chunk * WARP + lane();
        capacities[chunk] = before + warp_prefix(i < RANKS ? capacities[chunk] : 0, at_most(RANKS, WARP));
        before = __shfl_sync(ALL, capacities[chunk], at_most(RANKS, WARP) - 1);
    }
    u32 total = before, fits = at_most(rows, total), shares_before = 0;
    if (fits == 0) return 0;
    float ratio = __fdividef((float)fits, (float)total);
#pragma unroll UNROLLED
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        u32 shares = share(fits, capacities[chunk], total, ratio), previous = __shfl_up_sync(ALL, shares, 1);
        own[chunk] += shares - (lane() == 0 ? shares_before : previous);
        if (CHUNKS > 1) shares_before = __shfl_sync(ALL, shares, WARP - 1);
    }
    return fits;
}

// Open quotas, of which `left` is there, for bids anywhere but at home. By one warp.
__device__ __forceinline__ void open_quotas(const Args &args, Quotas &quotas) {
    u32 most = 0, left = 0;
    __syncwarp();  // DEFECT(open-syncwarp)
    for_each([&](u32, u32 rank) {
        left = rank == args.rank ? 0 : quotas.left[rank];
        most = at_least(most, left);
    });
    most = warp_max(most);
    open_levels(quotas, left, most);
    if (lane() == 0) {
        quotas.home = quotas.left[args.rank];
        quotas.most = most;
        quotas.left[args.rank] = quotas.left[NO_RANK] = 0;
    }
}

// Own quotas, open: own rank first, then visited ranks, then any. By one warp.
__device__ __forceinline__ void plan_own(const Args &args, const Shared &s, const Block &b, u32 inverse) {
    Entries bases, room, capacity, own{};
    u32 sum = estimate(args, s, bases), tokens = all_tokens(b), top = 0;
    for_each([&](u32 chunk, u32) { top = at_least(top, bases[chunk]); });
    // Under way while the level is found.
    top = warp_max(top);
    if (tokens > 0) top = at_least(top, CHUNKS == 1 ? level_of_few(bases, tokens, inverse) : level_of_many(bases, tokens, sum));
    for_each([&](u32 chunk, u32 i) {
        room[chunk] = at_most(top - bases[chunk], tokens);
        own[chunk] = i == 0 ? room[chunk] : 0;
        if (i == 0) room[chunk] = 0;
        capacity[chunk] = at_most(room[chunk], s.all_visits[rank_at(args, i)]);
    });
    u32 left = tokens - __shfl_sync(ALL, own[0], 0);
    left -= spread(left, capacity, own);
    if (left > 0) {
        for_each([&](u32 chunk, u32 i) { room[chunk] -= i > 0 ? own[chunk] : 0; });
        spread(left, room, own);
    }
    for_each([&](u32 chunk, u32 i) { s.quotas[PLANNED].left[rank_at(args, i)] = own[chunk]; });
    open_quotas(args, s.quotas[PLANNED]);
}
