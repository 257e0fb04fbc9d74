// CUDA's threads on the CPU: the kernel's source is compiled behind this file by a C++ compiler (lib.rs).
//
// Each CUDA thread is a fiber, all of one launch on one OS thread. A fiber runs until it waits for others: for its warp,
// its block or its cluster. Of the warps that can run, the first in an order drawn for the launch does, so that some are
// far ahead of others; and a warp's lanes run in an order drawn each time. So a barrier that is missing shows.
// Only C's headers: no C++ library is needed. A fiber starts by `setcontext`; from then on it goes to and fro by jumps, which
// unlike `swapcontext` ask nothing of the system. Fortified ones take a jump to another stack for an error.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// Its reads and writes are nobody's.
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))

namespace emulated {

typedef unsigned long long Word;
static constexpr unsigned LANES = 32;
static constexpr size_t STACK = 64 << 10;
// A launch takes some 100,000.
static constexpr unsigned MOST_SWITCHES = 4 * 1000 * 1000;
// Behind each block's shared memory, which is full of POISON before the launch.
static constexpr unsigned GUARD = 1024;
static constexpr int POISON = 0xa5;
// Behind the guard, so that a kernel that goes astray reads and writes there rather than anywhere.
static constexpr unsigned MARGIN = 1 << 20;

// Where a thread waits.
struct Site {
    const char *what, *file;
    int line;
};
static bool operator==(const Site &a, const Site &b) { return a.line == b.line && !strcmp(a.what, b.what) && !strcmp(a.file, b.file); }

struct Thread {
    ucontext_t context;    // Where it starts.
    jmp_buf there;         // Where it waits.
    Site site;
    bool started, ready, ended;
    bool in_cluster;       // Arrived at the cluster's barrier, and has not waited for it yet.
    unsigned left_phase;   // The cluster's phase when it arrived.
    // Barriers of its block and of its warp that it passed; releases for the cluster before now, and of how many it sees
    // what was before them (races.h).
    unsigned passed_block, passed_warp, released, seen;
};

// Threads that wait for each other, all of them at one place.
struct Barrier {
    unsigned arrived;
    Site site;
};

struct Warp {
    Barrier barrier;
    unsigned ready;
    Word brought[LANES], got[LANES];
};

struct Block {
    Barrier barrier;
    unsigned ended;
    unsigned char *memory;
};

// One launch.
static Thread *threads;
static Warp *warps;
static Block *blocks;
static unsigned thread_count, current, ended, switches, shared_bytes;
// Blocks of a cluster; of each cluster, threads that arrived at its barrier, and how often all did.
static unsigned cluster_blocks, arrived_at_cluster[2], phase[2];
static unsigned char *all_memory;
static size_t memory_stride;
static jmp_buf scheduler;
static const void *arguments;
static void (*meanwhile)(void *);
static void *for_meanwhile;
static Word random_state, clock_ns;
static char failure[4096];

static void say(const char *format, ...) {
    size_t used = strlen(failure);
    va_list values;
    va_start(values, format);
    vsnprintf(failure + used, sizeof failure - used, format, values);
    va_end(values);
}

// By a thread: the launch ends here.
#define FAIL(...) (emulated::say(__VA_ARGS__), emulated::stop())
static void stop() {
    say(" (block %u, thread %u)", blockIdx.x, threadIdx.x);
    _longjmp(scheduler, 1);
}

static unsigned draw(unsigned below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 32) % below;
}

static void make_ready(unsigned first, unsigned count) {
    for (unsigned i = first; i < first + count; ++i) {
        if (threads[i].ready || threads[i].ended) continue;
        threads[i].ready = true;
        warps[i / LANES].ready += 1;
    }
}

__attribute__((noinline)) static void wait(const Site &site) {
    Thread &thread = threads[current];
    thread.site = site;
    thread.ready = false;
    warps[current / LANES].ready -= 1;
    if (!_setjmp(thread.there)) _longjmp(scheduler, 1);
}

// Whether this thread is the last of `count` at a barrier; they all have to be at the same place.
static bool is_last(Barrier &barrier, unsigned count, const Site &site) {
    if (barrier.arrived == 0) barrier.site = site;
    const Site &other = barrier.site;
    if (!(other == site))
        FAIL("some wait in %s (%s:%d), another one in %s (%s:%d)", other.what, other.file, other.line, site.what, site.file, site.line);
    barrier.arrived = (barrier.arrived + 1) % count;
    return barrier.arrived == 0;
}

// What each lane of the warp brought.
static const Word *exchange(unsigned mask, Word value, const Site &site) {
    if (mask != 0xffffffffu) FAIL("%s for some lanes (%s:%d)", site.what, site.file, site.line);
    Warp &warp = warps[current / LANES];
    warp.brought[current % LANES] = value;
    if (is_last(warp.barrier, LANES, site)) {
        // A copy: a lane may bring its next value before another one looked.
        memcpy(warp.got, warp.brought, sizeof warp.got);
        make_ready(current / LANES * LANES, LANES);
    } else {
        wait(site);
    }
    return warp.got;
}

static void run_kernel();
enum Kind { READ, WRITE, ATOMIC };
static void watch(const void *address, unsigned bytes, Kind kind);
static void start_watching();
static void end_watching();

static void start(unsigned blocks_wanted, unsigned cluster, unsigned threads_wanted, unsigned shared_wanted, Word seed) {
    static char *stacks;
    static size_t stack_bytes;
    thread_count = blocks_wanted * threads_wanted;
    gridDim.x = blocks_wanted, blockDim.x = threads_wanted, shared_bytes = shared_wanted;
    ended = switches = 0, cluster_blocks = cluster;
    memset(arrived_at_cluster, 0, sizeof arrived_at_cluster), memset(phase, 0, sizeof phase);
    random_state = (seed + 1) * 0x9e3779b97f4a7c15ull, clock_ns = 1000000;
    failure[0] = 0;
    if (stack_bytes < thread_count * STACK) {
        if (stacks) munmap(stacks, stack_bytes);
        stack_bytes = thread_count * STACK;
        stacks = (char *)mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) abort();
    }
    threads = (Thread *)calloc(thread_count, sizeof(Thread));
    warps = (Warp *)calloc(thread_count / LANES, sizeof(Warp));
    blocks = (Block *)calloc(blocks_wanted, sizeof(Block));
    memory_stride = (shared_wanted + 2 * GUARD - 1) / GUARD * GUARD + MARGIN;
    all_memory = (unsigned char *)aligned_alloc(GUARD, blocks_wanted * memory_stride);
    for (unsigned i = 0; i < blocks_wanted; ++i) {
        blocks[i].memory = all_memory + i * memory_stride;
        memset(blocks[i].memory, POISON, shared_wanted + GUARD);
    }
    start_watching();
    for (unsigned i = 0; i < thread_count; ++i) {
        ucontext_t &context = threads[i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks + i * STACK;
        context.uc_stack.ss_size = STACK;
        makecontext(&context, run_kernel, 0);
    }
    make_ready(0, thread_count);
}

UNWATCHED static void end() {
    end_watching();
    for (unsigned i = 0; i < gridDim.x; ++i) {
        for (unsigned byte = shared_bytes; byte < shared_bytes + GUARD && !failure[0]; ++byte)
            if (blocks[i].memory[byte] != POISON) say("block %u wrote byte %u of %u of its shared memory", i, byte, shared_bytes);
    }
    free(all_memory), free(threads), free(warps), free(blocks);
}

__attribute__((noinline)) static void run_thread(unsigned i) {
    current = i;
    blockIdx.x = i / blockDim.x, threadIdx.x = i % blockDim.x;
    ++switches;
    if (_setjmp(scheduler)) return;
    if (threads[i].started) _longjmp(threads[i].there, 1);
    threads[i].started = true;
    setcontext(&threads[i].context);
}

static void run_warp(unsigned warp) {
    unsigned first = draw(LANES), step = draw(LANES) | 1;
    for (unsigned i = 0; i < LANES && !failure[0]; ++i) {
        unsigned thread = warp * LANES + (first + i * step) % LANES;
        if (threads[thread].ready) run_thread(thread);
    }
}

// The warps in a random order, the first ones to run whenever they can.
static void run_all() {
    unsigned count = thread_count / LANES, order[2048], next = 0;
    for (unsigned i = 0; i < count; ++i) {
        unsigned j = draw(i + 1);
        order[i] = order[j], order[j] = i;
    }
    while (next < count && !failure[0]) {
        for (next = 0; next < count && warps[order[next]].ready == 0;) ++next;
        if (next < count) run_warp(order[next]);
        if (switches > MOST_SWITCHES) say("it does not end");
    }
}

// Who waits where, by runs of threads that do at one place.
static void say_who_waits() {
    say("nobody can go on:");
    for (unsigned i = 0, first = 0; i < thread_count; ++i) {
        const Thread &thread = threads[i];
        bool more = (i + 1) % blockDim.x && threads[i + 1].ended == thread.ended && (thread.ended || threads[i + 1].site == thread.site);
        if (more) continue;
        say("\n  block %u, threads %u to %u: ", first / blockDim.x, first % blockDim.x, i % blockDim.x);
        if (thread.ended) say("ended");
        else say("%s (%s:%d)", thread.site.what, thread.site.file, thread.site.line);
        first = i + 1;
    }
}

}  // namespace emulated

// Behind the kernel's source.
extern "C" void call_kernel(const void *args);

static void emulated::run_kernel() {
    call_kernel(arguments);
    Thread &thread = threads[current];
    if (thread.in_cluster) FAIL("it arrived at the cluster's barrier, and ends without the wait");
    thread.ready = false, thread.ended = true;
    warps[current / LANES].ready -= 1;
    blocks[blockIdx.x].ended += 1;
    ended += 1;
    _longjmp(scheduler, 1);
}

// One launch of whole warps; null, or what went wrong. `meanwhile` is called whenever the clock is read.
extern "C" const char *launch(const void *args, unsigned blocks, unsigned cluster, unsigned threads, unsigned shared_bytes, unsigned seed,
                              void (*meanwhile)(void *), void *for_meanwhile) {
    emulated::start(blocks, cluster, threads, shared_bytes, seed);
    emulated::arguments = args;
    emulated::meanwhile = meanwhile, emulated::for_meanwhile = for_meanwhile;
    emulated::run_all();
    if (emulated::ended < emulated::thread_count && !emulated::failure[0]) emulated::say_who_waits();
    emulated::end();
    return emulated::failure[0] ? emulated::failure : nullptr;
}

// What -fsanitize=alignment,bounds calls (the start of its first argument is a place in the source): a GPU takes no
// address that is not aligned, a CPU does.
struct Place {
    const char *file;
    unsigned line, column;
};
extern "C" void __ubsan_handle_type_mismatch_v1_abort(const Place *place, size_t) {
    FAIL("a misaligned address (%s:%u)", place->file, place->line);
}
extern "C" void __ubsan_handle_out_of_bounds_abort(const Place *place, size_t) {
    FAIL("an index past the end (%s:%u)", place->file, place->line);
}

// CUDA's functions, as far as the kernel calls them. Each knows from where.
#define FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SITE emulated::Site{__func__, file, line}

inline void __syncthreads(FROM) {
    if (emulated::is_last(emulated::blocks[blockIdx.x].barrier, blockDim.x, SITE)) emulated::make_ready(blockIdx.x * blockDim.x, blockDim.x);
    else emulated::wait(SITE);
    emulated::threads[emulated::current].passed_block += 1;
}

// Of a warp's functions this one alone orders memory.
inline void __syncwarp(FROM) {
    emulated::exchange(~0u, 0, SITE);
    emulated::threads[emulated::current].passed_warp += 1;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane, FROM) {
    return (T)emulated::exchange(mask, value, SITE)[lane % 32];
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, FROM) {
    unsigned lane = threadIdx.x % 32;
    return (T)emulated::exchange(mask, value, SITE)[lane < delta ? lane : lane - delta];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, FROM) {
    return (T)emulated::exchange(mask, value, SITE)[(threadIdx.x ^ bits) % 32];
}

inline unsigned __ballot_sync(unsigned mask, bool vote, FROM) {
    const emulated::Word *votes = emulated::exchange(mask, vote, SITE);
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; ++lane) all |= (unsigned)votes[lane] << lane;
    return all;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, FROM) {
    const emulated::Word *values = emulated::exchange(mask, value, SITE);
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane) same |= (unsigned)((T)values[lane] == value) << lane;
    return same;
}

inline bool __all_sync(unsigned mask, bool vote, FROM) {
    const emulated::Word *votes = emulated::exchange(mask, vote, SITE);
    bool all = true;
    for (unsigned lane = 0; lane < 32; ++lane) all &= votes[lane] != 0;
    return all;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, FROM) {
    const emulated::Word *values = emulated::exchange(mask, value, SITE);
    unsigned sum = 0;
    for (unsigned lane = 0; lane < 32; ++lane) sum += (unsigned)values[lane];
    return sum;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, FROM) {
    const emulated::Word *values = emulated::exchange(mask, value, SITE);
    emulated::Word most = 0;
    for (unsigned lane = 0; lane < 32; ++lane) most = values[lane] > most ? values[lane] : most;
    return (unsigned)most;
}

inline unsigned __popc(unsigned bits) { return (unsigned)__builtin_popcount(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((emulated::Word)a * b >> 32); }

// As inexact as CUDA's may be: by two units in the last place.
inline float __fdividef(float a, float b) {
    float quotient = a / b;
    unsigned bits;
    memcpy(&bits, &quotient, sizeof bits);
    if (quotient > 0) bits += emulated::draw(5) - 2;
    memcpy(&quotient, &bits, sizeof bits);
    return quotient;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (unsigned byte = 0; byte < 32; byte += 8) sum += (a >> byte & 255) * (b >> byte & 255);
    return sum;
}

UNWATCHED inline unsigned atomicAdd(unsigned *word, unsigned value) {
    emulated::watch(word, sizeof *word, emulated::ATOMIC);
    unsigned old = *word;
    *word += value;
    return old;
}

UNWATCHED inline unsigned atomicMax(unsigned *word, unsigned value) {
    emulated::watch(word, sizeof *word, emulated::ATOMIC);
    unsigned old = *word;
    *word = value > old ? value : old;
    return old;
}
