"""The balancer that stands in for sglang's ``WaterfillBalancer``: same constructor, same contract."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from sglang.srt.layers.moe.topk import StandardTopKOutput

from waterfill_rs.config import Config
from waterfill_rs.exchange.device import DeviceExchange
from waterfill_rs.exchange.host import Exchange
from waterfill_rs.sglang.overlap import OverlappedLayer
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang_versions import SCALING_FACTOR, Seams
from waterfill_rs.torch import expand_topk, move_up

__all__ = ["ScalingFactorBalancer", "WaterfillBalancer", "balancer_of"]

logger = logging.getLogger(__name__)


@functools.cache
def _tell_not_joined() -> None:
    """Once a process. sglang logs a hook that it cannot apply, and goes on; another plugin's may go round ours."""
    text = (
        "waterfill-rs: layers were prepared past its hook, so all plans are from own counts: "
        "see waterfill-rs doctor --deep, and for another plugin that hooks the preparation"
    )
    if Config.from_environment(os.environ).required:
        raise RuntimeError(text)
    logger.warning(text)


class WaterfillBalancer:
    """Widens one MoE layer's top-k by the shared expert.

    ``exchange``, set once by the plugin after sglang's preparation, is shared by all layers of a model, which
    call it in the same order on every rank. Without one, own counts decide, with a warning.
    """

    def __init__(
        self,
        num_routed_experts: int,
        world_size: int,
        rank: int,
        layer_id: int | None,
        shared_weight: float,
    ) -> None:
        """
        Args:
            num_routed_experts: physical routed experts over all ranks, redundant ones included.
            world_size: EP size.
            rank: this EP rank.
            layer_id: for messages only: hash layers and draft layers share ids or have none.
            shared_weight: weight of a shared row.

        Raises:
            ValueError: experts that do not divide over the ranks, a rank outside the group.
        """
        if world_size < 1 or num_routed_experts < 1 or num_routed_experts % world_size:
            raise ValueError(
                f"Waterfill: {num_routed_experts} physical routed experts do not divide over "
                f"{world_size} EP ranks (layer {layer_id}): change --ep-size or --ep-num-redundant-experts"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"Waterfill: EP rank {rank} is outside 0 to {world_size - 1} (layer {layer_id})"
            )
        self.num_routed_experts = num_routed_experts
        self.world_size = world_size
        self.rank = rank
        self.layer_id = layer_id
        self.shared_weight = shared_weight
        self.exchange: Exchange | DeviceExchange | None = None
        self.overlap: OverlappedLayer | None = None
        """This router's layer, if it can run its shared expert unfused."""

    @panics_are_errors
    def expand_topk(
        self, topk_output: StandardTopKOutput, num_tokens: int, *, is_decode: bool | None = None
    ) -> StandardTopKOutput:
        """``[N, K]`` to ``[N, K + 1]``; ``num_tokens`` is N, 0 on an idle rank. ``is_decode`` changes nothing.

        Ids may be int32 or int64 and weights of any float type. They come back in it, by way of int32 and float32: weights of
        double precision are rounded.

        Where the layer runs its shared expert unfused: ids int64 ``[N, K]`` in the same places, and the weights as given.
        """
        topk_ids: Any = topk_output.topk_ids
        if topk_ids.shape[0] != num_tokens:
            raise ValueError(
                f"Waterfill: {num_tokens} tokens, and topk_ids has {topk_ids.shape[0]} rows"
            )
        if self.exchange is None:
            _tell_not_joined()
        # A kernel is of one type of ids and of weights, and batches are not: idle ranks give int32 and float32 always.
        # Beside them sglang before 0.5.14 gives int64 where it places experts, and a router may give weights of any type.
        ids = topk_ids.to(torch.int32).contiguous()
        given = topk_output.topk_weights.contiguous()
        if self.overlap is not None and self.overlap.runs:
            return self._expanded(topk_output, self._moved_up(ids), given)
        routed = ids, given.float()
        if isinstance(self.exchange, DeviceExchange):
            wide, weights = self.exchange.expand(*routed, self.shared_weight)
        else:
            wide, weights = expand_topk(
                *routed,
                physical_experts=self.num_routed_experts,
                ranks=self.world_size,
                rank=self.rank,
                shared_weight=self.shared_weight,
                exchange=self.exchange,
            )
        return self._expanded(topk_output, wide.to(topk_ids.dtype), weights.to(given.dtype))

    def _moved_up(self, ids: Any) -> Any:
        if isinstance(self.exchange, DeviceExchange):
            return self.exchange.move_up(ids)
        return move_up(ids, physical_experts=self.num_routed_experts, ranks=self.world_size)

    @staticmethod
    def _expanded(topk_output: StandardTopKOutput, ids: Any, weights: Any) -> StandardTopKOutput:
        # As sglang's, always the plain type: one with packed ids beside would keep those of the routed columns alone.
        return StandardTopKOutput(
            topk_ids=ids, topk_weights=weights, router_logits=topk_output.router_logits
        )


class ScalingFactorBalancer(WaterfillBalancer):
    """The same, made as sglang made it before 0.5.23."""

    def __init__(
        self,
        num_routed_experts: int,
        world_size: int,
        rank: int,
        layer_id: int | None,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        """The shared row weighs ``1 / routed_scaling_factor``, as in those versions, and 1 where that is 0."""
        weight = 1.0 / routed_scaling_factor if routed_scaling_factor else 1.0
        super().__init__(num_routed_experts, world_size, rank, layer_id, weight)


def balancer_of(seams: Seams) -> type[WaterfillBalancer]:
    """The class whose constructor is that of sglang's."""
    return ScalingFactorBalancer if seams.weight == SCALING_FACTOR else WaterfillBalancer
