"""Which ranks are slow, and which experts are hot: what an operator looks for where a recording is uneven."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.report import Expert
from waterfill_rs.policies.summary import mean, of
from waterfill_rs.replay.recorded import Counts, Tokens

__all__ = ["hottest", "print_hottest", "rank_loads"]

RANKS, LAYERS, EXPERTS = 3, 3, 2
"""The most that are printed: ranks, layers, and experts of a layer."""


def rank_loads(results: list[Result]) -> list[float]:
    """``[R]`` of one policy: each rank's cost over that of the mean rank with shared experts at home, over all results."""
    sums = map(sum, zip(*(result.loads for result in results), strict=True))
    level = mean(results)
    return [load / level for load in sums]


def hottest(dump: Tokens | Counts, results: list[Result]) -> list[Expert]:
    """The hottest experts of a few layers, in the passes of ``results``.

    First come the layers in which most of the slowest rank's routed cost is above the mean: shared rows cannot level that.
    """
    rows = _routed(dump, list({result.pass_id for result in results}))
    above: dict[int, float] = defaultdict(float)
    for result in of(results, results[0].policy):
        above[result.layer] += max(0.0, result.routed_max - result.home_mean)
    times = rows / rows.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
    order = sorted(above, key=lambda layer: (-above[layer], -float(times[layer].max())))
    found = []
    for layer in order[:LAYERS]:
        best = times[layer].topk(min(EXPERTS, dump.experts)).indices.tolist()
        found += [_expert(dump, layer, expert, rows, times) for expert in best]
    return found


def print_hottest(results: list[Result], experts: list[Expert]) -> None:
    """A few lines: the slowest ranks, and the hottest experts by layer."""
    loads = {p: rank_loads(of(results, p)) for p in ("home", "live") if of(results, p)}
    if loads:
        first = next(iter(loads.values()))
        order = sorted(range(len(first)), key=lambda rank: -first[rank])
        ranks = (
            f"rank {rank} {', '.join(f'{own[rank]:.3f}' for own in loads.values())}"
            for rank in order[:RANKS]
        )
        print(f"Slowest ranks over the mean ({', '.join(loads)}): {'; '.join(ranks)}.")
    if experts:
        print("Hottest experts, rows over their layer's mean expert, the least level layers first:")
    by_layer: dict[int, list[Expert]] = defaultdict(list)
    for expert in experts:
        by_layer[expert.layer].append(expert)
    for layer, own in by_layer.items():
        print(f"  layer {layer}: {'; '.join(map(_in_words, own))}")


def _in_words(expert: Expert) -> str:
    other = "" if expert.logical == expert.physical else f" (logical {expert.logical})"
    return f"expert {expert.physical}{other} on rank {expert.rank}, {expert.times:.1f} times"


def _expert(dump: Tokens | Counts, layer: int, expert: int, rows: Tensor, times: Tensor) -> Expert:
    logical = expert
    if dump.places is not None:
        logical = int(dump.places[layer, expert])
    elif dump.mappings is not None:
        logical = dump.mappings[layer][expert]
    return Expert(
        layer=layer,
        physical=expert,
        logical=logical,
        rank=expert * dump.ranks // dump.experts,
        rows=int(rows[layer, expert]),
        times=float(times[layer, expert]),
    )


def _routed(dump: Tokens | Counts, passes: list[int]) -> Tensor:
    """``[L, P]`` int64: each physical expert's rows over these passes and all ranks."""
    if isinstance(dump, Counts):
        first, *others = (dump.passes[i].sum(0, dtype=torch.int64) for i in passes)
        return sum(others, first)
    layers = dump.passes[passes[0]][0].shape[0]
    rows = torch.zeros(layers, dump.experts + 1, dtype=torch.int64)
    one = torch.ones(1, dtype=torch.int64)
    for ids in (own for i in passes for own in dump.passes[i]):
        # Ids of -1 are counted in the last place.
        flat = ids[:, :, : dump.top_k].flatten(1).long()
        rows.scatter_add_(1, flat.where(flat >= 0, dump.experts), one.expand_as(flat))
    return rows[:, :-1]
