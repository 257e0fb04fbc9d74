"""How a rank with layers on the CPU learns the other ranks' counts: not at all, or over a node's board.

Both expand one layer's routed rows by quotas that always add up to this rank's tokens. Every rank of the group makes
the same calls in the same order, a rank without tokens too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from waterfill_rs.exchange.ends import BoardEnd, SoloEnd
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.tensors import ids_at, weights_at
from waterfill_rs.torch import expand_topk, move_up

__all__ = ["BoardExchange", "SoloExchange"]


class _OnTensors(Protocol):
    """Calls with CPU tensors, by the addresses of an end."""

    member: Member

    def unsafe_expand_ptr(
        self,
        ids: tuple[int, int, int, int],
        weights: tuple[int, int],
        out: tuple[int, int],
        shared_weight: float,
    ) -> None: ...

    def expand(
        self, ids: Tensor, weights: Tensor, shared_weight: float, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Exchange.expand``. A refusal leaves this call out: the others learn no counts of this rank."""
        there = ids_at(ids)
        rows, top_k = ids.shape
        beside = weights_at(weights, (rows, top_k))
        out_ids = ids.new_empty(rows, top_k + 1)
        out_weights = weights.new_empty(rows, top_k + 1)
        out = out_ids.data_ptr(), out_weights.data_ptr()
        self.unsafe_expand_ptr(there, beside, out, shared_weight)
        return out_ids, out_weights

    def move_up(self, ids: Tensor, *, layer: int | None = None, live: bool = True) -> Tensor:
        """See ``Exchange.move_up``."""
        return move_up(ids, physical_experts=self.member.experts, ranks=self.member.ranks)


def _primary(ids: Tensor, primaries: list[int] | None) -> Tensor:
    """Ids by the primary replicas of their experts; those that name no expert stay, as do all without primaries."""
    if primaries is None:
        return ids
    expert = (ids >= 0) & (ids < len(primaries))
    of = torch.tensor(primaries, dtype=ids.dtype)
    return torch.where(expert, of[ids.clamp(0, len(primaries) - 1).long()], ids)


class SoloExchange(SoloEnd, _OnTensors):
    """Own counts only."""

    replicas: ReplicaTables | None = None


class BoardExchange(BoardEnd, _OnTensors):
    """Live counts of the ranks of one node: a ``BoardEnd`` for tensors."""

    replicas: ReplicaTables | None = None

    def choose_by(self, replicas: ReplicaTables) -> None:
        """Choose replicas by these tables, and have the planner know them. The board has as many redundant experts."""
        self.replicas = replicas
        replicas.teach(self.learn)

    def expand(
        self, ids: Tensor, weights: Tensor, shared_weight: float, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Exchange.expand``. A refusal leaves this call out: the others learn no counts of this rank."""
        if self.replicas is None:
            return super().expand(ids, weights, shared_weight)
        there = ids_at(ids)
        weights_at(weights, tuple(ids.shape))
        chosen = torch.empty_like(ids)
        self.unsafe_choose_ptr(there, chosen.data_ptr(), self.replicas.of(layer), moved=False)
        member = self.member
        return expand_topk(
            chosen,
            weights,
            physical_experts=member.experts,
            ranks=member.ranks,
            rank=member.rank,
            shared_weight=shared_weight,
            quotas=self.quotas,
        )

    def move_up(self, ids: Tensor, *, layer: int | None = None, live: bool = True) -> Tensor:
        """See ``Exchange.move_up``."""
        if self.replicas is None:
            return super().move_up(ids)
        if not live:
            return super().move_up(_primary(ids, self.replicas.primaries(layer)))
        there = ids_at(ids)
        moved = torch.empty(ids.shape, dtype=torch.int64)
        self.unsafe_choose_ptr(there, moved.data_ptr(), self.replicas.of(layer), moved=True)
        return moved
