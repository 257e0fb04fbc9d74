// The plan from own counts, by one warp: waterfill_core's own.rs for CostModel::Rows, number by number.
// A lane has up to EACH entries in registers; entry i, of lane i % 32, is rank (source + i) % ranks.
// A source has at most 2^20 rows (src/shape.rs), so their routed rows, and 1024 ranks' rooms, fit 32 bits.

constexpr u32 HALF_TRUSTED = 48;
constexpr u32 LEAST_TRUST = 3 * 1024 / 10;

__device__ __forceinline__ u32 rank_at(const Args &args, u32 i) {
    u32 rank = args.rank + i;
    return rank < args.ranks ? rank : rank - args.ranks;
}

template <u32 EACH>
struct Entries {
    u32 value[EACH];

    __device__ __forceinline__ u32 sum() const {
        u32 sum = 0;
#pragma unroll
        for (u32 j = 0; j < EACH; ++j) sum += value[j];
        return warp_sum(sum);
    }
};

// Entry j of this lane is one of the ranks.
__device__ __forceinline__ bool here(const Args &args, u32 j) { return j * WARP + lane() < args.ranks; }

// Loads as far as own counts tell them, shrunk towards their mean.
template <u32 EACH>
__device__ __forceinline__ Entries<EACH> estimate(const Args &args, const Shared &s) {
    Entries<EACH> loads;
#pragma unroll
    for (u32 j = 0; j < EACH; ++j) loads.value[j] = here(args, j) ? s.loads[rank_at(args, j * WARP + lane())] : 0;
    u32 mean = loads.sum() / args.ranks;
    // floor(1024 mean / (mean + HALF_TRUSTED)), in 32 bits.
    u32 trust = at_least(1024 - up(1024 * HALF_TRUSTED, mean + HALF_TRUSTED), LEAST_TRUST);
#pragma unroll
    for (u32 j = 0; j < EACH; ++j) {
        u32 load = loads.value[j], apart = load < mean ? mean - load : load - mean;
        u32 part = (u32)(((u64)apart * trust + 512) >> 10);
        loads.value[j] = load < mean ? mean - part : mean + part;
        if (!here(args, j)) loads.value[j] = 0;
    }
    return loads;
}

// The smallest level with room for `tokens` rows, at least one. The ranks up to a base need a level of their own
// for themselves; the least of these is the level. One entry a lane.
__device__ __forceinline__ u32 level_of(const Args &args, const Entries<1> &bases, u32 tokens) {
    u32 mine = bases.value[0], below = 0, under = 0;
    for (u32 i = 0; i < args.ranks; ++i) {
        u32 base = __shfl_sync(ALL, mine, i);
        if (base <= mine) {
            below += 1;
            under += base;
        }
    }
    u32 level = here(args, 0) ? up(tokens + under, below) : ALL;
    return ~warp_max(~level);
}

// The same by Newton's method from above, for more ranks.
template <u32 EACH>
__device__ __forceinline__ u32 level_of(const Args &args, const Entries<EACH> &bases, u32 tokens) {
    u32 level = up(tokens + bases.sum(), args.ranks);
    while (true) {
        u32 below = 0, under = 0;
#pragma unroll
        for (u32 j = 0; j < EACH; ++j) {
            if (here(args, j) && bases.value[j] < level) {
                below += 1;
                under += bases.value[j];
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

// Add rows to `own` in proportion to the capacities; gives how many fitted.
template <u32 EACH>
__device__ __forceinline__ u32 spread(u32 rows, const Entries<EACH> &capacities, Entries<EACH> &own) {
    u32 total = capacities.sum();
    u32 fits = at_most(rows, total);
    if (fits == 0) return 0;
    u32 before = 0, given = 0;
#pragma unroll
    for (u32 j = 0; j < EACH; ++j) {
        u32 until = before + warp_prefix(capacities.value[j]);
        u32 shared = share(fits, until, total);
        u32 previous = __shfl_up_sync(ALL, shared, 1);
        own.value[j] += shared - (lane() == 0 ? given : previous);
        before = __shfl_sync(ALL, until, WARP - 1);
        given = __shfl_sync(ALL, shared, WARP - 1);
    }
    return fits;
}

// Write own quotas: own rank first, then visited ranks, then any.
template <u32 EACH>
__device__ __forceinline__ void plan_entries(const Args &args, const Shared &s, u32 tokens) {
    Entries<EACH> bases = estimate<EACH>(args, s), room, capacities, own;
    u32 top = tokens == 0 ? 0 : level_of(args, bases, tokens);
#pragma unroll
    for (u32 j = 0; j < EACH; ++j) top = at_least(top, bases.value[j]);
    top = warp_max(top);
#pragma unroll
    for (u32 j = 0; j < EACH; ++j) {
        room.value[j] = here(args, j) ? at_most(top - bases.value[j], tokens) : 0;
        own.value[j] = 0;
    }
    // Entry 0 is home.
    u32 home = __shfl_sync(ALL, room.value[0], 0), left = tokens - home;
    if (lane() == 0) {
        own.value[0] = home;
        room.value[0] = 0;
    }
#pragma unroll
    for (u32 j = 0; j < EACH; ++j)
        capacities.value[j] =
            here(args, j) ? at_most(room.value[j], s.visits[rank_at(args, j * WARP + lane())]) : 0;
    left -= spread(left, capacities, own);
    if (left > 0) {
#pragma unroll
        for (u32 j = 0; j < EACH; ++j)
            if (j * WARP + lane() > 0) room.value[j] -= own.value[j];
        spread(left, room, own);
    }
#pragma unroll
    for (u32 j = 0; j < EACH; ++j)
        if (here(args, j)) s.own[rank_at(args, j * WARP + lane())] = own.value[j];
}

__device__ void plan_own(const Args &args, const Shared &s, u32 tokens) {
    if (args.ranks <= WARP) plan_entries<1>(args, s, tokens);
    else if (args.ranks <= 5 * WARP) plan_entries<5>(args, s, tokens);
    else plan_entries<32>(args, s, tokens);
}
