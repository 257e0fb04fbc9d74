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
    if (args.mode == OWN || (args.mode == LIVE && block() > 0)) return;
    Quotas &quotas = s.quotas[TAKEN];
    u32 outcome = TALLY_TORN;
    if (args.mode == LIVE) {
        outcome = wait(args, quotas.left, b);
    } else {
        u64 sum = 0;
#pragma unroll 1
        for (u32 rank = lane(); rank < RANKS; rank += WARP) {
            quotas.left[rank] = args.quotas[rank];
            sum += quotas.left[rank];
        }
        if (warp_sum_long(sum) == all_tokens(b)) outcome = TALLY_LIVE;
    }
    if (outcome == TALLY_LIVE) open_quotas(args, quotas);
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
    if (block() > 0) {
        u32 *words = (u32 *)(s.quotas + TAKEN);
#pragma unroll 1
        for (u32 i = threadIdx.x; i < sizeof(Quotas) / sizeof(u32); i += blockDim.x) words[i] = read_block(words + i, 0);
        if (threadIdx.x == 0) b.source = read_block(&b.source, 0);
    }
    __syncthreads();
}

__device__ __forceinline__ void start(const Args &args, Block &b) {
    uint4 *zeros = (uint4 *)shared_memory();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < args.cleared_bytes / sizeof(uint4); i += blockDim.x) zeros[i] = uint4{0, 0, 0, 0};
    // These are in what the same thread cleared; the first block alone posts and waits.
    if (threadIdx.x == 0 && block() == 0 && args.mode == LIVE) {
        b.sequence = next_sequence(args.state->last);
        b.failures = args.state->failures;
    }
}

extern "C" __global__ void __launch_bounds__(1024) expand_topk(const __grid_constant__ Args args) {
    if (CLUSTERED && blockIdx.x >= blocks()) return write_part(args, blockIdx.x - blocks());
    Shared s = shared_arrays(args);
    Block &b = *s.block;
    Rows rows(args, block());
    Ids ids;
    ids.load(rows, threadIdx.x);
    start(args, b);
    u32 inverse = lane_inverse();
    rows.pad(args);
    __syncthreads();

#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows.count; base += blockDim.x) {
        if (base >= blockDim.x) ids.load(rows, base + lane());
        count_tokens(args, s, b, rows, base + lane(), ids);
    }
    gather(s, b);

    if (block() == 0) post_counts(args, s, b);
    if (args.mode == COUNT) {
        leave_blocks();
        return end_blocks();
    }

    // While one warp plans and another waits, the others write.
    if (warp() == warps() - 1) plan_own(args, s, b, inverse);
    else if (warp() == warps() - 2) take_quotas(args, s, b);
    else if (args.writers == 0) write_routed(args, rows, threadIdx.x, blockDim.x - 2 * WARP);
    if (CLUSTERED && args.mode == LIVE) share_quotas(s, b);
    else __syncthreads();

    Quotas &quotas = s.quotas[b.source];
    u32 most, last = run_rounds(args, s, b, quotas, rows, most);
    leave_blocks();
    place_rest(args, s, b, quotas, rows, last, most > 0);
    end_blocks();
}
