"""What a recording is once it is read, and the checks that all its formats share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ANY_TOP_K", "Counts", "Dump", "Tokens", "given_top_k", "replicated", "top_k_doubts"]

ANY_TOP_K = 0
"""Where rows alone matter and tokens do not: counts are read as of one expert a token."""


@dataclass(frozen=True)
class Dump:
    """What all kinds have. ``mappings``: for each layer, the logical expert of each physical one, or None
    where none has replicas. ``notes``: what had to be assumed, a sentence each. ``modes``: forward pass id to
    the ``forward_mode`` of the ranks that routed anything, where they are recorded. ``summed``: each pass is a sum
    over passes. ``places``: where experts stand, the map ``[L, P]``, replicas or not."""

    ranks: int
    experts: int
    top_k: int
    mappings: list[list[int]] | None
    notes: list[str]
    modes: dict[int, list[int]] = field(default_factory=dict, kw_only=True)
    summed: bool = field(default=False, kw_only=True)
    places: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Tokens(Dump):
    """``passes``: forward pass id to one ``[L, tokens, 8]`` tensor of ids a rank, ranks in order."""

    passes: dict[int, list[Tensor]]


@dataclass(frozen=True)
class Counts(Dump):
    """``passes``: forward pass id to counts ``[R, L, P]``, or ``[1, L, P]`` where sources are not known."""

    passes: dict[int, Tensor]


def given_top_k(top_k: int | None, experts: int) -> int:
    """``--top-k``, which counts need."""
    if top_k == ANY_TOP_K:
        return 1
    if top_k is None:
        raise ValueError("counts do not tell how many experts a token has: give --top-k")
    if top_k > experts:
        raise ValueError(f"--top-k {top_k}: the dump has {experts} experts")
    return top_k


def top_k_doubts(layers: list[Tensor], top_k: int) -> list[str]:
    """A sentence, if the rows of a layer are no whole number of tokens.

    Args:
        layers: rows of layers, tensors of any shape.
    """
    sums = torch.cat([rows.flatten() for rows in layers])
    odd = sums % top_k != 0
    if not odd.any():
        return []
    return [
        f"--top-k {top_k} may be wrong: the rows of {int(odd.sum())} of {int((sums > 0).sum())} layers and passes are no whole "
        f"number of tokens, as the {int(sums[odd][0])} of the first. (Mode stat_approx rounds its counts.)"
    ]


def replicated(name: str, mapping: Tensor) -> list[list[int]] | None:
    """The map ``[L, P]`` by layer, if any logical expert is there more than once.

    Raises:
        ValueError: naming the map by ``name``, if a layer's logical experts are not 0 to their number.
    """
    mappings: list[list[int]] = mapping.tolist()
    found = False
    for layer, row in enumerate(mappings):
        named = set(row)
        found |= len(named) < len(row)
        if named != set(range(len(named))):
            odd = min(named ^ set(range(len(named))))
            raise ValueError(
                f"{name} of layer {layer}: {len(named)} logical experts "
                f"are not 0 to {len(named) - 1}; the first that does not fit is {odd}"
            )
    return mappings if found else None
