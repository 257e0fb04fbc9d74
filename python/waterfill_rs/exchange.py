"""How a rank learns the other ranks' counts: not at all, over a node's board, or by a collective.

All three take the ids of one layer and give this rank's quotas, ``[R]``, which always add up to its
tokens. Every rank of the group makes the same calls in the same order, a rank without tokens too.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from waterfill_rs import CostModel, _native

__all__ = ["BoardExchange", "Exchange", "GroupExchange", "Ids", "Pace", "SoloExchange"]

Ids = tuple[int, int, int, int]
"""Ids ``[rows, top_k]`` in this process's memory: address, rows, top_k, and bits an id (32 or 64)."""

Pace = Literal["auto", "inline", "park", "spin"]
"""Who plans at a board. ``inline``: the leader's own call while it waits, which ranks on a CUDA device cannot;
``park``, ``spin``: a thread of the leader, which sleeps when nothing comes for a while, or never sleeps. ``auto``:
inline on the CPU, park for a device."""


class Exchange(Protocol):
    """One rank's end. ``reason``: why it is this one, in words."""

    reason: str

    @property
    def name(self) -> str:
        """``solo``, ``board`` or ``group``."""
        ...

    def quotas(self, ids: Ids) -> list[int]:
        """Count, exchange, and give this rank's quotas.

        Raises:
            ValueError: an id at or above the number of experts, with its place. Nothing was posted then.
        """
        ...

    def tally(self) -> dict[str, Any]:
        """How the calls so far ended; at least ``calls``."""
        ...

    def close(self) -> None:
        """End what runs beside it. Quotas are not asked for afterwards."""
        ...


class SoloExchange:
    """Own counts only."""

    name = "solo"

    def __init__(
        self, ranks: int, experts: int, rank: int, cost_model: CostModel, reason: str
    ) -> None:
        self.reason = reason
        self._end = _native.Solo(ranks, experts, rank, cost_model)

    def quotas(self, ids: Ids) -> list[int]:
        return self._end.unsafe_quotas_ptr(ids)

    def tally(self) -> dict[str, Any]:
        return {"calls": self._end.calls}

    def close(self) -> None:
        pass


class BoardExchange:
    """Live counts of the ranks of one node, through shared memory.

    A wait ends after ``cap_us``; then the quotas are from own counts. The leader, rank 0, has the planner,
    which waits ``patience_us`` for late ranks from a call's first counts on.
    """

    name = "board"

    def __init__(
        self,
        board: _native.Board,
        rank: int,
        cost_model: CostModel,
        *,
        cap_us: int,
        patience_us: int,
        pace: Pace,
        core: int | None = None,
        reason: str,
    ) -> None:
        self.reason = reason
        self.board = board
        self._cap_us = cap_us
        self._planner: _native.PlannerThread | None = None
        inline = pace in ("auto", "inline")
        self._end = _native.Port(
            board, rank, cost_model, plans_patience_us=patience_us if rank == 0 and inline else None
        )
        if rank == 0 and not inline:
            self._planner = _native.PlannerThread(
                board, cost_model, patience_us=patience_us, pace=pace, core=core
            )

    def quotas(self, ids: Ids) -> list[int]:
        return self._end.unsafe_quotas_ptr(ids, self._cap_us)[1]

    def tally(self) -> dict[str, Any]:
        return self._end.tally()

    def close(self) -> None:
        if self._planner is not None:
            self._planner.stop()


class GroupExchange:
    """Live counts by one all-gather a call through a ``torch.distributed`` process group, any number of nodes.

    It is as alive as the group: no cap, because a collective that one rank gives up is lost for all. Where
    the model's own collectives would hang, so does this.
    """

    name = "group"

    def __init__(
        self, group: Any, ranks: int, experts: int, rank: int, cost_model: CostModel, reason: str
    ) -> None:
        import torch
        import torch.distributed

        if (found := torch.distributed.get_world_size(group)) != ranks:
            raise ValueError(f"the process group has {found} ranks: give one of {ranks}")
        self.reason = reason
        self._gather = torch.distributed.all_gather_into_tensor
        self._group = group
        self._end = _native.GroupPlanner(ranks, experts, rank, cost_model)
        self._own = torch.zeros(self._end.words, dtype=torch.int32)
        # Flat, because gloo takes no other shape.
        self._all = torch.zeros(ranks * self._end.words, dtype=torch.int32)
        self._calls = 0

    def quotas(self, ids: Ids) -> list[int]:
        self._end.unsafe_count_ptr(ids, self._own.data_ptr())
        self._gather(self._all, self._own, group=self._group)
        self._calls += 1
        return self._end.unsafe_quotas_ptr(self._all.data_ptr())

    def tally(self) -> dict[str, Any]:
        return {"calls": self._calls, "live": self._calls}

    def close(self) -> None:
        pass
