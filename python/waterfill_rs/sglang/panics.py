"""A panic of the Rust core is an error like any other here.

The core's own doors turn panics into ``RuntimeError``. pyo3's ``PanicException``, from anywhere else, is no ``Exception``:
sglang's handlers would miss it, and a rank would end without a word while the others wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["panics_are_errors"]

P = ParamSpec("P")
T = TypeVar("T")


def panics_are_errors(call: Callable[P, T]) -> Callable[P, T]:
    """The same call, whose panic is a ``RuntimeError``."""

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            # Its class has no module to import it from.
            if type(error).__name__ != "PanicException":
                raise
            raise RuntimeError(
                f"waterfill-rs: a defect in the Rust core, please report it: {error}"
            ) from error

    return guarded
