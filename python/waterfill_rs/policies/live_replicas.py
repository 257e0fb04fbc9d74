"""Plans that move the rows of replicated experts, by the names that policies have in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import waterfill_rs
from waterfill_rs import CostModel

__all__ = ["plan"]

_NAMES: dict[str, Literal["joint", "single_replica", "replicas"]] = {
    "joint": "joint",
    "single-replica": "single_replica",
    "replicas": "replicas",
}


def plan(
    policy: str,
    routed: Sequence[int],
    tokens: Sequence[int],
    mapping: Sequence[int],
    model: CostModel,
) -> waterfill_rs.Plan:
    """A plan of one layer that moves the rows of replicated experts.

    Args:
        policy: ``joint`` splits them, ``single-replica`` puts all rows of an expert on one replica, both as ``model`` says.
            ``replicas`` is what a server does, which plans by rows whatever ``model`` is.
        routed: ``[P]`` rows.
        tokens: ``[R]``, of which shared rows are placed too: zeros where the shared expert runs beside dispatch.
        mapping: ``[P]``, the logical expert of each physical one.
    """
    return waterfill_rs.plan(
        routed,
        tokens,
        ranks=len(tokens),
        physical_experts=len(routed),
        physical_to_logical=mapping,
        cost_model=CostModel.rows() if policy == "replicas" else model,
        policy=_NAMES[policy],
    )
