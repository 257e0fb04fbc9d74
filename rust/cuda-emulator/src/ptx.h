// In place of waterfill-cuda's kernels/ptx.cuh, over threads.h.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

inline u8 *shared_memory() { return emulated::blocks[blockIdx.x].memory; }

#if CLUSTERED
inline u32 cluster_size() { return emulated::cluster_blocks; }
inline u32 cluster() { return blockIdx.x / cluster_size(); }

inline void arrive_at_cluster(FROM) {
    using namespace emulated;
    Thread &thread = threads[current];
    if (thread.in_cluster) FAIL("it arrives again at the cluster's barrier without a wait (%s:%d)", file, line);
    thread.in_cluster = true;
    thread.left_phase = phase[cluster()];
    if (thread.released < releases[cluster()].arriving) releases[cluster()].arriving = thread.released;
    u32 count = cluster_size() * blockDim.x;
    arrived_at_cluster[cluster()] = (arrived_at_cluster[cluster()] + 1) % count;
    if (arrived_at_cluster[cluster()] > 0) return;
    phase[cluster()] += 1;
    releases[cluster()] = {releases[cluster()].arriving, ~0u};
    for (u32 i = cluster() * count; i < (cluster() + 1) * count; ++i)
        if (threads[i].in_cluster && !strcmp(threads[i].site.what, "wait_for_cluster")) make_ready(i, 1);
}

inline void wait_for_cluster(FROM) {
    using namespace emulated;
    Thread &thread = threads[current];
    if (!thread.in_cluster) FAIL("it waits for the cluster without an arrival (%s:%d)", file, line);
    if (thread.left_phase == phase[cluster()]) emulated::wait(SITE);
    thread.in_cluster = false;
    thread.seen = releases[cluster()].arrived;
}

inline void release_shared() { emulated::threads[emulated::current].released += 1; }

template <typename T>
T read_there(const u32 *words, u32 other, const char *file, int line) {
    using namespace emulated;
    size_t at = (const u8 *)words - blocks[blockIdx.x].memory;
    if (other >= cluster_size() || at + sizeof(T) > shared_bytes) FAIL("it reads byte %zu of block %u (%s:%d)", at, other, file, line);
    other += cluster() * cluster_size();
    if (blocks[other].ended == blockDim.x) FAIL("it reads block %u, which has ended (%s:%d)", other, file, line);
    return *(const T *)(blocks[other].memory + at);
}

inline u32 read_cluster(const u32 *word, u32 other, FROM) { return read_there<u32>(word, other, file, line); }
inline uint4 read_cluster_four(const u32 *words, u32 other, FROM) { return read_there<uint4>(words, other, file, line); }
#endif

inline u64 load_relaxed(const u64 *word) { return *word; }
inline u64 load_acquire(const u64 *word) { return *word; }
inline void store_relaxed(u64 *word, u64 value) { *word = value; }

// It goes on as it is read, so lanes read different times.
inline u64 now_ns() {
    emulated::meanwhile(emulated::for_meanwhile);
    return emulated::clock_ns += 100;
}
