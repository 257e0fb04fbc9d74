"""One model's layers joined to their expert-parallel peers: which ranks, which store, which exchange."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from waterfill_rs import CostModel
from waterfill_rs.config import Config
from waterfill_rs.device import DeviceExchange
from waterfill_rs.exchange import Exchange, SoloExchange
from waterfill_rs.rendezvous import open_exchange
from waterfill_rs.sglang import metrics
from waterfill_rs.sglang.balancer import WaterfillBalancer
from waterfill_rs.sglang.compat import Seams, resolve
from waterfill_rs.sglang.panics import panics_are_errors

__all__ = ["connect"]

_runners = itertools.count()
"""Models prepared so far in this process: target and draft models call in an order of their own each."""


@panics_are_errors
def connect(
    balancers: Sequence[WaterfillBalancer],
    config: Config,
    seams: Seams,
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
        else _open(ranks, experts, rank, device, config, seams)
    )
    for balancer in balancers:
        balancer.exchange = exchange
    metrics.watch(exchange, leads=rank == 0)
    return exchange


def _alone(
    ranks: int, experts: int, rank: int, device: torch.device, reason: str
) -> Exchange | DeviceExchange:
    if device.type == "cuda":
        return DeviceExchange(device, ranks=ranks, experts=experts, rank=rank, reason=reason)
    return SoloExchange(ranks, experts, rank, CostModel.rows(), reason)


def _open(
    ranks: int, experts: int, rank: int, device: torch.device, config: Config, seams: Seams
) -> Exchange | DeviceExchange:
    runner = next(_runners)
    if not dist.is_initialized():
        reason = "torch.distributed is not initialised"
        if config.exchange not in ("auto", "solo"):
            raise ValueError(f"exchange {config.exchange} was asked for, and {reason}")
        return _alone(ranks, experts, rank, device, reason)
    coordinator: Any = resolve(seams.group)()
    peers = "-".join(map(str, coordinator.ranks))
    rendezvous: Any = dist.distributed_c10d
    store = rendezvous.PrefixStore(
        f"waterfill_rs/{runner}/{peers}", rendezvous._get_default_store()
    )
    return open_exchange(
        store,
        ranks=ranks,
        rank=rank,
        experts=experts,
        choice=config.exchange,
        settings=config.board,
        group=coordinator.device_group if device.type == "cuda" else coordinator.cpu_group,
        device=device if device.type == "cuda" else None,
    )
