"""Integers as callers give them, on their way into the core."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["Integers", "flat", "misfit"]

Integers = Any
"""A sequence of integers, or anything with ``tolist()`` (numpy arrays, CPU tensors), of one or two dimensions."""

_MOST = 2**32 - 1


def flat(values: Integers) -> list[int]:
    """The integers in a row, the last dimension fastest."""
    items: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    if items and isinstance(items[0], list):
        return [value for row in items for value in row]
    return items


def misfit(error: Exception, **arguments: Any) -> Exception:
    """What to raise for an ``OverflowError`` or ``TypeError`` of a call with these integers or lists of them.

    The call converts them fast and does not say which one it was; a ``ValueError`` does.
    """
    for name, given in arguments.items():
        several = isinstance(given, list)
        for index, value in enumerate(given if several else [given]):
            if not _fits(value):
                where = f"{name}[{index}]" if several else name
                return ValueError(f"{where} is {value!r}: give an integer from 0 to {_MOST}")
    return error


def _fits(value: Any) -> bool:
    try:
        return 0 <= operator.index(value) <= _MOST
    except TypeError:
        return False
