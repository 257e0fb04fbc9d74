"""A line in the log when too few of the last calls had a live plan: who or what was late, and what to do.

Once, and then ever more seldom as long as it stays so. A thread looks at the board now and then, because layers on a
GPU run no Python; nothing is done layer by layer.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from waterfill_rs._native import OUTCOMES

__all__ = ["LiveShare", "watch"]

logger = logging.getLogger(__name__)

WINDOW = 1000
"""Calls of a rank that are looked at together."""
MOST_NOT_LIVE = 0.01
LOOK_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
"""From one line to the next: twice as long each time."""

_BOARD = {
    "none": "a rank that compiles kernels or starts is late for a while; one that always is lacks CPU or is held up: see "
    "waterfill-rs top, and the log of the ranks that were missed; a WATERFILL_RS_TIMEOUT_US that is set lower than the "
    "ranks are apart is too low: take it out",
    "timed_out": "the planner, a thread of rank 0's process, is late: give it a CPU of its own (waterfill-rs doctor)",
    "broken": "the planner, a thread of rank 0's process, is gone or always late: see waterfill-rs status and doctor",
    "torn": "something else writes to the board: see waterfill-rs status",
}
_GROUP = {
    "none": "a rank refused its ids: see its log",
    "timed_out": "this process's planner is late: give it a CPU of its own (waterfill-rs doctor)",
    "broken": "this process's planner is gone or always late: see waterfill-rs status and doctor",
    "torn": "something else writes to this process's board: see waterfill-rs status",
}


def watch(exchange: Any) -> None:
    """Look at this exchange from now on, until it is gone. On the leader, rank 0, which tells of all ranks of a board."""
    share = LiveShare(_GROUP if exchange.name == "group" else _BOARD)
    alive = weakref.ref(exchange)

    def look() -> None:
        while (there := alive()) is not None:
            if told := share.look(_tallies(there)):
                logger.warning("waterfill-rs: %s", told)
            del there
            time.sleep(LOOK_S)

    threading.Thread(target=look, name="waterfill-share", daemon=True).start()


def _tallies(exchange: Any) -> list[Mapping[str, Any]]:
    board = getattr(exchange, "board", None)
    if board is None:
        return [exchange.tally()]
    snapshot = board.snapshot()
    missed = snapshot["planner"]["missed"]
    return [{**tally, "missed": missed[rank]} for rank, tally in enumerate(snapshot["by_rank"])]


class LiveShare:
    """What each rank's last calls came to. ``advice``: by how calls end. ``clock``: seconds, monotonic."""

    def __init__(
        self, advice: Mapping[str, str] = _BOARD, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._advice, self._clock = advice, clock
        self._before: list[dict[str, int]] = []
        self._next = 0.0
        self._pause = FIRST_PAUSE_S

    def look(self, tallies: list[Mapping[str, Any]]) -> str | None:
        """Given each rank's tally, and how many calls it was ``missed`` in: what to log, if anything."""
        now = [{name: tally.get(name, 0) for name in (*OUTCOMES, "missed")} for tally in tallies]
        if len(self._before) != len(now):
            self._before = now
            return None
        grown = [
            {name: count - before[name] for name, count in tally.items()}
            for tally, before in zip(now, self._before, strict=True)
        ]
        if max(_calls(rank) for rank in grown) < WINDOW:
            return None
        self._before = now
        # A rank that died or stopped has made a few calls of these alone.
        ranks = [rank for rank, counts in enumerate(grown) if _calls(counts) >= WINDOW]
        worst = min(ranks, key=lambda rank: _live(grown[rank]))
        if _live(grown[worst]) >= 1 - MOST_NOT_LIVE:
            self._pause = FIRST_PAUSE_S
            return None
        if self._clock() < self._next:
            return None
        self._next, self._pause = self._clock() + self._pause, min(2 * self._pause, LONGEST_PAUSE_S)
        return _told(worst, grown, self._advice)


def _calls(counts: Mapping[str, int]) -> int:
    return sum(counts[name] for name in OUTCOMES)


def _live(counts: Mapping[str, int]) -> float:
    return counts["live"] / _calls(counts) if _calls(counts) else 1.0


def _told(worst: int, grown: list[dict[str, int]], advice: Mapping[str, str]) -> str:
    counts = grown[worst]
    others = {name: counts[name] for name in OUTCOMES if name != "live" and counts[name]}
    missed = {rank: tally["missed"] for rank, tally in enumerate(grown) if tally["missed"]}
    most = max(others, key=lambda name: others[name])
    return (
        f"{1 - _live(counts):.1%} of the last {_calls(counts)} calls of rank {worst} had no live plan, so layers were less level: "
        + ", ".join(f"{count} {name}" for name, count in others.items())
        + (f"; calls without a rank's counts, by rank: {missed}" if missed else "")
        + f". {advice[most]}"
    )
