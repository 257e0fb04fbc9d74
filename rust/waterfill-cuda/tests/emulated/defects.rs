//! Defects to plant in the kernels, one at a time: at the lines with these marks, and what the tests then have to say.

use cuda_emulator::{Defect, instead, without};

/// Whatever is said.
const ANYTHING: &str = "";
const RACE: &str = "a race";

/// A barrier that is missing, of few ranks.
pub const BARRIERS: &[Defect] = &[
    // clang before 15 does not tell of the writes before it.
    (&[without("clear-barrier")], ANYTHING),
    (&[without("gather-barrier-of-one-block")], RACE),
    (&[without("gather-barrier")], RACE),
    (&[without("plan-barrier")], RACE),
    (&[without("gather-sync")], RACE),
    (&[instead("gather-sync", "sync_blocks", "__syncthreads")], RACE),
    (&[without("round-sync")], RACE),
    (&[without("round-sums-barrier")], RACE),
    (&[without("round-levels-barrier")], RACE),
    (&[without("pending-barrier")], RACE),
    (&[without("share-sync")], RACE),
    (&[without("share-barrier")], RACE),
];

/// The same, of many ranks.
pub const BARRIERS_OF_MANY: &[Defect] = &[(&[without("round-most-barrier")], RACE)];

/// What orders memory, of few ranks. On the CPU, where a thread goes on alone from one barrier to the next, most give the right ids.
pub const ORDER: &[Defect] = &[
    (&[without("open-syncwarp")], RACE),
    (&[without("release")], RACE),
    (&[instead("count-tokens", "atomicAdd(&b.tokens, tokens)", "b.tokens += tokens")], RACE),
    (&[instead("count-loads", "atomicAdd(&s.loads[rank], 1u)", "s.loads[rank] += 1")], RACE),
    (
        &[instead("add-one", "atomicAdd(all + first[j], read[j].x)", "all[first[j]] += read[j].x")],
        RACE,
    ),
];

/// The same, of many ranks.
pub const ORDER_OF_MANY: &[Defect] = &[
    (
        &[instead(
            "round-most",
            "atomicMax(&b.most[round], most_here)",
            "b.most[round] = most_here",
        )],
        RACE,
    ),
    (&[instead("add-four", "atomicAdd(to + 1, four.y)", "to[1] += four.y")], RACE),
];

/// Threads that do not come.
pub const THREADS: &[Defect] = &[
    (&[without("leave")], "without an arrival"),
    (&[without("end")], "ends without the wait"),
    (&[instead("warp-max", "ALL", "lanes_before()")], "for some lanes"),
    (
        &[instead(
            "wait-clock",
            "__shfl_sync(ALL, stage(args, now_ns() - begun), 0)",
            "stage(args, now_ns() - begun)",
        )],
        ANYTHING,
    ),
    (
        &[instead(
            "take-vote",
            "!__all_sync(ALL, (u32)(word >> 32) == sequence)",
            "(u32)(word >> 32) != sequence",
        )],
        "__shfl",
    ),
];

/// Counts and ranks, of few ranks.
pub const COUNTS: &[Defect] = &[
    (&[instead("count-padding", "row < rows.unpadded ? ids.id[k] : (ID)-1", "ids.id[k]")], "ids"),
    (&[instead("write-padding", "i < unpadded", "i < slots")], "ids"),
    (&[instead("clear-bytes", "args.cleared_bytes", "args.cleared_bytes / 2")], ANYTHING),
    (&[instead("same-rank", "NO_RANK", "RANKS - 1")], "ids"),
    (&[instead("any-visit", "mask & ALL >> (WARP - RANKS)", "mask")], "ids"),
    (&[instead("count-visits", "visits.add(k, rank) ? rank : NO_RANK", "rank")], "ids"),
    (&[instead("level-of-lane", "lane()", "(lane() + 1)")], "ids"),
    (&[instead("nearest-rank", "ALL << first", "~1u << first")], "ids"),
    (&[instead("sum-last", ")) - 1", "))")], "ids"),
    (&[instead("sum-fours", "<= column", "< column")], ANYTHING),
    (&[instead("blocks-before", "< block()", "<= block()")], "ids"),
    (&[instead("level-of-part", "(first + i)", "(first + i + 1)")], "ids"),
    (&[instead("settle", "< allowed", "<= allowed")], "ids"),
    (&[instead("leftover", "> place", ">= place")], "ids"),
    (&[instead("home-is-full", ">= quotas.home", "> quotas.home")], "ids"),
    (&[instead("granted-before", "+= granted", "= granted")], "ids"),
    (&[instead("place-before", " - b.granted_before", "")], "ids"),
    (&[instead("table-at", "args.table_bytes", "args.table_bytes + 2")], "misaligned"),
    (&[instead("token-state", "[row]", "[row + 256]")], "of its shared memory"),
];

/// Writers, of two ranks.
pub const WRITERS: &[Defect] = &[
    (&[instead("writers", "write_part(args, writer)", "")], "ids"),
    (&[without("writer-padding")], "ids"),
    (&[instead("writer-rows", "(args, writer)", "(args, 0)")], "ids"),
    (&[instead("first-cluster", "if (!CLUSTERED || blockIdx.x < blocks()) ", "")], ANYTHING),
];

/// Plans, of many ranks.
pub const PLANS: &[Defect] = &[
    (&[instead("rank-of-id", "(UNSIGNED_ID)id", "(u32)id")], "ids"),
    (&[instead("moved-up", "id < 0 ? id : (ID)-1", "id")], "ids"),
    (&[instead("trust-rounding", " + 512", "")], "ids"),
    (&[instead("share", " + (more > 0)", "")], "ids"),
    (&[instead("newton-end", "next == level", "next > level")], "does not end"),
    (&[instead("granted-sum", "+=", "=")], "ids"),
    (&[instead("blocks-before", " && other[j] < block()", "")], "ids"),
    (&[instead("first-visit", "true", "added != rank[0]")], "counts"),
];

/// Words and waits, of few ranks.
pub const WORDS: &[Defect] = &[
    (&[instead("ring", "% args.ring", "% 2")], ANYTHING),
    (&[instead("post-all-at", " - args.rank * args.counts_stride", "")], "the board"),
    (&[instead("take-sum", "warp_sum_long(mine)", "warp_sum((u32)mine)")], ANYTHING),
    (&[instead("torn", " == all_tokens(b)", "")], ANYTHING),
    // The look before the clock.
    (
        &[
            instead("wait-clock", "u32 now", "bool is_there = look();\n        u32 now"),
            instead("wait-look", "look()", "is_there"),
        ],
        ANYTHING,
    ),
    (&[instead("break-after", "failures < BREAK_AFTER", "failures <= BREAK_AFTER")], ANYTHING),
    (&[instead("most-seldom", "MOST_SELDOM", "MOST_SELDOM - 1")], "the board"),
    (&[instead("try-again", "seldom == 0", "seldom == 0 && sequence > 1")], "the board"),
    (
        &[instead("without-plan", "last != 0 && (int)(last - sequence) >= 0", "last == sequence")],
        ANYTHING,
    ),
    (&[instead("without-plan", "(int)(last - sequence) >= 0", "last >= sequence")], ANYTHING),
    (&[instead("failures", "none ? 0 : ", "")], "sequence and failures"),
    (&[instead("wait-on", "!= SPENT", "!= LATE")], ANYTHING),
    (&[instead("take-back", "lane() ==", "WARP ==")], "the board"),
    (&[instead("post-waits", "b.waits", "1")], "the board"),
    (&[instead("post-own-wait", "!args.words", "true")], "the board"),
];

/// Levels and shares of rows, with fewer bits or corrections.
pub const ARITHMETIC: &[Defect] = &[
    (&[instead("share", " + (more > (int)total)", "")], ANYTHING),
    (&[instead("level-one", "1u << 26", "1u << 25")], ANYTHING),
    (&[instead("level-down", "__umulhi(last,", "__umulhi(last + 1,")], ANYTHING),
];

/// Ids of 64 bits moved up.
pub const MOVES: &[Defect] = &[
    (&[instead("moved-id", "(UNSIGNED_ID)id <", "(u32)id <")], ANYTHING),
    (&[instead("moved-id", "< args.experts", "<= args.experts")], ANYTHING),
    (&[instead("moved-id", "< args.experts", "< args.experts - 1")], ANYTHING),
    (&[instead("moved-id", "(UNSIGNED_ID)id < args", "id < (ID)args")], ANYTHING),
    (&[instead("moved-id", "(UNSIGNED_ID)id <", "id > 0 && id <")], ANYTHING),
    (&[instead("moved-id", "args.rank_multiplier", "args.rank_multiplier - 1")], ANYTHING),
    (&[without("moved-primary")], ANYTHING),
    (&[without("primary-expert")], ANYTHING),
    (&[instead("primary-expert", ">=", ">")], ANYTHING),
    (&[without("primary-logical")], ANYTHING),
    (&[instead("rank-of-expert", "2 * (u32)id", "(u32)id")], ANYTHING),
    (&[instead("moved-up", "id < 0 ? id : (ID)-1", "id")], ANYTHING),
    (&[instead("moved-up", "id < 0 ? id : (ID)-1", "(ID)-1")], ANYTHING),
    (&[instead("moved-up", "id + (ID)rank", "id + (ID)rank + 1")], ANYTHING),
    (&[without("moved-count")], ANYTHING),
    (&[instead("moved-count", "i >=", "i >")], ANYTHING),
    (&[instead("moved-count", "i >=", "i + 1 >=")], ANYTHING),
    (&[instead("moved-block", "* MOVE_THREADS", "* (MOVE_THREADS - 1)")], ANYTHING),
];

/// The same of 32 bits, which are written as 64.
pub const MOVES_OF_32_BITS: &[Defect] = &[(&[instead("moved-out", "long long", "ID")], ANYTHING)];

/// The choice of replicas: barriers, and what orders memory.
pub const REPLICA_ORDER: &[Defect] = &[
    (&[without("choose-clear")], ANYTHING),
    (&[instead("choose-sync", "sync_blocks", "__syncthreads")], RACE),
    (&[without("sum-barrier")], RACE),
    (&[instead("sum-jobs", "atomicAdd(&r.all_rows[job], rows)", "r.all_rows[job] += rows")], RACE),
    (&[without("jobs-sync")], RACE),
    (&[instead("jobs-sync", "sync_blocks", "__syncthreads")], RACE),
    (&[without("jobs-barrier")], RACE),
    (&[without("number-start")], RACE),
    (&[without("open-replicas")], RACE),
    (&[without("replica-share-sync")], RACE),
    (&[without("replica-share-barrier")], RACE),
    (&[without("replica-leave")], "without an arrival"),
    (&[without("choose-end")], "ends without the wait"),
    (&[instead("choose-tokens", "atomicAdd(&b.tokens, tokens)", "b.tokens += tokens")], RACE),
    (
        &[instead(
            "job-columns",
            "atomicAdd(&column[choice.job[k]], 1u)",
            "column[choice.job[k]] += 1",
        )],
        RACE,
    ),
    (
        &[instead(
            "job-rows",
            "atomicAdd(&r.rows[choice.job[k]], 1u)",
            "r.rows[choice.job[k]] += 1",
        )],
        RACE,
    ),
];

/// The choice of replicas: words and waits.
pub const REPLICA_WORDS: &[Defect] = &[
    (&[instead("choose-counts", "args.experts", "0")], "counts"),
    (&[without("choose-overlapped")], "counts"),
    (&[instead("fingerprint", "table.fingerprint", "0")], "counts"),
    (&[instead("sum-others", "job == NO_JOB ? rows : 0", "rows")], "counts"),
    (&[instead("sum-active", "others > 0", "rows > 0")], "counts"),
    (&[instead("sum-rank", "rank == of ? others : 0", "others")], "counts"),
    (&[instead("replica-post-waits", "sequence, waits", "sequence, 1")], "the board"),
    (&[instead("take-quotas", "i <= RANKS", "i < RANKS")], ANYTHING),
    (&[instead("take-mine", "i < RANKS", "i <= RANKS")], ANYTHING),
    (&[instead("take-fits", "== wanted.fingerprint &&", "!= 0 &&")], ANYTHING),
    (&[without("take-replicas")], ANYTHING),
    (&[instead("wait-on", "!= SPENT", "!= LATE")], ANYTHING),
    (&[instead("failures", "none ? 0 : ", "")], "sequence and failures"),
    (&[instead("take-back", "lane() ==", "WARP ==")], "the board"),
    (&[instead("torn", " == all_tokens(b)", "")], ANYTHING),
    (
        &[instead(
            "wait-clock",
            "__shfl_sync(ALL, stage(args, now_ns() - begun), 0)",
            "stage(args, now_ns() - begun)",
        )],
        ANYTHING,
    ),
    // The look before the clock.
    (
        &[
            instead("wait-clock", "u32 now", "bool is_there = look();\n        u32 now"),
            instead("wait-look", "look()", "is_there"),
        ],
        ANYTHING,
    ),
    (&[instead("choose-live", "outcome == TALLY_LIVE && ", "")], "ids"),
    (&[instead("quotas-out", ": ALL", ": 0")], "quotas"),
    (&[without("choose-tally")], "the board"),
    (&[instead("choose-outcome", "!= outcome", "!= 0")], ANYTHING),
    (&[instead("replica-sum", "((u64)warp_sum((u32)(mine >> HALF)) << HALF) + ", "")], ANYTHING),
];

/// The choice of replicas: jobs, numbers and slots.
pub const CHOICES: &[Defect] = &[
    (&[instead("choose-expert", "(UNSIGNED_ID)id", "(u32)id")], ANYTHING),
    (&[instead("choose-expert", "row < rows.unpadded && ", "")], "counts"),
    (&[instead("table-jobs", "words[1]", "words[1] / 2")], "counts"),
    (&[instead("table-first", "first(i)", "first(i + 1)")], "ids"),
    (&[instead("jobs-before", "< block()", "<= block()")], "ids"),
    (&[instead("number-columns", "column < base", "column + WARP < base")], "ids"),
    (&[instead("number", " + __popc(same[k] & lanes_before())", "")], "ids"),
    (&[instead("number-next", "__popc(same[k])", "1")], "ids"),
    (&[instead("number-next", "choice.job[k] != NO_JOB && ", "")], ANYTHING),
    (&[without("number-order")], "ids"),
    (&[instead("open-until", "slot + j < end", "true")], ANYTHING),
    (&[instead("slots-closed", "SLOTS", "i < REDUNDANT ? r.first[i] : SLOTS")], "ids"),
    (&[instead("job-torn", "sum == rows", "true")], "ids"),
    (&[instead("replica-share", "until + i, 0", "until + i, block()")], "ids"),
    (&[instead("replica-share-open", "open + i, 0", "open + i, block()")], "ids"),
    (&[instead("choose-slot", ">=", ">")], "ids"),
    (&[instead("ids-aligned", "!is_aligned(rows.ids) || ", "")], "misaligned"),
    (&[instead("ids-words", "(u64)words[(at + 1) % 4] << 32 | ", "")], ANYTHING),
    (&[instead("out-aligned", " && is_aligned(replica.out)", "")], "misaligned"),
    (&[instead("out-words", "(u32)(other >> 32)", "(u32)(one >> 32)")], "ids"),
    (&[instead("choose-moved", "replica.args.rank_multiplier", "1")], "ids"),
    (
        &[instead(
            "choose-padding",
            "row < rows.unpadded ? choice.ids.id[k] : (ID)-1",
            "choice.ids.id[k]",
        )],
        "ids",
    ),
];

/// A table of more words than come at once, and more experts of a rank than a warp has lanes.
pub const LARGE_TABLES: &[Defect] = &[
    (&[without("keep-more")], ANYTHING),
    (&[instead("sum-loads", "atomicAdd(&s.all_loads[of], load)", "s.all_loads[of] += load")], RACE),
    (&[instead("keep-start", "threadIdx.x + at_once", "at_once")], RACE),
];

/// What keeps a row at its logical expert, whatever is on the board and in the table.
pub const SAFETY: &[Defect] = &[
    (&[instead("choose-logical", "of_slot == logical", "of_slot != ALL")], "logical"),
    (&[instead("choose-logical", " && logical != NO_LOGICAL", "")], "logical"),
    (
        &[instead(
            "logical-bits",
            "logical[j] < NO_LOGICAL ? (u32)logical[j] : NO_LOGICAL",
            "(u32)logical[j]",
        )],
        "logical",
    ),
    (&[instead("table-replica", ": NO_LOGICAL", ": 0")], "logical"),
    (&[instead("table-order", "r.first[job] <= r.first[job + 1]", "true")], RACE),
];

/// Structs and arrays of the choice of replicas that are not the host's.
pub const REPLICA_LAYOUTS: &[Defect] = &[
    (&[instead("replica-out", "void *out", "u64 more; void *out")], "sizeof(ReplicaArgs)"),
    (&[instead("replica-until", "SLOTS", "SLOTS + 1")], "sizeof(Replicas)"),
];

/// Structs and arrays that are not the host's: the compiler refuses them.
pub const LAYOUTS: &[Defect] = &[
    (&[instead("args-rank", "rank, experts,", "experts, rank,")], "offsetof(Args, rank)"),
    (&[instead("args-rows", "rows,", "rows, more,")], "offsetof(Args, rows_per_block)"),
    (&[instead("state-tally", "u64", "u32")], "sizeof(State)"),
    (
        &[instead("moved-out", "long long *out", "u64 count, *out"), without("moved-length")],
        "offsetof(MoveArgs, count)",
    ),
    (&[instead("zeros-visits", ";", ", more[ENTRIES];")], "sizeof(Zeros)"),
    (&[instead("quotas-home", "home;", "home, more;")], "sizeof(PerRank)"),
    (&[instead("visit-bits", "= 1", "= 2")], "Visits::WORDS"),
];

/// All of them.
pub const ALL: [&[Defect]; 19] = [
    BARRIERS,
    BARRIERS_OF_MANY,
    ORDER,
    ORDER_OF_MANY,
    THREADS,
    COUNTS,
    WRITERS,
    PLANS,
    WORDS,
    ARITHMETIC,
    MOVES,
    MOVES_OF_32_BITS,
    LAYOUTS,
    REPLICA_ORDER,
    REPLICA_WORDS,
    CHOICES,
    LARGE_TABLES,
    SAFETY,
    REPLICA_LAYOUTS,
];
