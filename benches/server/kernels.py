"""A profiled forward by groups of kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

GROUPS = (
    ("Waterfill call", r"expand_topk|waterfill|count_routed_per_rank"),
    ("dispatch", r"notify_dispatch|get_dispatch_layout|::dispatch\b|::dispatch<|layout::"),
    ("combine", r"notify_combine|::combine\b|::combine<"),
    ("dense GEMM", r"fp8_gemm.*GemmType\)0"),
    ("grouped GEMM", r"fp8_gemm|m_grouped|grouped_gemm|group_gemm"),
    ("dense GEMM", r"gemm|nvjet|cutlass|cublas|splitKreduce"),
    ("attention", r"^_fwd|attention|attn|flash|mla|decode_grouped"),
)
"""The first pattern that is found in a kernel's name decides. DeepGEMM's name is the same for all its GEMMs but for its type."""
NAMES = (*dict.fromkeys(name for name, _ in GROUPS), "other")
LONGEST_NAME = 100


def group(kernel: str) -> str:
    """The group of ``NAMES`` that a kernel is of."""
    for name, pattern in GROUPS:
        if re.search(pattern, kernel):
            return name
    return "other"


def breakdown(times_us: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Milliseconds by group, of kernels' microseconds and counts; all groups are there."""
    sums = dict.fromkeys(NAMES, 0.0)
    for kernel, (us, _) in times_us.items():
        sums[group(kernel)] += us / 1e3
    return {name: round(ms, 4) for name, ms in sums.items()}


def longest(times_us: Mapping[str, tuple[float, int]], most: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds and count of those that took longest together."""
    ordered = sorted(times_us.items(), key=lambda item: -item[1][0])
    return [
        (name[:LONGEST_NAME], round(us / 1e3, 4), count) for name, (us, count) in ordered[:most]
    ]


def mean(breakdowns: Iterable[Mapping[str, float]]) -> dict[str, float] | None:
    """By group over ranks; None of none."""
    found = list(breakdowns)
    if not found:
        return None
    return {name: round(sum(b[name] for b in found) / len(found), 4) for name in found[0]}
