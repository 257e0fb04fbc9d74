// Ids to ranks, routed ids out, and this block's counts.

__device__ __forceinline__ void clear(u32 *words, u32 count) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

// Slots that a thread has in flight at once: of memory's latency, one is paid a batch.
static constexpr u32 BATCH = TOP_K < 8 ? TOP_K : 8;

// A thread's part of `BATCH * blockDim.x` slots from `base` on, side by side with its neighbours'.
struct Slots {
    ID ids[BATCH];
    WEIGHT weights[BATCH];
};

__device__ __forceinline__ Slots load_slots(const Args &args, u32 first, u32 rows, u32 base) {
    Slots slots;
#pragma unroll
    for (u32 j = 0; j < BATCH; ++j) {
        u32 i = base + j * blockDim.x + threadIdx.x;
        u64 at = (u64)first * TOP_K + i;
        slots.ids[j] = -1;
        slots.weights[j] = 0;
        if (i < rows * TOP_K) {
            slots.ids[j] = args.ids[at];
            slots.weights[j] = args.weights[at];
        }
    }
    return slots;
}

// Each slot: its expert is counted, its rank kept, its id moved up by its rank, its weight copied.
__device__ __forceinline__ void take_slots(const Args &args, const Shared &s, u32 first, u32 rows, u32 unpadded,
                                           const Slots &slots, u32 base) {
#pragma unroll
    for (u32 j = 0; j < BATCH; ++j) {
        u32 i = base + j * blockDim.x + threadIdx.x, row = i / TOP_K;
        if (i >= rows * TOP_K) break;
        ID id = first + row < unpadded ? slots.ids[j] : (ID)-1;
        bool valid = id >= 0 && id < (ID)args.experts;
        u32 rank = (u32)(((u64)(u32)id * args.rank_multiplier) >> args.rank_shift);
        s.slots[i] = (u16)(valid ? rank : args.ranks);
        if (valid) atomicAdd(&s.counts[(u32)id], 1u);
        if (!args.out_ids) continue;
        // An id past the last expert names none, so nothing downstream may take it for one.
        ID moved = valid ? id + (ID)rank : id < 0 ? id : (ID)-1;
        u64 out = (u64)first * (TOP_K + 1) + i + row;
        args.out_ids[out] = moved;
        args.out_weights[out] = valid ? slots.weights[j] : (WEIGHT)0;
    }
}

// A token's ranks, all in flight at once; none in each slot if it is not `here`.
struct Ranks {
    u32 rank[TOP_K];

    __device__ __forceinline__ Ranks(const Args &args, const Shared &s, u32 row, bool here) {
        const u16 *slots = s.slots + (here ? row : 0) * TOP_K;
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) rank[k] = slots[k];
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) rank[k] = here ? rank[k] : args.ranks;
    }

    __device__ __forceinline__ bool any(const Args &args) const {
        u32 least = args.ranks;
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) least = at_most(least, rank[k]);
        return least < args.ranks;
    }
};

// A warp counts the visits of its 32 tokens: a ballot a rank and one addition for few ranks, else one by one.
__device__ __forceinline__ void add_visits(const Args &args, const Shared &s, const Ranks &ranks) {
#if SMALL
    u32 visited = 0, mine = 0;
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) visited |= ranks.rank[k] < WARP ? 1u << ranks.rank[k] : 0;
#pragma unroll 4
    for (u32 rank = 0; rank < args.ranks; ++rank) {
        u32 count = __popc(__ballot_sync(ALL, visited >> rank & 1));
        mine = lane() == rank ? count : mine;
    }
    if (mine > 0) atomicAdd(&s.visits[lane()], mine);
#else
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        bool seen = ranks.rank[k] == args.ranks;
#pragma unroll
        for (u32 before = 0; before < k; ++before) seen |= ranks.rank[before] == ranks.rank[k];
        if (!seen) atomicAdd(&s.visits[ranks.rank[k]], 1u);
    }
#endif
}

// Visits and tokens of this block; every token is pending from here on.
__device__ __forceinline__ void count_tokens(const Args &args, const Shared &s, Block &b, u32 rows) {
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows; base += blockDim.x) {
        u32 row = base + lane();
        Ranks ranks(args, s, row, row < rows);
        bool token = ranks.any(args);
        add_visits(args, s, ranks);
        if (row < rows) s.given[row] = token ? PENDING : NOBODY;
        u32 tokens = __popc(__ballot_sync(ALL, token));
        if (lane() == 0) atomicAdd(&b.tokens, tokens);
    }
}

// Rows routed to each rank, from this block's counts: a warp a rank if it has many experts, else a thread.
__device__ __forceinline__ void add_loads(const Args &args, const Shared &s) {
    u32 each = args.experts_per_rank;
    if (each < 8) {
#pragma unroll 1
        for (u32 rank = threadIdx.x; rank < args.ranks; rank += blockDim.x) {
            u32 sum = 0;
#pragma unroll 1
            for (u32 i = 0; i < each; ++i) sum += s.counts[rank * each + i];
            s.loads[rank] = sum;
        }
        return;
    }
#pragma unroll 1
    for (u32 rank = warp(); rank < args.ranks; rank += warps()) {
        u32 sum = 0;
#pragma unroll 1
        for (u32 i = lane(); i < each; i += WARP) sum += s.counts[rank * each + i];
        sum = warp_sum(sum);
        if (lane() == 0) s.loads[rank] = sum;
    }
}
