// Tokens to quotas, in rounds: waterfill_core's assign.rs, for all tokens at once.
//
// A token's state is its rank, PENDING, NOBODY (padding), or a bid: BID | order << 10 | destination, `order`
// being its place among the bids of its 32 rows for that destination.

static constexpr u16 BID = 0x8000;

// The destination that a token bids for in this round; `ranks` for none. Loads first: none waits for another.
__device__ __forceinline__ u32 wanted(const Args &args, const Shared &s, const Ranks &ranks, u32 row, u32 round, u32 most) {
    u32 level = __umulhi(row * STEP_LEVEL + round * ROUND_LEVEL, LEVELS);
    u32 first = __umulhi(row * STEP_TURN + round * ROUND_TURN, args.ranks);
    u32 above = level * most / LEVELS;
    u32 left[TOP_K];
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) left[k] = s.left[ranks.rank[k]];
    // The nearest of those above the level, else of those that are open: the least distance, with its rank.
    u32 best = ALL;
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        u32 rank = ranks.rank[k];
        u32 distance = rank - first + (rank < first ? args.ranks : 0);
        u32 key = (distance + (left[k] > above ? 0 : 1 << RANK_BITS)) << RANK_BITS | rank;
        best = at_most(best, left[k] > 0 ? key : ALL);
    }
    return best == ALL ? args.ranks : best & ((1 << RANK_BITS) - 1);
}

// A warp's bids for its 32 rows from `base` on.
__device__ __forceinline__ bool bid(const Args &args, const Shared &s, u32 first_row, u32 base, u32 rows, u32 round, u32 most) {
    u32 column = base / WARP, row = base + lane();
#pragma unroll 1
    for (u32 rank = lane(); rank < args.ranks; rank += WARP) s.table[rank * args.table_stride + column] = 0;
    __syncwarp();
    bool pending = row < rows && s.given[row] == PENDING;
    u32 rank = wanted(args, s, Ranks(args, s, row, pending), first_row + row, round, most);
    u32 same = __match_any_sync(ALL, rank);
    if (rank == args.ranks) return false;
    u32 order = __popc(same & lanes_before());
    if (order == 0) s.table[rank * args.table_stride + column] = (u16)__popc(same);
    s.given[row] = (u16)(BID | order << 10 | rank);
    return true;
}

// Over one destination's columns: from counts to sums of the columns before; gives the sum of all.
__device__ __forceinline__ u32 add_columns(u16 *columns, u32 count) {
    u32 sum = 0;
#pragma unroll 1
    for (u32 i = 0; i < count; i += 8) {
        uint4 *packed = (uint4 *)(columns + i);
        uint4 pairs = *packed;
        u32 *pair = &pairs.x;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            // Past the last column is what the last round left there.
            u32 low = i + 2 * j < count ? pair[j] & 0xffff : 0;
            u32 high = i + 2 * j + 1 < count ? pair[j] >> 16 : 0;
            pair[j] = sum | (sum + low) << 16;
            sum += low + high;
        }
        *packed = pairs;
    }
    return sum;
}

// Close the bids of a round: how many of this block's are granted at each destination, and what is left there.
__device__ __forceinline__ void close_round(const Args &args, const Shared &s, Block &b, u32 columns, u32 round) {
    u32 *totals = s.totals + round % 2 * (args.ranks + 1);
#pragma unroll 1
    for (u32 rank = threadIdx.x; rank < args.ranks; rank += blockDim.x)
        totals[rank] = add_columns(s.table + rank * args.table_stride, columns);
    if (CLUSTERED) sync_blocks();
#pragma unroll 1
    for (u32 first = warp() * WARP; first < args.ranks; first += blockDim.x) {
        u32 rank = first + lane(), left = 0;
        if (rank < args.ranks) {
            u32 before = 0, all = 0;
#pragma unroll 8
            for (u32 other = 0; other < blocks(); ++other) {
                u32 bids = read_block(totals + rank, other);
                if (other < block()) before += bids;
                all += bids;
            }
            left = s.left[rank];
            s.allowed[rank] = left - at_most(left, before);
            left -= at_most(left, all);
            s.left[rank] = left;
        }
        u32 most = warp_max(left);
        if (lane() == 0) atomicMax(&b.most[round + 1], most);
    }
}

// A warp's bids are granted in the order of the tokens, or pending again.
__device__ __forceinline__ void grant(const Args &args, const Shared &s, u32 base, u32 rows) {
    u32 row = base + lane();
    u16 state = row < rows ? s.given[row] : NOBODY;
    if (!(state & BID)) return;
    u32 rank = state & 0x3ff, order = state >> 10 & 0x1f;
    order += s.table[rank * args.table_stride + base / WARP];
    s.given[row] = order < s.allowed[rank] ? (u16)rank : PENDING;
}

// Gives whether rows are left anywhere but at home.
__device__ __forceinline__ bool run_rounds(const Args &args, const Shared &s, Block &b, u32 first_row, u32 rows) {
#pragma unroll 1
    for (u32 round = 0; round < ROUNDS; ++round) {
        u32 most = b.most[round];
        if (most == 0) return false;
        bool any = false;
#pragma unroll 1
        for (u32 base = warp() * WARP; base < rows; base += blockDim.x)
            any |= bid(args, s, first_row, base, rows, round, most);
        // Nobody bids: nothing would change. Blocks of a cluster stay in step instead.
        if (!__syncthreads_or(any) && !CLUSTERED) return true;
        close_round(args, s, b, up(rows, WARP), round);
        __syncthreads();
#pragma unroll 1
        for (u32 base = warp() * WARP; base < rows; base += blockDim.x) grant(args, s, base, rows);
        __syncwarp();
    }
    return b.most[ROUNDS] > 0;
}

// Sums of the rows left anywhere but at home, up to and with each rank, into `allowed`. By one warp.
__device__ __forceinline__ void sum_left(const Args &args, const Shared &s) {
    u32 sum = 0;
#pragma unroll 1
    for (u32 first = 0; first < args.ranks; first += WARP) {
        u32 rank = first + lane();
        u32 until = sum + warp_prefix(rank < args.ranks ? s.left[rank] : 0);
        if (rank < args.ranks) s.allowed[rank] = until;
        sum = __shfl_sync(ALL, until, WARP - 1);
    }
}

// The rank of the token that is number `place` among those that found no room at home.
__device__ __forceinline__ u32 leftover(const Args &args, const Shared &s, u32 place) {
    u32 least = 0, most = args.ranks - 1;
    while (least < most) {
        u32 middle = (least + most) / 2;
        if (s.allowed[middle] > place) most = middle;
        else least = middle + 1;
    }
    return least;
}

// `table` gets the pending tokens before each warp's rows, `b.pending_before` those of the blocks before.
__device__ __forceinline__ void number_pending(const Args &args, const Shared &s, Block &b, u32 rows) {
    u32 columns = up(rows, WARP);
    u16 *pending = s.table;
    __syncthreads();
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows; base += blockDim.x) {
        u32 row = base + lane();
        u32 votes = __ballot_sync(ALL, row < rows && s.given[row] == PENDING);
        if (lane() == 0) pending[base / WARP] = (u16)__popc(votes);
    }
    __syncthreads();
    if (warp() == 0) {
        u32 sum = 0;
#pragma unroll 1
        for (u32 first = 0; first < columns; first += WARP) {
            u32 own = first + lane() < columns ? pending[first + lane()] : 0;
            u32 until = sum + warp_prefix(own);
            if (first + lane() < columns) pending[first + lane()] = (u16)(until - own);
            sum = __shfl_sync(ALL, until, WARP - 1);
        }
        if (lane() == 0) b.pending = sum;
    }
    if (warp() == 1) sum_left(args, s);
    sync_blocks();
    if (threadIdx.x == 0) {
        u32 before = 0;
#pragma unroll 1
        for (u32 other = 0; other < block(); ++other) before += read_block(&b.pending, other);
        b.pending_before = before;
    }
    __syncthreads();
}

// Tokens without a rank: at home while rows are left there, then wherever some are. Then the last column.
// If `anywhere` is false rows are left at home alone, as many as such tokens.
__device__ __forceinline__ void place_rest(const Args &args, const Shared &s, Block &b, u32 first_row, u32 rows, bool anywhere) {
    if (anywhere) number_pending(args, s, b, rows);
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows; base += blockDim.x) {
        u32 row = base + lane();
        u16 state = row < rows ? s.given[row] : NOBODY;
        u32 votes = __ballot_sync(ALL, state == PENDING);
        if (row >= rows) continue;
        u32 rank = state == PENDING ? args.rank : state;
        if (state == PENDING && anywhere) {
            u32 place = b.pending_before + s.table[base / WARP] + __popc(votes & lanes_before());
            if (place >= b.home) rank = leftover(args, s, place - b.home);
        }
        u64 out = (u64)(first_row + row) * (TOP_K + 1) + TOP_K;
        bool token = state != NOBODY;
        args.out_ids[out] = token ? (ID)(rank * (args.experts_per_rank + 1) + args.experts_per_rank) : (ID)-1;
        args.out_weights[out] = token ? (WEIGHT)args.shared_weight : (WEIGHT)0;
    }
}
