"""What each sglang calls the parts of its Waterfill: one table, and the check of an installed sglang against it.

Nothing of sglang is imported before ``find`` is called.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "ROWS",
    "Seams",
    "against_overlap",
    "against_posting",
    "differences",
    "find",
    "resolve",
    "row_of",
]

SHARED_WEIGHT = "shared_weight"
SCALING_FACTOR = "routed_scaling_factor"


@dataclass(frozen=True)
class Seams:
    """The names of one range of versions, first and last included.

    ``weight``: the balancer's fifth parameter. A ``shared_weight`` is the weight of a shared row; from a
    ``routed_scaling_factor`` f that weight is 1 / f, or 1 where f is 0, whatever the routed weights hold.
    """

    versions: tuple[str, str]
    switch: str
    """The user's: ``ServerArgs``' attribute; the flag has dashes."""
    balancer: str
    weight: str
    hash_topk: str | None
    """None where hash layers (DeepSeek V4) have no Waterfill."""
    enabled: str
    """A router's attribute: is Waterfill on?"""
    holder: str
    """A router's attribute: its balancer, None before preparation."""
    expands: str
    """A router's method, ``(topk_output, num_tokens)``: calls the balancer."""
    prepare: str
    """Gives routers their balancers: takes ``model``, or is a method of what has one."""
    arguments: str
    """Function that gives the ``ServerArgs`` in force."""
    group: str = "sglang.srt.distributed.parallel_state.get_moe_ep_group"
    gatherers: str = "sglang.srt.eplb.expert_distribution"
    """Module of the recorder's gatherers."""
    redundant: bool = True
    """Does preparation count redundant experts?"""
    backend: str = "sglang.srt.layers.moe.utils.get_moe_a2a_backend"
    """Function that gives the one in force, where the ``ServerArgs`` may hold what was asked for."""
    is_extend_in_batch: str = "sglang.srt.layers.dp_attention.get_is_extend_in_batch"
    """Function: does any rank prefill in this step? DeepEP's mode is chosen by it."""
    moe: str = "sglang.srt.models.deepseek_v2.DeepseekV2MoE"
    """The layer of DeepSeek V3 and V4, which asks at each call whether its shared expert is fused."""
    mlp: str = "sglang.srt.models.deepseek_v2.DeepseekV2MLP"
    """What that layer's shared expert is where it is not fused."""
    prefill_graph: str | None = None
    """Function: is a prefill's graph captured? None where DeepEP goes without such graphs."""
    mega_moe: str | None = None
    """A layer under the backend megamoe, ``(moe, hidden_states, ...)``. None where Waterfill is DeepEP's alone."""

    @property
    def flag(self) -> str:
        return "--" + self.switch.replace("_", "-")


_SERVER_ARGS = "sglang.srt.server_args.get_global_server_args"
_CONTEXT = "sglang.srt.runtime_context.get_server_args"

_ROUTER = "sglang.srt.layers.moe.topk.TopK"

_V3_ONLY = Seams(
    versions=("0.5.12.post1", "0.5.12.post1"),
    switch="enable_deepep_waterfill",
    balancer="sglang.srt.layers.moe.deepep_waterfill.DeepEPWaterfillBalancer",
    weight=SCALING_FACTOR,
    hash_topk=None,
    enabled="enable_deepep_waterfill",
    holder="deepep_waterfill_balancer",
    expands="_apply_deepep_waterfill",
    prepare="sglang.srt.model_executor.model_runner.ModelRunner._prepare_moe_topk",
    arguments=_SERVER_ARGS,
    redundant=False,
)
_HASH_LAYERS = replace(
    _V3_ONLY,
    redundant=True,
    versions=("0.5.13", "0.5.15.post1"),
    hash_topk="sglang.srt.layers.moe.hash_topk.HashTopK",
)
_RENAMED = replace(
    _HASH_LAYERS,
    versions=("0.5.16", "0.5.22"),
    switch="enable_waterfill",
    balancer="sglang.srt.layers.moe.waterfill.WaterfillBalancer",
    enabled="enable_waterfill",
    holder="waterfill_balancer",
    expands="_apply_waterfill",
    prepare="sglang.srt.model_executor.model_runner_components.moe_ep_setup.prepare_moe_topk",
    arguments=_CONTEXT,
    prefill_graph="sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context.is_in_breakable_cuda_graph",
    mega_moe="sglang.srt.layers.moe.mega_moe.forward_mega_moe",
)
_FOLDED = replace(_RENAMED, versions=("0.5.23", "0.5.23"), weight=SHARED_WEIGHT)

ROWS = (_FOLDED, _RENAMED, _HASH_LAYERS, _V3_ONLY)
"""Newest first. A version that no row names is used if it fits one."""

_CONSTRUCTOR = ("num_routed_experts", "world_size", "rank", "layer_id")
_EXPAND = ("topk_output", "num_tokens")
_MEGA_MOE = ("moe", "hidden_states")
_EMPTY = ("self", "device", "layer_id")
_KEYWORDS = {"is_decode"}
"""Of ``expand_topk``, after 0.5.23: what the forward is for. It changes nothing in a plan of rows."""


def row_of(version: str) -> Seams | None:
    """The row that names this version."""
    number = _number(version)
    inside = (r for r in ROWS if _number(r.versions[0]) <= number <= _number(r.versions[1]))
    return next(inside, None)


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
    known = f"{ROWS[-1].versions[0]} to {ROWS[0].versions[1]}"
    return None, [
        f"sglang {version} differs from what waterfill-rs knows ({known}): {difference}"
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


def _number(version: str) -> tuple[int, ...]:
    """For comparing releases and their posts: 0.5.15.post1 comes after 0.5.15."""
    release, _, post = version.partition(".post")
    numbers = [int(part) for part in re.findall(r"\d+", release)[:3]]
    return (*numbers, int(post) if post.isdigit() else 0)
