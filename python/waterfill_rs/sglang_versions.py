"""What each sglang calls the parts of its Waterfill: one table. Data alone, which imports nothing of sglang or of ours."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["KNOWN", "ROWS", "SCALING_FACTOR", "SHARED_WEIGHT", "Seams", "row_of"]

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
    sender: str = "sglang.srt.model_executor.model_runner.ModelRunner"
    """The class that sends a rank's parameters to another server."""
    updater: str = "sglang.srt.model_executor.model_runner.ModelRunner"
    """The class that takes tensors for a rank's parameters while it serves."""
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
    expert_location: str = "sglang.srt.eplb.expert_location"
    """Module of the map of experts, ``ExpertLocationMetadata``."""
    mega_moe: str | None = None
    """A layer under the backend megamoe, ``(moe, hidden_states, ...)``. None where Waterfill is DeepEP's alone."""

    @property
    def flag(self) -> str:
        return "--" + self.switch.replace("_", "-")

    @property
    def location_update(self) -> str:
        """The method that changes the map of some layers in place: a rebalance's."""
        return f"{self.expert_location}.ExpertLocationMetadata.update"

    @property
    def location_init(self) -> str:
        """The function that every map of experts is made by, before weights are loaded or moved."""
        return f"{self.expert_location}.ExpertLocationMetadata._init_raw"

    @property
    def location_by_eplb(self) -> str:
        """The function that makes a map by EPLB from counts: at start of a file, and at each rebalance."""
        return f"{self.expert_location}.ExpertLocationMetadata.init_by_eplb"

    @property
    def location_trivial(self) -> str:
        """The function that makes the map of a server without a placement."""
        return f"{self.expert_location}.ExpertLocationMetadata.init_trivial"

    @property
    def location_mapping(self) -> str:
        """The function that makes the same of any map."""
        return f"{self.expert_location}.ExpertLocationMetadata.init_by_mapping"

    @property
    def slots_out(self) -> tuple[str, ...]:
        """The functions that give a rank's parameters away as they stand: to files, to a store, to another server."""
        loaders = ("ShardedStateLoader", "RemoteModelLoader")
        saves = (f"sglang.srt.model_loader.loader.{loader}.save_model" for loader in loaders)
        return (*saves, f"{self.sender}.send_weights_to_remote_instance")

    @property
    def slots_in(self) -> str:
        """The method that is sent tensors for a rank's parameters, by names of a checkpoint or as they stand."""
        return f"{self.updater}.update_weights_from_tensor"


_SERVER_ARGS = "sglang.srt.server_args.get_global_server_args"
_CONTEXT = "sglang.srt.runtime_context.get_server_args"

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
    sender="sglang.srt.model_executor.model_runner_components.weight_exporter.WeightExporter",
    updater="sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater",
)
_FOLDED = replace(_RENAMED, versions=("0.5.23", "0.5.23"), weight=SHARED_WEIGHT)

ROWS = (_FOLDED, _RENAMED, _HASH_LAYERS, _V3_ONLY)
"""Newest first. A version that no row names is used if it fits one."""
KNOWN = f"{ROWS[-1].versions[0]} to {ROWS[0].versions[1]}"
"""The versions that rows name, in words."""


def row_of(version: str) -> Seams | None:
    """The row that names this version."""
    number = _number(version)
    inside = (r for r in ROWS if _number(r.versions[0]) <= number <= _number(r.versions[1]))
    return next(inside, None)


def _number(version: str) -> tuple[int, ...]:
    """For comparing releases and their posts: 0.5.15.post1 comes after 0.5.15."""
    release, _, post = version.partition(".post")
    numbers = [int(part) for part in re.findall(r"\d+", release)[:3]]
    return (*numbers, int(post) if post.isdigit() else 0)
