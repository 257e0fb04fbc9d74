"""The kernels' time: GPU time inside a CUDA graph, host time a call. ``gpu.py own``, ``sglang``, ``move_up`` or ``live``.

GPU time: a graph of CALLS calls, replayed REPLAYS times between two events; the median replay over CALLS. The
inputs rotate over several sets. ``own`` begins with the same of a memset of one float: about what a launch alone takes.
``sglang``: the same beside the static mode of the sglang that is installed (below 64 rows it leaves shared rows at
home), the two graphs in turn. ``move_up``: ids alone, beside torch's cast to int64, which it takes the place of; the two in
turn too, MOVES calls a graph. ``live``: RANKS processes, spread over the GPUs there are (where some share one, start
``nvidia-cuda-mps-control -d`` before), a planner beside them, the time of each rank's replays.
"""

from __future__ import annotations

import os
import secrets
import statistics
import subprocess
import sys
import time

import torch

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander

CALLS, REPLAYS, SETS = 60, 41, 6
OWN_RANKS = (8, 12, 16, 32, 64, 72, 144)
OWN_ROWS = (1, 8, 32, 128, 1024, 4096, 16384)
MOVES = 64
MOVE_ROWS = (1, 8, 32, 128, 1024, 8192, 16384)
LIVE_RANKS = (1, 2, 4, 8)
LIVE_ROWS = (8, 128, 4096)
TOP_K = 6


def inputs(
    rows: int, experts: int, seed: int = 0, top_k: int = TOP_K
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator(device="cuda").manual_seed(seed)
    sets = []
    for _ in range(SETS):
        popularity = torch.randn(experts, generator=random, device="cuda").mul(0.7).exp()
        chances = popularity.expand(max(rows, 1), experts)
        ids = torch.multinomial(chances, top_k, generator=random).to(torch.int32)[:rows]
        sets.append((ids.contiguous(), torch.rand((rows, top_k), generator=random, device="cuda")))
    return sets


def graph_of(call, sets, calls: int = CALLS) -> torch.cuda.CUDAGraph:
    call(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(*sets[i % len(sets)])
    return graph


def replay_us(
    graph: torch.cuda.CUDAGraph, replays: int = REPLAYS, calls: int = CALLS
) -> list[float]:
    """Microseconds a call, a value a replay."""
    taken = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / calls)
    return taken


def host_us(call, sets) -> float:
    torch.cuda.synchronize()
    taken = []
    for _ in range(30):
        begin = time.perf_counter()
        for i in range(20):
            call(*sets[i % len(sets)])
        taken.append((time.perf_counter() - begin) / 20 * 1e6)
        torch.cuda.synchronize()
    return statistics.median(taken)


def own(all_ranks=OWN_RANKS, all_rows=OWN_ROWS) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, top {TOP_K}")
    tiny = torch.zeros(1, device="cuda")
    empty = replay_us(graph_of(lambda *_: tiny.zero_(), [(None, None)]))
    print(f"a memset of one float: {statistics.median(empty):.2f} us")
    print("own counts, GPU us (host us)")
    print("EP   experts " + "".join(f"{rows:>15}" for rows in all_rows))
    for ranks in all_ranks:
        experts = -(-256 // ranks) * ranks
        run = Expander("cuda", physical_experts=experts, ranks=ranks, rank=ranks // 2, top_k=TOP_K)
        cells = []
        for rows in all_rows:
            sets = inputs(rows, experts)

            def call(ids, weights, run=run):
                return run(ids, weights, 0.4)

            gpu = statistics.median(replay_us(graph_of(call, sets)))
            cells.append(f"{gpu:>8.2f} ({host_us(call, sets):>4.1f})")
        print(f"{ranks:<5}{experts:<8}" + "".join(cells), flush=True)


def beside_sglang(all_ranks=(8, 16, 32), all_rows=OWN_ROWS) -> None:
    import sglang
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.layers.moe.waterfill import WaterfillBalancer

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, sglang {sglang.__version__}")
    print("own counts beside sglang's static mode, GPU us (host us), and the GPU time's ratio")
    for ranks in all_ranks:
        rank = ranks // 2
        run = Expander("cuda", physical_experts=256, ranks=ranks, rank=rank, top_k=TOP_K)
        theirs = WaterfillBalancer(256, ranks, rank, 0, 2.5)

        def ours(ids, weights, run=run):
            return run(ids, weights, 0.4)

        def static(ids, weights, balancer=theirs):
            return balancer.expand_topk(StandardTopKOutput(weights, ids, None), len(ids))

        for rows in all_rows:
            sets = inputs(rows, 256)
            graphs = [graph_of(call, sets) for call in (ours, static)]
            # In turn, so that both see the same machine.
            turns = [[statistics.median(replay_us(graph, 9)) for graph in graphs] for _ in range(9)]
            gpu = [statistics.median(of) for of in zip(*turns, strict=True)]
            host = [host_us(call, sets) for call in (ours, static)]
            print(
                f"EP {ranks} N={rows}: ours {gpu[0]:.2f} ({host[0]:.1f}), sglang {gpu[1]:.2f} ({host[1]:.1f}), "
                f"{gpu[1] / gpu[0]:.1f}x",
                flush=True,
            )


def move_up(all_rows=MOVE_ROWS, experts: int = 256, ranks: int = 8) -> None:
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {experts} experts on {ranks}"
    )
    print("ids moved up beside torch's cast to int64: GPU us (host us), and the times' ratios")
    for top_k in (6, 8):
        where = dict(physical_experts=experts, ranks=ranks, rank=0)
        run = Expander("cuda", top_k=top_k, **where)

        def ours(ids, _, run=run):
            return run.move_up(ids)

        def cast(ids, _):
            return ids.to(torch.int64)

        for rows in all_rows:
            sets = inputs(rows, experts, top_k=top_k)
            graphs = [graph_of(call, sets, MOVES) for call in (ours, cast)]
            gpu_turns, host_turns = [], []
            # In turn, so that both see the same machine.
            for _ in range(9):
                gpu_turns.append([statistics.median(replay_us(of, 9, MOVES)) for of in graphs])
                host_turns.append([host_us(call, sets) for call in (ours, cast)])
            gpu, host = (
                [statistics.median(of) for of in zip(*turns, strict=True)]
                for turns in (gpu_turns, host_turns)
            )
            print(
                f"top {top_k} N={rows}: ours {gpu[0]:.2f} ({host[0]:.2f}), cast {gpu[1]:.2f} ({host[1]:.2f}), "
                f"{gpu[0] / gpu[1]:.2f}x ({host[0] / host[1]:.2f}x)",
                flush=True,
            )


def live() -> None:
    print(
        f"{torch.cuda.device_count()} GPUs; live, us a call in a graph: median of the ranks' medians, slowest rank's p99 and p99.9 of replays; own counts beside"
    )
    for experts in (None, 256):
        for ranks in LIVE_RANKS:
            name, run = f"waterfill-bench-{os.getpid()}-{ranks}", secrets.randbits(120)
            arguments = [name, str(run), str(ranks), str(experts or ranks)]
            board = _native.Board.create(name, ranks, experts or ranks, run)
            workers = [
                subprocess.Popen(
                    [sys.executable, __file__, "rank", str(rank), *arguments],
                    stdout=subprocess.PIPE,
                    stdin=subprocess.PIPE,
                    text=True,
                )
                for rank in range(ranks)
            ]
            for worker in workers:
                worker.stdout.readline()
            planner = _native.PlannerThread(
                board, CostModel.rows(), patience_us=10_000_000, pace="spin"
            )
            for rows in LIVE_ROWS:
                own_us = collect(workers, f"own {rows}")
                live_us = collect(workers, f"live {rows}")
                middle = statistics.median(float(line[0]) for line in live_us)
                p99, p999 = (max(float(line[i]) for line in live_us) for i in (1, 2))
                alone = statistics.median(float(line[0]) for line in own_us)
                tally = " ".join(live_us[0][3:])
                print(
                    f"R={ranks} {'per expert' if experts else 'per rank'} N={rows}: {middle:.2f}, p99 {p99:.2f}, p99.9 {p999:.2f}; "
                    f"own {alone:.2f}; {tally}",
                    flush=True,
                )
            for worker in workers:
                worker.stdin.close()
                worker.wait()
            planner.stop()
            board.unlink()


def collect(workers, command: str) -> list[list[str]]:
    for worker in workers:
        worker.stdin.write(command + "\n")
        worker.stdin.flush()
    return [worker.stdout.readline().split() for worker in workers]


def rank_process(rank: int, name: str, run: int, ranks: int, experts: int) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    board = _native.Board.attach(name, ranks, experts, run)
    expander = Expander(
        "cuda", physical_experts=256, ranks=ranks, rank=rank, top_k=TOP_K, board=board
    )
    graphs = {}
    for rows in LIVE_ROWS:
        sets = inputs(rows, 256, rank)
        graphs["own", rows] = graph_of(lambda i, w: expander(i, w, 0.4), sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                expander(*sets[i % SETS], 0.4, cap_us=5_000_000)
        graphs["live", rows] = graph
    print("ready", flush=True)
    for line in sys.stdin:
        mode, rows = line.split()
        taken = sorted(replay_us(graphs[mode, int(rows)], 1001 if mode == "live" else 101)[1:])
        tally = expander.tally()
        print(
            statistics.median(taken),
            taken[-len(taken) // 100],
            taken[-max(len(taken) // 1000, 1)],
            *(f"{how}={calls}" for how, calls in tally.items()),
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank_process(int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
    elif sys.argv[1] == "live":
        live()
    elif sys.argv[1] == "sglang":
        beside_sglang()
    elif sys.argv[1] == "move_up":
        move_up()
    else:
        own()
