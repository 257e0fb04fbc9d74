// Races in shared memory. Behind threads.h.
//
// A race: two accesses to one byte by different threads, at least one a write, not both atomic, with no barrier that orders memory
// between them. Whether they collided on the CPU does not matter. The file is compiled with -fsanitize=thread: the compiler then
// calls a function here at each read and each write.
// Every race that is reported is one. Some are missed: the history of a byte has its last writer, of several atomics the last one,
// and three readers. clang before 15 does not report stores and copies of 16 bytes.

namespace emulated {

// By whom a byte was read or written, and how far that thread was.
struct Access {
    Word thread_and_one : 16;  // 0: nobody yet.
    Word atomic : 1;
    Word passed_block : 16, passed_warp : 16, released : 15;
};

// A byte's last writer, and up to three readers since. A reader is dropped once a later reader is ordered after it. If more are
// needed a random one is evicted, so which races are found can vary between launches.
struct Byte {
    static constexpr unsigned READERS = 3;
    Access writer, readers[READERS];
};
static Byte *bytes;

// Of a cluster: the releases that all of its threads had made as they arrived at its barrier, when all had, and of those
// that have up to now.
struct Releases {
    unsigned arrived, arriving;
};
static Releases releases[2];

UNWATCHED static void start_watching() {
    bytes = (Byte *)calloc((size_t)gridDim.x * shared_bytes, sizeof(Byte));
    releases[0] = releases[1] = {0, ~0u};
}

UNWATCHED static void end_watching() {
    free(bytes);
    bytes = nullptr;
}

// Whether a barrier that orders memory comes between that access and this thread's next one.
UNWATCHED static bool is_ordered(const Access &access) {
    const Thread &now = threads[current];
    unsigned other = access.thread_and_one - 1u;
    if (access.thread_and_one == 0 || other == current) return true;
    if (access.released < now.seen) return true;
    if (other / blockDim.x != current / blockDim.x) return false;
    if (access.passed_block < now.passed_block) return true;
    return other / LANES == current / LANES && access.passed_warp < now.passed_warp;
}

UNWATCHED static void say_race(const Access &access, bool wrote, bool writes, const unsigned char *address) {
    unsigned other = access.thread_and_one - 1u;
    size_t at = address - all_memory;
    const Site &site = threads[current].site, &there = threads[other].site;
    FAIL("a race: byte %zu of block %zu was %s by thread %u of block %u (last seen at %s:%d) and is %s after %s:%d", at % memory_stride,
         at / memory_stride, wrote ? "written" : "read", other % blockDim.x, other / blockDim.x, there.file ? there.file : "its start",
         there.line, writes ? "written" : "read", site.file ? site.file : "the start", site.line);
}

UNWATCHED static void watch(const void *address, unsigned count, Kind kind) {
    if (!bytes) return;
    size_t first = (const unsigned char *)address - all_memory, byte = first % memory_stride;
    if (first >= gridDim.x * memory_stride || byte + count > shared_bytes) return;
    const Thread &now = threads[current];
    Access access{current + 1, kind == ATOMIC, now.passed_block, now.passed_warp, now.released};
    for (unsigned i = 0; i < count; ++i) {
        Byte &of = bytes[first / memory_stride * shared_bytes + byte + i];
        bool together = kind == ATOMIC && of.writer.atomic;
        if (!together && !is_ordered(of.writer)) say_race(of.writer, true, kind != READ, all_memory + first + i);
        Access *room = nullptr;
        for (Access &reader : of.readers) {
            if (kind == READ && is_ordered(reader)) room = &reader, reader = Access{};
            if (kind != READ && !is_ordered(reader)) say_race(reader, false, true, all_memory + first + i);
            if (kind != READ) reader = Access{};
        }
        if (kind != READ) of.writer = access;
        else *(room ? room : &of.readers[draw(Byte::READERS)]) = access;
    }
}

}  // namespace emulated

// What -fsanitize=thread calls.
#define WATCHED(bytes)                                                                              \
    extern "C" UNWATCHED void __tsan_read##bytes(void *at) { emulated::watch(at, bytes, emulated::READ); }    \
    extern "C" UNWATCHED void __tsan_write##bytes(void *at) { emulated::watch(at, bytes, emulated::WRITE); }
WATCHED(1)
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)
extern "C" UNWATCHED void __tsan_read_range(void *at, size_t bytes) { emulated::watch(at, bytes, emulated::READ); }
extern "C" UNWATCHED void __tsan_write_range(void *at, size_t bytes) { emulated::watch(at, bytes, emulated::WRITE); }
extern "C" UNWATCHED void *__tsan_memset(void *to, int byte, size_t bytes) {
    emulated::watch(to, bytes, emulated::WRITE);
    return memset(to, byte, bytes);
}
extern "C" UNWATCHED void *__tsan_memcpy(void *to, const void *from, size_t bytes) {
    emulated::watch(from, bytes, emulated::READ);
    emulated::watch(to, bytes, emulated::WRITE);
    return memcpy(to, from, bytes);
}
extern "C" UNWATCHED void *__tsan_memmove(void *to, const void *from, size_t bytes) {
    emulated::watch(from, bytes, emulated::READ);
    emulated::watch(to, bytes, emulated::WRITE);
    return memmove(to, from, bytes);
}
extern "C" UNWATCHED void __tsan_func_entry(void *) {}
extern "C" UNWATCHED void __tsan_func_exit() {}
extern "C" UNWATCHED void __tsan_init() {}
