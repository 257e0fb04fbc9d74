// One launch a call: count, post, wait for the plan (or plan from own counts), assign, expand. Where a collective
// brings the counts it is two, with the collective between them: the first one only counts.

// What others are to know of this call, by the first block.
__device__ __forceinline__ void post_counts(const Args &args, const Shared &s, const Block &b) {
    if (args.mode == COUNT) {
        for_each_posted(args, s, b, [&](u32 i, u32 value) { args.words[i] = value; });
    } else if (args.mode == LIVE && args.words) {
        post_all(args, b.sequence);
    } else if (args.mode == LIVE) {
        post(args, s, b);
    }
}

// One warp opens quotas from the board, or given ones, if any are to be had; each block's its own given ones.
__device__ __forceinline__ void take_quotas(const Args &args, const Shared &s, Block &b) {
    u32 *quotas = s.quotas + TAKEN * ENTRIES, outcome = TALLY_TORN;
    if (args.mode == LIVE) {
        outcome = wait(args, quotas, b);
    } else {
        u64 sum = 0;
#pragma unroll 1
        for (u32 rank = lane(); rank < RANKS; rank += WARP) {
            quotas[rank] = args.quotas[rank];
            sum += quotas[rank];
        }
        if (warp_sum_long(sum) == all_tokens(b)) outcome = TALLY_LIVE;
    }
    if (outcome == TALLY_LIVE) open_quotas(args, s, b, TAKEN);
    if (lane() > 0) return;
    b.source = outcome == TALLY_LIVE ? TAKEN : PLANNED;
    if (block() > 0) return;
    u64 calls = args.state->tally[outcome] + 1;
    args.state->tally[outcome] = calls;
    if (args.mode == LIVE) {
        args.state->last = b.sequence;
        // Relaxed: a count that nobody decides by, for those who look from outside (waterfill-board's tally.rs).
        store_relaxed(args.board + args.tally_at + outcome, calls);
    }
}

// What the first block took from the board, for the others.
__device__ __forceinline__ void share_quotas(const Shared &s, Block &b) {
    sync_blocks();
    u32 *quotas = s.quotas + TAKEN * ENTRIES;
    if (block() > 0) {
#pragma unroll 1
        for (u32 rank = threadIdx.x; rank < ENTRIES; rank += blockDim.x) quotas[rank] = read_block(quotas + rank, 0);
        if (threadIdx.x == 0) {
            b.source = read_block(&b.source, 0);
            b.open[TAKEN] = Open{read_block(&b.open[TAKEN].home, 0), read_block(&b.open[TAKEN].most, 0)};
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void start(const Args &args, const Shared &s, Block &b) {
    if (args.posts_experts) clear(s.counts, args.experts);
    clear(s.loads, 2 * ENTRIES);
    if (threadIdx.x < ROUNDS) b.most[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        b.tokens = 0;
        b.source = PLANNED;
        b.granted_before = 0;
        if (args.mode == LIVE) {
            b.sequence = next_sequence(args.state->last);
            b.failures = args.state->failures;
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) expand_topk(const __grid_constant__ Args args) {
    Shared s = shared_arrays(args);
    Block &b = *s.block;
    Rows rows(args);
    Slots slots = load_slots(rows, 0);
    start(args, s, b);
    rows.pad(args);
    __syncthreads();

    count_slots(args, s, rows, slots, 0);
#pragma unroll 1
    for (u32 base = BATCH * blockDim.x; base < rows.slots; base += BATCH * blockDim.x) {
        Slots more = load_slots(rows, base);
        count_slots(args, s, rows, more, base);
        if (args.mode != COUNT) write_slots(s, rows, more, base);
    }
    __syncthreads();
    bool plans = warp() == warps() - 1;
    Entries bases;
    u32 sum = 0;
    // With one block its loads are all, and visits need not be awaited.
    if (!CLUSTERED && plans) sum = estimate(args, s, bases);
    count_tokens(s, b, rows.count);
    gather(s, b);

    if (block() == 0) post_counts(args, s, b);
    if (args.mode == COUNT) {
        leave_blocks();
        return end_blocks();
    }

    // While one warp plans and another waits, the others write; these two have the fewest rows, or none.
    if (CLUSTERED && plans) sum = estimate(args, s, bases);
    if (plans) plan_own(args, s, b, bases, sum);
    if (warp() == warps() - 2 && (args.mode == GIVEN || (args.mode == LIVE && block() == 0))) take_quotas(args, s, b);
    write_slots(s, rows, slots, 0);
    if (CLUSTERED && args.mode == LIVE) share_quotas(s, b);
    else __syncthreads();

    u32 *left = s.quotas + b.source * ENTRIES;
    Open open = b.open[b.source];
    bool anywhere = run_rounds(args, s, b, left, open.most, rows.first, rows.count);
    leave_blocks();
    place_rest(args, s, b, rows, open.home, anywhere);
    end_blocks();
}
