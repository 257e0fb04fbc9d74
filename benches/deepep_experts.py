"""DeepEP's low-latency mode by the number of experts it is told of, where only the first of each rank have rows.

``deepep_experts.py ADDITIONAL``: on every GPU 32 experts with rows, and so many without. us of a layer in a CUDA graph: a stand-in
of the router, dispatch, a wait of a fixed time in place of the experts, and combine. ``beside``: the two GEMMs of a shared
expert run on another stream meanwhile, as sglang runs them in decode.

One process group takes one number: DeepEP's buffers of several numbers must not be mixed. Run it for each, in turn.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

USED, HIDDEN, INTERMEDIATE, TOP_K = 32, 4096, 2048, 6
MOST_TOKENS, TOKENS = 128, (8, 32, 64, 128)
LAYERS, ROUNDS, REPLAYS = 12, 8, 20
EXPERTS_CYCLES = 60_000
BLOCK = 128


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        raise SystemExit("give the number of experts without rows a rank, e.g. 0, 9 or 17")
    ranks = torch.cuda.device_count()
    print(f"{ranks} x {torch.cuda.get_device_name()}, {USED} + {sys.argv[1]} experts a rank")
    mp.spawn(rank_process, args=(ranks, USED + int(sys.argv[1])), nprocs=ranks)


def rank_process(rank: int, ranks: int, a_rank: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29579"}
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank)
    )
    torch.manual_seed(rank)
    buffer = make_buffer(ranks, ranks * a_rank)
    for tokens in TOKENS:
        for beside in (False, True):
            took = layer_us(buffer, tokens, ranks, a_rank, beside)
            if rank == 0:
                print(f"N={tokens} {'beside' if beside else 'alone'}: {took:.2f}", flush=True)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # NVSHMEM's own end can hang.


def make_buffer(ranks: int, experts: int) -> Any:
    from deep_ep import Buffer

    configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
    nvlink = max(config.get_nvl_buffer_size_hint(HIDDEN * 2, ranks) for config in configs)
    symmetric = Buffer.get_low_latency_rdma_size_hint(MOST_TOKENS, HIDDEN, ranks, experts)
    return Buffer(
        dist.new_group(list(range(ranks))),
        nvlink,
        symmetric,
        low_latency_mode=True,
        num_qps_per_rank=max(20, experts // ranks),
    )


def layer_us(buffer: Any, tokens: int, ranks: int, a_rank: int, beside: bool) -> float:
    experts = ranks * a_rank
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, device="cuda")
    router = torch.randn(HIDDEN, 256, device="cuda", dtype=torch.bfloat16)
    chosen = torch.rand(tokens, ranks * USED, device="cuda").topk(TOP_K).indices
    ids = chosen // USED * a_rank + chosen % USED
    shared, side = shared_expert(tokens), torch.cuda.Stream()

    def layer() -> None:
        now = torch.cuda.current_stream()
        if beside:
            side.wait_stream(now)
            with torch.cuda.stream(side):
                shared()
        for _ in range(3):
            x @ router
        received, _, handle, _, hook = buffer.low_latency_dispatch(
            x, ids, MOST_TOKENS, experts, use_fp8=False, return_recv_hook=True
        )
        hook()
        torch.cuda._sleep(EXPERTS_CYCLES)
        *_, hook = buffer.low_latency_combine(received, ids, weights, handle, return_recv_hook=True)
        hook()
        if beside:
            now.wait_stream(side)

    def clean() -> None:
        buffer.clean_low_latency_buffer(MOST_TOKENS, HIDDEN, experts)
        torch.cuda.synchronize()
        dist.barrier()

    clean()
    layer()
    layer()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            layer()
    took = []
    for _ in range(ROUNDS):
        clean()
        for _ in range(3):
            graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / REPLAYS / LAYERS)
    return statistics.median(took)


def shared_expert(tokens: int) -> Any:
    """Its two GEMMs in FP8, of made weights."""
    import deep_gemm
    from deep_gemm import get_mn_major_tma_aligned_tensor as aligned

    def made(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)
        return values, torch.rand(rows, columns // BLOCK, device="cuda")

    operands = []
    for columns, rows in ((HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)):
        values, scales = made(tokens, columns)
        weight = made(rows, columns)[0], torch.rand(rows // BLOCK, columns // BLOCK, device="cuda")
        out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
        operands.append(((values, aligned(scales)), weight, out))

    def run() -> None:
        first, second = operands
        deep_gemm.fp8_gemm_nt(*first)
        torch.relu(first[2])  # In place of the activation.
        deep_gemm.fp8_gemm_nt(*second)

    return run


if __name__ == "__main__":
    main()
