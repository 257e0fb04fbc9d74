"""Joint plans against a linear program, which may split rows in fractions: ``joint.py [COUNTS.npz]``.

COUNTS.npz holds arrays ``[layers, experts]`` of rows for each logical expert, one a workload; layers without rows are
dense. Replicas are placed for the first workload by name, and the last one is planned. Without it the rows are synthetic
(``synthetic_routing.py``). Fails unless each plan is the linear program's optimum, rounded up to a whole row.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import synthetic_routing
from scipy import optimize, sparse

import waterfill_rs

TOP_K = 8
SHAPES = ((8, 32), (16, 32), (32, 32), (64, 64))
"""EP size and redundant experts."""
LAYERS = 10
ROUNDING = 1e-9
"""Of the linear program's floats, relative."""


class Found(NamedTuple):
    """The slowest rank's rows: of the linear program, of the joint plan, and of a plan that leaves replicas as they are; the mean."""

    program: float
    joint: int
    live: int
    mean: float

    @property
    def rows_over(self) -> int:
        """Rows of the joint plan over the optimum in whole rows, which is the linear program's, rounded up."""
        return self.joint - math.ceil(self.program * (1 - ROUNDING))


def layers_of(file: Path | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows by expert of the first workload and of the last, for up to ``LAYERS`` layers that are not dense."""
    if file is None:
        first, last = synthetic_routing.expert_rows(2, LAYERS, 256, 67_000_000)
    else:
        with np.load(file) as content:
            names = sorted(content.files)
            first, last = (content[name].astype(np.int64) for name in (names[0], names[-1]))
        routed = first.any(1) & last.any(1)
        first, last = first[routed], last[routed]
    every = -(-len(first) // LAYERS)
    yield from zip(first[::every], last[::every], strict=True)


def solve(before: np.ndarray, counts: np.ndarray, ranks: int, redundant: int) -> Found:
    """``counts``: rows by expert; ``before``: those that the replicas were placed for."""
    mapping = place(before, ranks, redundant)
    routed = np.zeros(len(mapping), np.int64)
    for expert in range(len(counts)):  # as the router splits them: evenly
        held = [p for p, e in enumerate(mapping) if e == expert]
        for index, p in enumerate(held):
            routed[p] = (counts[expert] + index) // len(held)
    tokens = int(counts.sum()) // TOP_K
    sources = [tokens // ranks + (r < tokens % ranks) for r in range(ranks)]
    joint = waterfill_rs.plan(
        routed, sources, ranks=ranks, physical_to_logical=mapping, policy="joint"
    )
    live = waterfill_rs.plan(routed, sources, ranks=ranks)
    mean = (int(counts.sum()) + tokens) / ranks
    program = linear_program(counts, mapping, ranks, tokens)
    return Found(program, joint.optimum, live.optimum, mean)


def place(counts: np.ndarray, ranks: int, redundant: int) -> list[int]:
    """Physical to logical: replicas to the heaviest expert a replica, then heaviest to the lightest rank."""
    replicas = np.ones(len(counts), int)
    for _ in range(redundant):
        replicas[np.argmax(counts / replicas)] += 1
    share = counts / replicas
    per_rank = (len(counts) + redundant) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for expert in np.argsort(-share, kind="stable"):
        for _ in range(replicas[expert]):
            free = [r for r in range(ranks) if len(held[r]) < per_rank]
            rank = min(free, key=lambda r: (expert in held[r], load[r]))
            held[rank].append(int(expert))
            load[rank] += share[expert]
    return [expert for rank in held for expert in rank]


def linear_program(counts: np.ndarray, mapping: list[int], ranks: int, tokens: int) -> float:
    """The least rows of the slowest rank where rows may be split in fractions."""
    physical, experts = len(mapping), len(counts)
    per_rank = physical // ranks
    top = physical + ranks
    logical = sparse.lil_matrix((experts + 1, top + 1))
    for p, expert in enumerate(mapping):
        logical[expert, p] = 1
    logical[experts, physical:top] = 1
    below = sparse.lil_matrix((ranks, top + 1))
    for rank in range(ranks):
        below[rank, rank * per_rank : (rank + 1) * per_rank] = 1
        below[rank, physical + rank] = 1
        below[rank, top] = -1
    cost = np.zeros(top + 1)
    cost[top] = 1
    total = np.append(counts, tokens)
    solved = optimize.linprog(
        cost, A_ub=below.tocsr(), b_ub=np.zeros(ranks), A_eq=logical.tocsr(), b_eq=total
    )
    if not solved.success:
        raise RuntimeError(f"EP{ranks}: the linear program was not solved: {solved.message}")
    return float(solved.fun)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", type=Path, metavar="COUNTS.npz", nargs="?")
    asked = parser.parse_args()
    print("| EP | redundant | layers | live, over the mean | joint | most rows over the optimum |")
    print("|---|---|---|---|---|---|", flush=True)
    worst = 0
    for ranks, redundant in SHAPES:
        found = [solve(*rows, ranks, redundant) for rows in layers_of(asked.counts)]
        over = max(one.rows_over for one in found)
        live, joint = (
            np.mean([rows / one.mean for one, rows in zip(found, of, strict=True)])
            for of in ([one.live for one in found], [one.joint for one in found])
        )
        print(
            f"| {ranks} | {redundant} | {len(found)} | {live:.3f} | {joint:.3f} | {over} |",
            flush=True,
        )
        worst = max(worst, over)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
