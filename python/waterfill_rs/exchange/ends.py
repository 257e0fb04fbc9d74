"""A rank's native end, without torch: its calls take addresses or Python's arrays, and how they go is counted.

``waterfill_rs.exchange.host`` takes tensors. The demo and the doctor's self-test have none.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.settings import BoardSettings, Pace

if TYPE_CHECKING:
    from typing import Self

    from waterfill_rs._native import Tally

__all__ = ["BoardEnd", "SoloEnd"]


class SoloEnd:
    """Own counts only. ``reason``: why, in words."""

    name = "solo"
    unwatched: str | None = None

    def __init__(self, member: Member, cost_model: CostModel, reason: str) -> None:
        self.member = member
        self.reason = reason
        self._end = _native.Solo(member.ranks, member.experts, member.rank, cost_model)

    def unsafe_expand_ptr(
        self,
        ids: tuple[int, int, int, int],
        weights: tuple[int, int],
        out: tuple[int, int],
        shared_weight: float,
    ) -> None:
        """One call; see ``_native.Solo.unsafe_expand_ptr``."""
        self._end.unsafe_expand_ptr(ids, weights, out, shared_weight)

    @property
    def quotas(self) -> list[int]:
        """``[ranks]`` of the last call."""
        return self._end.quotas

    def tally(self) -> Mapping[str, int]:
        """How many ``calls`` there were."""
        return {"calls": self._end.calls}

    def close(self) -> None:
        """Nothing runs beside it."""


class BoardEnd:
    """Live counts of the ranks of one node, through shared memory.

    The leader, rank 0, has the planner. It waits for the counts of all ranks that live, ``patience_us`` from a call's
    first counts on; if a rank's are not there then, no rank has a plan for this call, and all take own counts at once.
    A rank whose planner does not answer takes own counts after ``cap_us``.
    """

    name = "board"

    def __init__(
        self,
        board: _native.Board,
        member: Member,
        cost_model: CostModel,
        *,
        cap_us: int,
        patience_us: int,
        pace: Pace,
        core: int | None = None,
        reason: str,
    ) -> None:
        self.member = member
        self.reason = reason
        self.board = board
        self._cap_us = cap_us
        self._planner: _native.PlannerThread | None = None
        leads, inline = member.rank == 0, pace in ("auto", "inline")
        self._leads = leads
        self._end = _native.Port(
            board,
            member.rank,
            cost_model,
            plans_patience_us=patience_us if leads and inline else None,
        )
        self.unwatched = self._end.unwatched
        if leads and not inline:
            self._planner = _native.PlannerThread(
                board, cost_model, patience_us=patience_us, pace=pace, core=core
            )
            self.unwatched = self.unwatched or self._planner.unwatched

    @classmethod
    def open(
        cls,
        board: _native.Board,
        member: Member,
        settings: BoardSettings,
        reason: str,
        cost_model: CostModel | None = None,
    ) -> Self:
        """A rank's end of a board, as the settings have it. Without a cost model a row costs 1.

        Raises:
            OSError, ValueError: the planner's core is not to be had.
        """
        return cls(
            board,
            member,
            CostModel.rows() if cost_model is None else cost_model,
            cap_us=settings.cap_us,
            patience_us=settings.patience_us,
            pace=settings.pace,
            core=settings.core,
            reason=reason,
        )

    def unsafe_expand_ptr(
        self,
        ids: tuple[int, int, int, int],
        weights: tuple[int, int],
        out: tuple[int, int],
        shared_weight: float,
    ) -> None:
        """One call; see ``_native.Port.unsafe_expand_ptr``."""
        if self._planner is not None:
            self._planner.wake()
        self._end.unsafe_expand_ptr(ids, weights, out, shared_weight, self._cap_us)

    def unsafe_choose_ptr(
        self,
        ids: tuple[int, int, int, int],
        out: int,
        table: _native.ReplicaTable | None,
        moved: bool,
    ) -> None:
        """One call at a board with redundant experts; see ``_native.Port.unsafe_choose_ptr``."""
        if self._planner is not None:
            self._planner.wake()
        self._end.unsafe_choose_ptr(ids, out, self._cap_us, table, moved)

    def learn(self, layer: int, table: _native.ReplicaTable) -> None:
        """A layer's map, for the planner, if it is in this process."""
        if self._planner is not None:
            self._planner.set_map(layer, table)
        elif self._leads:
            self._end.set_map(layer, table)

    def expand_array(self, ids: array[int], top_k: int) -> array[int]:
        """One call with int32 ids ``[N * top_k]`` in a row, the weights all alike; gives int32 ids ``[N * (top_k + 1)]``.

        Raises:
            ValueError: an id at or above the number of experts, with its place. The others learn no counts then.
                An array of another type, or of a length that is no multiple of ``top_k``.
        """
        if ids.typecode not in "il" or ids.itemsize != 4 or top_k < 1 or len(ids) % top_k:
            raise ValueError(
                f"{len(ids)} ids of type {ids.typecode!r}, top_k {top_k}: give int32 ids, a multiple of top_k"
            )
        rows = len(ids) // top_k
        weights = array("f", [1 / top_k]) * (rows * top_k)
        out_ids, out_weights = (array(code, [0]) * (rows * (top_k + 1)) for code in "if")
        self.unsafe_expand_ptr(
            (ids.buffer_info()[0], rows, top_k, 32),
            (weights.buffer_info()[0], 32),
            (out_ids.buffer_info()[0], out_weights.buffer_info()[0]),
            1.0,
        )
        return out_ids

    @property
    def quotas(self) -> list[int]:
        """``[ranks]`` of the last call."""
        return self._end.quotas

    def tally(self) -> Tally:
        """How the calls so far ended, and how long they waited."""
        return self._end.tally()

    def close(self) -> None:
        """End the planner's thread. No calls are made afterwards."""
        if self._planner is not None:
            self._planner.stop()
