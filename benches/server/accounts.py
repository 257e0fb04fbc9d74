"""Do a round's batches and calls add up? Each forward is overlapped or fused, and each layer of a fused one is one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.modes import CHOOSE, LIVE
from waterfill_rs._native import OUTCOMES


def mismatches(rank: Mapping[str, Any], *, calls: bool) -> list[str]:
    """What does not add up in one rank's result of one round, in words; nothing where all does.

    Args:
        rank: see ``rank.Rank.results``.
        calls: are calls looked at too? Only where the device had nothing to do when the round began.
    """
    modes, batches = rank["modes"], rank["batches"]
    forwards = sum(modes.values())
    found = []
    overlapped = batches.get("overlapped", 0)
    if batches:
        fused = batches.get("fused", 0)
        if overlapped + fused != forwards:
            found.append(
                f"{forwards} forwards, and {overlapped} overlapped + {fused} fused batches"
            )
        wanted = modes.get("overlap", 0)
        if not modes.keys() & set(CHOOSE) and overlapped != wanted:
            found.append(f"{wanted} forwards were to overlap, and {overlapped} did")
    elif modes.get("overlap"):
        found.append(
            f"{modes['overlap']} forwards were to overlap, and nothing tells that they did"
        )
    return found + (_calls(rank, overlapped) if calls else [])


def _calls(rank: Mapping[str, Any], overlapped: int) -> list[str]:
    modes, calls, layers, staying = (rank[name] for name in ("modes", "calls", "layers", "staying"))
    ends = {name: calls.get(name, 0) for name in OUTCOMES}
    if not any(name in calls for name in OUTCOMES):
        return []  # Nobody asked for live counts.
    chosen = rank["batches"] if "auto" in modes else {}
    fused = chosen.get("fused", sum(modes.get(name, 0) for name in LIVE))
    expected = fused * layers + overlapped * (staying if layers else 0)
    ended = sum(ends.values())
    told = ", ".join(f"{name} {count}" for name, count in ends.items())
    found = []
    if ended != expected:
        found.append(
            f"{fused} fused batches of {layers} layers are {expected} calls, and {ended} ended: {told}"
        )
    if calls.get("calls", ended) != ended:
        found.append(f"{calls['calls']} calls, and {ended} ended: {told}")
    return found
