"""One model's layers on a CUDA device: the kernel posts, waits and expands; a planner's thread plans on the node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander

__all__ = ["DeviceExchange"]


class DeviceExchange:
    """One rank's end, on one device and one stream at a time; all layers of a model share it.

    Its kernel is made at the first call, which is when top-k and dtypes are known, and must not be within the
    capture of a graph. With ``board`` (of ``ranks`` experts: loads a rank) plans are from live counts; without,
    from own ones. Rank 0 has the planner.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        ranks: int,
        experts: int,
        rank: int,
        reason: str,
        board: _native.Board | None = None,
        cap_us: int = 500,
        patience_us: int = 250,
        pace: str = "park",
        core: int | None = None,
    ) -> None:
        self.name = "solo" if board is None else "board"
        self.reason = reason
        self.device, self.board = device, board
        self._shape = {"physical_experts": experts, "ranks": ranks, "rank": rank}
        self._cap_us = None if board is None else cap_us
        self._expander: Expander | None = None
        self._planner: _native.PlannerThread | None = None
        if board is not None and rank == 0:
            self._planner = _native.PlannerThread(
                board, CostModel.rows(), patience_us=patience_us, pace=pace, core=core
            )

    def expand(self, ids: Tensor, weights: Tensor, shared_weight: float) -> tuple[Tensor, Tensor]:
        """Widen ids and weights ``[N, K]`` to ``[N, K + 1]``; N may be 0. See ``waterfill_rs.torch``.

        Raises:
            ValueError: tensors that do not fit those of the first call, before anything is written.
            RuntimeError: the first call within a capture; no driver or NVRTC.
        """
        expander = self._expander or self._prepare(ids, weights)
        return expander(ids, weights, shared_weight, cap_us=self._cap_us)

    def _prepare(self, ids: Tensor, weights: Tensor) -> Expander:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first Waterfill call is within the capture of a CUDA graph: run the model once before"
            )
        self._expander = Expander(
            self.device,
            **self._shape,
            top_k=ids.shape[1],
            ids=ids.dtype,
            weights=weights.dtype,
            board=self.board,
        )
        return self._expander

    def tally(self) -> dict[str, Any]:
        """How the calls so far ended; waits for the device."""
        if self._expander is None:
            return {"calls": 0}
        counts = self._expander.tally()
        return {"calls": sum(counts.values()), **counts}

    def close(self) -> None:
        """End the planner's thread. Graphs that were captured are not replayed afterwards."""
        if self._planner is not None:
            self._planner.stop()
