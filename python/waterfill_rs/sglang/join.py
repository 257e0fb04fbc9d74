"""One model's layers joined to their expert-parallel peers by an exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from waterfill_rs import CostModel
from waterfill_rs.config import Config
from waterfill_rs.exchange.device import DeviceExchange
from waterfill_rs.exchange.host import Exchange, SoloExchange
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.sglang import live_share, metrics
from waterfill_rs.sglang.balancer import WaterfillBalancer
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang.peers import Peers

__all__ = ["connect"]


@panics_are_errors
def connect(
    balancers: Sequence[WaterfillBalancer],
    config: Config,
    peers: Peers | None,
    device: torch.device,
    alone: str | None = None,
) -> Exchange | DeviceExchange:
    """Open one exchange for these layers and give it to each. All ranks of their group call it.

    Args:
        device: where the layers are.
        alone: why own counts are to be taken, whatever was asked for.

    Raises:
        ValueError: layers of several shapes, ranks that disagree, or a choice that cannot be had.
        RuntimeError: a rank did not come.
    """
    shapes = {(b.world_size, b.num_routed_experts, b.rank) for b in balancers}
    if len(shapes) != 1:
        raise ValueError(f"layers of one model differ in (ranks, experts, rank): {sorted(shapes)}")
    ranks, experts, rank = shapes.pop()
    exchange = (
        _alone(ranks, experts, rank, device, alone)
        if alone
        else _open(ranks, experts, rank, device, config, peers)
    )
    for balancer in balancers:
        balancer.exchange = exchange
    metrics.watch(exchange, leads=rank == 0)
    if rank == 0 and exchange.name != "solo":
        live_share.watch(exchange)
    return exchange


def _alone(
    ranks: int, experts: int, rank: int, device: torch.device, reason: str
) -> Exchange | DeviceExchange:
    if device.type == "cuda":
        return DeviceExchange(device, ranks=ranks, experts=experts, rank=rank, reason=reason)
    return SoloExchange(ranks, experts, rank, CostModel.rows(), reason)


def _open(
    ranks: int,
    experts: int,
    rank: int,
    device: torch.device,
    config: Config,
    peers: Peers | None,
) -> Exchange | DeviceExchange:
    if peers is None:
        reason = "torch.distributed is not initialised"
        if config.exchange not in ("auto", "solo"):
            raise ValueError(f"exchange {config.exchange} was asked for, and {reason}")
        return _alone(ranks, experts, rank, device, reason)
    on_device = device.type == "cuda"
    return open_exchange(
        peers.store,
        ranks=ranks,
        rank=rank,
        experts=experts,
        choice=config.exchange,
        settings=config.board,
        group=peers.coordinator.device_group if on_device else None,
        device=device if on_device else None,
    )
