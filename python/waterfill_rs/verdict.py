"""A comparison in words: what was seen, what can be levelled, and whether this package is worth turning on.

What a result counts for is its mean rank's rows, or its time where a cost model is given. In decode this package runs
the shared expert beside dispatch, so no shared row is placed there (docs/operators.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from waterfill_rs.comparison import Result
from waterfill_rs.summary import can_be_level, gain, level_share, mean, of, ratio

__all__ = ["WORTH", "print_total", "print_verdict"]

WORTH = 0.02
"""The part of the slowest rank's cost, over the whole recording, from which on a gain is worth turning on."""


def print_verdict(results: list[Result], top_k: int, unit: str = "rows") -> None:
    """Of results of one phase, or of none; nothing where ``home`` or ``live`` was not asked for."""
    home, live = of(results, "home"), of(results, "live")
    if not home or not live:
        return
    if results[0].phase == "decode":
        print(
            "In decode the shared expert runs beside dispatch: no shared row is placed, so there is nothing to gain\n"
            "and nothing to lose. The table is what fused shared experts would do: live counts would\n"
            f"take {gain(home, live):.1%} off the slowest rank's {unit} there"
            + (", and rows are not time: --cost-model tells." if unit == "rows" else ".")
        )
        return
    own = of(results, "own-counts")
    from_own = f"{ratio(own) - 1:.1%} from own counts, " if own else ""
    print(
        f"The slowest rank is {ratio(home) - 1:.1%} above the mean with shared experts at home,\n"
        f"{from_own}{ratio(live) - 1:.1%} from live counts, weighted by {unit}."
    )
    print(f"Live counts reach the optimum {_in_how_many(live)}.")
    _print_levels(home, top_k, unit)
    own_gain = f", own counts {gain(home, own):.1%}" if own else ""
    print(
        f"Live counts take {gain(home, live):.1%} off the slowest rank's {unit}{own_gain}: "
        f"{_worth(gain(home, live))}."
    )
    joint = of(results, "joint")
    if joint:
        print(f"With the rows of replicas split anew too (joint) it is {gain(home, joint):.1%}.")
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
    share = mean(phases[0]) / mean(home)
    saved = sum(r.max for r in phases[0]) - sum(r.max for r in phases[1])
    whole = saved / sum(r.max for r in home)
    print(
        f"\nPrefill has {share:.1%} of the {unit} of this recording. Live counts take {whole:.1%} off the slowest rank's\n"
        f"{unit} of prefill and decode together: {_worth(whole)}."
    )


def _worth(part: float) -> str:
    return "worth turning on" if part >= WORTH else "little to gain here"


def _in_how_many(live: list[Result]) -> str:
    met = sum(result.max == result.optimum for result in live)
    layers, passes = len({r.layer for r in live}), len({r.pass_id for r in live})
    shape = f"{layers} layer{'s' * (layers != 1)}, {passes} pass{'es' * (passes != 1)}"
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
            "(redundant experts, EPLB: --redundant and --placement tell what they would do)."
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
