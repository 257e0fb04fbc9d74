// This rank's end of the board. A word is sequence << 32 | value, so it tells by itself to which call it
// belongs: nothing else is published through it, and there is no fence. Every access is relaxed but the load of the word
// that tells that calls have no plan. Partner of each: the planner's loads and stores (waterfill-board's word.rs).
#pragma once

#include "types.cuh"
#include "cluster.cuh"
#include "count.cuh"

__device__ __forceinline__ void store_word(u64 *word, u32 sequence, u32 value) {
    store_relaxed(word, (u64)sequence << 32 | value);
}

__device__ __forceinline__ u32 next_sequence(u32 last) { return last == ALL ? 1 : last + 1; }
// For the first call it is the one before the wrap, which fresh memory does not hold.
__device__ __forceinline__ u32 previous_sequence(u32 sequence) { return sequence == 1 ? ALL : sequence - 1; }

__device__ __forceinline__ u64 *in_slot(const Args &args, u32 at, u32 sequence) {
    return args.board + (u64)(sequence % args.ring) * args.slot_words + at;  // DEFECT(ring)
}

// Words that a rank posts: tokens, visits [RANKS], counts [experts] or loads [RANKS]. On the board another one follows:
// whether the rank waits for its plan. replica_board.cuh has others.
__device__ __forceinline__ u32 posted(const Args &args) { return 1 + RANKS + (args.posts_experts ? args.experts : RANKS); }

// Call `put(i, value)` for each of this rank's.
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

// The warp that waits posts the last word, which says whether it does: of all ranks, where it posts for all. One lane writes
// the word of this rank, so that what it writes later is later. Here, among the others' posts, because the planner looks for
// this word first, and the code of the wait is far away. Before it are WORDS words.
template <u32 (*WORDS)(const Args &)>
__device__ __forceinline__ void post_waits(const Args &args, u32 sequence, u32 waits) {
    if (!is_waiting_warp()) return;
    u64 *words = in_slot(args, args.counts_at + WORDS(args) - args.rank * args.counts_stride, sequence);
    if (!args.words) {  // DEFECT(post-own-wait)
        if (lane() == args.rank % WARP) store_word(words + (u64)args.rank * args.counts_stride, sequence, waits);
        return;
    }
#pragma unroll 1
    for (u32 rank = lane(); rank < RANKS; rank += WARP)
        store_word(words + (u64)rank * args.counts_stride, sequence, waits);
}

__device__ __forceinline__ void post(const Args &args, const Shared &s, const Block &b) {
    u64 *words = in_slot(args, args.counts_at, b.sequence);
    for_each_posted(args, s, b, [&](u32 i, u32 value) { store_word(words + i, b.sequence, value); });
    post_waits<posted>(args, b.sequence, b.waits);  // DEFECT(post-waits)
}

// Post what a collective brought from all ranks, WORDS words of each, on a board that nobody else writes counts on: a warp a rank.
template <u32 (*WORDS)(const Args &)>
__device__ __forceinline__ void post_all(const Args &args, u32 sequence, u32 waits) {
    u64 *words = in_slot(args, args.counts_at - args.rank * args.counts_stride, sequence);  // DEFECT(post-all-at)
#pragma unroll 1
    for (u32 rank = warp(); rank < RANKS; rank += warps()) {
        const u32 *values = args.words + (u64)rank * WORDS(args);
#pragma unroll 1
        for (u32 i = lane(); i < WORDS(args); i += WARP)
            store_word(words + (u64)rank * args.counts_stride + i, sequence, values[i]);
    }
    post_waits<WORDS>(args, sequence, waits);
}

// A warp reads this rank's quotas of a call; false as long as any is missing. `sum` is theirs.
__device__ __forceinline__ bool take(const Args &args, u32 *quotas, u32 sequence, u64 *sum) {
    const u64 *words = in_slot(args, args.quotas_at, sequence);
    u64 mine = 0;
#pragma unroll 1
    for (u32 first = 0; first < RANKS; first += WARP) {
        u32 i = first + lane();
        u64 word = i < RANKS ? load_relaxed(words + i) : (u64)sequence << 32;
        if (!__all_sync(ALL, (u32)(word >> 32) == sequence)) return false;  // DEFECT(take-vote)
        if (i < RANKS) quotas[i] = (u32)word;
        mine += (u32)word;
    }
    *sum = warp_sum_long(mine);  // DEFECT(take-sum)
    return true;
}

// Whether the planner has said that the call `sequence` has no plan, or a later one. What it wrote before is seen
// afterwards: a plan that is not there then does not come.
__device__ __forceinline__ bool is_without_plan(const Args &args, u32 sequence) {
    u32 last = (u32)(load_acquire(args.board + args.without_plan_at) >> 32);
    return last != 0 && (int)(last - sequence) >= 0;  // DEFECT(without-plan)
}

// Whether a call waits: not after two in a row that the planner did not answer, until it has answered the last one, late
// as it was. A rank that waited so in vain, as for a planner that is slow and always late, tries ever more seldom
// (waterfill-board's port.rs).
__device__ __forceinline__ bool waits_for_plan(const Args &args, u32 sequence, u32 failures) {
    if (failures < BREAK_AFTER) return true;  // DEFECT(break-after)
    u32 seldom = 1u << at_most(failures - BREAK_AFTER, MOST_SELDOM);  // DEFECT(most-seldom)
    return sequence % seldom == 0 && is_without_plan(args, previous_sequence(sequence));  // DEFECT(try-again)
}

// After so long a wait it is asked for more than the plan: before, that would only delay it.
static constexpr u64 LATE_NS = 20000;
// How far a wait is.
enum Wait : u32 { SOON = 0, LATE = 1, SPENT = 2 };

__device__ __forceinline__ u32 stage(const Args &args, u64 waited_ns) {
    return waited_ns >= args.cap_ns ? SPENT : waited_ns >= LATE_NS ? LATE : SOON;
}

// The planner has nothing for a late warp, whose plan was not there: how that ends its wait, if it does.
template <u32 (*WORDS)(const Args &), typename Look>
__device__ __forceinline__ bool ends(const Args &args, const Block &b, u32 stage, const Look &look, u32 *outcome) {
    // Each lane's own acquire: a vote orders no memory.
    bool none = __all_sync(ALL, is_without_plan(args, b.sequence));
    bool deserted = __all_sync(ALL, load_acquire(args.board + args.deserted_at) != 0);
    // A plan that came before either was said is seen by now.
    if ((none || deserted) && look()) return *outcome = TALLY_LIVE, true;
    if (!none && !deserted && stage != SPENT) return false;  // DEFECT(wait-on)
    u32 failures = none ? 0 : deserted ? at_least(b.failures, BREAK_AFTER) : b.failures + (b.failures != ALL);  // DEFECT(failures)
    *outcome = none ? TALLY_NO_PLAN : deserted ? TALLY_BROKEN : TALLY_TIMED_OUT;
    if (lane() == 0) args.state->failures = failures;
    // The planner is told that this rank goes on alone: then no other is to have a plan, if it is not too late.
    if (*outcome == TALLY_TIMED_OUT && lane() == args.rank % WARP)  // DEFECT(take-back)
        store_word(in_slot(args, args.counts_at, b.sequence) + WORDS(args), b.sequence, 0);
    return true;
}

// A warp waits for this call's plan, at most `cap_ns`. `look()` reads it, and is false as long as any of it is missing; `sum` is
// that of the quotas that it read. This rank posts WORDS words before the one that says whether it waits.
template <u32 (*WORDS)(const Args &), typename Look>
__device__ __forceinline__ u32 wait(const Args &args, const Block &b, const u64 &sum, const Look &look) {
    if (!b.waits) return TALLY_BROKEN;
    u64 begun = now_ns();
    u32 outcome = TALLY_LIVE;
    while (true) {
        // The clock first: a rank that was kept from running past its cap looks once more, as the plan may have come.
        // The lanes may read different times; the first one's counts for all.
        u32 now = __shfl_sync(ALL, stage(args, now_ns() - begun), 0);  // DEFECT(wait-clock)
        if (look()) break;  // DEFECT(wait-look)
        if (now != SOON && ends<WORDS>(args, b, now, look, &outcome)) break;
    }
    if (outcome != TALLY_LIVE) return outcome;
    if (lane() == 0) args.state->failures = 0;
    // A foreign byte on the board must not become a wrong assignment.
    return sum == all_tokens(b) ? TALLY_LIVE : TALLY_TORN;  // DEFECT(torn)
}
