"""Experts on a GPU whose dense MLP and grouped GEMM can be called, as sglang runs them.

``Fp8Experts`` calls DeepGEMM with sglang's quantisation and activation, ``Bf16Experts`` is torch alone. Weights and inputs are random:
zeros would draw less power, and the GPU would run at a higher clock.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "BLOCK",
    "QUANTISE",
    "Bf16Experts",
    "Experts",
    "Fp8Experts",
    "check",
    "experts_of",
    "first_working",
    "hold",
    "make",
    "quantise_rows",
    "reference",
]

BLOCK = 128
"""Elements of a quantisation group of a row, and rows and columns of a block of a weight."""
_FP8 = torch.float8_e4m3fn
_FP8_MOST = 448.0
_LEAST = 1e-4
_CACHES = 3  # The experts' weights are at least so many times the L2 cache.


class Experts(Protocol):
    """``count`` experts of one shape. ``x`` is ``[rows, hidden]`` in BF16, every output as well."""

    count: int
    alignment: int
    """Rows of an expert in the grouped GEMM are a multiple of this."""
    description: str
    as_sglang: bool
    """Every kernel is the one that sglang runs."""
    poisoned: bool
    """Outputs hold NaN before a kernel writes them."""

    def dense(self, x: Tensor, expert: int) -> Tensor:
        """The MLP of one expert, as the shared expert runs where it is not fused: quantisation of ``x`` included."""
        ...

    def dispatched(self, x: Tensor) -> Any:
        """What the grouped GEMM gets from dispatch: ``x``, quantised."""
        ...

    def layout(self, experts: Sequence[int], rows: int) -> Any:
        """Which expert each row goes through: ``rows`` rows, a multiple of ``alignment``, for each of ``experts`` in turn."""
        ...

    def grouped(self, dispatched: Any, layout: Any) -> Tensor:
        """The grouped GEMM of dispatched rows, up and down, with the activation and its quantisation between."""
        ...

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """``[2 x intermediate, hidden]`` and ``[hidden, intermediate]`` in float32, as the kernels see them."""
        ...

    def seen(self, x: Tensor) -> Tensor:
        """``x`` in float32, as the kernels see it."""
        ...


def make(hidden: int, intermediate: int, group: int) -> Experts:
    """``group`` experts, or the multiple of it whose weights do not fit into the L2 cache, on the current GPU.

    FP8 where ``deep_gemm`` can be had and the GPU has a kernel of it (Hopper and newer), else BF16.
    """
    cache = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))
    groups = -(-_CACHES * cache // (3 * hidden * intermediate * group))
    return experts_of(hidden, intermediate, group * max(1, groups))


def experts_of(hidden: int, intermediate: int, count: int) -> Experts:
    """``count`` experts on the current GPU, the same in every process of a machine. FP8 or BF16, as ``make`` says."""
    torch.manual_seed(0)
    packed = torch.cuda.get_device_capability() >= (10, 0)
    if torch.cuda.get_device_capability() < (9, 0):
        reason = "DeepGEMM needs a GPU of compute capability 9.0 or newer"
        return Bf16Experts(hidden, intermediate, count, reason)
    tools = _tools()
    try:
        deep_gemm = importlib.import_module("deep_gemm")
    except Exception as error:  # Its import compiles and loads, and fails in many ways.
        reason = f"deep_gemm cannot be imported ({_line(error)})"
        return Bf16Experts(hidden, intermediate, count, reason)
    return Fp8Experts(hidden, intermediate, count, deep_gemm, tools, packed=packed)


@dataclass(frozen=True)
class Tools:
    """What runs between the GEMMs, and in words whose they are."""

    quantise: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    """``[rows, K]`` BF16 and whether scales are powers of two packed as DeepGEMM wants them on Blackwell."""
    activate: Callable[[Tensor], Tensor]
    """``[rows, 2N]`` to ``[rows, N]``: ``silu(left) * right``."""
    words: str
    of_sglang: bool = False
    """Both are sglang's."""


class Fp8Experts:
    """FP8 with scales of blocks of 128, by DeepGEMM. See ``Experts``."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        count: int,
        deep_gemm: Any,
        tools: Tools,
        *,
        packed: bool = False,
        device: str = "cuda",
    ) -> None:
        """``packed``: scales are powers of two, four in an int32, as DeepGEMM wants them on Blackwell."""
        self.count = count
        self.as_sglang = tools.of_sglang
        self.poisoned = False
        self._gemm = deep_gemm
        self._tools = tools
        self._packed = packed
        self._device = device
        alignment = getattr(deep_gemm, "get_mk_alignment_for_contiguous_layout", lambda: BLOCK)()
        self.alignment = int(alignment[0] if isinstance(alignment, tuple) else alignment)
        self.description = f"FP8 in blocks of {BLOCK}, DeepGEMM, {tools.words}"
        self._up = self._random(count, 2 * intermediate, hidden)
        self._down = self._random(count, hidden, intermediate)

    def dense(self, x: Tensor, expert: int) -> Tensor:
        up, down = (_part(weight, expert) for weight in (self._up, self._down))
        middle = self._output(x, up[0].shape[0])
        self._gemm.fp8_gemm_nt(self.dispatched(x), up, middle)
        out = self._output(x, down[0].shape[0])
        self._gemm.fp8_gemm_nt(self._activated(middle), down, out)
        return out

    def dispatched(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._tools.quantise(x, self._packed)

    def layout(self, experts: Sequence[int], rows: int) -> Tensor:
        return torch.tensor(experts, dtype=torch.int32, device=self._device).repeat_interleave(rows)

    def grouped(self, dispatched: tuple[Tensor, Tensor], layout: Tensor) -> Tensor:
        call = self._gemm.m_grouped_fp8_gemm_nt_contiguous
        middle = self._output(dispatched[0], self._up[0].shape[1])
        call(dispatched, self._up[:2], middle, layout)
        out = self._output(dispatched[0], self._down[0].shape[1])
        call(self._activated(middle), self._down[:2], out, layout)
        return out

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        up, down = (
            _whole(weight[0][expert], weight[2][expert]) for weight in (self._up, self._down)
        )
        return up, down

    def seen(self, x: Tensor) -> Tensor:
        values, scales = quantise_rows(x, powers_of_two=self._packed)
        return values.float() * scales.repeat_interleave(BLOCK, dim=1)

    def _activated(self, middle: Tensor) -> tuple[Tensor, Tensor]:
        return self._tools.quantise(self._tools.activate(middle), self._packed)

    def _output(self, rows: Tensor, width: int) -> Tensor:
        out = torch.empty(rows.shape[0], width, dtype=torch.bfloat16, device=rows.device)
        return out.fill_(float("nan")) if self.poisoned else out

    def _random(self, count: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[count, n, k]`` FP8, the scales as DeepGEMM wants them, and as plain float32 ``[count, n/128, k/128]``."""
        values = torch.empty(count, n, k, dtype=_FP8, device=self._device)
        scales = torch.empty(count, n // BLOCK, k // BLOCK, device=self._device)
        for expert in range(count):
            weight = torch.randn(n, k, dtype=torch.bfloat16, device=self._device) / k**0.5
            values[expert], scales[expert] = quantise_blocks(weight, powers_of_two=self._packed)
        if not self._packed:
            return values, scales, scales
        pack = importlib.import_module("sglang.srt.layers.quantization.fp8_utils")
        return values, pack.transform_scale_ue8m0(scales, mn=n), scales


class Bf16Experts:
    """BF16 by torch, one expert after the other. See ``Experts``."""

    alignment = 128
    as_sglang = False

    def __init__(
        self, hidden: int, intermediate: int, count: int, reason: str, *, device: str = "cuda"
    ) -> None:
        self.count = count
        self.poisoned = False
        self.description = f"BF16 by torch, expert after expert, because {reason}"
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self._up = torch.randn(count, 2 * intermediate, hidden, **options) / hidden**0.5
        self._down = torch.randn(count, hidden, intermediate, **options) / intermediate**0.5

    def dense(self, x: Tensor, expert: int) -> Tensor:
        middle = _torch_activate(functional.linear(x, self._up[expert]))
        return functional.linear(middle, self._down[expert])

    def dispatched(self, x: Tensor) -> Tensor:
        return x

    def layout(self, experts: Sequence[int], rows: int) -> list[tuple[int, slice]]:
        return [(e, slice(i * rows, (i + 1) * rows)) for i, e in enumerate(experts)]

    def grouped(self, dispatched: Tensor, layout: list[tuple[int, slice]]) -> Tensor:
        out = torch.empty_like(dispatched)
        if self.poisoned:
            out.fill_(float("nan"))
        for expert, rows in layout:
            out[rows] = self.dense(dispatched[rows], expert)
        return out

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        return self._up[expert].float(), self._down[expert].float()

    def seen(self, x: Tensor) -> Tensor:
        return x.float()


def check(experts: Experts, hidden: int, device: str = "cuda") -> None:
    """Do the timed calls compute what torch does in float32? Outputs hold NaN beforehand.

    Raises:
        RuntimeError: with the error found and the one allowed.
    """
    rows = 2 * experts.alignment
    order = (experts.count - 1, 0)
    x = torch.randn(2 * rows, hidden, dtype=torch.bfloat16, device=device)
    experts.poisoned = True
    hold("dense MLP", experts.dense(x, order[0]), reference(experts, x, order[0]))
    found = experts.grouped(experts.dispatched(x), experts.layout(order, rows))
    experts.poisoned = False
    expected = [
        reference(experts, part, e) for part, e in zip((x[:rows], x[rows:]), order, strict=True)
    ]
    hold("grouped GEMM", found, torch.cat(expected))


def reference(experts: Experts, x: Tensor, expert: int) -> Tensor:
    """One expert's MLP of ``x`` ``[rows, hidden]`` by torch in float32, weights and ``x`` as the kernels see them."""
    up, down = experts.weights(expert)
    return _torch_activate(experts.seen(x) @ up.T) @ down.T


def hold(what: str, found: Tensor, expected: Tensor) -> None:
    """Is it torch's but for FP8? Quantising the activation alone makes an error of 2 to 3% of the output's norm.

    Raises:
        RuntimeError: with the error found and the one allowed.
    """
    error = float((found.float() - expected).norm() / expected.norm())
    if not error <= 0.06:
        text = f"the {what} differs from torch's by {error:.3f} of its norm, at most 0.06 is right"
        raise RuntimeError(f"{text}: this deep_gemm is not the one that this sglang needs")


def quantise_rows(x: Tensor, *, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """``[rows, K]`` to FP8 and float32 scales ``[rows, K/128]``, by torch."""
    groups = x.float().view(x.shape[0], -1, BLOCK)
    scales = _scales(groups.abs().amax(2, keepdim=True), powers_of_two)
    return (groups / scales).to(_FP8).flatten(1), scales.squeeze(2)


def quantise_blocks(weight: Tensor, *, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """``[N, K]`` to FP8 and float32 scales ``[N/128, K/128]``, by torch."""
    n, k = weight.shape
    blocks = weight.float().view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scales = _scales(blocks.abs().amax((1, 3), keepdim=True), powers_of_two)
    return (blocks / scales).to(_FP8).view(n, k), scales.view(n // BLOCK, k // BLOCK)


def _scales(largest: Tensor, powers_of_two: bool) -> Tensor:
    scales = largest.clamp(_LEAST) / _FP8_MOST
    return scales.log2().ceil().exp2() if powers_of_two else scales


def _whole(values: Tensor, scales: Tensor) -> Tensor:
    spread = scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return values.float() * spread


def _part(weight: tuple[Tensor, ...], expert: int) -> tuple[Tensor, Tensor]:
    return weight[0][expert], weight[1][expert]


def _torch_activate(both: Tensor) -> Tensor:
    left, right = both.chunk(2, dim=1)
    return functional.silu(left) * right


def _torch_quantise(x: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    return quantise_rows(x, powers_of_two=packed)


# Where sglang 0.5.13 to 0.5.23 have them.
QUANTISE = (
    "sglang.kernels.ops.quantization.fp8_kernel:sglang_per_token_group_quant_fp8",
    "sglang.srt.layers.quantization.fp8_kernel:sglang_per_token_group_quant_fp8",
)
"""Places of sglang's quantisation, ``module:name``, for ``first_working``."""
_ACTIVATE = (
    "sglang.kernels.ops.activation:silu_and_mul",
    "sglang.jit_kernel.activation:silu_and_mul",
    "sgl_kernel:silu_and_mul",
)


def _tools() -> Tools:
    """sglang's quantisation and activation where they can be had and compute what torch's do, else torch's."""
    x = torch.randn(BLOCK, 4 * BLOCK, dtype=torch.bfloat16, device="cuda")

    def quantises(function: Any) -> bool:
        values, scales = function(x, BLOCK, column_major_scales=True, scale_tma_aligned=True)
        back = values.float() * scales.repeat_interleave(BLOCK, dim=1)
        return bool((back - x.float()).norm() < 0.05 * x.float().norm())

    def activates(function: Any) -> bool:
        return torch.allclose(function(x).float(), _torch_activate(x.float()), atol=0.02, rtol=0.02)

    quantise, lacks_one = first_working(QUANTISE, quantises)
    activate, lacks_other = first_working(_ACTIVATE, activates)
    lacks = [reason for reason in (lacks_one, lacks_other) if reason]
    words = "sglang's quantisation and activation"
    if lacks:
        words = f"torch's quantisation or activation, slower than sglang's ({'; '.join(lacks)})"

    def sglang_quantise(x: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
        options = {"column_major_scales": True, "scale_tma_aligned": True, "scale_ue8m0": packed}
        values, scales = quantise(x, BLOCK, **options)
        return values, scales

    return Tools(
        sglang_quantise if quantise else _torch_quantise,
        activate or _torch_activate,
        words,
        of_sglang=not lacks,
    )


def first_working(places: Sequence[str], works: Callable[[Any], bool]) -> tuple[Any, str]:
    """The first function that can be imported and works, or None; and why none does."""
    reasons = []
    for place in places:
        module, name = place.split(":")
        try:
            function = getattr(importlib.import_module(module), name)
            if works(function):
                return function, ""
            reasons.append(f"{name} of {module} computes something else")
        except Exception as error:  # Other versions' modules fail in their own ways.
            reasons.append(f"{name} of {module}: {_line(error)}")
    return None, reasons[0]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
