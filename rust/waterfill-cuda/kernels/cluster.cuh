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

// Call `visit(other, value)` for the word of each block, several in flight at once; of blocks that are not there, 0.
template <typename Visit>
__device__ __forceinline__ void for_each_block(const u32 *word, Visit visit) {
    static constexpr u32 IN_FLIGHT = CLUSTERED ? 8 : 1;
#pragma unroll 1
    for (u32 first = 0; first < blocks(); first += IN_FLIGHT) {
        u32 values[IN_FLIGHT];
#pragma unroll
        for (u32 j = 0; j < IN_FLIGHT; ++j) values[j] = first + j < blocks() ? read_block(word, first + j) : 0;
#pragma unroll
        for (u32 j = 0; j < IN_FLIGHT; ++j) visit(first + j, values[j]);
    }
}

__device__ __forceinline__ u32 sum_blocks(const u32 *word) {
    u32 sum = 0;
    for_each_block(word, [&](u32, u32 value) { sum += value; });
    return sum;
}
