// This rank's end of the board. A word is sequence << 32 | value, so it tells by itself to which call it
// belongs: nothing else is published through it, every access is relaxed, and there is no fence. Partner of
// each: the planner's relaxed loads and stores (waterfill-board's word.rs).

__device__ __forceinline__ void store_word(u64 *word, u32 sequence, u32 value) {
    store_relaxed(word, (u64)sequence << 32 | value);
}

static constexpr u32 BREAK_AFTER = 2;
static constexpr u32 MOST_SELDOM = 6;

__device__ __forceinline__ u32 next_sequence(u32 last) { return last == ALL ? 1 : last + 1; }
// For the first call it is the one before the wrap, which fresh memory does not hold.
__device__ __forceinline__ u32 previous_sequence(u32 sequence) { return sequence == 1 ? ALL : sequence - 1; }

__device__ __forceinline__ u64 *in_slot(const Args &args, u32 at, u32 sequence) {
    return args.board + (u64)(sequence % args.ring) * args.slot_words + at;
}

// Words that a rank posts: tokens, visits [RANKS], counts [experts] or loads [RANKS].
__device__ __forceinline__ u32 posted(const Args &args) { return 1 + RANKS + (args.posts_experts ? args.experts : RANKS); }

// Call `put(i, value)` for each of this rank's, the last word last, which the planner reads first.
template <typename Put>
__device__ __forceinline__ void for_each_posted(const Args &args, const Shared &s, const Block &b, Put put) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < posted(args); i += blockDim.x) {
        u32 value;
        if (i == 0) value = all_tokens(b);
        else if (i <= RANKS) value = s.all_visits[i - 1];
        else if (args.posts_experts) value = sum_blocks(s.counts + i - 1 - RANKS);
        else value = s.all_loads[i - 1 - RANKS];
        put(i, value);
    }
}

__device__ __forceinline__ void post(const Args &args, const Shared &s, const Block &b) {
    u64 *words = in_slot(args, args.counts_at, b.sequence);
    for_each_posted(args, s, b, [&](u32 i, u32 value) { store_word(words + i, b.sequence, value); });
}

// Post what a collective brought from all ranks, on a board that nobody else writes counts on: a warp a rank.
__device__ __forceinline__ void post_all(const Args &args, u32 sequence) {
    u64 *words = in_slot(args, args.counts_at - args.rank * args.counts_stride, sequence);
#pragma unroll 1
    for (u32 rank = warp(); rank < RANKS; rank += warps()) {
        const u32 *values = args.words + (u64)rank * posted(args);
#pragma unroll 1
        for (u32 i = lane(); i < posted(args); i += WARP)
            store_word(words + (u64)rank * args.counts_stride + i, sequence, values[i]);
    }
}

// A warp reads this rank's quotas of a call; false as long as any is missing. `sum` is theirs.
__device__ __forceinline__ bool take(const Args &args, u32 *quotas, u32 sequence, u64 *sum) {
    const u64 *words = in_slot(args, args.quotas_at, sequence);
    u64 mine = 0;
#pragma unroll 1
    for (u32 first = 0; first < RANKS; first += WARP) {
        u32 i = first + lane();
        u64 word = i < RANKS ? load_relaxed(words + i) : (u64)sequence << 32;
        if (!__all_sync(ALL, (u32)(word >> 32) == sequence)) return false;
        if (i < RANKS) quotas[i] = (u32)word;
        mine += (u32)word;
    }
    *sum = warp_sum_long(mine);
    return true;
}

// Whether a broken rank waits again: once the plan of its last call did come, late as it was. One that waited so in
// vain, as for a planner that is slow and always late, tries ever more seldom (waterfill-board's port.rs).
__device__ __forceinline__ bool tries_again(const Args &args, u32 *quotas, u32 sequence, u32 failures) {
    u32 seldom = 1u << at_most(failures - BREAK_AFTER, MOST_SELDOM);
    u64 sum = 0;
    return sequence % seldom == 0 && take(args, quotas, previous_sequence(sequence), &sum);
}

// A warp waits for this call's quotas, at most `cap_ns`; `quotas` has them if the outcome is TALLY_LIVE.
__device__ __forceinline__ u32 wait(const Args &args, u32 *quotas, const Block &b) {
    u32 sequence = b.sequence, failures = b.failures;
    if (failures >= BREAK_AFTER && !tries_again(args, quotas, sequence, failures)) return TALLY_BROKEN;
    u64 begun = now_ns(), sum = 0;
    while (true) {
        // The clock first: a rank that was kept from running past its cap looks once more, as the plan may have come.
        // The lanes may read different times; the first one's counts for all.
        u32 spent = __shfl_sync(ALL, (u32)(now_ns() - begun >= args.cap_ns), 0);
        if (take(args, quotas, sequence, &sum)) break;
        if (spent) {
            if (lane() == 0) args.state->failures = failures + (failures != ALL);
            return TALLY_TIMED_OUT;
        }
    }
    if (lane() == 0) args.state->failures = 0;
    // A foreign byte on the board must not become a wrong assignment.
    return sum == all_tokens(b) ? TALLY_LIVE : TALLY_TORN;
}
