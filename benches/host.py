"""The core's work beside the same work in numpy: interleaved in one run, medians and their ratio.

Called through Python, so each of ours carries its call's overhead (``cargo bench`` has the times without).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import waterfill_rs
from waterfill_rs.torch import count, expand_topk

ROUNDS = 201


def numpy_level(loads: np.ndarray, rows: int) -> int:
    """The water level by sorting: ``[R]`` loads."""
    ordered = np.sort(loads)
    ranks = np.arange(1, len(loads) + 1)
    levels = -(-(rows + np.cumsum(ordered)) // ranks)
    below = np.append(levels[:-1] <= ordered[1:], True)
    return int(levels[np.argmax(below)])


def numpy_plan(loads: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Shared rows ``[R]``: own rank first, the rest where there is room; no visits."""
    level = max(numpy_level(loads, int(tokens.sum())), int(loads.max()))
    room = level - loads
    home = np.minimum(tokens, room)
    left = int((tokens - home).sum())
    filled = np.minimum(np.cumsum(room - home), left)
    return home + np.diff(filled, prepend=0)


def numpy_table_optimum(
    counts: np.ndarray, ranks: int, tokens: int, rows: np.ndarray, costs: np.ndarray
) -> int:
    """The slowest rank's least cost by bisection: ``[P]`` counts, a table of ``rows`` and their ``costs``."""
    of_expert = np.append(costs, 0)[np.where(counts == 0, -1, np.searchsorted(rows, counts))]
    bases = of_expert.reshape(ranks, -1).sum(1)
    room = np.append(0, rows)
    low, high = int(bases.min()), int(bases.min() + costs[np.searchsorted(rows, tokens)])
    while low < high:
        middle = (low + high) // 2
        rooms = room[np.searchsorted(costs, middle - bases, side="right")]
        low, high = (low, middle) if rooms.sum() >= tokens else (middle + 1, high)
    return max(low, int(bases.max()))


def numpy_count(ids: np.ndarray, experts: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.bincount(ids.ravel(), minlength=experts)
    visited = np.zeros((len(ids), ranks), dtype=bool)
    visited[np.arange(len(ids))[:, None], ids // (experts // ranks)] = True
    return counts, visited.sum(0)


def numpy_expand(
    ids: np.ndarray, weights: np.ndarray, quotas: np.ndarray, experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to quotas in order: without looking at what each token visits, which ours does."""
    ranks, per_rank = len(quotas), experts // len(quotas)
    shared = np.repeat(np.arange(ranks), quotas) * (per_rank + 1) + per_rank
    out = np.column_stack([ids + ids // per_rank, shared.astype(ids.dtype)])
    return out, np.column_stack([weights, np.full(len(ids), 0.4, weights.dtype)])


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    mine, numpys = (statistics.median(taken) * 1e6 for taken in times)
    print(f"{name:<28}{mine:>10.1f}{numpys:>10.1f}{numpys / mine:>9.1f}x", flush=True)


def main() -> None:
    random = np.random.default_rng(0)
    print(f"{'':<28}{'ours us':>10}{'numpy us':>10}{'ratio':>10}")
    for ranks in (8, 72, 1024):
        loads, tokens = random.integers(1000, 2000, ranks), random.integers(0, 400, ranks)
        lists = loads.tolist(), tokens.tolist()
        plan = waterfill_rs.plan(*lists, ranks=ranks)
        rows = numpy_plan(loads, tokens)
        assert rows.sum() == tokens.sum() and (loads + rows).max() == plan.optimum
        compare(
            f"plan, {ranks} ranks",
            lambda ranks=ranks, lists=lists: waterfill_rs.plan(*lists, ranks=ranks),
            lambda loads=loads, tokens=tokens: numpy_plan(loads, tokens),
        )
    experts, ranks = 256, 8
    curve = [(256, 22.0), (512, 41.0), (768, 62.0), (1024, 82.0), (4096, 330.0)]
    table, tokens = waterfill_rs.CostModel.table(curve), [256] * ranks
    routed = random.integers(0, 400, experts)
    rows, costs = (np.array(column) for column in zip(*curve, strict=True))
    costs = (costs * 1e6).astype(np.int64)
    listed = routed.tolist()

    def plan_table() -> waterfill_rs.Plan:
        return waterfill_rs.plan(listed, tokens, ranks=ranks, cost_model=table)

    def numpy_table() -> int:
        return numpy_table_optimum(routed, ranks, sum(tokens), rows, costs)

    assert plan_table().optimum == numpy_table()
    compare("plan, table, 8 x 256", plan_table, numpy_table)
    ids = torch.from_numpy(
        random.permuted(np.tile(np.arange(experts), (4096, 1)), axis=1)[:, :6].copy()
    )
    ids = ids.int()
    weights = torch.full(ids.shape, 0.25)
    counts, visits, _ = count(ids, physical_experts=experts, ranks=ranks)
    assert [counts, visits] == [list(x) for x in numpy_count(ids.numpy(), experts, ranks)]
    compare(
        "count, 4096 x 6",
        lambda: count(ids, physical_experts=experts, ranks=ranks),
        lambda: numpy_count(ids.numpy(), experts, ranks),
    )
    quotas = [128, 384, 448, 576, 608, 640, 640, 672]
    shape = {"physical_experts": experts, "ranks": ranks, "rank": 0, "shared_weight": 0.4}
    compare(
        "assign + expand, 4096 x 6",
        lambda: expand_topk(ids, weights, **shape, quotas=quotas),
        lambda: numpy_expand(ids.numpy(), weights.numpy(), np.array(quotas), experts),
    )


if __name__ == "__main__":
    main()
