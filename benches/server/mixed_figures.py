"""Rounds of mixed traffic made into figures: tokens per second by the wall clock, and ratios of rounds with the same requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server import figures
from server.modes import MODES
from waterfill_rs._native import OUTCOMES


@dataclass(frozen=True)
class MixedRound:
    """``number``: engines have the same requests in the round of the same number. Sums over ranks: ``batches`` by choice,
    ``calls`` by their ends, ``kinds`` of forwards."""

    number: int
    seconds: float
    prompt_tokens: int
    new_tokens: int
    batches: Mapping[str, int]
    calls: Mapping[str, int]
    kinds: Mapping[str, int]


def of_result(number: int, result: Mapping[str, Any]) -> MixedRound:
    """``result``: an engine's, see ``engine.Rounds``."""
    sums: dict[str, dict[str, int]] = {name: {} for name in ("batches", "calls", "kinds")}
    for rank in result["ranks"]:
        for name, of in sums.items():
            figures.add(of, rank[name])
    return MixedRound(
        number, result["seconds"], result["prompt_tokens"], result["new_tokens"], **sums
    )


def entries(
    place: Mapping[str, Any], rounds: Mapping[str, Sequence[MixedRound]]
) -> list[dict[str, Any]]:
    """Entries of ``mixed``, one a mode: see ``entry``."""
    return [
        entry(place, mode, rounds[mode], rounds.get("off", ()))
        for mode in MODES
        if rounds.get(mode)
    ]


def entry(
    place: Mapping[str, Any], mode: str, own: Sequence[MixedRound], off: Sequence[MixedRound]
) -> dict[str, Any]:
    """Medians over rounds. ``ratio_off``: a round's seconds over those of ``off`` with the same requests: below 1 is
    faster than ``off``."""
    sums: dict[str, dict[str, int]] = {name: {} for name in ("batches", "calls", "kinds")}
    for one in own:
        for name, of in sums.items():
            figures.add(of, getattr(one, name))
    paired = figures.ratios(_seconds(own), _seconds(off))
    return {
        "placement": place["placement"],
        "redundant": place["redundant"],
        "mode": mode,
        "rounds": len(own),
        "seconds": figures.median([one.seconds for one in own]),
        "new_tokens_per_s": figures.median([one.new_tokens / one.seconds for one in own], 1),
        "prompt_tokens_per_s": figures.median([one.prompt_tokens / one.seconds for one in own], 1),
        "ratio_off": figures.median(paired),
        "quartiles": figures.quartiles(paired),
        "pairs": len(paired),
        "batches": sums["batches"] or None,
        "calls": {end: sums["calls"][end] for end in OUTCOMES if end in sums["calls"]} or None,
        "forwards": sums["kinds"],
        "by_round": [
            {
                "round": one.number,
                "seconds": round(one.seconds, 4),
                "new_tokens": one.new_tokens,
                "prompt_tokens": one.prompt_tokens,
            }
            for one in own
        ],
    }


def _seconds(rounds: Sequence[MixedRound]) -> dict[tuple[int, int], float]:
    return {(one.number, 0): one.seconds for one in rounds}
