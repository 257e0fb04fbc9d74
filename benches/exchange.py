"""The board's call beside a gloo all-reduce of the same counts: turn by turn in one run, medians and their ratio.

``exchange.py [RANKS ...]``: for each, three turns of each side, ranks as processes. A call is post, merge,
plan and read; the all-reduce alone is less work, it only adds the counts up. ``inline``: the leader plans while
it waits; ``spin``: a thread does, where there are cores for it. ``--program F`` takes a built example ``calls``
instead of building it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
TURNS = 3
CALLS = 100_000
ALL_REDUCES = 3000
PARTS = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", nargs="*", type=int, default=[2])
    parser.add_argument("--program", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    program = arguments.program or build()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; medians of {TURNS} turns, microseconds")
    print(f"{'ranks':>6}{'':>10}{'p50':>10}{'p99':>10}{'p99.9':>10}{'gloo p50':>12}{'ratio':>8}")
    found = []
    for ranks in arguments.ranks:
        paces = ["inline"] + (["spin"] if cores > ranks else [])
        turns = [
            {pace: calls(program, ranks, pace) for pace in paces} | {"gloo": gloo(ranks)}
            for _ in range(TURNS)
        ]
        medians = {
            side: {part: statistics.median(turn[side][part] for turn in turns) for part in PARTS}
            for side in (*paces, "gloo")
        }
        for pace in paces:
            ours, theirs = medians[pace], medians["gloo"]["p50_us"]
            print(
                f"{ranks:>6}{pace:>10}"
                + "".join(f"{ours[part]:>10.2f}" for part in PARTS)
                + f"{theirs:>12.1f}{theirs / ours['p50_us']:>7.0f}x",
                flush=True,
            )
        found.append({"ranks": ranks, "cores": cores, **medians})
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def build() -> Path:
    command = ["cargo", "build", "--release", "--package", "waterfill-board", "--example", "calls"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ROOT / "target/release/examples/calls"


def calls(program: Path, ranks: int, pace: str) -> dict[str, float]:
    command = [program, str(ranks), str(CALLS), pace]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def gloo(ranks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(all_reduces, args=(ranks, folder), nprocs=ranks)
        return json.loads((Path(folder) / "times.json").read_text())


def all_reduces(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    counts = torch.ones(1 + 2 * ranks, dtype=torch.int32)
    times = []
    for _ in range(ALL_REDUCES):
        begun = time.perf_counter()
        dist.all_reduce(counts)
        times.append((time.perf_counter() - begun) * 1e6)
        counts.fill_(1)
    times.sort()
    if rank == 0:
        quantiles = {name: times[int((len(times) - 1) * part)] for name, part in PARTS.items()}
        (Path(folder) / "times.json").write_text(json.dumps(quantiles))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
