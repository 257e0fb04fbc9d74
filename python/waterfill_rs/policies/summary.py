"""Results of many layers and passes as one number.

What a result counts for is its mean rank's rows, or its time where a cost model is given: a pass of three tokens is not
worth one of thousands. That mean is the one with shared experts at home, whatever the policy, so ratios can be compared.
"""

from __future__ import annotations

from waterfill_rs.policies.comparison import MOVE_ROUTED, POLICIES, Result

__all__ = [
    "bound",
    "by_phase",
    "can_be_level",
    "copies",
    "copies_a_token",
    "gain",
    "heading",
    "level_share",
    "mean",
    "microseconds",
    "of",
    "passes",
    "passes_in_words",
    "present",
    "ratio",
]


def present(results: list[Result]) -> list[str]:
    """The policies that are there, in the order of tables."""
    found = {result.policy for result in results}
    return [policy for policy in POLICIES if policy in found]


def of(results: list[Result], policy: str) -> list[Result]:
    """One policy's results."""
    return [result for result in results if result.policy == policy]


def by_phase(results: list[Result]) -> dict[str | None, list[Result]]:
    """Prefill first."""
    found: dict[str | None, list[Result]] = {}
    for result in results:
        found.setdefault(result.phase, []).append(result)
    return dict(sorted(found.items(), key=lambda item: item[0] != "prefill"))


def passes(results: list[Result]) -> int:
    """How many passes they are of."""
    return len({result.pass_id for result in results})


def passes_in_words(results: list[Result]) -> str:
    """``3 passes``."""
    number = passes(results)
    return f"{number} pass{'es' * (number != 1)}"


def heading(phase: str | None, results: list[Result]) -> str:
    """``prefill: 3 passes``."""
    return f"{phase or 'all'}: {passes_in_words(results)}"


def mean(results: list[Result]) -> float:
    """The mean rank's cost with shared experts at home, over all of them."""
    return sum(result.home_mean for result in results)


def ratio(results: list[Result]) -> float:
    """max/mean over all of them."""
    return sum(result.max for result in results) / mean(results)


def microseconds(results: list[Result]) -> float:
    """The slowest rank's time, summed over layers, mean over passes. Only where the unit is picoseconds."""
    return sum(result.max for result in results) / passes(results) / 1e6


def bound(results: list[Result]) -> tuple[float, float]:
    """``ratio`` and ``microseconds`` if each slowest rank had the least that it can have.

    That is with the routed rows where they are, and shared rows anywhere: no policy is below it but those of ``MOVE_ROUTED``.
    Where none but these is there, it is the bound of the first of them.
    """
    there = present(results)
    policy = next((policy for policy in there if policy not in MOVE_ROUTED), there[0])
    own = of(results, policy)
    least = sum(result.optimum for result in own)
    return least / mean(own), least / passes(own) / 1e6


def copies_a_token(results: list[Result]) -> float | None:
    """Extra copies a token, over all tokens; None where they are not known."""
    known = [result for result in results if result.extra_copies is not None]
    tokens = sum(result.tokens for result in known)
    total = sum((result.extra_copies or 0) * result.tokens for result in known)
    return total / tokens if tokens else None


def copies(results: list[Result]) -> str:
    """``copies_a_token`` for a table."""
    found = copies_a_token(results)
    return "not known" if found is None else f"{found:.4f}"


def gain(before: list[Result], after: list[Result]) -> float:
    """The part of the slowest rank's cost that is gone."""
    return 1 - sum(result.max for result in after) / sum(result.max for result in before)


def level_share(results: list[Result]) -> float:
    """The part of the rows, or of the time, in layers and passes that shared rows can level."""
    return sum(result.home_mean for result in results if can_be_level(result)) / mean(results)


def can_be_level(result: Result) -> bool:
    """Does no rank's routed part alone cost more than the mean? In rows: is routed max/mean at most 1 + 1/K?

    A mean that is no whole number is level at the next one.
    """
    return result.routed_max < result.home_mean + 1
