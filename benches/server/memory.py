"""Memory of the engines beside each other: what torch has allocated on a rank, with Waterfill and without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OURS = ("auto", "overlap", "fused", "switched", "live", "own", "home")
"""Engines with this package, the one that is compared first."""
EQUAL = 1e-3
"""Two engines' memory is equal if it differs by no more than this share: allocations are of whole blocks."""
TIMES = ("prepared", "ended")


def entry(phases: str, engine: str, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One of the results' ``memory``: bytes ``allocated`` by torch in the rank's process, and ``free`` and ``total`` of its
    GPU, on which other engines may be, for each rank when its model was ``prepared`` and when the run ``ended``."""
    by_rank = [{"prepared": rank["prepared"], "ended": rank["now"]} for rank in ranks]
    return {"phases": phases, "engine": engine, "ranks": by_rank}


def lines(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each start of engines: memory of the engine with the package, without Waterfill, and with sglang's."""
    by_phases: dict[str, dict[str, Mapping[str, Any]]] = {}
    for one in entries:
        by_phases.setdefault(one["phases"], {})[one["engine"]] = one
    return [_line(phases, of) for phases, of in by_phases.items()]


def most(entry: Mapping[str, Any], time: str) -> int | None:
    """Bytes allocated on the rank that has most; None where a rank told none."""
    told = [rank[time] for rank in entry["ranks"]]
    return max(one["allocated"] for one in told) if told and all(told) else None


def _line(phases: str, of: Mapping[str, Mapping[str, Any]]) -> str:
    told = []
    for name, one in of.items():
        numbers = [most(one, time) for time in TIMES]
        told.append(
            f"{name} " + " / ".join("?" if n is None else f"{n / 2**30:.3f}" for n in numbers)
        )
    ours = next((name for name in OURS if name in of), None)
    compared = [
        f"{ours} to {other}: {_difference(of[ours], of[other])}"
        for other in ("off", "sglang")
        if ours and other in of
    ]
    return (
        f"Memory, {phases}, GiB that torch has allocated on the rank that has most, prepared / at the end: "
        + ", ".join(told)
        + "".join(f". {one}" for one in compared)
        + "."
    )


def _difference(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    found = []
    for time in TIMES:
        a, b = most(ours, time), most(other, time)
        if a is None or not b:
            found.append("not known")
        elif abs(a - b) <= EQUAL * b:
            found.append("equal")
        else:
            found.append(f"{(a - b) / 2**20:+,.1f} MiB ({(a - b) / b:+.2%})")
    return " / ".join(found)
