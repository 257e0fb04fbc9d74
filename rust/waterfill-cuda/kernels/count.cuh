// Ids to ranks, routed columns out, and counts: of this block, then of all.

__device__ __forceinline__ void clear(u32 *words, u32 count) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

// Slots that a thread has in flight at once: of memory's latency, one is paid a batch.
static constexpr u32 BATCH = TOP_K < 8 ? TOP_K : 8;

// A block's rows in the arrays, and its slots: those at or past `padded` are of padded rows.
struct Rows {
    const ID *ids;
    const WEIGHT *weights;
    ID *out_ids;
    WEIGHT *out_weights;
    u32 first, count;
    u32 slots, padded;

    __device__ __forceinline__ Rows(const Args &args) {
        first = at_most(block() * args.rows_per_block, args.rows);
        count = at_most(args.rows_per_block, args.rows - first);
        ids = args.ids + (u64)first * TOP_K;
        weights = args.weights + (u64)first * TOP_K;
        out_ids = args.out_ids + (u64)first * (TOP_K + 1);
        out_weights = args.out_weights + (u64)first * (TOP_K + 1);
        slots = padded = count * TOP_K;
    }

    __device__ __forceinline__ void pad(const Args &args) {
        if (!args.unpadded) return;
        int unpadded = *args.unpadded;
        if (unpadded < (int)(first + count)) padded = unpadded < (int)first ? 0 : (unpadded - first) * TOP_K;
    }
};

// A thread's part of `BATCH * blockDim.x` slots from `base` on, side by side with its neighbours'.
struct Slots {
    ID ids[BATCH];
    WEIGHT weights[BATCH];
};

__device__ __forceinline__ Slots load_slots(const Rows &rows, u32 base) {
    Slots slots;
#pragma unroll
    for (u32 j = 0; j < BATCH; ++j) {
        u32 i = base + j * blockDim.x + threadIdx.x;
        slots.ids[j] = -1;
        slots.weights[j] = 0;
        if (i < rows.slots) {
            slots.ids[j] = rows.ids[i];
            slots.weights[j] = rows.weights[i];
        }
    }
    return slots;
}

// Each slot's rank is kept, and its row counted there.
__device__ __forceinline__ void count_slots(const Args &args, const Shared &s, const Rows &rows, const Slots &slots, u32 base) {
#pragma unroll
    for (u32 j = 0; j < BATCH; ++j) {
        u32 i = base + j * blockDim.x + threadIdx.x;
        if (i >= rows.slots) break;
        bool expert = (UNSIGNED_ID)slots.ids[j] < args.experts && i < rows.padded;
        u32 id = (u32)slots.ids[j];
        u32 rank = expert ? __umulhi(2 * id, args.rank_multiplier) : NO_RANK;
        s.slots[i] = (u16)rank;
        atomicAdd(&s.loads[rank], 1u);
        if (args.posts_experts && expert) atomicAdd(&s.counts[id], 1u);
    }
}

// Each slot's id goes out moved up by its rank, its weight as it is.
__device__ __forceinline__ void write_slots(const Shared &s, const Rows &rows, const Slots &slots, u32 base) {
#pragma unroll
    for (u32 j = 0; j < BATCH; ++j) {
        u32 i = base + j * blockDim.x + threadIdx.x;
        if (i >= rows.slots) break;
        u32 rank = s.slots[i], out = i + i / TOP_K;
        bool expert = rank != NO_RANK;
        ID id = i < rows.padded ? slots.ids[j] : (ID)-1;
        // An id past the last expert names none, so nothing downstream may take it for one.
        rows.out_ids[out] = expert ? id + (ID)rank : id < 0 ? id : (ID)-1;
        rows.out_weights[out] = expert ? slots.weights[j] : (WEIGHT)0;
    }
}

// A token's ranks, all in flight at once, two a word where they pair up; none in each slot if it is not `here`.
struct Ranks {
    u32 rank[TOP_K];

    __device__ __forceinline__ Ranks(const Shared &s, u32 row, bool here) {
        const u16 *slots = s.slots + (here ? row : 0) * TOP_K;
        if (TOP_K % 2 == 0) {
            u32 pairs[TOP_K / 2 + 1];
#pragma unroll
            for (u32 k = 0; k < TOP_K / 2; ++k) pairs[k] = ((const u32 *)slots)[k];
#pragma unroll
            for (u32 k = 0; k < TOP_K; ++k) rank[k] = pairs[k / 2] >> k % 2 * 16 & 0xffff;
        } else {
#pragma unroll
            for (u32 k = 0; k < TOP_K; ++k) rank[k] = slots[k];
        }
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) rank[k] = here ? rank[k] : NO_RANK;
    }

    __device__ __forceinline__ bool any() const {
        u32 least = NO_RANK;
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) least = at_most(least, rank[k]);
        return least < NO_RANK;
    }

    // Whether slot k is the first of the token's at its rank.
    __device__ __forceinline__ bool is_visit(u32 k) const {
        bool visit = rank[k] != NO_RANK;
#pragma unroll
        for (u32 before = 0; before < k; ++before) visit &= rank[before] != rank[k];
        return visit;
    }
};

// A warp counts the visits of its 32 tokens: a ballot a rank and one addition for few ranks, else one by one.
__device__ __forceinline__ void add_visits(const Shared &s, const Ranks &ranks) {
    if (RANKS <= 16) {
        u32 visited = 0, mine = 0;
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) visited |= 1u << ranks.rank[k];
#pragma unroll
        for (u32 rank = 0; rank < RANKS; ++rank) {
            u32 count = __popc(__ballot_sync(ALL, visited >> rank & 1));
            mine = lane() == rank ? count : mine;
        }
        if (mine > 0) atomicAdd(&s.visits[lane()], mine);
    } else {
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) {
            if (ranks.is_visit(k)) atomicAdd(&s.visits[ranks.rank[k]], 1u);
        }
    }
}

// Visits and tokens of this block; every token is pending from here on.
__device__ __forceinline__ void count_tokens(const Shared &s, Block &b, u32 rows) {
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows; base += blockDim.x) {
        u32 row = base + lane();
        Ranks ranks(s, row, row < rows);
        bool token = ranks.any();
        add_visits(s, ranks);
        if (row < rows) s.given[row] = token ? PENDING : NOBODY;
        u32 tokens = __popc(__ballot_sync(ALL, token));
        if (lane() == 0) atomicAdd(&b.tokens, tokens);
    }
}

// Tokens of all blocks, once they are gathered.
__device__ __forceinline__ u32 all_tokens(const Block &b) { return CLUSTERED ? b.all_tokens : b.tokens; }

// Sum all blocks' counts, in each of them, for all of its threads.
__device__ __forceinline__ void gather(const Shared &s, Block &b) {
#if CLUSTERED
    sync_blocks();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < 2 * ENTRIES; i += blockDim.x) s.all_loads[i] = sum_blocks(s.loads + i);
    if (warp() == warps() - 1) {
        u32 tokens = lane() < blocks() ? read_block(&b.tokens, lane()) : 0;
        u32 all = warp_sum(tokens), before = warp_sum(lane() < block() ? tokens : 0);
        if (lane() == 0) {
            b.all_tokens = all;
            b.tokens_before = before;
        }
    }
    __syncthreads();
#else
    __syncthreads();
#endif
}
