"""One model's layers on a CUDA device: the kernel posts, waits and expands; a planner's thread plans beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.exchange.settings import BoardSettings

__all__ = ["DeviceExchange", "DeviceGroupExchange"]

# Its name from torch 2.14 on, or the one before.
_all_gather = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)
NO_COUNT = -1
"""What a rank that refuses its tensors gives the others, in each word. As unsigned it is the most there is, which no planner
takes for a number of tokens: the call has no plan, and all ranks take own counts."""


class DeviceExchange:
    """One rank's end, on one device and one stream at a time; all layers of a model share it.

    Its kernel is made at the first call, which is when top-k and dtypes are known, and must not be within the
    capture of a graph. With ``board`` (of ``ranks`` experts: loads a rank) plans are from live counts; without,
    from own ones.

    With ``replicas`` the board has rows of replicated experts and loads of the rest, and each call first chooses replicas,
    by one launch more where shared rows are routed. That launch then has the exchange in it.

    Args:
        replicas: tables on the device, with as many redundant experts as the board has.
        plans: this process has the board's planner. Of ranks that share a board, rank 0 has.
        cap_us: a wait's longest, if the planner does not answer.
        patience_us: how long the planner waits for the counts of ranks that live: by default 7/8 of ``cap_us``.
    """

    def __init__(
        self,
        device: torch.device,
        member: Member,
        *,
        reason: str,
        board: _native.Board | None = None,
        plans: bool = False,
        cap_us: int = BoardSettings.cap_us,
        patience_us: int | None = None,
        pace: str = "park",
        core: int | None = None,
        replicas: ReplicaTables | None = None,
    ) -> None:
        self.name = "solo" if board is None else "board"
        self.reason = reason
        self.replicas = None if board is None else replicas
        self.device, self.board, self.member = device, board, member
        self._cap_us = cap_us
        self._expander: Expander | None = None
        self._planner: _native.PlannerThread | None = None
        self._end: _native.DeviceEnd | None = None
        self.unwatched: str | None = None
        if board is not None:
            self._end = _native.DeviceEnd(board, member.rank, plans)
            self.unwatched = self._end.unwatched
        if board is not None and plans:
            if patience_us is None:
                patience_us = BoardSettings(cap_us).patience_us
            self._planner = _native.PlannerThread(
                board, CostModel.rows(), patience_us=patience_us, pace=pace, core=core
            )
            self.unwatched = self.unwatched or self._planner.unwatched
            if self.replicas is not None:
                self.replicas.teach(self._planner.set_map)

    def expand(
        self, ids: Tensor, weights: Tensor, shared_weight: float, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Widen ids and weights ``[N, K]`` to ``[N, K + 1]``; N may be 0. See ``waterfill_rs.torch``.

        Raises:
            ValueError: tensors that do not fit those of the first call, before anything is written.
            RuntimeError: the first call within a capture; no driver or NVRTC.
        """
        expander = self._expander or self._prepare(ids, weights)
        if self.replicas is not None:
            chosen, quotas = self._choose(self.replicas, expander, ids, layer, moved=False)
            return expander(chosen, weights, shared_weight, quotas=quotas)
        self._wake()
        cap_us = None if self.board is None else self._cap_us
        return expander(ids, weights, shared_weight, cap_us=cap_us)

    def move_up(
        self,
        ids: Tensor,
        weights: Tensor | None = None,
        *,
        layer: int | None = None,
        live: bool = True,
    ) -> Tensor:
        """Routed ids ``[N, K]`` past the shared experts, int64, for a batch whose shared rows are not routed; N may be 0.

        Without ``replicas``, or not ``live``, it is no call of the board's: this rank posts nothing, waits for nothing and
        counts nothing, so ranks need not make as many. Else all ranks make it.
        ``weights`` ``[N, K]`` are not looked at; the first call of all takes their dtype for the kernel, and float32
        without them.
        See ``waterfill_rs.torch.move_up``.

        Raises:
            ValueError: ids that do not fit those of the first call, before anything is written.
            RuntimeError: the first call within a capture; no driver or NVRTC.
        """
        expander = self._expander or self._prepare(ids, weights)
        if self.replicas is None:
            return expander.move_up(ids)
        if not live:
            return expander.move_up(ids, *self.replicas.primaries_on_device(layer))
        return self._choose(self.replicas, expander, ids, layer, moved=True)[0]

    def _choose(
        self,
        replicas: ReplicaTables,
        expander: Expander,
        ids: Tensor,
        layer: int | None,
        *,
        moved: bool,
        gathered: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One launch: exchange, and name replicas. With them the quotas of shared rows, unless ids are ``moved`` up."""
        self._wake()
        table, logical = replicas.on_device(layer)
        return expander.choose_replicas(
            ids, table, logical, moved=moved, cap_us=self._cap_us, gathered=gathered
        )

    def _wake(self) -> None:
        if self._planner is not None:
            self._planner.wake()

    def _prepare(self, ids: Tensor, weights: Tensor | None) -> Expander:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first Waterfill call is within the capture of a CUDA graph: run the model once before"
            )
        self._expander = Expander(
            self.device,
            physical_experts=self.member.experts,
            ranks=self.member.ranks,
            rank=self.member.rank,
            top_k=ids.shape[1],
            ids=ids.dtype,
            weights=torch.float32 if weights is None else weights.dtype,
            board=self.board,
            redundant=0 if self.replicas is None else self.replicas.redundant,
        )
        return self._expander

    def tally(self) -> Mapping[str, Any]:
        """How the calls with live counts ended so far, as the kernel tells the board: does not wait for the device."""
        if self.board is None:
            return {"calls": 0}
        return self.board.snapshot()["by_rank"][self.member.rank]

    def close(self) -> None:
        """End the planner's thread, and leave the board. Graphs that were captured are not replayed afterwards."""
        if self._planner is not None:
            self._planner.stop()
        if self._end is not None:
            self._end.leave()


class DeviceGroupExchange(DeviceExchange):
    """Live counts of ranks on any number of hosts: one all-gather a call on the layer's stream.

    It is between two launches, and a graph captures all three: the first counts; the second posts all ranks' counts
    on a board of this process alone, whose planner makes of them the plan that every rank's makes.

    The collective is as alive as the model's own, and has no cap; the wait for the planner has one. ``group``: the
    ``torch.distributed`` process group of these ranks, whose backend takes CUDA tensors.
    """

    def __init__(
        self,
        device: torch.device,
        group: Any,
        member: Member,
        *,
        reason: str,
        board: _native.Board,
        cap_us: int = BoardSettings.cap_us,
        patience_us: int | None = None,
        pace: str = "park",
        replicas: ReplicaTables | None = None,
    ) -> None:
        super().__init__(
            device,
            member,
            reason=reason,
            board=board,
            plans=True,
            cap_us=cap_us,
            patience_us=patience_us,
            pace=pace,
            replicas=replicas,
        )
        self.name = "group"
        self._group = group
        words = board.words
        self._own = torch.zeros(words, dtype=torch.int32, device=device)
        self._all = torch.zeros(member.ranks * words, dtype=torch.int32, device=device)

    def expand(
        self, ids: Tensor, weights: Tensor, shared_weight: float, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As there; a rank that refuses its tensors joins the others first, who then have own counts for this call."""
        expander = self._count(ids, weights, layer)
        if self.replicas is not None:
            chosen, quotas = self._choose(
                self.replicas, expander, ids, layer, moved=False, gathered=self._all
            )
            return expander(chosen, weights, shared_weight, quotas=quotas)
        self._wake()
        return expander(ids, weights, shared_weight, cap_us=self._cap_us, gathered=self._all)

    def move_up(
        self,
        ids: Tensor,
        weights: Tensor | None = None,
        *,
        layer: int | None = None,
        live: bool = True,
    ) -> Tensor:
        """As there."""
        if self.replicas is None or not live:
            return super().move_up(ids, weights, layer=layer, live=live)
        expander = self._count(ids, weights, layer, moved=True)
        return self._choose(self.replicas, expander, ids, layer, moved=True, gathered=self._all)[0]

    def _count(
        self, ids: Tensor, weights: Tensor | None, layer: int | None, *, moved: bool = False
    ) -> Expander:
        """Count, and bring all ranks' counts here."""
        table = None if self.replicas is None else self.replicas.on_device(layer)[0]
        try:
            expander = self._expander or self._prepare(ids, weights)
            expander.count(ids, weights, self._own, table=table, moved=moved)
        except ValueError:
            self._own.fill_(NO_COUNT)
            self._gather()
            raise
        self._gather()
        return expander

    def _gather(self) -> None:
        _all_gather(self._all, self._own, group=self._group)
