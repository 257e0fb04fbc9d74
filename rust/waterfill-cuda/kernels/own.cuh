// The plan from own counts, by one warp: waterfill_core's own.rs for CostModel::Rows, number by number.
// Entry i of `scratch` and `room` is rank (source + i) % ranks, and lane i % 32 alone touches it.
// A source has at most 2^20 rows (src/shape.rs), so their routed rows, and 1024 ranks' rooms, fit 32 bits.

constexpr u32 HALF_TRUSTED = 48;
constexpr u32 LEAST_TRUST = 3 * 1024 / 10;

__device__ __forceinline__ u32 rank_at(const Args &args, u32 i) {
    u32 rank = args.rank + i;
    return rank < args.ranks ? rank : rank - args.ranks;
}

// Loads as far as own counts tell them, shrunk towards their mean, into `scratch`; gives their sum.
__device__ __forceinline__ u32 estimate(const Args &args, const Shared &s) {
    u32 sum = 0;
    for (u32 i = lane(); i < args.ranks; i += WARP) sum += s.loads[i];
    u32 mean = warp_sum(sum) / args.ranks;
    // floor(1024 mean / (mean + HALF_TRUSTED)), in 32 bits.
    u32 trust = at_least(1024 - up(1024 * HALF_TRUSTED, mean + HALF_TRUSTED), LEAST_TRUST);
    sum = 0;
    for (u32 i = lane(); i < args.ranks; i += WARP) {
        u32 load = s.loads[rank_at(args, i)];
        u32 apart = load < mean ? mean - load : load - mean;
        u32 part = (u32)(((u64)apart * trust + 512) >> 10);
        u32 base = load < mean ? mean - part : mean + part;
        s.scratch[i] = base;
        sum += base;
    }
    return warp_sum(sum);
}

// The smallest level with room for `tokens` rows over the bases in `scratch`: Newton's method from above.
__device__ __forceinline__ u32 water_level(const Args &args, const Shared &s, u32 tokens, u32 sum) {
    u32 level = up(tokens + sum, args.ranks);
    while (true) {
        u32 below = 0, under = 0;
        for (u32 i = lane(); i < args.ranks; i += WARP) {
            u32 base = s.scratch[i];
            if (base < level) {
                below += 1;
                under += base;
            }
        }
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

// Add rows to own quotas in proportion to `capacity(i)`; gives how many fitted.
template <typename Capacity>
__device__ __forceinline__ u32 spread(const Args &args, const Shared &s, u32 rows, Capacity capacity) {
    u32 sum = 0;
    for (u32 i = lane(); i < args.ranks; i += WARP) sum += capacity(i);
    u32 total = warp_sum(sum);
    u32 fits = at_most(rows, total);
    if (fits == 0) return 0;
    u32 before = 0;
    for (u32 first = 0; first < args.ranks; first += WARP) {
        u32 i = first + lane();
        u32 own = i < args.ranks ? capacity(i) : 0;
        u32 until = before + warp_prefix(own);
        u32 given = share(fits, until, total) - share(fits, until - own, total);
        if (i < args.ranks) s.own[rank_at(args, i)] += given;
        before = __shfl_sync(ALL, until, WARP - 1);
    }
    return fits;
}

// Write own quotas: own rank first, then visited ranks, then any.
__device__ void plan_own(const Args &args, const Shared &s, u32 tokens) {
    u32 sum = estimate(args, s);
    u32 level = tokens == 0 ? 0 : water_level(args, s, tokens, sum);
    u32 highest = 0;
    for (u32 i = lane(); i < args.ranks; i += WARP) highest = at_least(highest, s.scratch[i]);
    u32 top = at_least(level, warp_max(highest));
    for (u32 i = lane(); i < args.ranks; i += WARP) {
        s.room[i] = at_most(top - s.scratch[i], tokens);
        s.own[rank_at(args, i)] = 0;
    }
    __syncwarp();
    u32 home = at_most(tokens, s.room[0]), left = tokens - home;
    __syncwarp();
    if (lane() == 0) {
        s.own[args.rank] = home;
        s.room[0] -= home;
    }
    left -= spread(args, s, left, [&](u32 i) {
        return i == 0 ? 0 : at_most(s.room[i], s.visits[rank_at(args, i)]);
    });
    if (left == 0) return;
    for (u32 i = lane(); i < args.ranks; i += WARP)
        if (i > 0) s.room[i] -= s.own[rank_at(args, i)];
    spread(args, s, left, [&](u32 i) { return s.room[i]; });
}
