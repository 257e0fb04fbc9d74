"""A comparison as a table, and what its other forms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from waterfill_rs.policies.comparison import POLICIES, Result
from waterfill_rs.policies.routed_rows import RoutedRows
from waterfill_rs.policies.summary import (
    bound,
    by_phase,
    copies,
    level_share,
    mean,
    microseconds,
    of,
    present,
    ratio,
)

__all__ = [
    "Compared",
    "Expert",
    "most_of_usual",
    "print_sizes",
    "print_table",
    "printable",
]

MEANING = (
    "us a pass: the slowest rank's time, summed over layers, mean over passes. max/mean: to the mean rank's time with\n"
    "shared experts at home."
)


@dataclass(frozen=True)
class Expert:
    """A hot one. ``physical`` and ``logical`` are ids in its layer, ``rows`` its routed rows over all passes, and ``times``
    how many times those of the layer's mean expert."""

    layer: int
    physical: int
    logical: int
    rank: int
    rows: int
    times: float


@dataclass(frozen=True)
class Compared:
    """A recording under one EP size and placement. ``redundant``: experts beyond one of each; ``notes``: what had to be
    assumed, and what is left out; ``hottest``: the hottest experts of each phase; ``routed``: by phase and choice of
    replicas, what redundant experts make of routed rows; ``trivial``: redundant experts stand as sglang's default puts them."""

    recording: str
    ranks: int
    experts: int
    redundant: int
    top_k: int
    notes: list[str]
    results: list[Result]
    hottest: dict[str | None, list[Expert]] = field(default_factory=dict)
    routed: dict[str | None, dict[str, RoutedRows]] = field(default_factory=dict)
    trivial: bool = False


def print_table(results: list[Result], title: str, unit: str = "rows") -> None:
    """The policies and the bound: what the slowest rank can have at least, shared rows alone placed.

    ``unit``: ``rows``, or ``time`` where a cost model is given, which has a column of microseconds more.
    """
    timed = unit == "time"
    print(title)
    if timed:
        print(MEANING)
    head = f"{'policy':<14}{'max/mean':>10}{'worst':>9}"
    print(head + f"{'us a pass':>13}" * timed + f"{'extra copies a token':>23}")
    for policy in present(results):
        mine = of(results, policy)
        worst = max(result.max / result.home_mean for result in mine)
        row = f"{policy:<14}{ratio(mine):>10.4f}{worst:>9.4f}"
        print(row + f"{microseconds(mine):>13.1f}" * timed + f"{copies(mine):>23}")
    least, least_us = bound(results)
    print(f"{'bound':<14}{least:>10.4f}" + f"{'':>9}{least_us:>13.1f}" * timed)


def print_sizes(compared: list[Compared], unit: str) -> None:
    """Recordings, EP sizes and placements, a line for each phase; with a cost model microseconds too."""
    policies = [p for p in POLICIES if any(p in present(one.results) for one in compared)]
    width = max(9, *(len(one.recording) for one in compared)) + 2
    print(f"\nmax/mean, weighted by {unit}; level: the part of them that shared rows can level.")
    if unit == "rows":
        print("routed: of routed rows alone. Above 1 + 1/K place experts first.")
    routed = f"{'routed':>10}" if unit == "rows" else ""
    _print_lines(
        compared,
        width,
        routed + _names(policies) + f"{'level':>9}",
        lambda one, mine: _cells(mine, policies, one.top_k, unit),
    )
    if unit == "time":
        print(f"\n{MEANING}")
        _print_lines(
            compared, width, _names([*policies, "bound"]), lambda _, mine: _times(mine, policies)
        )


def _print_lines(
    compared: list[Compared],
    width: int,
    head: str,
    cells: Callable[[Compared, list[Result]], str],
) -> None:
    print(f"{'recording':<{width}}{'EP':>4}{'redundant':>11}  {'passes':<9}{head}")
    for one in compared:
        for phase, mine in by_phase(one.results).items():
            start = (
                f"{one.recording:<{width}}{one.ranks:>4}{one.redundant:>11}  {phase or 'all':<9}"
            )
            print(start + cells(one, mine))


def _names(columns: list[str]) -> str:
    return "".join(f"{name:>{_width(name)}}" for name in columns)


def _width(column: str) -> int:
    return max(10, len(column) + 2)


def _cells(results: list[Result], policies: list[str], top_k: int, unit: str) -> str:
    first = of(results, present(results)[0])
    cells = ""
    if unit == "rows":
        # Of a token's K + 1 rows K are routed.
        routed = mean(first) * top_k / (top_k + 1)
        cells = f"{sum(result.routed_max for result in first) / routed:>10.4f}"
    for policy in policies:
        mine = of(results, policy)
        cells += f"{f'{ratio(mine):.4f}' if mine else '-':>{_width(policy)}}"
    return f"{cells}{level_share(first):>9.1%}"


def _times(results: list[Result], policies: list[str]) -> str:
    cells = ""
    for policy in policies:
        mine = of(results, policy)
        cells += f"{f'{microseconds(mine):.1f}' if mine else '-':>{_width(policy)}}"
    return cells + f"{bound(results)[1]:>{_width('bound')}.1f}"


def most_of_usual(parts: list[float]) -> float:
    """Of parts of the mean: the largest that is no outlier, over four times the upper quartile. Scales end there."""
    quartile = sorted(parts)[-(-3 * len(parts) // 4) - 1]
    return max(part for part in parts if part <= 4 * max(quartile, 0.01))


def printable(name: str, most: int | None = None) -> str:
    """A name of anyone's making without control characters and lone surrogates, its middle left out where it is long."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    if most is None or len(safe) <= most:
        return safe
    return f"{safe[: most // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{safe[-(most // 2) :]}"
