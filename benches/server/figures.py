"""Forwards of several engines made into figures: full ones only, the slowest rank's time, ratios of what had the same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.modes import REFERENCES, VERDICT_AMONG

Key = tuple[int, int]
"""Round and place: forwards of all engines with this key had the same tokens and the same routing."""


@dataclass(frozen=True)
class Sent:
    """Rows of one layer and forward, as they were sent. ``rows``: max/mean over ranks of routed and shared rows in the grouped
    GEMM; ``routed``: of routed ones alone; ``active``: physical experts with rows, of the rank that has most of them."""

    rows: float
    routed: float
    active: int


@dataclass
class Mode:
    """What one mode did in one cell. ``ms``: a full forward's GPU time on its slowest rank."""

    ms: dict[Key, float] = field(default_factory=dict)
    interval_ms: list[float] = field(default_factory=list)
    """From a full forward's begin to the next's, the slowest rank's."""
    calls: dict[str, int] = field(default_factory=dict)
    """How calls with live counts ended in rounds that were timed, over all ranks."""
    planner: dict[str, float] = field(default_factory=dict)
    """Sums over plans in these rounds, of the planner."""
    batches: dict[str, int] = field(default_factory=dict)
    """``overlapped`` and ``fused`` in these rounds, over all ranks; empty where the engine does not choose by batch."""
    rows: list[Sent] = field(default_factory=list)
    """Of each layer and forward whose rows were counted."""
    breakdown: dict[str, float] | None = None


def full_forwards(
    ranks: Sequence[Mapping[str, Any]], tokens: int, lead: int
) -> Iterable[tuple[int, str, int, float, float | None]]:
    """Index, mode, place, ms and interval of forwards that count: the same on all ranks, with ``tokens`` tokens on each.

    ``ranks``: each rank's result of one round; see ``ranks.Rank``.
    """
    by_index = [{forward[0]: forward for forward in rank["forwards"]} for rank in ranks]
    for index, (_, mode, place, *_) in sorted(by_index[0].items()):
        same = [own[index] for own in by_index if index in own]
        if index < lead or len(same) < len(ranks):
            continue
        if any(own[1] != mode or own[3] != tokens for own in same):
            continue
        intervals = [own[5] for own in same]
        yield (
            index,
            mode,
            place,
            max(own[4] for own in same),
            None if None in intervals else max(intervals),
        )


def layers_rows(
    ranks: Sequence[Mapping[str, Any]], tokens: int, lead: int
) -> Iterable[tuple[str, Sent]]:
    """Mode and rows of each layer of the forwards that count: rows are summed over the ranks that sent them."""
    counted = {index: mode for index, mode, *_ in full_forwards(ranks, tokens, lead)}
    found: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
    for rank in ranks:
        for index, layer, routed, shared in rank["rows"]:
            found.setdefault((index, layer), []).append((np.array(routed), np.array(shared)))
    for (index, _), sources in sorted(found.items(), key=lambda item: item[0]):
        if index not in counted or len(sources) < len(ranks):
            continue
        by_expert = sum(routed for routed, _ in sources)
        routed = by_expert.sum(1)
        rows = routed + sum(shared for _, shared in sources)
        if routed.sum():
            active = int((by_expert > 0).sum(1).max())
            yield counted[index], Sent(_max_mean(rows), _max_mean(routed), active)


def _max_mean(rows: Any) -> float:
    return float(rows.max() * len(rows) / rows.sum())


def ratios(times: Mapping[Key, float], reference: Mapping[Key, float]) -> list[float]:
    """One a key that both have, sorted."""
    return sorted(times[key] / reference[key] for key in times.keys() & reference.keys())


def quartiles(values: Sequence[float]) -> list[float] | None:
    """The first and the third, or None of fewer than two values."""
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [round(first, 5), round(third, 5)]


def median(values: Sequence[float], digits: int = 5) -> float | None:
    return round(statistics.median(values), digits) if values else None


def add(sums: dict[str, Any], more: Mapping[str, Any] | None) -> None:
    """Add numbers by name; what is no number is left out."""
    for name, value in (more or {}).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            sums[name] = sums.get(name, 0) + value


def live_share(calls: Mapping[str, int]) -> float | None:
    """Of the calls with live counts, those that had a live plan; None where none was asked for."""
    if not calls.get("calls") or "live" not in calls:
        return None
    return round(calls["live"] / calls["calls"], 6)


def rows_max_mean(name: str, mode: Mode, modelled: Mapping[str, float]) -> tuple[float | None, str]:
    """The figure, and where it is from: ``counted``, the ``planner``'s sums, or the ``model`` of the recording."""
    if mode.rows:
        return round(statistics.fmean(sent.rows for sent in mode.rows), 5), "counted"
    if mode.planner.get("mean") and "planned_max" in mode.planner:
        return round(mode.planner["planned_max"] / mode.planner["mean"], 5), "planner"
    model = {"off": "routed", "overlap": "routed", "fused": "live", "auto": "live"}.get(name, name)
    if name == "auto" and mode.batches.get("overlapped", 0) > mode.batches.get("fused", 0):
        model = "routed"  # Its shared rows are beside dispatch.
    value = modelled.get(model)
    return (None if value is None else round(value, 5)), "model"


def overlapped_share(batches: Mapping[str, int]) -> float | None:
    """Of the batches, those that were overlapped; None where none is known."""
    total = batches.get("overlapped", 0) + batches.get("fused", 0)
    return round(batches.get("overlapped", 0) / total, 6) if total else None


def verdict(modes: Mapping[str, Mode]) -> dict[str, Any] | None:
    """``auto`` beside the ``best`` of ``VERDICT_AMONG``, that with the least median ms; None without either."""
    there = {name: modes[name] for name in VERDICT_AMONG if name in modes and modes[name].ms}
    if not there or "auto" not in modes:
        return None
    best = min(there, key=lambda name: statistics.median(there[name].ms.values()))
    paired = ratios(modes["auto"].ms, there[best].ms)
    return {
        "best": best,
        "ratio_best": median(paired),
        "quartiles_best": quartiles(paired),
        "pairs": len(paired),
    }


def _with_placed(
    mode: Mode, modes: Mapping[str, Mode], modelled: Mapping[str, float]
) -> dict[str, Any]:
    """What an entry has beside where engines place experts."""
    found: dict[str, Any] = {}
    for choice in ("static", "dynamic"):
        to = ratios(mode.ms, modes[f"off-{choice}"].ms) if f"off-{choice}" in modes else []
        found |= {f"ratio_{choice}": median(to), f"quartiles_{choice}": quartiles(to)}
    sent = mode.rows
    routed = statistics.fmean(own.routed for own in sent) if sent else None
    active = statistics.fmean(own.active for own in sent) if sent else None
    values = {"routed_max_mean": routed, "active_experts": active}
    values |= {name: modelled.get(name) for name in ("routed_optimum", "even", "least_active")}
    return found | {name: None if v is None else round(v, 5) for name, v in values.items()}


def cell(
    place: Mapping[str, Any],
    name: str,
    modes: Mapping[str, Mode],
    modelled: Mapping[str, float],
    ranks: int,
) -> dict[str, Any]:
    """One entry of ``cells``: ``place`` names phase, tokens, placement and redundant."""
    mode = modes[name]
    by_reference = {
        reference: ratios(mode.ms, modes[reference].ms) if reference in modes else []
        for reference in REFERENCES
    }
    rows, source = rows_max_mean(name, mode, modelled)
    interval = median(mode.interval_ms)
    optimum = modelled.get("optimum")
    return {
        **place,
        "mode": name,
        "gpu_ms": median(list(mode.ms.values()), 4),
        "quartiles_ms": quartiles(list(mode.ms.values())),
        "ratio_off": median(by_reference["off"]),
        "quartiles": quartiles(by_reference["off"]),
        "ratio_home": median(by_reference["home"]),
        "quartiles_home": quartiles(by_reference["home"]),
        "pairs": {reference: len(found) for reference, found in by_reference.items()},
        "tokens_per_s": None if not interval else round(ranks * place["tokens"] / interval * 1e3),
        "rows_max_mean": rows,
        "rows_from": source,
        "optimum": None if optimum is None else round(optimum, 5),
        **(_with_placed(mode, modes, modelled) if place.get("placed") else {}),
        "live_share": live_share(mode.calls),
        "calls": dict(mode.calls) or None,
        "batches": dict(mode.batches) or None,
        "overlapped_share": overlapped_share(mode.batches),
        "verdict": verdict(modes) if name == "auto" else None,
        "forwards": len(mode.ms),
        "breakdown": mode.breakdown,
    }
