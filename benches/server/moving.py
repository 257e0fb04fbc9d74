"""An engine's experts move to another placement while it serves, as in a rebalance of sglang's EPLB."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def move(runner: Any, location: str, rank: int) -> None:
    """Weights and maps; all ranks call it in step, between two forwards.

    Args:
        runner: sglang's ``ModelRunner``.
        location: as ``--init-expert-location``: ``trivial``, or a file with a map or with counts.
        rank: of the EP group, which is the whole world.
    """
    from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater

    layers = runner.model.routed_experts_weights_of_layer
    ExpertLocationUpdater().update(
        layers,
        _metadata(runner, location, rank),
        update_layer_ids=sorted(layers),
        nnodes=1,
        rank=rank,
    )


def _metadata(runner: Any, location: str, rank: int) -> Any:
    """sglang's, as it makes them at start of the same."""
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    known = {
        "server_args": runner.server_args,
        "model_config": runner.model_config,
        "moe_ep_rank": rank,
    }
    if location == "trivial":
        return _called(ExpertLocationMetadata.init_trivial, known)
    given = json.loads(Path(location).read_text())
    by_counts = "logical_count" in given
    make = (
        ExpertLocationMetadata.init_by_eplb if by_counts else ExpertLocationMetadata.init_by_mapping
    )
    return _called(make, known | given)


def _called(make: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """With those that this version takes."""
    return make(
        **{name: known[name] for name in inspect.signature(make).parameters if name in known}
    )
