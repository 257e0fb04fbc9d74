"""The check of an installed sglang against the table of what each calls the parts of its Waterfill.

Nothing of sglang is imported before ``find`` is called.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from typing import Any

from waterfill_rs.sglang_versions import KNOWN, ROWS, Seams, row_of

__all__ = [
    "against_order",
    "against_overlap",
    "against_places",
    "against_posting",
    "against_replicas",
    "differences",
    "dispatch_algorithm",
    "find",
    "resolve",
]

_ROUTER = "sglang.srt.layers.moe.topk.TopK"
_DISPATCH = "sglang.srt.eplb.expert_location_dispatch"

_CONSTRUCTOR = ("num_routed_experts", "world_size", "rank", "layer_id")
_EXPAND = ("topk_output", "num_tokens")
_MEGA_MOE = ("moe", "hidden_states")
_EMPTY = ("self", "device", "layer_id")
_UPDATE = ("self", "other", "update_layer_ids")
_INIT = ("ep_size", "physical_to_logical_map", "logical_to_all_physical_map")
_TRIVIAL = ("model_config", "moe_ep_rank")
_KEYWORDS = {"is_decode"}
"""Of ``expand_topk``, after 0.5.23: what the forward is for. It changes nothing in a plan of rows."""


@functools.cache
def find() -> tuple[Seams | None, list[str]]:
    """The row that the installed sglang fits, or None and what keeps it from fitting."""
    import sglang

    version: str = sglang.__version__
    named = row_of(version)
    candidates = (named,) if named else ROWS
    for row in candidates:
        if not differences(row):
            return row, []
    return None, [
        f"sglang {version} differs from what waterfill-rs knows ({KNOWN}): {difference}"
        for difference in differences(candidates[0])
    ]


def resolve(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        ImportError, AttributeError: it isn't there.
    """
    return pkgutil.resolve_name(name)


def differences(row: Seams) -> list[str]:
    """Everything in which the installed sglang is unlike this row."""
    found = {}
    reasons = []
    parts = (row.balancer, row.hash_topk, row.prepare)
    for name in (*parts, row.arguments, row.group, row.gatherers, row.backend):
        try:
            found[name] = resolve(name) if name else None
        except (ImportError, AttributeError) as error:
            reasons.append(f"no {name} ({error})")
    if balancer := found.get(row.balancer):
        reasons += _unlike(f"{row.balancer}", balancer.__init__, (*_CONSTRUCTOR, row.weight))
        expand = getattr(balancer, "expand_topk", None)
        reasons += _unlike(f"{row.balancer}.expand_topk", expand, _EXPAND)
    if hash_topk := found.get(row.hash_topk):
        expands = getattr(hash_topk, row.expands, None)
        reasons += _unlike(f"{row.hash_topk}.{row.expands}", expands, _EXPAND)
    if (prepare := found.get(row.prepare)) and not (
        {"model", "self"} & set(inspect.signature(prepare).parameters)
    ):
        reasons.append(f"{row.prepare} takes no model")
    return reasons


def against_posting(row: Seams) -> list[str]:
    """Why a rank without rows cannot be made to post, once, under the backend megamoe."""
    import sglang

    version: str = sglang.__version__
    if row.mega_moe is None:
        return [f"Waterfill of sglang {version} is for deepep alone"]
    if row_of(version) is None:
        return [f"not known of sglang {version} is what a rank without rows does there"]
    heads = ((row.mega_moe, _MEGA_MOE), (f"{_ROUTER}.empty_topk_output", _EMPTY))
    return [reason for name, head in heads for reason in _headed(name, head)]


def against_replicas(row: Seams) -> list[str]:
    """Why tables of replicas cannot follow this sglang's map of experts."""
    import sglang

    version: str = sglang.__version__
    if row_of(version) is None:
        return [f"not known of sglang {version} is how it changes its map of experts"]
    return _headed(row.location_update, _UPDATE)


def against_order(row: Seams) -> list[str]:
    """Why experts of this sglang's maps cannot be put into another order within their ranks."""
    if reasons := against_replicas(row):
        return reasons
    try:
        takes = tuple(inspect.signature(resolve(row.location_init)).parameters)
    except (ImportError, AttributeError) as error:
        return [f"no {row.location_init} ({error})"]
    if set(_INIT) <= set(takes):
        return []
    return [f"{row.location_init} takes {takes}, and waterfill-rs knows {_INIT}"]


def against_places(row: Seams) -> list[str]:
    """Why this sglang's trivial map cannot be replaced by another."""
    if reasons := against_order(row):
        return reasons
    try:
        trivial, by_mapping = (
            set(inspect.signature(resolve(name)).parameters)
            for name in (row.location_trivial, row.location_mapping)
        )
    except (ImportError, AttributeError) as error:
        return [f"no {row.location_trivial} ({error})"]
    if set(_TRIVIAL) <= trivial and trivial | {"physical_to_logical_map"} <= by_mapping:
        return []
    return [f"{row.location_trivial} takes {sorted(trivial)}, and waterfill-rs knows {_TRIVIAL}"]


def dispatch_algorithm() -> str | None:
    """How this sglang makes physical ids of logical ones, read where its routers read it. None: it takes them for the same.

    Raises:
        ImportError, AttributeError: it is another sglang.
    """
    dispatch = resolve(_DISPATCH)
    if hasattr(dispatch, "get_exec"):  # From 0.5.17 on; arguments have what was asked for.
        found: str | None = dispatch.get_exec().moe.ep_dispatch_algorithm
        return found
    read = getattr(dispatch, "get_server_args", None) or dispatch.get_global_server_args
    found = read().ep_dispatch_algorithm
    return found


_ASKS = ("forward_deepep", "_forward_shared_experts", "op_shared_experts")
"""Methods of a MoE layer that ask at each call whether its shared expert is fused."""
_WRAPPED = ("forward", "op_select_experts", *_ASKS)
_FUSED = "num_fused_shared_experts"


def against_overlap(row: Seams) -> list[str]:
    """Why no layer of this sglang can run a fused shared expert unfused."""
    import sglang

    version: str = sglang.__version__
    if row_of(version) is None:
        return [f"not known of sglang {version} is what its MoE layers ask for at each call"]
    try:
        moe = resolve(row.moe)
        for name in filter(None, (row.mlp, row.is_extend_in_batch, row.prefill_graph)):
            resolve(name)
    except (ImportError, AttributeError) as error:
        return [f"this sglang has no such part ({error})"]
    reasons = [
        f"another plugin hooks {target}"
        for target in (row.moe, row.mlp, *(f"{row.moe}.{name}" for name in _WRAPPED))
        if _hooked(target)
    ]
    if not reasons and not hasattr(moe, "op_select_experts"):
        reasons.append(f"no {row.moe}.op_select_experts")
    for name in _ASKS if not reasons else ():
        code = getattr(getattr(moe, name, None), "__code__", None)
        if code is None or _FUSED not in code.co_names:
            reasons.append(f"{row.moe}.{name} does not ask for {_FUSED} at each call")
    return reasons


def _hooked(target: str) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return bool(HookRegistry._hooks.get(target))


def _headed(name: str, head: tuple[str, ...]) -> list[str]:
    """Does this function take these first?"""
    try:
        takes = tuple(inspect.signature(resolve(name)).parameters)
    except (ImportError, AttributeError) as error:
        return [f"no {name} ({error})"]
    if takes[: len(head)] == head:
        return []
    return [f"{name} takes {takes}, and waterfill-rs knows {head}"]


def _unlike(name: str, function: Any, expected: tuple[str, ...]) -> list[str]:
    """Does a method take these, and beyond them only keywords that change nothing?"""
    if function is None:
        return [f"no {name}"]
    _, *found = inspect.signature(function).parameters.values()
    places = tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)
    others = {p.name for p in found} - set(places)
    if places == expected and others <= _KEYWORDS:
        return []
    names = tuple(p.name for p in found)
    return [f"{name} takes {names}, and waterfill-rs knows {expected}"]
