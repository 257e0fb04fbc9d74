// The blocks of one launch: a cluster that reads each other's shared memory (sm_90 and later), or one block.

__device__ __forceinline__ u32 blocks() { return gridDim.x; }
__device__ __forceinline__ u32 block() { return blockIdx.x; }

// All blocks are here, and see each other's shared memory as of here. Orders: release, acquire.
__device__ __forceinline__ void sync_blocks() {
#if __CUDA_ARCH__ >= 900
    if (blocks() > 1) {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// The word of another block that is where `word` is in this one.
__device__ __forceinline__ u32 read_block(const u32 *word, u32 other) {
#if __CUDA_ARCH__ >= 900
    if (blocks() > 1) {
        u32 address = (u32)__cvta_generic_to_shared(word), there, value;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(other));
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
        return value;
    }
#endif
    return *word;
}

__device__ __forceinline__ u32 sum_blocks(const u32 *word) {
    u32 sum = 0;
    for (u32 other = 0; other < blocks(); ++other) sum += read_block(word, other);
    return sum;
}
