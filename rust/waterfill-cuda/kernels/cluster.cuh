// The blocks of one launch: a cluster that reads each other's shared memory (sm_90 and later) if CLUSTERED, else one.

__device__ __forceinline__ u32 blocks() { return CLUSTERED ? gridDim.x : 1; }
__device__ __forceinline__ u32 block() { return CLUSTERED ? blockIdx.x : 0; }

// All blocks are here, and see each other's shared memory as of here. Orders: release, acquire.
__device__ __forceinline__ void sync_blocks() {
#if CLUSTERED
    release_shared();
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

__device__ __forceinline__ u32 sum_blocks(const u32 *word) {
    u32 sum = 0;
#pragma unroll 8
    for (u32 other = 0; other < blocks(); ++other) sum += read_block(word, other);
    return sum;
}
