"""One rank of an expert-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Member"]


@dataclass(frozen=True)
class Member:
    """``ranks``: the EP size. ``experts``: physical routed experts over all ranks, redundant ones too. ``rank``: which one it is.

    Raises:
        ValueError: experts that do not divide over the ranks, a rank outside the group.
    """

    ranks: int
    experts: int
    rank: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.experts < 1 or self.experts % self.ranks:
            raise ValueError(
                f"{self.experts} physical experts over {self.ranks} ranks: give a positive multiple of the ranks"
            )
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank {self.rank}: give one from 0 to {self.ranks - 1}")
