// A replica for each routed row of a replicated expert, as the plan says: waterfill_core's replicas.rs, for all rows at once.
//
// One launch a call, as in expand.cu: count, post, wait for the plan, and write the ids with replicas chosen. Another kernel
// beside `expand_topk`, in the modules of shapes with redundant experts that are not for own counts alone. Where the shared rows
// are routed, `expand_topk` follows, and has the quotas that this one found on the board as given ones.
//
// A job is a replicated expert, a slot one of its replicas. A job's rows are numbered by groups of 32 rows, which are those of a
// warp, then by column, then by row. Number n goes to the first slot whose sum of quotas is above n. Nothing on the board or in
// the table can change which logical expert computes a row, where the server's own map is given.

#include "expand.cu"
#include "replica_board.cuh"

__device__ __forceinline__ Replicas &replicas() { return *(Replicas *)(shared_memory() + REPLICAS_BYTES); }

// The ids of a row, and what becomes of them.
struct Choice {
    Ids ids;
    u32 job[TOP_K];     // NO_JOB where nothing is to be chosen.
    u32 number[TOP_K];  // Of the job's rows.
};

__device__ __forceinline__ bool is_aligned(const void *at) { return ((u64)at & (sizeof(uint4) - 1)) == 0; }

// As `Ids::load`, by 16 bytes where rows are aligned so: one by one, the ids of a warp touch the same lines eight times.
__device__ __forceinline__ void load_ids(const Rows &rows, u32 row, Ids &ids) {
    static constexpr u32 EACH = sizeof(uint4) / sizeof(ID);
    if (TOP_K % EACH != 0 || !is_aligned(rows.ids) || row >= rows.count) return ids.load(rows, row);  // DEFECT(ids-aligned)
    uint4 four[TOP_K / EACH + 1];
#pragma unroll
    for (u32 i = 0; i < TOP_K / EACH; ++i) four[i] = ((const uint4 *)(rows.ids + row * TOP_K))[i];
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        u32 words[] = {four[k / EACH].x, four[k / EACH].y, four[k / EACH].z, four[k / EACH].w};
        u32 at = k % EACH * (4 / EACH);
        ids.id[k] = EACH == 4 ? (ID)words[at] : (ID)((u64)words[(at + 1) % 4] << 32 | words[at]);  // DEFECT(ids-words)
    }
}

// Whether an id names an expert. In padding none does.
__device__ __forceinline__ bool is_expert(const ReplicaArgs &replica, const Rows &rows, u32 row, ID id) {
    return row < rows.unpadded && (UNSIGNED_ID)id < replica.args.experts;  // DEFECT(choose-expert)
}

__device__ __forceinline__ void find_jobs(const ReplicaArgs &replica, const Table &table, const Rows &rows, u32 row, Choice &choice) {
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        ID id = choice.ids.id[k];
        choice.job[k] = is_expert(replica, rows, row, id) ? table.job_of((u32)id) : NO_JOB;
    }
}

// A warp counts its 32 rows: by expert, and where their shared rows are routed tokens and visits too.
__device__ __forceinline__ void count_rows(const ReplicaArgs &replica, const Shared &s, Block &b, const Rows &rows, u32 row,
                                           const Choice &choice) {
    const Args &args = replica.args;
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        ID id = choice.ids.id[k];
        atomicAdd(&s.counts[is_expert(replica, rows, row, id) ? (u32)id : args.experts], 1u);  // DEFECT(choose-counts)
    }
    if (replica.moved) return;  // DEFECT(choose-overlapped)
    Visits visits;
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        ID id = choice.ids.id[k];
        u32 rank = is_expert(replica, rows, row, id) ? rank_of_expert(id, args.rank_multiplier) : NO_RANK;
        atomicAdd(&s.visits[visits.add(k, rank) ? rank : NO_RANK], 1u);
    }
    u32 tokens = __popc(__ballot_sync(ALL, visits.any()));
    if (lane() == 0) atomicAdd(&b.tokens, tokens);  // DEFECT(choose-tokens)
}

// What the first block posts, from the rows of each expert: those of each job, and by rank those of experts without one, with a bit
// for each that has any. A thread an expert.
__device__ __forceinline__ void sum_experts(const Args &args, const Table &table, const Shared &s, Replicas &r) {
#pragma unroll 1
    for (u32 first = warp() * WARP; first < args.experts; first += blockDim.x) {
        u32 expert = first + lane(), last = at_most(first + WARP, args.experts) - 1;
        u32 rows = expert <= last ? sum_blocks(s.counts + expert) : 0, job = expert <= last ? table.job_of(expert) : NO_JOB;
        u32 others = job == NO_JOB ? rows : 0;  // DEFECT(sum-others)
        u32 bits = __ballot_sync(ALL, others > 0);  // DEFECT(sum-active)
        if (lane() == 0) active_words(args, s)[first / WARP] = bits;
        if (job != NO_JOB) atomicAdd(&r.all_rows[job], rows);  // DEFECT(sum-jobs)
        // A warp's experts are mostly of one or two ranks, and additions to one word would wait for each other.
        u32 rank = rank_of_expert((ID)expert, args.rank_multiplier);
        u32 end = rank_of_expert((ID)last, args.rank_multiplier);
#pragma unroll 1
        for (u32 of = rank_of_expert((ID)first, args.rank_multiplier); of <= end; ++of) {
            u32 load = warp_sum(rank == of ? others : 0);  // DEFECT(sum-rank)
            if (lane() == 0) atomicAdd(&s.all_loads[of], load);  // DEFECT(sum-loads)
        }
    }
    __syncthreads();  // DEFECT(sum-barrier)
}

// The word at `i` of those that a rank posts.
__device__ __forceinline__ u32 posted_word(const Args &args, const Table &table, const Shared &s, const Block &b,
                                           const Replicas &r, u32 i) {
    if (i == 0) return all_tokens(b);
    if (i < LOADS_AT) return s.all_visits[i - VISITS_AT];
    if (i < JOBS_AT) return s.all_loads[i - LOADS_AT];
    if (i < ACTIVE_AT) return r.all_rows[i - JOBS_AT];
    return i + 1 < replica_posted(args) ? active_words(args, s)[i - ACTIVE_AT] : table.fingerprint;  // DEFECT(fingerprint)
}

// What others are to know of this call, by the first block, all threads of it: `post_counts`, where experts are redundant.
__device__ __forceinline__ void post_replicas(const Args &args, const Table &table, const Shared &s, const Block &b,
                                              Replicas &r) {
    u32 count = replica_posted(args);
    bool posts_all = mode_of(args) == LIVE && args.words;
    if (posts_all) post_all<replica_posted>(args, b.sequence, b.waits);
    // Before the barrier: a slot is found by a division.
    u32 sequence = b.sequence, waits = b.waits;
    u64 *words = mode_of(args) == LIVE ? in_slot(args, args.counts_at, sequence) : nullptr;
    sum_experts(args, table, s, r);
    if (posts_all) return;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        u32 value = posted_word(args, table, s, b, r, i);
        if (mode_of(args) == COUNT) args.words[i] = value;
        else store_word(words + i, sequence, value);
    }
    // As `post_waits`.
    if (mode_of(args) == LIVE && is_waiting_warp() && lane() == args.rank % WARP)
        store_word(words + count, sequence, waits);  // DEFECT(replica-post-waits)
}

// Rows of each job, by warp's rows: [rows_per_block / WARP, REDUNDANT].
__device__ __forceinline__ u32 *column_of(const ReplicaArgs &replica, u32 base) {
    return (u32 *)(shared_memory() + replica.columns_bytes) + base / WARP * REDUNDANT;
}

__device__ __forceinline__ void count_jobs(const ReplicaArgs &replica, Replicas &r, u32 base, const Choice &choice) {
    u32 *column = column_of(replica, base);
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        if (choice.job[k] == NO_JOB) continue;
        atomicAdd(&column[choice.job[k]], 1u);  // DEFECT(job-columns)
        if (CLUSTERED) atomicAdd(&r.rows[choice.job[k]], 1u);  // DEFECT(job-rows)
    }
}

// What is known of each slot before the plan is. One that names no expert is chosen for none.
__device__ __forceinline__ void find_slots(const Table &table, Replicas &r) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < SLOTS; i += blockDim.x) {
        u32 expert = table.replica(i);
        if (i <= REDUNDANT) {
            r.first[i] = at_most(table.first(i), SLOTS);  // DEFECT(table-first)
            r.open[i] = SLOTS;  // DEFECT(slots-closed)
        }
        r.replica[i] = expert;
        r.logical[i] = expert < table.experts ? table.logical_of(expert) : NO_LOGICAL;  // DEFECT(table-replica)
    }
}

// Rows of each job in the blocks before this one. All threads call it, and see all of it afterwards.
__device__ __forceinline__ void gather_jobs(const Table &table, Replicas &r) {
    sync_blocks();  // DEFECT(jobs-sync)
#if CLUSTERED
    static constexpr u32 AT_ONCE = 8;
#pragma unroll 1
    for (u32 job = threadIdx.x; job < table.jobs; job += blockDim.x) {
        u32 before = 0;
#pragma unroll 1
        for (u32 first = 0; first < block(); first += AT_ONCE) {
            u32 rows[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; ++j) rows[j] = first + j < block() ? read_block(r.rows + job, first + j) : 0;  // DEFECT(jobs-before)
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; ++j) before += rows[j];
        }
        r.before[job] = before;
    }
    __syncthreads();  // DEFECT(jobs-barrier)
#endif
}

// A warp numbers the slots of its 32 rows; `next` [REDUNDANT] is its own. A job's first lane in a column counts on for all of
// them. No lane waits for a column's count before the next column's: they are additions, one after the other.
__device__ __forceinline__ void number_rows(const ReplicaArgs &replica, const Table &table, const Replicas &r, u32 base, Choice &choice) {
    u32 *next = (u32 *)(shared_memory() + replica.next_bytes) + warp() * REDUNDANT;
#pragma unroll 1
    for (u32 job = lane(); job < table.jobs; job += WARP) {
        u32 before = CLUSTERED ? r.before[job] : 0;
#pragma unroll 4
        for (u32 column = 0; column < base; column += WARP) before += column_of(replica, column)[job];  // DEFECT(number-columns)
        next[job] = before;
    }
    u32 same[TOP_K];
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) same[k] = __match_any_sync(ALL, choice.job[k]);
    __syncwarp();  // DEFECT(number-start)
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        bool is_first = (same[k] & lanes_before()) == 0;
        choice.number[k] = 0;
        if (choice.job[k] != NO_JOB && is_first) choice.number[k] = atomicAdd(&next[choice.job[k]], (u32)__popc(same[k]));  // DEFECT(number-next)
        __syncwarp();  // DEFECT(number-order)
    }
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k)
        choice.number[k] = __shfl_sync(ALL, choice.number[k], __ffs(same[k]) - 1) + __popc(same[k] & lanes_before());  // DEFECT(number)
}

// Sums of the replica quotas, for those jobs whose quotas add up to their rows. By the warp that has the plan, a lane a job: all
// others wait for it, so a job's quotas are read four at once, and once.
__device__ __forceinline__ void open_replicas(const Table &table, Replicas &r) {
    static constexpr u32 AT_ONCE = 4;
    __syncwarp();  // DEFECT(open-replicas)
    const u32 *quotas = r.plan + RANKS + 1;
#pragma unroll 1
    for (u32 job = lane(); job < table.jobs; job += WARP) {
        u32 first = r.first[job], end = r.first[job + 1], rows = r.all_rows[job];
        u64 sum = 0;
#pragma unroll 1
        for (u32 slot = first; slot < end; slot += AT_ONCE) {
            u32 some[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; ++j) some[j] = slot + j < end ? quotas[slot + j] : 0;
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; ++j) {
                sum += some[j];
                if (slot + j < end) r.until[slot + j] = (u32)sum;  // DEFECT(open-until)
            }
        }
        if (sum == rows) r.open[job] = first;  // DEFECT(job-torn)
    }
}

// Whether the slots of jobs follow each other: then each slot is of one job. A warp asks.
__device__ __forceinline__ bool is_in_order(const Table &table, const Replicas &r) {
    bool ordered = true;
#pragma unroll 1
    for (u32 job = lane(); job < table.jobs; job += WARP) ordered &= r.first[job] <= r.first[job + 1];  // DEFECT(table-order)
    return __all_sync(ALL, ordered);
}

// The warp that waits, in the first block: take the plan, and hand on the quotas. Gives how the call ended.
__device__ __forceinline__ u32 take_plan(const ReplicaArgs &replica, const Table &table, const Block &b, Replicas &r) {
    const Args &args = replica.args;
    Wanted wanted;
    bool ordered = is_in_order(table, r);
    wanted.fingerprint = ordered ? table.fingerprint : 0;
    wanted.slots = ordered && table.fingerprint != 0 ? r.first[table.jobs] : 0;
    wanted.words = in_slot(args, args.quotas_at, b.sequence);
    u32 outcome = wait<replica_posted>(args, b, wanted.sum, [&] { return take(args, r.plan, b.sequence, wanted); });
    if (outcome == TALLY_LIVE && wanted.fits) open_replicas(table, r);  // DEFECT(choose-live)
    if (replica.quotas) {
#pragma unroll 1
        for (u32 rank = lane(); rank < RANKS; rank += WARP) replica.quotas[rank] = outcome == TALLY_LIVE ? r.plan[rank] : ALL;  // DEFECT(quotas-out)
    }
    return outcome;
}

// What the first block took from the board, for the others, which read nothing of another block from here on.
__device__ __forceinline__ void share_plan(Replicas &r) {
    sync_blocks();  // DEFECT(replica-share-sync)
#if CLUSTERED
    if (block() > 0) {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < SLOTS; i += blockDim.x) {
            r.until[i] = read_block(r.until + i, 0);  // DEFECT(replica-share)
            if (i < REDUNDANT) r.open[i] = read_block(r.open + i, 0);  // DEFECT(replica-share-open)
        }
    }
    __syncthreads();  // DEFECT(replica-share-barrier)
    leave_blocks();  // DEFECT(replica-leave)
#endif
}

// Calls so far that ended so, by Outcome, a lane each: read before the plan is there.
__device__ __forceinline__ u64 calls_so_far(const Args &args) { return lane() < OUTCOMES ? args.state->tally[lane()] : 0; }

// The call counts once, here: the launch of given quotas that follows counts in a state of its own. By a warp.
__device__ __forceinline__ void tally(const Args &args, u32 sequence, u32 outcome, u64 calls) {
    if (lane() != outcome) return;  // DEFECT(choose-outcome)
    args.state->tally[outcome] = calls + 1;
    args.state->last = sequence;
    store_relaxed(args.board + args.tally_at + outcome, calls + 1);  // DEFECT(choose-tally)
}

// A row's replicas, or its ids as they are. Each step is one of all columns, so that their loads are in flight at once. All rows
// of an open job have a slot.
__device__ __forceinline__ void take_replicas(const Table &table, const Replicas &r, Choice &choice) {
    u32 slot[TOP_K];
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) slot[k] = r.open[choice.job[k]];
    bool more = true;
#pragma unroll 1
    while (more) {
        more = false;
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) {
            bool is_next = slot[k] < SLOTS - 1 && choice.number[k] >= r.until[slot[k]];  // DEFECT(choose-slot)
            slot[k] += is_next;
            more |= is_next;
        }
    }
#pragma unroll
    for (u32 k = 0; k < TOP_K; ++k) {
        bool is_open = slot[k] < SLOTS;
        u32 at = at_most(slot[k], SLOTS - 1), of_slot = r.logical[at], logical = is_open ? table.logical_of((u32)choice.ids.id[k]) : NO_LOGICAL;
        if (is_open && of_slot == logical && logical != NO_LOGICAL) choice.ids.id[k] = (ID)r.replica[at];  // DEFECT(choose-logical)
    }
}

__device__ __forceinline__ void write_ids(const ReplicaArgs &replica, const Rows &rows, u32 row, const Choice &choice) {
    if (row >= rows.count) return;
    u64 out = (u64)(rows.first + row) * TOP_K;
    if (replica.moved) {
        long long *to = (long long *)replica.out + out, moved[TOP_K + 1];
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) {
            ID id = choice.ids.id[k];
            bool expert = (UNSIGNED_ID)id < replica.args.experts;
            moved[k] = moved_up(id, rank_of_expert(id, replica.args.rank_multiplier), expert);  // DEFECT(choose-moved)
        }
        if (TOP_K % 2 == 0 && is_aligned(replica.out)) {  // DEFECT(out-aligned)
#pragma unroll
            for (u32 k = 0; k < TOP_K; k += 2) {
                u64 one = moved[k], other = moved[k + 1];
                *(uint4 *)(to + k) = uint4{(u32)one, (u32)(one >> 32), (u32)other, (u32)(other >> 32)};  // DEFECT(out-words)
            }
        } else {
#pragma unroll
            for (u32 k = 0; k < TOP_K; ++k) to[k] = moved[k];
        }
    } else {
#pragma unroll
        for (u32 k = 0; k < TOP_K; ++k) ((ID *)replica.out)[out + k] = row < rows.unpadded ? choice.ids.id[k] : (ID)-1;  // DEFECT(choose-padding)
    }
}

__device__ __forceinline__ void choose(const ReplicaArgs &replica) {
    const Args &args = replica.args;
    Shared s = shared_arrays(args);
    Block &b = *s.block;
    Replicas &r = replicas();
    Rows rows(args, block());
    Choice choice;
    // One trip to global memory: the ids, the layer's table and map, the call's number and the padding, all in flight at once.
    load_ids(rows, threadIdx.x, choice.ids);
    Arriving arriving;
    arriving.load(replica, threadIdx.x);
    bool numbers = block() == 0 && threadIdx.x == blockDim.x - 1 && mode_of(args) == LIVE;
    u32 last = numbers ? args.state->last : 0, failures = numbers ? args.state->failures : 0;
    int unpadded = args.unpadded ? *args.unpadded : NO_PADDING;
    clear(args);
    __syncthreads();  // DEFECT(choose-clear)
    if (numbers) {
        b.sequence = next_sequence(last);
        b.failures = failures;
        b.waits = waits_for_plan(args, b.sequence, failures);
    }
    if (unpadded < (int)(rows.first + rows.count)) rows.unpadded = unpadded < (int)rows.first ? 0 : unpadded - rows.first;

    // Rows of a block that has more than threads are read anew at each step, in the same order.
    bool anew = args.rows_per_block > blockDim.x;
    u32 end = at_least(args.rows_per_block, 1);
#pragma unroll 1
    for (u32 first = 0; first < end; first += blockDim.x) {
        u32 row = first + threadIdx.x;
        if (anew) load_ids(rows, row, choice.ids);
        if (row - lane() < rows.count) count_rows(replica, s, b, rows, row, choice);
    }
    keep_layer(replica, arriving);
    if (replica.moved) sync_blocks();  // DEFECT(choose-sync)
    else gather(s, b);
    Table table(replica);
    if (block() == 0) post_replicas(args, table, s, b, r);
    if (mode_of(args) == COUNT) {
        leave_blocks();
        return end_blocks();
    }

    // All that only the choice needs is done while the plan is made.
    find_slots(table, r);
#pragma unroll 1
    for (u32 first = 0; first < end; first += blockDim.x) {
        u32 row = first + threadIdx.x;
        if (anew) load_ids(rows, row, choice.ids);
        find_jobs(replica, table, rows, row, choice);
        if (row - lane() < rows.count) count_jobs(replica, r, row - lane(), choice);
    }
    gather_jobs(table, r);

    u32 outcome = 0;
    u64 calls = 0;
    bool waits = block() == 0 && is_waiting_warp();
#pragma unroll 1
    for (u32 first = 0; first < end; first += blockDim.x) {
        u32 row = first + threadIdx.x;
        if (anew) {
            load_ids(rows, row, choice.ids);
            find_jobs(replica, table, rows, row, choice);
        }
        bool has_rows = row - lane() < rows.count;
        if (has_rows) number_rows(replica, table, r, row - lane(), choice);
        if (first == 0) {
            if (waits) {
                calls = calls_so_far(args);
                outcome = take_plan(replica, table, b, r);
            }
            share_plan(r);
        }
        if (!has_rows) continue;
        take_replicas(table, r, choice);
        write_ids(replica, rows, row, choice);
    }
    if (waits) tally(args, b.sequence, outcome, calls);
    end_blocks();  // DEFECT(choose-end)
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS) choose_replicas(const __grid_constant__ ReplicaArgs args) {
    // So is the launch that warms it.
    if (mode_of(args.args) != OWN) choose(args);
}
