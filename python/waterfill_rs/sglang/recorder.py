"""sglang's expert distribution recorder beside Waterfill.

Counts on the receiving side have ``E / R + 1`` entries a rank under Waterfill, the last one of shared rows, and the
recorder's gatherers take ``E / R``: they raise. These drop the last entry first, and count it by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang_versions import Seams

__all__ = ["SHARED_ROWS", "gatherer_of_auto", "replacements", "shared_slots_come"]

logger = logging.getLogger(__name__)

SHARED_ROWS = "waterfill_shared_rows"
"""Key of a record (mode per_pass): shared rows that this rank received, int32 ``[layers]``."""

_serving = False

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


def shared_slots_come() -> None:
    """Called when a model of this process has been prepared with our balancers."""
    global _serving
    _serving = True


class _RoutedOnly(_Base):  # type: ignore[misc]
    """Beside one of sglang's gatherers: the same, given counts without the shared slot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Now, because adding to it may be captured in a CUDA graph.
        metadata = self._expert_location_metadata
        device = self._data.device if hasattr(self, "_data") else "cpu"
        self._shared = torch.zeros(metadata.num_layers, dtype=torch.int32, device=device)

    def on_deepep_dispatch_normal(
        self, layer_idx: int, local_physical_count_of_layer: Any, **rest: Any
    ) -> None:
        counts = self._routed(layer_idx, local_physical_count_of_layer)
        super().on_deepep_dispatch_normal(
            layer_idx=layer_idx, local_physical_count_of_layer=counts, **rest
        )

    def on_deepep_dispatch_low_latency(
        self, layer_idx: int, local_physical_count_of_layer: Any
    ) -> None:
        counts = self._routed(layer_idx, local_physical_count_of_layer)
        super().on_deepep_dispatch_low_latency(
            layer_idx=layer_idx, local_physical_count_of_layer=counts
        )

    def _routed(self, layer: int, counts: Any) -> Any:
        """``[E / R + 1]`` to ``[E / R]``; anything else is left for sglang to judge."""
        experts = self._expert_location_metadata.num_local_physical_experts
        if not _serving or len(counts) != experts + 1:
            return counts
        self._shared[layer] += counts[experts]
        return counts[:experts]

    def reset(self) -> None:
        super().reset()
        self._shared.zero_()

    def collect(self) -> dict[str, Any]:
        collected: dict[str, Any] = super().collect()
        return {**collected, SHARED_ROWS: self._shared} if _serving else collected


def replacements(seams: Seams) -> dict[str, type]:
    """By name of sglang's class: ours, for both gatherers that count what is received."""
    names = ("_DeepepNormalSinglePassGatherer", "_DeepepLowLatencySinglePassGatherer")
    targets = [f"{seams.gatherers}.{name}" for name in names]
    # Without the name, Python takes that of its module `abc`, which makes such classes.
    body = {"__module__": __name__}
    return {
        target: type(f"RoutedOnly{target.rpartition('.')[2]}", (_RoutedOnly, resolve(target)), body)
        for target in targets
    }


def gatherer_of_auto(seams: Seams) -> Callable[..., Any]:
    """Around ``_SinglePassGatherer.init_new``, which has no gatherer for deepep_mode auto.

    Under Waterfill it gets the one that counts before dispatch: that is right in both of auto's modes.
    """

    def hook(init_new: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return init_new(*args, **kwargs)
        except NotImplementedError:
            if not getattr(resolve(seams.arguments)(), seams.switch, False):
                raise
        logger.info("waterfill-rs: the recorder counts experts before dispatch, because "
                    "sglang has no gatherer for this --deepep-mode")  # fmt: skip
        metadata, rank = args[-2:]
        return resolve(f"{seams.gatherers}._SelectExpertsSinglePassGatherer")(metadata, rank)

    return hook
