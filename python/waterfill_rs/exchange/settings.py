"""What may be chosen of an exchange, and how a board waits and plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CHOICES", "BoardSettings", "Choice", "Pace"]

Choice = Literal["auto", "solo", "board", "group"]
CHOICES: tuple[Choice, ...] = ("auto", "solo", "board", "group")

Pace = Literal["auto", "inline", "park", "spin"]
"""Who plans at a board. ``inline``: the leader's own call while it waits, which ranks on a CUDA device cannot;
``park``, ``spin``: a thread of the leader, which sleeps when nothing comes for 0.1 s, or never sleeps. ``auto``:
inline on the CPU, park for a device. ``park`` spins while calls keep coming, so a busy server costs a core either way."""


@dataclass(frozen=True)
class BoardSettings:
    """``cap_us``: the longest wait of a call. ``pace``, ``core``: see ``Pace``.

    A wait for a rank that lives is one that the all-to-all of a prefill would make anyway, so the cap guards against a
    process that neither ends nor goes on. See docs/operators.md, "What waiting costs".
    """

    cap_us: int = 1_000_000
    pace: Pace = "auto"
    core: int | None = None

    @property
    def patience_us(self) -> int:
        """The planner answers for late ranks before the others give the planner up."""
        return max(1, self.cap_us - self.cap_us // 8)
