"""One model's layers joined to their expert-parallel peers by an exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from waterfill_rs import CostModel
from waterfill_rs.config import Config
from waterfill_rs.exchange.device import DeviceExchange
from waterfill_rs.exchange.host import SoloExchange
from waterfill_rs.exchange.interface import Exchange
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.replicas import ReplicaTables
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
    replicas: ReplicaTables | None = None,
) -> Exchange:
    """Open one exchange for these layers and give it to each. All ranks of their group call it.

    Args:
        device: where the layers are.
        alone: why own counts are to be taken, whatever was asked for.
        replicas: tables that it chooses replicas by, unless own counts are taken.

    Raises:
        ValueError: layers of several shapes, ranks that disagree, or a choice that cannot be had.
        RuntimeError: a rank did not come.
    """
    members = {balancer.member for balancer in balancers}
    if len(members) != 1:
        shapes = sorted((each.ranks, each.experts, each.rank) for each in members)
        raise ValueError(f"layers of one model differ in (ranks, experts, rank): {shapes}")
    member = members.pop()
    if alone:
        exchange = _alone(member, device, alone)
    else:
        exchange = _open(member, device, config, peers, replicas)
    for balancer in balancers:
        balancer.exchange = exchange
    metrics.watch(exchange, leads=member.rank == 0)
    if member.rank == 0 and exchange.name != "solo":
        live_share.watch(exchange)
    return exchange


def _alone(member: Member, device: torch.device, reason: str) -> Exchange:
    if device.type == "cuda":
        return DeviceExchange(device, member, reason=reason)
    return SoloExchange(member, CostModel.rows(), reason)


def _open(
    member: Member,
    device: torch.device,
    config: Config,
    peers: Peers | None,
    replicas: ReplicaTables | None,
) -> Exchange:
    if peers is None:
        reason = "torch.distributed is not initialised"
        if config.exchange not in ("auto", "solo"):
            raise ValueError(f"exchange {config.exchange} was asked for, and {reason}")
        return _alone(member, device, reason)
    on_device = device.type == "cuda"
    return open_exchange(
        peers.store,
        member,
        choice=config.exchange,
        settings=config.board,
        group=peers.coordinator.device_group if on_device else None,
        device=device if on_device else None,
        replicas=replicas,
    )
