// One launch a call: count, post, wait for the plan (or plan from own counts), assign, expand. Where a collective
// brings the counts it is two, with the collective between them: the first one only counts.
//
// In all files, `// DEFECT(name)` marks a line in which tests/emulated/defects.rs plants a defect, to see that the tests notice it.

#include "types.cuh"
#include "cluster.cuh"
#include "count.cuh"
#include "own.cuh"
#include "board.cuh"
#include "assign.cuh"

// What others are to know of this call, by the first block.
__device__ __forceinline__ void post_counts(const Args &args, const Shared &s, const Block &b) {
    if (mode_of(args) == COUNT) {
        for_each_posted(args, s, b, [&](u32 i, u32 value) { args.words[i] = value; });
    } else if (mode_of(args) == LIVE && args.words) {
        post_all<posted>(args, b.sequence, b.waits);
    } else if (mode_of(args) == LIVE) {
        post(args, s, b);
    }
}

// One warp opens quotas from the board, or given ones, if any are to be had; each block's its own given ones.
__device__ __forceinline__ void take_quotas(const Args &args, const Shared &s, Block &b) {
    if (mode_of(args) == OWN || (mode_of(args) == LIVE && block() > 0)) return;
    Quotas &quotas = s.quotas[TAKEN];
    u32 outcome = TALLY_TORN;
    u64 sum = 0;
    if (mode_of(args) == LIVE) {
        outcome = wait<posted>(args, b, sum, [&] { return take(args, quotas.left, b.sequence, &sum); });
    } else {
#pragma unroll 1
        for (u32 rank = lane(); rank < RANKS; rank += WARP) {
            quotas.left[rank] = args.quotas[rank];
            sum += quotas.left[rank];
        }
        if (warp_sum_long(sum) == all_tokens(b)) outcome = TALLY_LIVE;
    }
    if (outcome == TALLY_LIVE) open_quotas(args, quotas);
    if (lane() > 0) return;
    b.quota_set = outcome == TALLY_LIVE ? TAKEN : PLANNED;
    if (block() > 0) return;
    u64 calls = args.state->tally[outcome] + 1;
    args.state->tally[outcome] = calls;
    if (mode_of(args) == LIVE) {
        args.state->last = b.sequence;
        // Relaxed: a count that nobody decides by, for those who look from outside (waterfill-board's tally.rs).
        store_relaxed(args.board + args.tally_at + outcome, calls);
    }
}

// What the first block took from the board, for the others.
__device__ __forceinline__ void share_quotas(const Shared &s, Block &b) {
    sync_blocks();  // DEFECT(share-sync)
    if (block() > 0) {
        u32 *words = (u32 *)(s.quotas + TAKEN);
#pragma unroll 1
        for (u32 i = threadIdx.x; i < sizeof(Quotas) / sizeof(u32); i += blockDim.x) words[i] = read_block(words + i, 0);
        if (threadIdx.x == 0) b.quota_set = read_block(&b.quota_set, 0);
    }
    __syncthreads();  // DEFECT(share-barrier)
}

__device__ __forceinline__ void clear(const Args &args) {
    uint4 *zeros = (uint4 *)shared_memory();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < args.cleared_bytes / sizeof(uint4); i += blockDim.x) zeros[i] = uint4{0, 0, 0, 0};  // DEFECT(clear-bytes)
}

// The sequence number of this call, and whether it waits. Only the first block needs them: it alone posts and waits.
// Read by the last thread, whose warp usually has no rows, and only after the clear. An earlier load would share one of a warp's six
// scoreboards with the loads of the ids, so every warp would stall on its ids before clearing, even in modes that read nothing here.
__device__ __forceinline__ void number_call(const Args &args, Block &b) {
    if (threadIdx.x < blockDim.x - 1 || block() > 0 || mode_of(args) != LIVE) return;
    b.sequence = next_sequence(args.state->last);
    b.failures = args.state->failures;
    b.waits = waits_for_plan(args, b.sequence, b.failures);
}

// What a block of the first cluster does, or the one block.
__device__ __forceinline__ void expand(const Args &args) {
    Shared s = shared_arrays(args);
    Block &b = *s.block;
    Rows rows(args, block());
    Ids ids;
    ids.load(rows, threadIdx.x);
    clear(args);
    u32 inverse = lane_inverse();
    rows.pad(args);
    __syncthreads();  // DEFECT(clear-barrier)
    number_call(args, b);

#pragma unroll 1
    for (u32 base = warp() * WARP; base < rows.count; base += blockDim.x) {
        if (base >= blockDim.x) ids.load(rows, base + lane());
        count_tokens(args, s, b, rows, base + lane(), ids);
    }
    gather(s, b);

    if (block() == 0) post_counts(args, s, b);
    if (mode_of(args) == COUNT) {
        leave_blocks();
        return end_blocks();
    }

    // While one warp plans and another waits, the others write. The plan is last here because the compiler then puts its
    // instructions right behind the barrier: all wait for that warp, and it jumps over nothing.
    if (warp() < warps() - 2) {
        if (args.writers == 0) write_routed(args, rows, threadIdx.x, blockDim.x - 2 * WARP);
    } else if (is_waiting_warp()) {
        take_quotas(args, s, b);
    } else {
        plan_own(args, s, b, inverse);
    }
    if (CLUSTERED && mode_of(args) == LIVE) share_quotas(s, b);
    else __syncthreads();  // DEFECT(plan-barrier)

    Quotas &quotas = s.quotas[b.quota_set];
    u32 most, last = run_rounds(args, s, b, quotas, rows, most);
    leave_blocks();  // DEFECT(leave)
    place_rest(args, s, b, quotas, rows, last, most > 0);
    end_blocks();  // DEFECT(end)
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS) expand_topk(const __grid_constant__ Args args) {
    if (!CLUSTERED || blockIdx.x < blocks()) expand(args);  // DEFECT(first-cluster)
    // The blocks behind. A loop, though it runs once: the compiler puts a branch's instructions in front of all that the
    // others run.
#pragma unroll 1
    for (u32 writer = blockIdx.x - blocks(); CLUSTERED && writer < args.writers; writer += args.writers) write_part(args, writer);  // DEFECT(writers)
}
