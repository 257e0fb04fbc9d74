"""A model of sglang 0.5.23's Waterfill in both of its modes: what there is to compare with.

*Static*, the default: each rank looks at its own counts, gives every rank a weight by how far it is below the mean, its own
rank a little more, and draws a rank for each token by a hash of the token's place. *Dynamic*
(``SGLANG_DISABLE_STATIC_WATERFILL=1``): the same draw from the counts of all ranks and their numbers of rows, which it
all-reduces. Where some rank is above the level even so, a token's shared row only goes to its own rank or one it visits.
The test runs sglang's own balancer and kernels in Triton's interpreter beside it: the draws are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MIN_TOKENS", "dynamic_ranks", "serves", "static_ranks"]

MIN_TOKENS = 64
"""A rank with fewer rows keeps all its shared rows at home, in both modes."""

_WORD = 1 << 32


def serves(ranks: int) -> bool:
    """sglang's kernel takes powers of two, and one bit a rank of 32."""
    return 1 <= ranks <= 32 and ranks & (ranks - 1) == 0


def static_ranks(topk_ids: Tensor, *, physical_experts: int, ranks: int, rank: int) -> Tensor:
    """Static mode: each row's shared rank, int32 ``[N]``, -1 for a row without a valid id; ids ``[N, K]``."""
    rows, top_k = topk_ids.shape
    if rows < MIN_TOKENS:
        return _without_padding(topk_ids, torch.full((rows,), rank))
    load = _routed(topk_ids, physical_experts, ranks)
    routed = int(load.sum())
    target = -(-(routed + routed // top_k) // ranks)
    return _without_padding(topk_ids, _draw(load, target, rows, rank))


def dynamic_ranks(topk_ids: Sequence[Tensor], *, physical_experts: int) -> list[Tensor]:
    """Dynamic mode: each row's shared rank as in ``static_ranks``, for the ids ``[N, K]`` of every rank.

    A rank's load is its routed rows and its own rows, padding included. The level is of these and as many shared rows as
    tokens again: sglang counts a shared row twice, at home and where it is to go.
    """
    ranks = len(topk_ids)
    routed = torch.stack([_routed(ids, physical_experts, ranks) for ids in topk_ids]).sum(0)
    load = routed + torch.tensor([len(ids) for ids in topk_ids])
    tokens = int(routed.sum()) // topk_ids[0].shape[1]
    target = -(-(int(load.sum()) + tokens) // ranks)
    everywhere = int(load.max()) <= target
    chosen = []
    for rank, ids in enumerate(topk_ids):
        if len(ids) < MIN_TOKENS:
            own = torch.full((len(ids),), rank)
        elif everywhere:
            own = _draw(load, target, len(ids), rank)
        else:
            own = _draw_visited(load, target, ids, physical_experts // ranks, rank)
        chosen.append(_without_padding(ids, own))
    return chosen


def _without_padding(topk_ids: Tensor, chosen: Tensor) -> Tensor:
    return torch.where((topk_ids < 0).all(dim=1), -1, chosen).to(torch.int32)


def _routed(topk_ids: Tensor, physical_experts: int, ranks: int) -> Tensor:
    valid = topk_ids[topk_ids >= 0].long()
    return torch.bincount(valid // (physical_experts // ranks), minlength=ranks)


def _draw(load: Tensor, target: int, rows: int, rank: int) -> Tensor:
    """For each row any rank, by how far it is below the target."""
    weights = _weights(load, target, rank)
    total = int(weights.sum())
    if total == 0:
        return torch.full((rows,), _clearly_least(load.tolist(), rank))
    return torch.searchsorted(weights.cumsum(0), _hashes(rows, rank) % total, right=True)


def _draw_visited(load: Tensor, target: int, topk_ids: Tensor, per_rank: int, rank: int) -> Tensor:
    """For each row its own rank or one that it visits, by how far that is below the target."""
    visited = torch.where(topk_ids < 0, rank, topk_ids // per_rank).long()
    weights = _weights(load, target, rank).int()
    reach = torch.zeros(len(topk_ids), len(load), dtype=torch.int32)
    reach.scatter_(1, visited, weights[visited])[:, rank] = weights[rank]
    reach = reach.cumsum(1, dtype=torch.int32)
    total = reach[:, -1].long()
    place = (_hashes(len(topk_ids), rank) % total.clamp(min=1)).int()
    drawn = (reach <= place[:, None]).sum(1)
    if total.all():
        return drawn
    return torch.where(total > 0, drawn, _clearly_least_visited(load, visited, rank))


def _hashes(rows: int, rank: int) -> Tensor:
    """``[rows]``, 32 bits, of a row's place and its rank."""
    place = torch.arange(rows) ^ (rank * 0x9E3779B9 % _WORD)
    return (place * 1664525 + 1013904223) % _WORD


def _weights(load: Tensor, target: int, rank: int) -> Tensor:
    gaps = (target - load).clamp(min=0)
    weights = gaps * 10 // 11
    weights[rank] = gaps[rank]
    return weights


def _clearly_least(load: list[int], rank: int) -> int:
    """Where no rank is below the target: the first that is each time a tenth below the last."""
    best = rank
    for other, rows in enumerate(load):
        if rows * 11 < load[best] * 10:
            best = other
    return best


def _clearly_least_visited(load: Tensor, visited: Tensor, rank: int) -> Tensor:
    """The same for each row, among the ranks that it visits, in the order of its experts."""
    best = torch.full((len(visited),), rank)
    for other in visited.unbind(1):
        best = torch.where(load[other] * 11 < load[best] * 10, other, best)
    return best
