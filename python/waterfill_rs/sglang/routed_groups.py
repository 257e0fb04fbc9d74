"""sglang's masked grouped GEMMs without the shared expert's group, in calls that run it unfused.

DeepGEMM chooses its tiles by the number of groups. For 17 groups of a rank it takes tiles of 192 columns and for 16 of 128, which
are 10 to 14% faster in decode of 8 tokens a rank (docs/measurements/server.md). In such a call the shared expert's slot, a rank's
last, has no rows, and the combine reads none: without it the GEMM is the one of a server without Waterfill. Where rows go to primary
replicas alone and these are a rank's first slots, it is the one of a server without redundant experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["install", "slots"]

F8 = "grouped_gemm_nt_f8f8bf16_masked"
BF16 = "grouped_gemm_nt_bf16_masked"
_MARK = "_waterfill_rs_leaves_the_shared_group_out"


class _Slots:
    """Within the call of a layer whose shared expert is unfused; else 0, and nothing is left out.

    ``number``: a rank's slots, routed and shared. ``used``: its first ones, which alone can have rows.
    """

    number = 0
    used = 0


slots = _Slots()


def install(wrapper: Any) -> None:
    """Put both GEMMs of ``wrapper``, sglang's module of DeepGEMM, behind ours, once. What it lacks is left."""
    for name in (F8, BF16):
        gemm = getattr(wrapper, name, None)
        if gemm is not None and not hasattr(gemm, _MARK):
            setattr(wrapper, name, _of_routed(gemm))


def _of_routed(gemm: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gemm)
    def of_routed(lhs: Any, rhs: Any, out: Any, masked_m: Any, *rest: Any, **options: Any) -> Any:
        number = slots.number
        # With overlap of the combine the kernel signals by group, and its caller counts all of them.
        if (
            number
            and options.get("overlap_args") is None
            and _groups(lhs) == number == _groups(rhs)
        ):
            used = slice(0, slots.used)
            lhs, rhs = _cut(lhs, used), _cut(rhs, used)
            out, masked_m = out[used], masked_m[used]
        return gemm(lhs, rhs, out, masked_m, *rest, **options)

    setattr(of_routed, _MARK, True)
    return of_routed


def _groups(operand: Any) -> int:
    """Of a tensor ``[groups, rows, columns]``, or of one with its scales."""
    return int((operand[0] if isinstance(operand, tuple) else operand).shape[0])


def _cut(operand: Any, groups: slice) -> Any:
    if isinstance(operand, tuple):
        return tuple(each[groups] for each in operand)
    return operand[groups]
