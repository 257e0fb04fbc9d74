"""GPU time of a call whose counts come by NCCL, ranks with a GPU each, beside the all-gather of the same words alone.

``python benches/gpu_group.py``: as many ranks as there are GPUs. A row is one shape; microseconds of a call: of a
graph of ``CALLS`` calls, and of a graph of one, which holds what starting a graph takes. All ranks replay together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist

from waterfill_rs.cuda import Expander
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.settings import BoardSettings

EXPERTS, TOP_K = 256, 6
ROWS = (8, 128, 1024, 4096)
CALLS, REPLAYS, SINGLE = 30, 200, 1000


def capture(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def replays(graph: torch.cuda.CUDAGraph, times: int, calls: int) -> tuple[float, float]:
    """Median and 99th percentile over replays, microseconds a call."""
    dist.barrier()
    for _ in range(5):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    took = sorted(begin.elapsed_time(end) * 1e3 / calls for begin, end in events)
    return took[times // 2], took[times * 99 // 100]


def main(rank: int, ranks: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks)
    exchange = open_exchange(
        dist.PrefixStore("bench", store),
        Member(ranks, EXPERTS, rank),
        choice="group",
        settings=BoardSettings(cap_us=5_000, pace="spin"),
        group=dist.group.WORLD,
        device=device,
    )
    alone = Expander(device, physical_experts=EXPERTS, ranks=ranks, rank=rank, top_k=TOP_K)
    own = torch.zeros(1 + 2 * ranks, dtype=torch.int32, device=device)
    if rank == 0:
        print(f"{torch.cuda.get_device_name(device)}, {ranks} ranks, top {TOP_K} of {EXPERTS}")
        print(
            f"{'N':>5} {'':>12} {'p50':>7} {'p99':>7}   one call: {'p50':>7} {'p99':>7}", flush=True
        )
    for rows in ROWS:
        sets = [
            (
                (torch.rand((rows, TOP_K), device=device).pow(1.5) * EXPERTS).int(),
                torch.rand((rows, TOP_K), device=device),
            )
            for _ in range(6)
        ]
        variants: dict[str, Callable[[int], object]] = {
            "all-gather": lambda _: exchange._gather(),
            "count": lambda i, sets=sets: alone.count(*sets[i % 6], own),
            "own counts": lambda i, sets=sets: alone(*sets[i % 6], 1.0),
            "group": lambda i, sets=sets: exchange.expand(*sets[i % 6], 1.0),
        }
        exchange.expand(*sets[0], 1.0)
        for name, call in variants.items():
            many = replays(capture(call, CALLS), REPLAYS, CALLS)
            one = replays(capture(call, 1), SINGLE, 1)
            figures = torch.tensor([*many, *one], device=device)
            dist.all_reduce(figures, dist.ReduceOp.MAX)
            if rank == 0:
                a, b, c, d = figures.tolist()
                print(
                    f"{rows:>5} {name:>12} {a:7.2f} {b:7.2f}             {c:7.2f} {d:7.2f}",
                    flush=True,
                )
    print(f"rank {rank}: {exchange.tally()}", flush=True)
    dist.barrier()
    exchange.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        sys.exit()
    count = torch.cuda.device_count()
    if count < 2:
        sys.exit(f"{count} GPU here: NCCL takes one for each rank, 2 at least")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(count), folder], env=os.environ
            )
            for rank in range(count)
        ]
        sys.exit(max(process.wait() for process in started))
