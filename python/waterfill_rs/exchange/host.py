"""How a rank with layers on the CPU learns the other ranks' counts: not at all, or over a node's board.

Both take the ids of one layer and give this rank's quotas, ``[R]``, which always add up to its
tokens. Every rank of the group makes the same calls in the same order, a rank without tokens too.
"""

from __future__ import annotations

from typing import Any, Protocol

from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.settings import BoardSettings, Pace

__all__ = ["BoardExchange", "Exchange", "Ids", "SoloExchange"]

Ids = tuple[int, int, int, int]
"""Ids ``[rows, top_k]`` in this process's memory: address, rows, top_k, and bits an id (32 or 64)."""


class Exchange(Protocol):
    """One rank's end. ``reason``: why it is this one, in words."""

    reason: str
    unwatched: str | None
    """Why the other ranks cannot see whether this process lives, if they have to and can't."""

    @property
    def name(self) -> str:
        """``solo``, ``board`` or ``group``."""
        ...

    def quotas(self, ids: Ids) -> list[int]:
        """Count, exchange, and give this rank's quotas.

        Raises:
            ValueError: an id at or above the number of experts, with its place. The others learn no counts then.
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
    unwatched: str | None = None

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

    The leader, rank 0, has the planner. It waits for the counts of all ranks that live, ``patience_us`` from a call's
    first counts on; if a rank's are not there then, no rank has a plan for this call, and all take own counts at once.
    A rank whose planner does not answer takes own counts after ``cap_us``.
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
        self.unwatched = self._end.unwatched
        if rank == 0 and not inline:
            self._planner = _native.PlannerThread(
                board, cost_model, patience_us=patience_us, pace=pace, core=core
            )
            self.unwatched = self.unwatched or self._planner.unwatched

    @classmethod
    def open(
        cls,
        board: _native.Board,
        rank: int,
        settings: BoardSettings,
        reason: str,
        cost_model: CostModel | None = None,
    ) -> BoardExchange:
        """A rank's end of a board, as the settings have it. Without a cost model a row costs 1.

        Raises:
            OSError, ValueError: the planner's core is not to be had.
        """
        return cls(
            board,
            rank,
            CostModel.rows() if cost_model is None else cost_model,
            cap_us=settings.cap_us,
            patience_us=settings.patience_us,
            pace=settings.pace,
            core=settings.core,
            reason=reason,
        )

    def quotas(self, ids: Ids) -> list[int]:
        if self._planner is not None:
            self._planner.wake()
        return self._end.unsafe_quotas_ptr(ids, self._cap_us)[1]

    def tally(self) -> dict[str, Any]:
        return self._end.tally()

    def close(self) -> None:
        if self._planner is not None:
            self._planner.stop()
