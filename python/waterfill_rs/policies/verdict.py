"""A comparison in words: what was seen, what can be levelled, and whether this package is worth turning on.

The verdict is one of ``VERDICTS``.

What a result counts for is its mean rank's rows, or its time where a cost model is given. In decode this package runs
the shared expert beside dispatch, so no shared row is placed there (docs/operators.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.summary import (
    can_be_level,
    gain,
    level_share,
    mean,
    of,
    passes_in_words,
    ratio,
)

__all__ = ["VERDICTS", "WORTH", "print_total", "print_verdict", "total_gain", "verdict_of"]

WORTH = 0.02
"""The part of the slowest rank's cost, over the whole recording, from which on a gain is worth turning on."""

VERDICTS = ("worth turning on", "little to gain here", "place experts first")
"""The last where shared rows can level nothing, or next to nothing: layers with less than ``WORTH`` of the cost."""


def verdict_of(home: list[Result], part: float) -> str:
    """Of the gain ``part``, on the recording that ``home`` is of."""
    if level_share(home) < WORTH:
        return VERDICTS[2]
    return VERDICTS[part < WORTH]


def print_verdict(results: list[Result], top_k: int, unit: str = "rows") -> None:
    """Of results of one phase, or of none; nothing where ``home`` or ``live`` was not asked for."""
    home, live = of(results, "home"), of(results, "live")
    if not home or not live:
        return
    if results[0].phase == "decode":
        print(
            "In decode the shared expert runs beside dispatch: no shared row is placed, so there is nothing to gain\n"
            "and nothing to lose. The table is what fused shared experts would do: live counts would\n"
            f"{_takes(gain(home, live))} the slowest rank's {unit} there"
            + (", and rows are not time: --cost-model tells." if unit == "rows" else ".")
        )
        return
    own = of(results, "own-counts")
    from_own = f"{_off_mean(own)} from own counts, " if own else ""
    print(
        f"The slowest rank is {ratio(home) - 1:.1%} above the mean with shared experts at home,\n"
        f"{from_own}{_off_mean(live)} from live counts, weighted by {unit}."
    )
    print(f"Live counts reach the optimum {_in_how_many(live)}.")
    _print_levels(home, top_k, unit)
    own_gain = f", own counts {_change(gain(home, own))}" if own else ""
    print(
        f"Live counts {_takes(gain(home, live))} the slowest rank's {unit}{own_gain}: "
        f"{verdict_of(home, gain(home, live))}."
    )
    joint = of(results, "joint")
    if joint:
        _print_joint(gain(home, joint), gain(live, joint), unit)
    if results[0].phase == "prefill":
        print(
            "This compares fused shared experts. Without Waterfill they run beside dispatch: what fusing gains or\n"
            "costs in time is no matter of rows (docs/performance.md)."
        )


def print_total(results: list[Result], unit: str = "rows") -> None:
    """Of results of both phases: the gain over all of them, to which decode adds none."""
    home, live = of(results, "home"), of(results, "live")
    phases = [[r for r in one if r.phase == "prefill"] for one in (home, live)]
    if not phases[0] or not phases[1] or len(phases[0]) == len(home):
        return
    share, whole = mean(phases[0]) / mean(home), total_gain(home, live)
    print(
        f"\nPrefill has {share:.1%} of the {unit} of this recording. Live counts {_takes(whole)} the slowest rank's\n"
        f"{unit} of prefill and decode together: {verdict_of(phases[0], whole)}."
    )


def total_gain(home: list[Result], live: list[Result]) -> float:
    """The part of the slowest rank's cost that is gone where decode gains nothing."""
    before, after = (sum(r.max for r in one if r.phase != "decode") for one in (home, live))
    return (before - after) / sum(r.max for r in home)


def _off_mean(results: list[Result]) -> str:
    """How far the slowest rank is above the mean of home, or, where shared rows that are together take less time, below."""
    part = ratio(results) - 1
    return f"{abs(part):.1%}" if part > -0.0005 else f"{-part:.1%} below it"


def _takes(part: float) -> str:
    return f"take {part:.1%} off" if part > -0.0005 else f"add {-part:.1%} to"


def _change(part: float) -> str:
    return f"{abs(part):.1%}" if part > -0.0005 else f"add {-part:.1%}"


def _print_joint(over_home: float, over_live: float, unit: str) -> None:
    if over_live < WORTH:
        print(f"With the rows of replicas split anew too (joint) it is {over_home:.1%}.")
        return
    print(
        f"Splitting the rows of replicas anew too (joint) is far better: {over_home:.1%}, and {over_live:.1%} less {unit} than\n"
        "live counts alone. A server does so with live replicas (--waterfill-rs-replicas)."
    )


def _in_how_many(live: list[Result]) -> str:
    met = sum(result.max == result.optimum for result in live)
    layers = len({r.layer for r in live})
    shape = f"{layers} layer{'s' * (layers != 1)}, {passes_in_words(live)}"
    if met == len(live):
        return f"in every layer of every pass ({shape})"
    return f"in {met} of {len(live)} runs of a layer ({shape})"


def _print_levels(home: list[Result], top_k: int, unit: str) -> None:
    """Which layers shared rows can level, and what to do about the others."""
    by_layer: dict[int, list[bool]] = {}
    for result in home:
        by_layer.setdefault(result.layer, []).append(can_be_level(result))
    always = sum(all(passes) for passes in by_layer.values())
    never = [layer for layer, passes in by_layer.items() if not any(passes)]
    print(
        f"Shared rows can level {always} of {len(by_layer)} layers in every pass"
        + (f", and never layers {_ranges(never)}." if never else ".")
    )
    if level_share(home) < 1:
        above = (
            f"routed max/mean is above 1 + 1/{top_k} = {1 + 1 / top_k:.3f}"
            if unit == "rows"
            else "one rank's routed experts alone take longer than the mean"
        )
        print(
            f"For {1 - level_share(home):.1%} of the {unit} {above}: place experts first\n"
            "(redundant experts, EPLB: waterfill-rs replay --redundant and --placement tell what they would do)."
        )


def _ranges(numbers: Iterable[int]) -> str:
    """``1, 4-6``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
