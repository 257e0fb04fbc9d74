// Routed ids past the shared experts of the ranks before theirs: the rule, and a kernel that does this alone.
#pragma once

#include "types.cuh"

// id / experts_per_rank, for the id of an expert; `multiplier` is `Args::rank_multiplier`.
__device__ __forceinline__ u32 rank_of_expert(ID id, u32 multiplier) { return __umulhi(2 * (u32)id, multiplier); }  // DEFECT(rank-of-expert)

// An expert's id is moved up by its rank, one shared expert each; a negative id stays. An id past the last expert names
// none, so nothing downstream may take it for one.
__device__ __forceinline__ ID moved_up(ID id, u32 rank, bool expert) {
    return expert ? id + (ID)rank : id < 0 ? id : (ID)-1;  // DEFECT(moved-up)
}

// `MoveArgs` in src/args.rs, field by field. Not `Args`: a launch copies its argument.
struct MoveArgs {
    const ID *ids;        // [count]
    long long *out;       // [count]  // DEFECT(moved-out)
    u64 count;  // DEFECT(moved-length)
    u32 rank_multiplier;  // As in `Args`.
    u32 experts;
};

// In one of a shape's modules: the one for one block and own counts alone, which compiles fastest.
#if OWN_ONLY && !CLUSTERED
// A thread an id, so all are in flight at once: the 65,536 of a prefill of 8192 tokens are one wave of blocks on an H100.
extern "C" __global__ void __launch_bounds__(MOVE_THREADS) move_up(const __grid_constant__ MoveArgs args) {
    u64 i = (u64)blockIdx.x * MOVE_THREADS + threadIdx.x;  // DEFECT(moved-block)
    if (i >= args.count) return;  // DEFECT(moved-count)
    ID id = args.ids[i];
    args.out[i] = moved_up(id, rank_of_expert(id, args.rank_multiplier), (UNSIGNED_ID)id < args.experts);  // DEFECT(moved-id)
}
#endif
