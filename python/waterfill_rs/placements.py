"""Where experts stand: maps ``[L, P]`` from physical to logical experts, as sglang makes and reads them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from waterfill_rs import whole_numbers

__all__ = ["DoesNotDivideError", "by_eplb", "check_divides", "checked", "trivial"]


class DoesNotDivideError(ValueError):
    """Experts that do not divide over the ranks."""


def check_divides(experts: int, kind: str, ranks: int, redundant: int = 0) -> None:
    """Do so many experts, and the redundant ones, divide over the ranks?

    Raises:
        DoesNotDivideError: naming the numbers of redundant experts, and the EP sizes, that would do.
    """
    if ranks >= 1 and (experts + redundant) % ranks == 0:
        return
    sizes = [size for size in range(1, min(experts, 1024) + 1) if experts % size == 0]
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


def by_eplb(counts: Tensor, redundant: int, ranks: int) -> Tensor:
    """The installed sglang's own EPLB, on one node: logical counts ``[L, E]`` to a map.

    Raises:
        ValueError: where sglang, or this algorithm in it, cannot be imported.
    """
    try:
        if "sglang.srt.eplb.eplb_algorithms" not in sys.modules:
            print("importing sglang for its EPLB", file=sys.stderr)
        from sglang.srt.eplb import eplb_algorithms
    except ImportError as error:
        raise ValueError(
            f"the placement is computed by sglang's own EPLB, which cannot be imported ({error}): install sglang, "
            "or give --placement a file with a physical_to_logical_map"
        ) from error
    physical = counts.shape[1] + redundant
    found: Tensor = eplb_algorithms.rebalance_experts(
        tokens_per_expert=counts[None],
        num_physical_experts=physical,
        num_local_physical_experts=physical // ranks,
        num_groups=None,
        num_nodes=1,
        algorithm=eplb_algorithms.EplbAlgorithm.deepseek,
    )[0]
    return found


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
