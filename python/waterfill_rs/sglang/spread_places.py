"""Spread places for redundant experts, in a server that would start with sglang's trivial ones.

sglang makes the map of a server without a placement by ``ExpertLocationMetadata.init_trivial``, before it loads weights. The
hook around it gives another map (``placement/spread.py``) where all that reads weights or ids goes by the map.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from waterfill_rs import sglang_flags
from waterfill_rs.placement.spread import spread
from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.sglang import compat, loaded_hooks, primaries_first
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang.primaries_first import PrimariesFirst
from waterfill_rs.sglang_versions import Seams

__all__ = ["DISPATCH", "SpreadPlaces", "against", "against_arguments", "against_hook", "is_spread"]

DISPATCH = "ep_dispatch_algorithm"
"""``ServerArgs``' attribute."""
_MODELS = ("sglang.srt.models.deepseek_v2", "sglang.srt.models.deepseek_v4")
"""Modules of models whose routers map all ids, and whose weights come by the map: those that Waterfill is for."""
_agreed: list[list[str]] = []
"""What all ranks agreed on, once they have."""
_rows: list[list[int]] = []
"""The map that was given instead of the trivial one, of any layer."""


def against_arguments(arguments: Any, seams: Seams) -> list[str]:
    """Why these arguments, or parsed flags, keep the trivial map; whether sglang maps ids is another question."""
    return primaries_first.against_arguments(arguments, seams) or sglang_flags.against_spread(
        lambda name: getattr(arguments, name, None)
    )


def against(seams: Seams, model_config: Any) -> list[str]:
    """Why the trivial map stays, as far as this rank knows; the order of experts is agreed on before."""
    return (
        compat.against_places(seams)
        or against_arguments(resolve(seams.arguments)(), seams)
        or _against_torch()
        or sglang_flags.against_backend(resolve(seams.backend)().value)
        or sglang_flags.against_unmapped(compat.dispatch_algorithm())
        or _against_model(model_config)
    )


def _against_torch() -> list[str]:
    if torch.version.cuda is not None:
        return []
    return ["this torch has no CUDA: sglang 0.5.13 maps no ids on other GPUs"]


def _against_model(model_config: Any) -> list[str]:
    model, _ = resolve("sglang.srt.model_loader.get_model_architecture")(model_config)
    if not any(kind.__module__ in _MODELS for kind in model.__mro__):
        return [f"not known of {model.__name__} is whether all its routers and loaders go by a map"]
    return sglang_flags.against_format(getattr(model_config, "quantization", None))


def against_hook(seams: Seams) -> list[str]:
    """Why the trivial map stays, as all ranks agreed when it was made."""
    if _agreed:
        return _agreed[0]
    if reasons := compat.against_places(seams) or _missing(seams):
        return reasons
    return ["the placement that was given is the trivial one"]


def _missing(seams: Seams) -> list[str]:
    if loaded_hooks.found().get(seams.location_trivial):
        return []
    return [f"{seams.location_trivial} is not waterfill-rs's after registration"]


def is_spread(mapping: list[list[int]]) -> bool:
    """Is this sglang's map ``[L, P]``, and was it made by us?"""
    return bool(_rows and mapping) and all(row == _rows[-1] for row in mapping)


class SpreadPlaces:
    """The hook around ``init_trivial``. ``order``: that of the same maps, which refuses to give slots away."""

    def __init__(self, seams: Seams, order: PrimariesFirst) -> None:
        self._seams, self._order = seams, order

    @panics_are_errors
    def hook(self, init_trivial: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """sglang's metadata of the spread map, where all ranks agreed on it; else of the trivial one, as sglang made it."""
        made = init_trivial(*args, **kwargs)
        if made is None or not is_trivial(made.physical_to_logical_map_cpu.tolist()):
            return made
        given = inspect.signature(init_trivial).bind(*args, **kwargs).arguments
        layers, physical = made.physical_to_logical_map.shape
        row, reasons = self._row(made.num_logical_experts, physical)
        # What was agreed on stays, and a later map may have sizes that cannot be spread.
        if self._agree(row, reasons, given["model_config"]) or reasons:
            return made
        _rows.append(row)
        self._order.has_own_order = True
        by_mapping = resolve(self._seams.location_mapping)
        return by_mapping(**given, physical_to_logical_map=torch.tensor([row]).repeat(layers, 1))

    def _row(self, logical: int, physical: int) -> tuple[list[int], list[str]]:
        """``[P]``, and why there is none."""
        ranks = self._order.ranks
        if ranks == 1:
            return [], ["there is one rank"]
        try:
            return spread(logical, physical - logical, ranks), []
        except ValueError as error:
            return [], [str(error)]

    def _agree(self, row: list[int], reasons: list[str], model_config: Any) -> list[str]:
        """Why the trivial map stays on all ranks, if it does: asked when it is first made.

        The order was asked before, as sglang made the trivial map: whoever has no hooks is known from there.
        """
        if not _agreed:
            reasons = (
                primaries_first.against_hook(self._seams)
                or _missing(self._seams)
                or reasons
                or self._against(model_config)
            )
            _agreed.append(primaries_first.all_agree(self._seams, reasons, "places", row))
        return _agreed[0]

    def _against(self, model_config: Any) -> list[str]:
        """Another sglang may raise anything: then its map stays."""
        try:
            return against(self._seams, model_config)
        except Exception as error:
            return [f"sglang could not be asked: {error!r}"]
