"""sglang's default placement of redundant experts, and what to do where it is in force.

Physical expert p is logical expert p mod E, so the first experts stand twice, and their second replicas on the last ranks,
whichever experts are hot. Those last ranks then hold fewer experts that nobody else has, and the others more. Balance is
often worse than without redundant experts, and no choice of replica mends it: the hot experts have no second home.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TRIVIAL", "is_trivial"]

TRIVIAL = "trivial"
"""What ``--init-expert-location`` is by default."""


def is_trivial(mapping: Sequence[Sequence[int]]) -> bool:
    """Does a map ``[L, P]`` from physical to logical experts place redundant experts as sglang's default does, in every layer?

    A placement of ``waterfill-rs place`` has trivial layers too, the dense ones, so one layer tells nothing. A map without
    redundant experts, or without a layer, is no trivial one.
    """
    return any(mapping) and all(_is_trivial_layer(row) for row in mapping)


def _is_trivial_layer(row: Sequence[int]) -> bool:
    experts = max(row, default=-1) + 1
    return experts < len(row) and all(
        logical == physical % experts for physical, logical in enumerate(row)
    )
