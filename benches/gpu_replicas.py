"""GPU time of a call that chooses replicas, beside calls that do not: ``gpu_replicas.py``.

RANKS processes, spread over the GPUs there are (where some share one, start ``nvidia-cuda-mps-control -d`` before), with the
planner's thread in this one. Each rank replays graphs of CALLS calls; the medians of its replays over CALLS. The calls:
``move_up``: ids moved up as they are. ``primaries``: by primary replicas. ``alone``: all that a choice does but the wait,
on a board without a planner. ``choose``: by a live plan, ids moved up.
``choose+expand``: by a live plan, and the shared rows with it, which are two launches.
Redundant experts are each rank's last: replicas of experts of the next rank.
"""

from __future__ import annotations

import os
import secrets
import statistics
import subprocess
import sys

import torch
from gpu import CALLS, SETS, collect, inputs, replay_us

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander

RANKS = (1, 2, 4, 8)
ROWS = (8, 128, 4096)
SIZES = ((64, 16, 6), (256, 32, 8))
"""Logical experts, redundant ones, top-k."""
MODES = ("move_up", "primaries", "alone", "choose", "choose+expand")
LONG_US = 5_000_000


def mapping(ranks: int, logical: int, redundant: int) -> list[int]:
    """``[P]`` the logical expert of each physical one."""
    own, more = logical // ranks, redundant // ranks
    return [
        (rank if slot < own else (rank + 1) % ranks) * own + slot % own
        for rank in range(ranks)
        for slot in range(own + more)
    ]


def main() -> None:
    gpus = torch.cuda.device_count()
    print(f"{gpus} x {torch.cuda.get_device_name()}: us a call in a graph, median of the ranks'")
    for logical, redundant, top_k in SIZES:
        for ranks in (number for number in RANKS if number <= gpus):
            measure(ranks, logical, redundant, top_k)


def measure(ranks: int, logical: int, redundant: int, top_k: int) -> None:
    name, run = f"waterfill-bench-{os.getpid()}-{ranks}", secrets.randbits(120)
    experts = logical + redundant
    board = _native.Board.create(name, ranks, experts, run, redundant)
    sizes = [name, *map(str, (run, ranks, logical, redundant, top_k))]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *sizes],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    planner = _native.PlannerThread(board, CostModel.rows(), patience_us=2 * LONG_US, pace="spin")
    planner.set_map(0, _native.ReplicaTable(ranks, mapping(ranks, logical, redundant)))
    for worker in workers:
        worker.stdout.readline()
    for rows in ROWS:
        found = {mode: collect(workers, f"{mode} {rows}") for mode in MODES}
        middle = {mode: statistics.median(float(line[0]) for line in found[mode]) for mode in MODES}
        figures = ", ".join(f"{mode} {time:.2f}" for mode, time in middle.items())
        print(
            f"R={ranks} {logical}+{redundant} N={rows}: {figures}; {found[MODES[-1]][0][1]}",
            flush=True,
        )
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    planner.stop()
    board.unlink()


def rank_process(
    rank: int, name: str, run: int, ranks: int, logical: int, redundant: int, top_k: int
) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    experts, of_logical = logical + redundant, mapping(ranks, logical, redundant)
    board = _native.Board.attach(name, ranks, experts, run, redundant)
    where = dict(physical_experts=experts, ranks=ranks, rank=rank, top_k=top_k)
    expander = Expander("cuda", board=board, redundant=redundant, **where)
    without_planner = _native.Board.create(f"{name}-{rank}", ranks, experts, run, redundant)
    alone = Expander("cuda", board=without_planner, redundant=redundant, **where)
    table = _native.ReplicaTable(ranks, of_logical)
    words, primaries = (
        torch.tensor(each, dtype=torch.int32, device="cuda")
        for each in (table.words, table.primaries)
    )
    own = torch.tensor(of_logical, device="cuda")

    def choose(ids, moved):
        return expander.choose_replicas(ids, words, own, moved=moved, cap_us=LONG_US)

    # It waits twice in vain, and from then on no call does.
    def choose_alone(ids):
        return alone.choose_replicas(ids, words, own, moved=True, cap_us=1)

    def choose_and_expand(ids, weights):
        chosen, quotas = choose(ids, False)
        return expander(chosen, weights, 0.4, quotas=quotas)

    calls = {
        "move_up": lambda ids, _: expander.move_up(ids),
        "primaries": lambda ids, _: expander.move_up(ids, primaries, own),
        "alone": lambda ids, _: choose_alone(ids),
        "choose": lambda ids, _: choose(ids, True),
        "choose+expand": choose_and_expand,
    }
    graphs = {}
    for rows in ROWS:
        sets = inputs(rows, experts, rank, top_k)
        for mode, call in calls.items():
            graphs[mode, rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[mode, rows]):
                for i in range(CALLS):
                    call(*sets[i % SETS])
    print("ready", flush=True)
    for line in sys.stdin:
        mode, rows = line.split()
        taken = replay_us(graphs[mode, int(rows)], 201)[1:]
        ended = ",".join(f"{how}={calls}" for how, calls in expander.tally().items() if calls)
        print(statistics.median(taken), ended or "-", flush=True)
    without_planner.unlink()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_process(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
