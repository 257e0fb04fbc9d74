"""An engine's experts move to another placement while it serves, as in a rebalance of sglang's EPLB."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def move(runner: Any, location: str, rank: int, ranks: int) -> None:
    """Weights and maps; all ranks call it in step, between two forwards.

    Args:
        runner: sglang's ``ModelRunner``.
        location: as ``--init-expert-location``: ``trivial``, or a file with a map.
        rank: of the EP group, which has ``ranks`` and is the whole world.

    Raises:
        RuntimeError: a rank has other experts then than the file says.
    """
    from sglang.srt.eplb.expert_location import (
        ExpertLocationMetadata,
        get_global_expert_location_metadata,
    )

    known = {
        "server_args": runner.server_args,
        "model_config": runner.model_config,
        "moe_ep_rank": rank,
    }
    asked = None
    if location == "trivial":
        made = _called(ExpertLocationMetadata.init_trivial, known)
    else:
        asked = json.loads(Path(location).read_text())["physical_to_logical_map"]
        known["physical_to_logical_map"] = asked
        made = _called(ExpertLocationMetadata.init_by_mapping, known)
    weights = runner.model.routed_experts_weights_of_layer
    layers = sorted(weights)
    # sglang's own: one that is new empties torch's cache.
    runner.expert_location_updater.update(
        weights, made, update_layer_ids=layers, nnodes=1, rank=rank
    )
    if asked is not None:
        there = get_global_expert_location_metadata()
        _check(there.physical_to_logical_map.tolist(), asked, layers, ranks)


def _called(make: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """With those that this version takes."""
    return make(
        **{name: known[name] for name in inspect.signature(make).parameters if name in known}
    )


def _check(
    there: Sequence[Sequence[int]],
    asked: Sequence[Sequence[int]],
    layers: Sequence[int],
    ranks: int,
) -> None:
    """The order within a rank is free."""
    for layer in layers:
        if _of_ranks(there[layer], ranks) != _of_ranks(asked[layer], ranks):
            raise RuntimeError(
                f"layer {layer} has the map {there[layer]}, and was to have {asked[layer]}"
            )


def _of_ranks(row: Sequence[int], ranks: int) -> list[list[int]]:
    each = len(row) // ranks
    return [sorted(row[first : first + each]) for first in range(0, len(row), each)]
