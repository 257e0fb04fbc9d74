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
    // [experts] the primary replica of each expert's logical one, by which an id goes out; null: by the id itself.
    const u32 *primaries;
    const long long *logical;  // [experts] the logical expert of each by the server's own map, or null.
    u64 count;  // DEFECT(moved-length)
    u32 rank_multiplier;  // As in `Args`.
    u32 experts;
};

// The primary replica of an id's expert, if it is of the same logical expert by the server's own map; else the id.
__device__ __forceinline__ ID primary_of(const MoveArgs &args, ID id) {
    if ((UNSIGNED_ID)id >= args.experts) return id;
    u32 primary = args.primaries[id];
    if (primary >= args.experts) return id;  // DEFECT(primary-expert)
    if (args.logical && args.logical[primary] != args.logical[id]) return id;  // DEFECT(primary-logical)
    return (ID)primary;
}

// In one of a shape's modules: the one for one block and own counts alone, which compiles fastest.
#if OWN_ONLY && !CLUSTERED
// A thread an id, so all are in flight at once: the 65,536 of a prefill of 8192 tokens are one wave of blocks on an H100.
extern "C" __global__ void __launch_bounds__(MOVE_THREADS) move_up(const __grid_constant__ MoveArgs args) {
    u64 i = (u64)blockIdx.x * MOVE_THREADS + threadIdx.x;  // DEFECT(moved-block)
    if (i >= args.count) return;  // DEFECT(moved-count)
    ID id = args.ids[i];
    if (args.primaries) id = primary_of(args, id);  // DEFECT(moved-primary)
    args.out[i] = moved_up(id, rank_of_expert(id, args.rank_multiplier), (UNSIGNED_ID)id < args.experts);  // DEFECT(moved-id)
}
#endif
