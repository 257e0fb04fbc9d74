// What only PTX can say: shared memory, a cluster's blocks, words that the host sees, the clock. The test without a
// GPU puts its own in place of this file (rust/cuda-emulator/src/ptx.h).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u8 *shared_memory() {
    extern __shared__ __align__(16) u8 memory[];
    // Its address in a register: the compiler else asks a special register for it wherever it is used, each time anew.
    u32 address = (u32)__cvta_generic_to_shared(memory);
    asm("" : "+r"(address));
    return (u8 *)__cvta_shared_to_generic(address);
}

#if CLUSTERED
__device__ __forceinline__ u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}

// All threads of all blocks call both, the second after the first.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
// Orders: acquire.
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Before an arrival. Orders: release, of this block's shared memory alone: nothing else is exchanged, and a release of
// all memory waits until the routed columns are written, which takes as long as a round. What was read of other blocks is
// here by then, as it was stored in this one's memory, or added up.
__device__ __forceinline__ void release_shared() {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
#else
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}

// The word of another block that is where `word` is in this one.
__device__ __forceinline__ u32 read_cluster(const u32 *word, u32 other) {
    u32 address = (u32)__cvta_generic_to_shared(word), there, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(other));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
    return value;
}

// Four words likewise; aligned to 16 bytes.
__device__ __forceinline__ uint4 read_cluster_four(const u32 *words, u32 other) {
    u32 address = (u32)__cvta_generic_to_shared(words), there;
    uint4 four;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(other));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w) : "r"(there) : "memory");
    return four;
}
#endif

__device__ __forceinline__ u64 load_relaxed(const u64 *word) {
    u64 value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

// As there, and what its writer stored before is seen by what this thread reads afterwards.
__device__ __forceinline__ u64 load_acquire(const u64 *word) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void store_relaxed(u64 *word, u64 value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ u64 now_ns() {
    u64 time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}
