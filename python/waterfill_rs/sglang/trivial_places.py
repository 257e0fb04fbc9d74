"""One warning at start where redundant experts stand as sglang's default puts them."""

from __future__ import annotations

import functools
import logging
from typing import Any

from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.sglang.compat import resolve

__all__ = ["tell"]

logger = logging.getLogger(__name__)

_LOCATION = "sglang.srt.eplb.expert_location.get_global_expert_location_metadata"


def tell(arguments: Any, rank: int) -> None:
    """Warn, on EP rank 0 and once a process, if the map in force is the trivial one and redundant experts were asked for."""
    redundant = getattr(arguments, "ep_num_redundant_experts", 0)
    if not redundant or rank != 0:
        return
    mapping = _in_force()
    if mapping is not None and is_trivial(mapping):
        _tell_once(redundant, bool(getattr(arguments, "enable_eplb", False)))


def _in_force() -> list[list[int]] | None:
    """sglang's map ``[L, P]``; None where it has none, or is another sglang: a warning stops no server."""
    try:
        metadata = resolve(_LOCATION)()
        mapping: list[list[int]] = metadata.physical_to_logical_map.tolist()
    except (AssertionError, AttributeError, ImportError):
        return None
    return mapping


@functools.cache
def _tell_once(redundant: int, rebalances: bool) -> None:
    logger.warning(
        "waterfill-rs: %d redundant experts stand in trivial places, sglang's default%s: balance is often worse than without "
        "them, and no choice of replicas mends it. Make a placement of recorded traffic with waterfill-rs place, and give it "
        "with --init-expert-location",
        redundant,
        ", until EPLB rebalances" if rebalances else "",
    )
