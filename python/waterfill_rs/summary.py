"""Results of many layers and passes as one number.

What a result counts for is its mean rank's rows, or its time where a cost model is given: a pass of three tokens is not
worth one of thousands.
"""

from __future__ import annotations

from waterfill_rs.comparison import POLICIES, Result

__all__ = ["can_be_level", "copies", "gain", "level_share", "of", "present", "ratio"]


def present(results: list[Result]) -> list[str]:
    """The policies that are there, in the order of tables."""
    found = {result.policy for result in results}
    return [policy for policy in POLICIES if policy in found]


def of(results: list[Result], policy: str) -> list[Result]:
    """One policy's results."""
    return [result for result in results if result.policy == policy]


def ratio(results: list[Result]) -> float:
    """max/mean over all of them."""
    return sum(result.max for result in results) / sum(result.mean for result in results)


def copies(results: list[Result]) -> str:
    """Extra copies a token, over all tokens."""
    known = [result for result in results if result.extra_copies is not None]
    tokens = sum(result.tokens for result in known)
    total = sum((result.extra_copies or 0) * result.tokens for result in known)
    return f"{total / tokens:.4f}" if tokens else "not known"


def gain(before: list[Result], after: list[Result]) -> float:
    """The part of the slowest rank's cost that is gone."""
    return 1 - sum(result.max for result in after) / sum(result.max for result in before)


def level_share(results: list[Result]) -> float:
    """The part of the rows, or of the time, in layers and passes that shared rows can level."""
    levelled = sum(result.mean for result in results if can_be_level(result))
    return levelled / sum(result.mean for result in results)


def can_be_level(result: Result) -> bool:
    """Does no rank's routed part alone cost more than the mean? In rows: is routed max/mean at most 1 + 1/K?

    A mean that is no whole number is level at the next one.
    """
    return result.routed_max < result.mean + 1
