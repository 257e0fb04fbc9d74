"""The package's choice for each batch, overlapped or fused: forced for a mode, and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Choice:
    """Of one rank's layers, which share one object. A package or a layer that cannot overlap has none.

    Args:
        balancers: gives the rank's balancers, which are there once the model is prepared.
    """

    def __init__(self, balancers: Callable[[], Sequence[Any]]) -> None:
        self._balancers = balancers
        self._seen = {"overlapped": 0, "fused": 0}
        self._captured = False
        self._batches = {"overlapped": 0, "fused": 0}

    def _overlaps(self) -> list[Any]:
        return [getattr(balancer, "overlap", None) for balancer in self._balancers()]

    @property
    def _shared(self) -> Any:
        return next((own.choice for own in self._overlaps() if own is not None), None)

    def watch(self) -> None:
        """Before graphs are captured: what they are captured to do is what their replays do."""
        if (shared := self._shared) is None:
            return
        import torch

        overlaps = shared.overlaps

        def watched(batch: Any) -> bool:
            decided: bool = overlaps(batch)
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                self._captured = decided
            return decided

        shared.overlaps = watched

    @property
    def staying(self) -> int:
        """Layers that are fused in every batch."""
        return sum(own is None for own in self._overlaps())

    def force(self, mode: str) -> None:
        """For the forwards from now on, in an engine whose modes are switched.

        Raises:
            RuntimeError: overlap is asked for, and there are layers that cannot.
        """
        if mode == "overlap" and self.staying:
            raise RuntimeError(
                f"{self.staying} of {len(self._balancers())} layers cannot overlap, see the log: leave the mode overlap out"
            )
        if (shared := self._shared) is not None:
            shared.forced = "overlap" if mode == "overlap" else "fused"

    def count(self) -> None:
        """After each forward: what its layers did, or, where a graph was replayed, what they did when it was captured."""
        if (shared := self._shared) is None:
            return
        grown = {how: calls - self._seen[how] for how, calls in shared.tally.items()}
        self._seen = dict(shared.tally)
        overlapped = grown["overlapped"] > 0 if any(grown.values()) else self._captured
        self._batches["overlapped" if overlapped else "fused"] += 1

    def tally(self) -> dict[str, int]:
        """Batches so far, ``overlapped`` and ``fused``; empty where the package knows no choice."""
        return {} if self._shared is None else dict(self._batches)
