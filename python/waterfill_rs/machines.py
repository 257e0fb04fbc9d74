"""Figures of GPUs that this package knows, from measurements that others published.

NVIDIA's aiconfigurator (github.com/ai-dynamo/aiconfigurator, commit 095f58a, Apache-2.0, folder ``systems/data``), all for
experts of DeepSeek V3's shape in FP8 with blocks of 128, a token's top 8 of 256 experts:

- ``expert_us``, ``active_expert_us``: ``wideep_generation_moe_perf``, sglang 0.5.10, uniform routing. DeepGEMM's masked kernel in a
  CUDA graph. The file has calls of 1 to 128 experts. An active expert is ``(t(N, 8) - t(1, 8)) / (N - 1)`` for the largest N with 8
  rows an expert, a call ``t(1, 8)`` less that, and an expert's time the share of the largest group that was measured with so
  many rows. Alone an expert of 256 rows takes up to 10% longer than that, because one does not fill the GPU.
- ``dense_us``: of H100 and H200 ``wideep_context_mlp_perf``, sglang 0.5.6.post2: the MLP as the layer runs it. Of B200 and GB200
  ``gemm_perf``, sglang 0.5.14: the two GEMMs alone, up and down, each never less than for more rows.
- ``dispatch_us``: ``wideep_deepep_normal_perf``, sglang 0.5.12, one node, 20 SMs: the transfer of FP8 tokens with the best of DeepEP's
  chunk sizes, without the exchange of counts before it. The file does not give its ranks; its collector takes all GPUs of a
  node, so 8, and 4 of a GB200.
"""

from __future__ import annotations

from waterfill_rs.machine import Curve, Machine

__all__ = ["MACHINES"]

_SHAPE = (7168, 2048)
_MEASURED = (
    "aiconfigurator 095f58a (Apache-2.0), DeepGEMM FP8 in sglang: grouped GEMM 0.5.10, "
    "{dense}, DeepEP dispatch 0.5.12 (20 SMs, no exchange of counts; ranks: its collector's, all GPUs of a node)"
)
_MLP = "dense MLP 0.5.6.post2"
_GEMMS = "dense as its two GEMMs 0.5.14, without activation and quantisation"
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024)


def _machine(
    name: str,
    dense: str,
    ranks: int,
    active_us: float,
    curves: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]],
) -> Machine:
    expert_us, dense_us, dispatch_us = curves
    return Machine(
        name=name,
        source=_MEASURED.format(dense=dense),
        shape=_SHAPE,
        expert_us=_points(_ROWS, expert_us),
        active_expert_us=active_us,
        dense_us=_points(_TOKENS, dense_us),
        dispatch_us=_points(_TOKENS, dispatch_us),
        dispatch_ranks=ranks,
        dispatch_top_k=8,
    )


def _points(rows: tuple[int, ...], times: tuple[float, ...]) -> Curve:
    return tuple(zip(rows, times, strict=True))


_H100 = _machine(
    "NVIDIA H100 80GB HBM3",
    _MLP,
    8,
    16.1,
    (
        (35.6, 35.6, 35.6, 35.6, 37.3, 42.1, 56.9, 92.5),
        (31.2, 33.3, 39.6, 57.2, 91.9, 166.0, 298.6, 582.9, 1142.0),
        (39.4, 50.1, 67.4, 100.2, 157.8, 270.5, 492.2, 967.6, 1960.1),
    ),
)
_H200 = _machine(
    "NVIDIA H200",
    _MLP,
    8,
    11.2,
    (
        (29.8, 29.8, 30.0, 30.3, 31.7, 37.9, 54.1, 88.3),
        (24.2, 29.5, 38.1, 53.7, 88.3, 161.2, 287.6, 559.1, 1097.3),
        (38.6, 49.8, 66.2, 99.5, 156.1, 271.9, 494.2, 969.2, 1938.7),
    ),
)
_B200 = _machine(
    "NVIDIA B200",
    _GEMMS,
    8,
    7.6,
    (
        (27.0, 27.2, 27.4, 27.4, 28.0, 32.7, 43.8, 64.0),
        (42.9, 44.6, 47.5, 53.4, 70.2, 102.9, 156.6, 343.0, 540.8),
        (46.9, 57.7, 78.1, 113.1, 174.0, 289.5, 515.0, 977.1, 1926.2),
    ),
)
_GB200 = _machine(
    "NVIDIA GB200",
    _GEMMS,
    4,
    7.2,
    (
        (27.0, 27.1, 27.5, 27.6, 28.2, 32.2, 41.2, 57.9),
        (41.1, 43.0, 46.0, 52.2, 64.0, 92.4, 149.8, 272.0, 543.2),
        (40.0, 47.0, 63.0, 88.1, 137.2, 233.6, 420.7, 793.1, 1526.7),
    ),
)
# 6 x hidden x intermediate operations a row at 296 TFLOPS, the H20's FP8 peak, are 0.2976 us; 60 rows are 17.9 us.
_H20_BOUND: Curve = ((60, 17.9), (16384, 4875.3))
_H20 = Machine(
    name="NVIDIA H20",
    source=(
        "no measured curve: bounds from 296 TFLOPS in FP8 (the GPU's peak) and 17.9 us for an active expert's weights "
        "(a note of this project); measure with waterfill-rs calibrate"
    ),
    shape=_SHAPE,
    expert_us=_H20_BOUND,
    active_expert_us=17.9,
    dense_us=_H20_BOUND,
)

MACHINES: dict[str, Machine] = {
    "H100": _H100,
    "H200": _H200,
    "B200": _B200,
    "GB200": _GB200,
    "H20": _H20,
}
"""By the short name."""
