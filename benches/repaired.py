"""EPLB's maps before and after the swaps that let primary replicas come first: ``repaired.py [COUNTS.npz] [--other 3]``.

``repaired.py --made 500`` tells how many layers of made counts were repaired, by both of sglang's algorithms for EPLB.

COUNTS.npz holds arrays ``[layers, experts]`` of rows for each logical expert, one a workload; layers without rows are dense.
The installed sglang's EPLB makes maps of the first workload, and joint plans are of another one. Without a file the rows are
synthetic (``synthetic_routing.py``). Figures are max/mean of ranks' rows, mean over layers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import synthetic_routing
import torch

from waterfill_rs.placement import place, primaries
from waterfill_rs.placement.repair import repaired

SHAPES = (
    *((4, 16), (4, 32), (8, 16), (8, 32), (8, 64), (16, 32)),
    *((32, 32), (32, 64), (64, 64)),
)
"""EP size and redundant experts."""
RANKS_PER_HOST = 8
GROUPS = 8
"""Of experts, which EPLB keeps on a host each: DeepSeek-V3's."""

Maps = list[list[int]]


class Judged(NamedTuple):
    """``ordered``: layers that can have as many primary replicas on each rank."""

    ordered: int
    even: float
    joint: float


def counts_of(file: Path | None, other: int) -> np.ndarray:
    """Rows ``[2, layers, experts]`` of the first workload and the other, in layers that are dense in neither."""
    if file is None:
        return synthetic_routing.expert_rows(2, 10, 256, 67_000_000)
    with np.load(file) as content:
        names = sorted(content.files)
        counts = np.stack([content[names[0]], content[names[other]]]).astype(np.int64)
    return counts[:, counts.any(2).all(0)]


def by_eplb(counts: np.ndarray, ranks: int, redundant: int, hosts: int) -> Maps:
    """With several hosts the hierarchical one."""
    from sglang.srt.eplb.eplb_algorithms import deepseek

    found = deepseek.rebalance_experts(
        torch.tensor(counts), counts.shape[1] + redundant, GROUPS, hosts, ranks, hosts > 1
    )
    return found[0].tolist()


def judge(maps: Maps, counts: np.ndarray, ranks: int) -> Judged:
    """Maps of the layers of ``counts[0]``; joint plans are of ``counts[1]``."""
    experts = counts.shape[2]
    ordered = sum(primaries.fewest(one, experts, ranks) * ranks == experts for one in maps)
    seen, other = ([place.scaled(rows) for rows in of] for of in counts.tolist())
    even = [place.even(one, rows, ranks) for one, rows in zip(maps, seen, strict=True)]
    joint = [place.joint(one, rows, ranks) for one, rows in zip(maps, other, strict=True)]
    return Judged(ordered, float(np.mean(even)), float(np.mean(joint)))


def line(counts: np.ndarray, ranks: int, redundant: int, hosts: int) -> str:
    """A row of the table."""
    maps, rows = by_eplb(counts[0], ranks, redundant, hosts), counts[0].tolist()
    started = time.process_time()
    per_host = min(ranks, RANKS_PER_HOST)
    after = [repaired(one, of, ranks, per_host) for one, of in zip(maps, rows, strict=True)]
    took = time.process_time() - started
    swaps = np.count_nonzero(np.array(maps) != np.array(after)) / 2 / len(maps)
    was, found = judge(maps, counts, ranks), judge(after, counts, ranks)
    return (
        f"| {ranks} | {redundant} | {'flat' if hosts == 1 else f'{hosts} hosts'} | {was.ordered} | {found.ordered} | {swaps:.2f} "
        f"| {was.even:.3f} | {found.even:.3f} | {was.joint:.3f} | {found.joint:.3f} | {took:.2f} |"
    )


def repairs_of_made(number: int) -> str:
    """Of so many maps of 8 layers each, with any skew, also of counts that are nothing for most experts."""
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm, rebalance_experts

    found: Counter[str] = Counter()
    for seed in range(number):
        draws = np.random.default_rng(seed)
        ranks, experts = int(draws.choice([4, 8, 16, 32])), int(draws.choice([64, 128, 256]))
        redundant = ranks * int(draws.choice([1, 2, 4]))
        vec = "" if draws.random() < 0.5 else "_vec"
        hosts = max(ranks // RANKS_PER_HOST, 1)
        split = "_hierarchical" if hosts > 1 and draws.random() < 0.5 else ""
        counts = np.exp(draws.random((8, experts)) * draws.choice([0, 1, 3, 6, 10, 16]))
        counts *= draws.random((8, experts)) < draws.choice([1, 1, 1, 0.3])
        counts = counts.astype(np.int64)
        maps = rebalance_experts(
            tokens_per_expert=torch.tensor(counts)[None],
            num_physical_experts=experts + redundant,
            num_local_physical_experts=(experts + redundant) // ranks,
            num_groups=GROUPS,
            num_nodes=hosts if split else 1,
            algorithm=EplbAlgorithm[f"deepseek{vec}{split}"],
        )[0].tolist()
        for one, rows in zip(maps, counts.tolist(), strict=True):
            after = repaired(one, rows, ranks, min(ranks, RANKS_PER_HOST))
            is_ordered = primaries.fewest(after, experts, ranks) * ranks == experts
            how = "repaired" if after != one else "ordered before"
            found[how if is_ordered else f"not repaired at EP{ranks}, {experts} + {redundant}"] += 1
    return ", ".join(f"{layers} {how}" for how, layers in sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", type=Path, metavar="COUNTS.npz", nargs="?")
    parser.add_argument("--other", type=int, default=3, help="number of the other workload")
    parser.add_argument("--made", type=int, metavar="MAPS", help="so many, of made counts")
    asked = parser.parse_args()
    if asked.made:
        print(repairs_of_made(asked.made))
        return 0
    counts = counts_of(asked.counts, asked.other)
    print(
        f"| EP | redundant | EPLB | ordered, of {counts.shape[1]} | after | swaps a layer "
        "| even | after | joint | after | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for ranks, redundant in SHAPES:
        for hosts in sorted({1, max(ranks // RANKS_PER_HOST, 1)}):
            print(line(counts, ranks, redundant, hosts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
