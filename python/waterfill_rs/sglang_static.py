"""A model of sglang 0.5.23's Waterfill in its default, static mode: what there is to compare with.

Each rank looks at its own counts, gives every rank a weight by how far it is below the mean, its own rank
a little more, and draws a rank for each token by a hash of the token's place. The test runs sglang's own
kernel in Triton's interpreter beside it: the draws are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MIN_TOKENS", "serves", "shared_ranks"]

MIN_TOKENS = 64
"""Smaller batches keep every shared row at home."""

_WORD = 1 << 32


def serves(ranks: int) -> bool:
    """sglang's kernel takes powers of two, and one bit a rank of 32."""
    return 1 <= ranks <= 32 and ranks & (ranks - 1) == 0


def shared_ranks(topk_ids: Tensor, *, physical_experts: int, ranks: int, rank: int) -> Tensor:
    """Each row's shared rank, int32 ``[N]``, -1 for a row without a valid id; ids ``[N, K]``."""
    rows, top_k = topk_ids.shape
    padding = (topk_ids < 0).all(dim=1)
    if rows < MIN_TOKENS:
        chosen = torch.full((rows,), rank)
    else:
        valid = topk_ids[topk_ids >= 0].long()
        load = torch.bincount(valid // (physical_experts // ranks), minlength=ranks)
        chosen = _draw(load, rows, top_k, rank)
    return torch.where(padding, -1, chosen).to(torch.int32)


def _draw(load: Tensor, rows: int, top_k: int, rank: int) -> Tensor:
    weights = _weights(load, top_k, rank)
    total = int(weights.sum())
    if total == 0:
        return torch.full((rows,), _clearly_least(load.tolist(), rank))
    place = torch.arange(rows) ^ (rank * 0x9E3779B9 % _WORD)
    draw = (place * 1664525 + 1013904223) % _WORD % total
    return torch.searchsorted(weights.cumsum(0), draw, right=True)


def _weights(load: Tensor, top_k: int, rank: int) -> Tensor:
    routed = int(load.sum())
    target = -(-(routed + routed // top_k) // len(load))
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
