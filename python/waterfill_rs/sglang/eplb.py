"""Placements of experts by the installed sglang's own EPLB, for replays."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["by_eplb"]


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
