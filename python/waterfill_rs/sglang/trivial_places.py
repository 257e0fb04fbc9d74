"""One line at start where redundant experts were given no placement: spread by us, or as sglang's default puts them."""

from __future__ import annotations

import functools
import logging
from typing import Any

from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.sglang import spread_places
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang_versions import Seams

__all__ = ["tell", "tell_of_spread"]

logger = logging.getLogger(__name__)

_LOCATION = "sglang.srt.eplb.expert_location.get_global_expert_location_metadata"


def tell(arguments: Any, rank: int, seams: Seams) -> None:
    """On EP rank 0 and once a process: warn if the map in force is the trivial one, with the reason; or say that we spread it.

    Nothing where no redundant experts were asked for, or another placement is in force.
    """
    redundant = getattr(arguments, "ep_num_redundant_experts", 0)
    if redundant and rank == 0 and not tell_of_spread() and is_trivial(_in_force()):
        reason = "; ".join(spread_places.against_hook(seams)[:1])
        _tell_once(redundant, bool(getattr(arguments, "enable_eplb", False)), reason)


def tell_of_spread() -> bool:
    """Say once that we spread the experts, if we did: also where we stand aside later, because their places stay."""
    mapping = _in_force()
    if not spread_places.is_spread(mapping):
        return False
    _tell_once_of_spread(len(mapping[0]) - len(set(mapping[0])))
    return True


def _in_force() -> list[list[int]]:
    """sglang's map ``[L, P]``; empty where it has none, or is another sglang: a warning stops no server."""
    try:
        metadata = resolve(_LOCATION)()
        mapping: list[list[int]] = metadata.physical_to_logical_map.tolist()
    except (AssertionError, AttributeError, ImportError):
        return []
    return mapping


@functools.cache
def _tell_once(redundant: int, rebalances: bool, reason: str) -> None:
    logger.warning(
        "waterfill-rs: %d redundant experts stand in trivial places, sglang's default%s: balance is often worse than without "
        "them, and no choice of replicas mends it. They were not spread over the ranks, because %s. Make a placement of recorded "
        "traffic with waterfill-rs place, and give it with --init-expert-location",
        redundant,
        ", until EPLB rebalances" if rebalances else "",
        reason,
    )


@functools.cache
def _tell_once_of_spread(redundant: int) -> None:
    logger.info(
        "waterfill-rs: %d redundant experts are spread over the ranks, because no placement was given. One of recorded traffic, by "
        "waterfill-rs place, is more level",
        redundant,
    )
