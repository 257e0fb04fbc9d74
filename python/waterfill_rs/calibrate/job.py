"""What is measured, what the ranks' processes are told, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["Dispatched", "Job", "Plan"]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    dense_tokens: Sequence[int]
    tiles: Sequence[int]
    """Rows of an expert, in units of the grouped GEMM's alignment, the first 1."""
    dispatch_tokens: Sequence[int]
    prefill_tokens: Sequence[int]
    batches: int
    """How many times each is timed; the median counts."""


@dataclass(frozen=True)
class Job:
    """What the ranks' processes measure, all alike."""

    ranks: int
    hidden: int
    intermediate: int
    top_k: int
    experts: int
    dispatch_tokens: Sequence[int]
    prefill_tokens: Sequence[int]
    port: int
    """Of 127.0.0.1, where they meet."""

    def with_experts(self, experts: int) -> Job:
        """The same over other ``experts``."""
        return replace(self, experts=experts)


@dataclass(frozen=True)
class Dispatched:
    """Measured microseconds between GPUs, by tokens a rank."""

    ranks: int
    top_k: int
    times: dict[int, float]
    """Of dispatch."""
    prefill: dict[int, tuple[float, float]] | str
    """Of a layer in prefill, overlapped and fused; or in words why it was not measured."""
