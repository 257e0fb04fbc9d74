// The blocks that work together: a cluster that reads each other's shared memory (sm_90 and later) if CLUSTERED, else one.
// Behind the cluster there may be another one, of writers.

#if CLUSTERED
__device__ __forceinline__ u32 blocks() { return cluster_size(); }
#else
__device__ __forceinline__ u32 blocks() { return 1; }
#endif
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

// Of all blocks, and of those before this one.
struct Sum {
    u32 all, before;
};

// A word of each block added up, several in flight at once.
__device__ __forceinline__ Sum sum_blocks(const u32 *word) {
    static constexpr u32 AT_ONCE = CLUSTERED ? 8 : 1;
    Sum sum{0, 0};
#pragma unroll 1
    for (u32 first = 0; first < blocks(); first += AT_ONCE) {
        u32 values[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) values[j] = first + j < blocks() ? read_block(word, first + j) : 0;
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            sum.all += values[j];
            sum.before += first + j < block() ? values[j] : 0;
        }
    }
    return sum;
}

// The same for `COUNT` words at once, added to `all` and, if it is not null, to `before`, if there are as many threads as
// words in all blocks: each reads one, beginning with this block's and the next one's. Reading takes as long as a round's
// arithmetic. Gives false where there are too few threads, or one block.
template <u32 COUNT>
__device__ __forceinline__ bool add_blocks(const u32 *words, u32 *all, u32 *before) {
    if (!CLUSTERED || COUNT * blocks() > blockDim.x) return false;
    if (threadIdx.x < COUNT * blocks()) {
        u32 word = threadIdx.x % COUNT, other = block() + threadIdx.x / COUNT;
        other = at_most(other, other - blocks());
        u32 value = read_block(words + word, other);
        atomicAdd(&all[word], value);
        if (before && other < block()) atomicAdd(&before[word], value);
    }
    return true;
}
