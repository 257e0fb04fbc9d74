// The plan from own counts, by one warp: waterfill_core's own.rs for CostModel::Rows, number by number.
// Entry i, of lane i % 32, is rank (source + i) % ranks: in a register if there are no more than 32 ranks.
// A source has at most 2^20 rows (src/shape.rs), so their routed rows, and 1024 ranks' rooms, fit 32 bits.

static constexpr u32 HALF_TRUSTED = 48;
static constexpr u32 LEAST_TRUST = 3 * 1024 / 10;

struct InRegister {
    u32 value;
    __device__ __forceinline__ u32 &operator[](u32) { return value; }
    static __device__ __forceinline__ u32 chunks(const Args &) { return 1; }
};

struct InShared {
    u32 *words;
    __device__ __forceinline__ u32 &operator[](u32 i) { return words[i]; }
    static __device__ __forceinline__ u32 chunks(const Args &args) { return up(args.ranks, WARP); }
};

// Call `visit(i)` for this lane's entries.
template <typename Entries, typename Visit>
__device__ __forceinline__ void for_each(const Args &args, Visit visit) {
#pragma unroll 1
    for (u32 chunk = 0; chunk < Entries::chunks(args); ++chunk) {
        u32 i = chunk * WARP + lane();
        if (i < args.ranks) visit(i);
    }
}

__device__ __forceinline__ u32 rank_at(const Args &args, u32 i) {
    u32 rank = args.rank + i;
    return rank < args.ranks ? rank : rank - args.ranks;
}

// Loads as far as own counts tell them, shrunk towards their mean; gives their sum.
template <typename Entries>
__device__ __forceinline__ u32 estimate(const Args &args, const Shared &s, Entries &bases) {
    u32 sum = 0;
    for_each<Entries>(args, [&](u32 i) {
        bases[i] = s.loads[rank_at(args, i)];
        sum += bases[i];
    });
    u32 mean = warp_sum(sum) / args.ranks;
    // floor(1024 mean / (mean + HALF_TRUSTED)), in 32 bits.
    u32 trust = at_least(1024 - up(1024 * HALF_TRUSTED, mean + HALF_TRUSTED), LEAST_TRUST);
    sum = 0;
    for_each<Entries>(args, [&](u32 i) {
        u32 load = bases[i], apart = load < mean ? mean - load : load - mean;
        u32 part = (u32)(((u64)apart * trust + 512) >> 10);
        bases[i] = load < mean ? mean - part : mean + part;
        sum += bases[i];
    });
    return warp_sum(sum);
}

// The smallest level with room for `tokens` rows, at least one. The ranks up to a base need a level by
// themselves; the least of these is the level.
__device__ __forceinline__ u32 level_of(const Args &args, InRegister &bases, u32 tokens, u32) {
    u32 mine = bases.value, below = 0, under = 0;
#pragma unroll 4
    for (u32 i = 0; i < args.ranks; ++i) {
        u32 base = __shfl_sync(ALL, mine, i);
        below += base <= mine;
        under += base <= mine ? base : 0;
    }
    u32 level = lane() < args.ranks ? up(tokens + under, below) : ALL;
    return ~warp_max(~level);
}

// The same by Newton's method from above, for more ranks.
__device__ __forceinline__ u32 level_of(const Args &args, InShared &bases, u32 tokens, u32 sum) {
    u32 level = up(tokens + sum, args.ranks);
    while (true) {
        u32 below = 0, under = 0;
        for_each<InShared>(args, [&](u32 i) {
            u32 base = bases[i];
            below += base < level;
            under += base < level ? base : 0;
        });
        u32 next = up(tokens + warp_sum(under), warp_sum(below));
        if (next == level) return level;
        level = next;
    }
}

// The first so many of `total` rows' share of `fits`, rounded up.
__device__ __forceinline__ u32 share(u64 fits, u64 before, u32 total) {
    u64 product = fits * before;
    if (product == 0) return 0;
    // A division of 64 bits takes several times as long.
    if (product >> 32 == 0) return ((u32)product - 1) / total + 1;
    return (u32)((product - 1) / total) + 1;
}

// Add rows to `own` in proportion to `capacity(i)`, 0 past the last rank; gives how many fitted.
template <typename Entries, typename Capacity>
__device__ __forceinline__ u32 spread(const Args &args, u32 rows, Capacity capacity, Entries &own) {
    u32 sum = 0;
    for_each<Entries>(args, [&](u32 i) { sum += capacity(i); });
    u32 total = warp_sum(sum), fits = at_most(rows, total);
    if (fits == 0) return 0;
    u32 before = 0, given = 0;
#pragma unroll 1
    for (u32 chunk = 0; chunk < Entries::chunks(args); ++chunk) {
        u32 i = chunk * WARP + lane();
        u32 until = before + warp_prefix(i < args.ranks ? capacity(i) : 0);
        u32 shared = share(fits, until, total), previous = __shfl_up_sync(ALL, shared, 1);
        if (i < args.ranks) own[i] += shared - (lane() == 0 ? given : previous);
        before = __shfl_sync(ALL, until, WARP - 1);
        given = __shfl_sync(ALL, shared, WARP - 1);
    }
    return fits;
}

// Write own quotas: own rank first, then visited ranks, then any.
template <typename Entries>
__device__ __forceinline__ void plan_entries(const Args &args, const Shared &s, u32 tokens, Entries bases, Entries room,
                                             Entries own) {
    u32 sum = estimate(args, s, bases);
    u32 top = tokens == 0 ? 0 : level_of(args, bases, tokens, sum);
    for_each<Entries>(args, [&](u32 i) { top = at_least(top, bases[i]); });
    top = warp_max(top);
    u32 home = 0;
    for_each<Entries>(args, [&](u32 i) {
        room[i] = at_most(top - bases[i], tokens);
        own[i] = 0;
        // Entry 0 is home.
        if (i == 0) {
            own[i] = home = room[i];
            room[i] = 0;
        }
    });
    u32 left = tokens - __shfl_sync(ALL, home, 0);
    left -= spread(args, left, [&](u32 i) { return at_most(room[i], s.visits[rank_at(args, i)]); }, own);
    if (left > 0) {
        for_each<Entries>(args, [&](u32 i) { room[i] -= i > 0 ? own[i] : 0; });
        spread(args, left, [&](u32 i) { return room[i]; }, own);
    }
    for_each<Entries>(args, [&](u32 i) { s.own[rank_at(args, i)] = own[i]; });
}

__device__ __forceinline__ void plan_own(const Args &args, const Shared &s, u32 tokens) {
#if SMALL
    plan_entries(args, s, tokens, InRegister{0}, InRegister{0}, InRegister{0});
#else
    // These are not used before the rounds.
    plan_entries(args, s, tokens, InShared{s.allowed}, InShared{s.totals}, InShared{s.totals + args.ranks + 1});
#endif
}
