// One launch a call: count, post, wait for the plan (or plan from own counts), assign, expand. Where a collective
// brings the counts it is two, with the collective between them: the first one only counts.

// Sum the blocks' counts into the first one's.
__device__ __forceinline__ void gather(const Args &args, const Shared &s, Block &b) {
    sync_blocks();
    u32 words = args.experts + 2 * (args.ranks + 1);
    if (block() == 0) {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < words; i += blockDim.x) {
            u32 j = i - args.experts;
            u32 *word = i < args.experts ? s.counts + i : s.loads + j;
            *word = sum_blocks(word);
        }
        if (threadIdx.x == 0) b.tokens = sum_blocks(&b.tokens);
    }
    __syncthreads();
}

// The first warp of the first block gets quotas into `taken`, if any but own ones are to be had.
__device__ __forceinline__ void get_quotas(const Args &args, const Shared &s, Block &b) {
    u32 outcome = TALLY_TORN;
    if (args.mode == LIVE) {
        outcome = wait(args, s, b.tokens, b.sequence, b.failures);
    } else {
        u64 sum = 0;
#pragma unroll 1
        for (u32 i = lane(); i < args.ranks; i += WARP) {
            s.taken[i] = args.quotas[i];
            sum += s.taken[i];
        }
        for (u32 step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
        if (sum == b.tokens) outcome = TALLY_LIVE;
    }
    if (lane() == 0) {
        b.live = outcome == TALLY_LIVE;
        u64 calls = args.state->tally[outcome] + 1;
        args.state->tally[outcome] = calls;
        if (args.mode == LIVE) {
            args.state->last = b.sequence;
            // Relaxed: a count that nobody decides by, for those who look from outside (waterfill-board's tally.rs).
            asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(args.board + args.tally_at + outcome), "l"(calls) : "memory");
        }
    }
}

// Quotas, agreed on by all blocks, and the most of them that is not at home.
__device__ __forceinline__ void open_quotas(const Args &args, const Shared &s, Block &b) {
    sync_blocks();
    const u32 *quotas = read_block(&b.live, 0) ? s.taken : s.own;
#pragma unroll 1
    for (u32 first = warp() * WARP; first <= args.ranks; first += blockDim.x) {
        u32 rank = first + lane();
        u32 quota = rank < args.ranks ? read_block(quotas + rank, 0) : 0;
        if (rank == args.rank) {
            b.home = quota;
            quota = 0;
        }
        if (rank <= args.ranks) s.left[rank] = quota;
        u32 most = warp_max(quota);
        if (lane() == 0) atomicMax(&b.most[0], most);
    }
    __syncthreads();
}

__device__ __forceinline__ void post_counts(const Args &args, const Shared &s, const Block &b) {
    if (args.mode == COUNT) {
        for_each_posted(args, s, b.tokens, [&](u32 i, u32 value) { args.words[i] = value; });
    } else if (args.mode == LIVE && args.words) {
        post_all(args, b.sequence);
    } else if (args.mode == LIVE) {
        post(args, s, b.tokens, b.sequence);
    }
}

// Nobody leaves while its shared memory is read.
__device__ __forceinline__ void leave() {
    if (CLUSTERED) sync_blocks();
}

extern "C" __global__ void __launch_bounds__(1024) expand_topk(const __grid_constant__ Args args) {
    __shared__ Block b;
    Shared s = shared_arrays(args);
    u32 first = at_most(block() * args.rows_per_block, args.rows);
    u32 rows = at_most(args.rows_per_block, args.rows - first);
    Slots slots = load_slots(args, first, rows, 0);
    clear(s.counts, args.experts);
    clear(s.loads, 2 * (args.ranks + 1));
    if (threadIdx.x < ROUNDS + 1) b.most[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        b.tokens = 0;
        b.live = 0;
        if (args.mode == LIVE) {
            b.sequence = next_sequence(args.state->last);
            b.failures = args.state->failures;
        }
    }
    u32 unpadded = ALL;
    if (args.unpadded) unpadded = (u32)(*args.unpadded < 0 ? 0 : *args.unpadded);
    __syncthreads();

#pragma unroll 1
    for (u32 base = 0; base < rows * TOP_K; base += BATCH * blockDim.x) {
        if (base > 0) slots = load_slots(args, first, rows, base);
        take_slots(args, s, first, rows, unpadded, slots, base);
    }
    __syncthreads();
    count_tokens(args, s, b, rows);
    add_loads(args, s);
    if (CLUSTERED) gather(args, s, b);
    else __syncthreads();

    if (block() == 0) post_counts(args, s, b);
    if (args.mode == COUNT) return leave();
    if (block() == 0 && warp() == 0 && args.mode != OWN) get_quotas(args, s, b);
    if (block() == 0 && warp() == 1) plan_own(args, s, b.tokens);
    open_quotas(args, s, b);

    bool anywhere = run_rounds(args, s, b, first, rows);
    place_rest(args, s, b, first, rows, anywhere);
    leave();
}
