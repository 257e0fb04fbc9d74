"""Placements judged by workloads that they were not made from: ``place.py [COUNTS.npz] [--seen 0,3,6] [--eplb]``.

COUNTS.npz holds arrays ``[layers, experts]`` of rows for each logical expert, one a workload; layers without rows are
dense. ``--seen`` are the workloads by name that placements are made from. Without a file the rows are synthetic
(``synthetic_routing.py``). Figures are max/mean of the worst of the other workloads, mean over layers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import joint
import numpy as np
import synthetic_routing
import torch

import waterfill_rs
from waterfill_rs.placement import place, primaries
from waterfill_rs.placement.spread import spread
from waterfill_rs.replay import placements

SHAPES = ((4, 16), (8, 32), (16, 32), (32, 32), (32, 64), (64, 64))
"""EP size and redundant experts."""
WORKLOADS, LAYERS = 8, 10


class Judged(NamedTuple):
    """max/mean: routed rows alone with replicas split evenly and by joint plans, and these with shared rows too.

    ``primary``: routed rows on primary replicas alone; no number where these are not the first of each rank.
    """

    even: float
    joint: float
    with_shared: float
    primary: float


def counts_of(file: Path | None) -> np.ndarray:
    """Rows ``[workloads, layers, experts]`` of up to ``LAYERS`` layers that are not dense in any workload."""
    if file is None:
        return synthetic_routing.expert_rows(WORKLOADS, LAYERS, 256, 67_000_000)
    with np.load(file) as content:
        counts = np.stack([content[name] for name in sorted(content.files)]).astype(np.int64)
    counts = counts[:, counts.any(2).all(0)]
    return counts[:, :: -(-counts.shape[1] // LAYERS)]


def judge(
    counts: np.ndarray, seen: list[int], ranks: int, redundant: int, *, eplb: bool = False
) -> dict[str, Judged]:
    """Each placement that is made from the workloads ``seen``, on the others."""
    layers = list(counts.transpose(1, 0, 2))
    found = {}
    for name, mappings in _placed(counts[seen], ranks, redundant, eplb):
        both = zip(mappings, layers, strict=True)
        worst = [_worst(mapping, np.delete(of, seen, 0), ranks) for mapping, of in both]
        found[name] = Judged(*np.mean(worst, 0).tolist())
    return found


def _placed(
    counts: np.ndarray, ranks: int, redundant: int, eplb: bool
) -> Iterator[tuple[str, list[list[int]]]]:
    """Placements by name, a mapping ``[P]`` for each layer."""
    _, layers, experts = counts.shape
    scaled = np.array([[place.scaled(rows) for rows in of] for of in counts.tolist()])
    sums = scaled.sum(0)
    yield "trivial", placements.trivial(layers, experts, redundant).tolist()
    yield "spread", [spread(experts, redundant, ranks)] * layers
    yield "heaviest first", [joint.place(rows, ranks, redundant) for rows in sums]
    if eplb:
        from waterfill_rs.sglang.eplb import by_eplb

        yield "sglang's EPLB", by_eplb(torch.tensor(sums), redundant, ranks).tolist()
    names = {"place": redundant} | ({} if experts % ranks else {"place, none redundant": 0})
    for name, number in names.items():
        yield (
            name,
            [
                place.place(of.tolist(), ranks=ranks, redundant=number)
                for of in scaled.transpose(1, 0, 2)
            ],
        )


def _worst(mapping: list[int], workloads: np.ndarray, ranks: int) -> Judged:
    each = []
    has_primaries = primaries.are_first(mapping, workloads.shape[1], ranks)
    for workload in workloads.tolist():
        rows = place.scaled(workload)
        each.append(
            (
                place.even(mapping, rows, ranks),
                place.joint(mapping, rows, ranks),
                _with_shared(mapping, rows, ranks),
                primaries.level(mapping, rows, ranks) if has_primaries else math.nan,
            )
        )
    return Judged(*np.max(each, 0).tolist())


def _with_shared(mapping: list[int], rows: list[int], ranks: int) -> float:
    """max/mean after a joint plan, with a shared row for each token."""
    routed = [0 if expert in mapping[:p] else rows[expert] for p, expert in enumerate(mapping)]
    tokens = [sum(rows) // joint.TOP_K // ranks] * ranks
    plan = waterfill_rs.plan(
        routed, tokens, ranks=ranks, physical_to_logical=mapping, policy="joint"
    )
    return plan.optimum * ranks / (sum(rows) + sum(tokens))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", type=Path, metavar="COUNTS.npz", nargs="?")
    parser.add_argument(
        "--seen", action="append", help="numbers of workloads; may be given again (default: 0)"
    )
    parser.add_argument("--eplb", action="store_true", help="the installed sglang's EPLB too")
    asked = parser.parse_args()
    counts = counts_of(asked.counts)
    print(
        "| EP | redundant | seen | placement | even | joint | joint, with shared rows | primary |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for ranks, redundant in SHAPES:
        for text in asked.seen or ["0"]:
            seen = [int(number) for number in text.split(",")]
            for name, found in judge(counts, seen, ranks, redundant, eplb=asked.eplb).items():
                figures = " | ".join("-" if math.isnan(one) else f"{one:.3f}" for one in found)
                print(
                    f"| {ranks} | {redundant} | {len(seen)} | {name} | {figures} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
