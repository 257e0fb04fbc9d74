"""Where experts stand: maps ``[L, P]`` from physical to logical experts, as sglang makes and reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waterfill_rs._native import MAX_RANKS
from waterfill_rs.placement import place
from waterfill_rs.placement.spread import spread
from waterfill_rs.replay import whole_numbers

__all__ = ["DoesNotDivideError", "check_divides", "checked", "placed", "spread_out", "trivial"]


class DoesNotDivideError(ValueError):
    """Experts that do not divide over the ranks."""


def check_divides(experts: int, kind: str, ranks: int, redundant: int = 0) -> None:
    """Do so many experts, and the redundant ones, divide over the ranks?

    Raises:
        DoesNotDivideError: naming the numbers of redundant experts, and the EP sizes, that would do.
    """
    if ranks >= 1 and (experts + redundant) % ranks == 0:
        return
    sizes = [size for size in range(1, min(experts, MAX_RANKS) + 1) if experts % size == 0]
    fits = f"an --ep that divides {experts} ({_some(sizes)})"
    if kind == "physical":
        raise DoesNotDivideError(
            f"{experts} physical experts do not divide over {ranks} ranks: give {fits}"
        )
    least = -experts % ranks
    more = ", ".join(str(least + ranks * i) for i in range(not least, 3 + (not least)))
    plus = f" and {redundant} redundant ones" if redundant else ""
    raise DoesNotDivideError(
        f"{experts} {kind} experts{plus} do not divide over {ranks} ranks: give --redundant {more} "
        f"(or {ranks} more each time), or {fits}"
    )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) < 12 else [*numbers[:11], "..."]))


def trivial(layers: int, logical: int, redundant: int) -> Tensor:
    """sglang's default: physical expert p is logical expert p mod E, so the first experts have the replicas."""
    return (torch.arange(logical + redundant) % logical).repeat(layers, 1)


def spread_out(layers: int, logical: int, redundant: int, ranks: int) -> Tensor:
    """As a server with waterfill-rs and without a placement starts: a map ``[L, P]``.

    Trivial without redundant experts, and where none can be spread.
    """
    if not redundant:
        return trivial(layers, logical, 0)
    try:
        row = spread(logical, redundant, ranks)
    except ValueError:
        return trivial(layers, logical, redundant)
    return torch.tensor([row]).repeat(layers, 1)


def placed(counts: Tensor, redundant: int, ranks: int) -> Tensor:
    """As ``waterfill-rs place`` puts experts for logical counts ``[L, E]``: a map ``[L, P]``. Dense layers are trivial.

    Raises:
        ValueError: as ``place.place`` does.
    """
    layers, logical = counts.shape
    mapping = trivial(layers, logical, redundant)
    for layer, rows in enumerate(counts.tolist()):
        if any(rows):
            mapping[layer] = torch.tensor(place.place([rows], ranks=ranks, redundant=redundant))
    return mapping


def checked(name: str, content: Any, layers: int, logical: int) -> Tensor:
    """The ``physical_to_logical_map`` of what a file holds: int64 ``[L, P]``, each logical expert at least once.

    Args:
        name: the file's, for the error.

    Raises:
        ValueError: naming the file and the number that does not fit the recording.
    """
    where = f"{name}: physical_to_logical_map"
    mapping = whole_numbers.read(where, content["physical_to_logical_map"], (2,), "[L, P]")
    if mapping.shape[0] != layers:
        raise ValueError(f"{where} has {mapping.shape[0]} layers, the recording has {layers}")
    for layer, row in enumerate(mapping.tolist()):
        odd = set(row) ^ set(range(logical))
        if odd:
            raise ValueError(
                f"{where} of layer {layer}: {'names' if min(odd) in row else 'lacks'} expert {min(odd)}: "
                f"the recording has experts 0 to {logical - 1}, each must be there"
            )
    return mapping
