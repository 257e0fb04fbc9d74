"""The balancer that stands in for sglang's ``WaterfillBalancer``: same constructor, same contract."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from sglang.srt.layers.moe.topk import StandardTopKOutput

from waterfill_rs.config import Config
from waterfill_rs.exchange.interface import Exchange
from waterfill_rs.exchange.member import Member
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


class _NotJoined:
    """What layers without an exchange have instead: own counts, on whatever device they are, and a warning."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def expand(
        self, ids: Any, weights: Any, shared_weight: float, *, layer: int | None = None
    ) -> tuple[Any, Any]:
        _tell_not_joined()
        ranks, experts, rank = self._member.ranks, self._member.experts, self._member.rank
        where: dict[str, Any] = {"physical_experts": experts, "ranks": ranks, "rank": rank}
        return expand_topk(ids, weights, **where, shared_weight=shared_weight)

    def move_up(self, ids: Any, *, layer: int | None = None, live: bool = True) -> Any:
        _tell_not_joined()
        return move_up(ids, physical_experts=self._member.experts, ranks=self._member.ranks)


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
            layer_id: whose row of sglang's map of experts this layer goes by, where the exchange chooses replicas. A draft
                model's exchange does not, so that its ids may be those of target layers.
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
        self.member = Member(world_size, num_routed_experts, rank)
        self.exchange: Exchange | None = None
        self._not_joined = _NotJoined(self.member)
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
        exchange = self.exchange or self._not_joined
        # A kernel is of one type of ids and of weights, and batches are not: idle ranks give int32 and float32 always.
        # Beside them sglang before 0.5.14 gives int64 where it places experts, and a router may give weights of any type.
        ids = topk_ids.to(torch.int32).contiguous()
        given = topk_output.topk_weights.contiguous()
        if self.overlap is not None and self.overlap.runs:
            moved = exchange.move_up(ids, layer=self.layer_id, live=self.overlap.chooses_live)
            return self._expanded(topk_output, moved, given)
        wide, weights = exchange.expand(ids, given.float(), self.shared_weight, layer=self.layer_id)
        return self._expanded(topk_output, wide.to(topk_ids.dtype), weights.to(given.dtype))

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
