// The blocks that work together: a cluster that reads each other's shared memory (sm_90 and later) if CLUSTERED, else one.
// Behind the cluster there may be another one, of writers.
#pragma once

#include "ptx.cuh"
#include "types.cuh"

#if CLUSTERED
__device__ __forceinline__ u32 blocks() { return cluster_size(); }
#else
__device__ __forceinline__ u32 blocks() { return 1; }
#endif
__device__ __forceinline__ u32 block() { return CLUSTERED ? blockIdx.x : 0; }

// All blocks are here, and see each other's shared memory as of here. Orders: release, acquire.
__device__ __forceinline__ void sync_blocks() {
#if CLUSTERED
    release_shared();  // DEFECT(release)
    arrive_at_cluster();
    wait_for_cluster();
#else
    __syncthreads();
#endif
}

// The same in halves: nothing of another block is read after the first, and its memory may go after the second.
__device__ __forceinline__ void leave_blocks() {
#if CLUSTERED
    arrive_at_cluster();
#endif
}

__device__ __forceinline__ void end_blocks() {
#if CLUSTERED
    wait_for_cluster();
#endif
}

// The word of another block that is where `word` is in this one.
__device__ __forceinline__ u32 read_block(const u32 *word, u32 other) {
#if CLUSTERED
    return read_cluster(word, other);
#else
    return *word;
#endif
}

// A word of each block added up, several in flight at once.
__device__ __forceinline__ u32 sum_blocks(const u32 *word) {
    static constexpr u32 AT_ONCE = CLUSTERED ? 8 : 1;
    u32 sum = 0;
#pragma unroll 1
    for (u32 first = 0; first < blocks(); first += AT_ONCE) {
        u32 values[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) values[j] = first + j < blocks() ? read_block(word, first + j) : 0;
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) sum += values[j];
    }
    return sum;
}

__device__ __forceinline__ void add_four(u32 *to, uint4 four) {
    atomicAdd(to, four.x);
    atomicAdd(to + 1, four.y);  // DEFECT(add-four)
    atomicAdd(to + 2, four.z);
    atomicAdd(to + 3, four.w);
}

// `COUNT` words of all blocks, a multiple of 4 and aligned so, added to `all`, and those of the blocks before this one to `before`
// if it is not null; these begin as zeros. All threads call it; the sums are complete after their next barrier. Reading takes as
// long as a round's arithmetic, and a thread that reads of several blocks waits for one after the other. So each reads one
// word, or four where there are too few threads, of this block or of one of the next.
template <u32 COUNT>
__device__ __forceinline__ void add_blocks(const u32 *words, u32 *all, u32 *before) {
#if CLUSTERED
    // Of eight blocks, the fewest with so many threads each.
    static constexpr u32 BLOCKS = 8, THREADS = 192;
    static constexpr u32 WORDS = COUNT * BLOCKS <= THREADS ? 1 : 4, READS = COUNT / WORDS;
    static constexpr u32 NEEDED = (READS * BLOCKS + THREADS - 1) / THREADS, AT_ONCE = NEEDED < 4 ? NEEDED : 4;
#pragma unroll 1
    for (u32 start = threadIdx.x; start < READS * blocks(); start += AT_ONCE * blockDim.x) {
        u32 first[AT_ONCE], other[AT_ONCE];
        uint4 read[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            u32 i = start + j * blockDim.x;
            first[j] = i % READS * WORDS;
            other[j] = block() + i / READS;
            other[j] = at_most(other[j], other[j] - blocks());
            if (i >= READS * blocks()) continue;
            if (WORDS == 4) read[j] = read_cluster_four(words + first[j], other[j]);
            else read[j].x = read_cluster(words + first[j], other[j]);
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            if (start + j * blockDim.x >= READS * blocks()) break;
            bool is_before = before && other[j] < block();  // DEFECT(blocks-before)
            if (WORDS == 4) {
                add_four(all + first[j], read[j]);
                if (is_before) add_four(before + first[j], read[j]);
            } else {
                atomicAdd(all + first[j], read[j].x);  // DEFECT(add-one)
                if (is_before) atomicAdd(before + first[j], read[j].x);
            }
        }
    }
#endif
}
