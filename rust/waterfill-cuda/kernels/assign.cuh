// Tokens to quotas, in rounds: waterfill_core's assign.rs, for all tokens at once.
//
// A token's state is its rank, PENDING, NOBODY (padding), or a bid: BID | order << 10 | destination, `order`
// being its place among the bids of its 32 rows for that destination.

static constexpr u16 BID = 0x8000;

__device__ constexpr u32 bits_of(u32 value) { return value == 0 ? 0 : 1 + bits_of(value / 2); }

// The destination that a token bids for in this round; NO_RANK for none. Loads first: none waits for another.
__device__ __forceinline__ u32 wanted(const u32 *left, const Ranks &ranks, u32 row, u32 round, u32 most) {
    u32 level = __umulhi(row * STEP_LEVEL + round * ROUND_LEVEL, LEVELS);
    u32 first = __umulhi(row * STEP_TURN + round * ROUND_TURN, RANKS);
    u32 above = level * most / LEVELS;
    u32 rows[TOP_K];
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) rows[k] = left[ranks.rank[k]];
    // The nearest of those above the level, else of those that are open: the least distance, with its rank.
    u32 best = ALL;
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        u32 distance = ranks.rank[k] - first;
        distance = at_most(distance, distance + RANKS);
        u32 key = (distance + (rows[k] > above ? 0 : 1 << RANK_BITS)) << RANK_BITS | ranks.rank[k];
        best = at_most(best, rows[k] > 0 ? key : ALL);
    }
    return best == ALL ? NO_RANK : best & ((1 << RANK_BITS) - 1);
}

// The lanes of the same rank: a ballot a bit, which takes less than __match_any_sync for this few bits.
__device__ __forceinline__ u32 same_rank(u32 rank) {
    u32 same = ALL;
#pragma unroll
    for (u32 bit = 0; bit < bits_of(NO_RANK); ++bit) {
        u32 votes = __ballot_sync(ALL, rank >> bit & 1);
        same &= rank >> bit & 1 ? votes : ~votes;
    }
    return same;
}

// A warp's bids for its 32 rows from `base` on.
__device__ __forceinline__ void bid(const Args &args, const Shared &s, const u32 *left, u32 first_row, u32 base, u32 rows,
                                    u32 round, u32 most) {
    u32 column = base / WARP, row = base + lane();
#pragma unroll 1
    for (u32 rank = lane(); rank < RANKS; rank += WARP) s.table[rank * args.table_stride + column] = 0;
    bool pending = row < rows && s.given[row] == PENDING;
    u32 rank = wanted(left, Ranks(s, row, pending), first_row + row, round, most);
    u32 same = same_rank(rank);
    __syncwarp();
    if (rank == NO_RANK) return;
    u32 order = __popc(same & lanes_before());
    if (order == 0) s.table[rank * args.table_stride + column] = (u16)__popc(same);
    s.given[row] = (u16)(BID | order << RANK_BITS | rank);
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
__device__ __forceinline__ void close_round(const Args &args, const Shared &s, Block &b, u32 *left, u32 columns, u32 round) {
    u32 *totals = s.totals + round % 2 * ENTRIES;
#pragma unroll 1
    for (u32 rank = threadIdx.x; rank < RANKS; rank += blockDim.x)
        totals[rank] = add_columns(s.table + rank * args.table_stride, columns);
    if (CLUSTERED) sync_blocks();
#pragma unroll 1
    for (u32 first = warp() * WARP; first < RANKS; first += blockDim.x) {
        u32 rank = first + lane(), rest = 0, granted = 0;
        if (rank < RANKS) {
            u32 before = 0, all = 0;
            for_each_block(totals + rank, [&](u32 other, u32 bids) {
                before += other < block() ? bids : 0;
                all += bids;
            });
            rest = left[rank];
            granted = at_most(rest, before);
            s.allowed[rank] = rest - granted;
            rest -= at_most(rest, all);
            left[rank] = rest;
        }
        u32 most = warp_max(rest), before = CLUSTERED ? warp_sum(granted) : 0;
        if (lane() == 0) atomicMax(&b.most[round], most);
        if (lane() == 0 && CLUSTERED) atomicAdd(&b.granted_before, before);
    }
}

// A warp's bids are granted in the order of the tokens, or pending again. Gives its pending rows.
__device__ __forceinline__ u32 grant(const Args &args, const Shared &s, u32 base, u32 rows) {
    u32 row = base + lane();
    u16 state = row < rows ? s.given[row] : NOBODY;
    if (state & BID) {
        u32 rank = state & ((1 << RANK_BITS) - 1), order = state >> RANK_BITS & (WARP - 1);
        order += s.table[rank * args.table_stride + base / WARP];
        state = order < s.allowed[rank] ? (u16)rank : PENDING;
        s.given[row] = state;
    }
    return __popc(__ballot_sync(ALL, state == PENDING));
}

// Sums of the rows left anywhere but at home, up to and with each rank, into `until`. By one warp.
__device__ __forceinline__ void sum_left(const Shared &s, const u32 *left) {
    u32 sum = 0;
#pragma unroll 1
    for (u32 first = 0; first < RANKS; first += WARP) {
        u32 rank = first + lane();
        u32 until = sum + warp_prefix(rank < RANKS ? left[rank] : 0);
        if (rank < RANKS) s.until[rank] = until;
        sum = __shfl_sync(ALL, until, WARP - 1);
    }
}

// Gives whether rows are left anywhere but at home; then `until` and the table's last row tell where, and for whom.
__device__ __forceinline__ bool run_rounds(const Args &args, const Shared &s, Block &b, u32 *left, u32 most, u32 first_row,
                                           u32 rows) {
#pragma unroll 1
    for (u32 round = 0; round < ROUNDS && most > 0; ++round) {
#pragma unroll 1
        for (u32 base = warp() * WARP; base < rows; base += blockDim.x)
            bid(args, s, left, first_row, base, rows, round, most);
        __syncthreads();
        close_round(args, s, b, left, up(rows, WARP), round);
        __syncthreads();
        most = b.most[round];
#pragma unroll 1
        for (u32 base = warp() * WARP; base < rows; base += blockDim.x) {
            u32 pending = grant(args, s, base, rows);
            if (lane() == 0) s.table[NO_RANK * args.table_stride + base / WARP] = (u16)pending;
        }
        __syncwarp();
    }
    if (most == 0) return false;
    if (warp() == warps() - 1) sum_left(s, left);
    __syncthreads();
    return true;
}

// The rank of the token that is number `place` among those that found no room at home.
__device__ __forceinline__ u32 leftover(const Shared &s, u32 place) {
    u32 least = 0, most = RANKS - 1;
    while (least < most) {
        u32 middle = (least + most) / 2;
        if (s.until[middle] > place) most = middle;
        else least = middle + 1;
    }
    return least;
}

// The pending tokens of all blocks before a warp's rows from `base` on.
__device__ __forceinline__ u32 pending_before(const Args &args, const Shared &s, const Block &b, u32 base) {
    const u16 *pending = s.table + NO_RANK * args.table_stride;
    u32 mine = 0;
#pragma unroll 1
    for (u32 column = lane(); column < base / WARP; column += WARP) mine += pending[column];
    return warp_sum(mine) + (CLUSTERED ? b.tokens_before - b.granted_before : 0);
}

// Tokens without a rank: at home while rows are left there, then wherever some are. Then the last column.
// If `anywhere` is false rows are left at home alone, as many as such tokens.
__device__ __forceinline__ void place_rest(const Args &args, const Shared &s, const Block &b, const Rows &rows, u32 home,
                                           bool anywhere) {
#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows.count; base += blockDim.x) {
        u32 before = anywhere ? pending_before(args, s, b, base) : 0, row = base + lane();
        u16 state = row < rows.count ? s.given[row] : NOBODY;
        u32 place = before + __popc(__ballot_sync(ALL, state == PENDING) & lanes_before());
        if (row >= rows.count) continue;
        u32 rank = state, out = row * (TOP_K + 1) + TOP_K;
        if (state == PENDING) rank = anywhere && place >= home ? leftover(s, place - home) : args.rank;
        bool token = state != NOBODY;
        rows.out_ids[out] = token ? (ID)(rank * (args.experts_per_rank + 1) + args.experts_per_rank) : (ID)-1;
        rows.out_weights[out] = token ? (WEIGHT)args.shared_weight : (WEIGHT)0;
    }
}
