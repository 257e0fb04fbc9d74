"""A MoE layer's expert-parallel part in prefill, its shared expert fused or overlapped, timed as the host launches it eagerly.

*Fused*, the shared expert of a token's own rank is one more of its experts in dispatch and in the grouped GEMM. *Overlapped*, it is a
dense MLP on a second stream, beside dispatch. Both call DeepEP and the kernels as sglang does in normal mode (its
``token_dispatcher/deepep.py``, ``moe_runner/deep_gemm.py`` and ``forward_deepep`` of ``models/deepseek_v2.py``), over the same weights.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from waterfill_rs.calibrate.job import Job
from waterfill_rs.calibrate.kernels import (
    BLOCK,
    QUANTISE,
    Experts,
    check,
    experts_of,
    first_working,
    hold,
    reference,
)

__all__ = ["MOST_EXPERTS", "Batch", "Kernels", "Layer", "check_forms", "draw", "measure", "paired"]

MOST_EXPERTS = 32
"""Routed experts of a rank, or fewer where there are fewer: so their weights fit everywhere."""
_HOPPER = (9, 0)
_MOST_IDS = 32  # Of a token, in DeepEP's dispatch within a node.
_ALIGNMENT = 128  # Rows of an expert, as sglang asks DeepEP for them.
_CHECKED_TOKENS = 256
_APART = 0.02  # Of the output's norm: below what quantising to FP8 makes.
_LAYERS = 10  # Of a burst, back to back.
_PAIRS = 21
_WARM = 2


@dataclass(frozen=True)
class Kernels:
    """sglang's kernels around the grouped GEMM, under the names that they have there."""

    quantise: Callable[..., tuple[Tensor, Tensor]]
    ep_scatter: Callable[..., None]
    ep_gather: Callable[..., None]
    tma_align_input_scale: Callable[[Tensor], Tensor]

    @classmethod
    def load(cls) -> Kernels:
        """Those of the installed sglang.

        Raises:
            RuntimeError: naming the one that is not there.
        """
        quantise, lack = first_working(QUANTISE, callable)
        if quantise is None:
            raise RuntimeError(lack)
        return cls(quantise, *map(_placing, ("ep_scatter", "ep_gather", "tma_align_input_scale")))


def _placing(name: str) -> Any:
    modules = ("sglang.kernels.ops.moe.ep_moe_kernels", "sglang.srt.layers.moe.ep_moe.kernels")
    function, lack = first_working([f"{module}:{name}" for module in modules], callable)
    if function is None:
        raise RuntimeError(lack)
    return function


@dataclass(frozen=True)
class Batch:
    """A rank's tokens ``x`` ``[tokens, hidden]`` in BF16. ``fused`` and ``routed`` are ids of slots and float32 weights: ``routed``
    ``[tokens, K]`` each, ``fused`` ``[tokens, K+1]`` with the rank's own shared expert in the last column.
    """

    x: Tensor
    fused: tuple[Tensor, Tensor]
    routed: tuple[Tensor, Tensor]


def draw(job: Job, rank: int, tokens: int, id_type: Any, device: str = "cuda") -> Batch:
    """Random tokens with ``top_k`` distinct experts each, evenly drawn. A rank's last slot holds its shared expert."""
    local = job.experts // job.ranks
    x = torch.randn(tokens, job.hidden, dtype=torch.bfloat16, device=device)
    experts = torch.rand(tokens, job.experts, device=device).topk(job.top_k).indices
    ids = (experts + experts // local).to(id_type)
    weights = torch.rand(tokens, job.top_k, device=device) + 0.5
    home = torch.full_like(ids[:, :1], rank * (local + 1) + local)
    fused = torch.cat((ids, home), 1), torch.cat((weights, torch.ones_like(weights[:, :1])), 1)
    return Batch(x, fused, (ids, weights))


class Layer:
    """One rank's expert-parallel part: its experts, the shared one last, between DeepEP's dispatch and combine."""

    def __init__(self, buffer: Any, experts: Experts, kernels: Kernels, slots: int) -> None:
        """``buffer``: DeepEP's. ``slots``: of all ranks."""
        self.experts = experts
        self._buffer = buffer
        self._kernels = kernels
        self._slots = slots
        stream: Any = torch.cuda.Stream  # Untyped.
        self._side = stream()
        # sglang 0.5.17 and newer also take an expert's rows without padding, and get the padded ones for them here.
        takes = inspect.signature(kernels.ep_scatter).parameters
        self._counts = 2 if "num_valid_tokens_per_expert" in takes else 1

    def fused(self, batch: Batch) -> Tensor:
        """``[tokens, hidden]`` in BF16."""
        return self._routed(batch.x, *batch.fused)

    def overlapped(self, batch: Batch) -> Tensor:
        """``[tokens, hidden]`` in BF16."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            shared = self.experts.dense(batch.x, self.experts.count - 1)
            done = self._side.record_event()
        out = self._routed(batch.x, *batch.routed)
        current.wait_event(done)
        return shared.add_(out)

    def expected(self, batch: Batch) -> Tensor:
        """The fused form by torch in float32. All ranks hold the same experts, so no dispatch is needed."""
        ids, weights = batch.fused
        out = torch.zeros(batch.x.shape, device=batch.x.device)
        for expert in range(self.experts.count):
            share = (weights * (ids % self.experts.count == expert)).sum(1)
            tokens = share.nonzero().flatten()
            out[tokens] += reference(self.experts, batch.x[tokens], expert) * share[tokens, None]
        return out

    def _routed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent = self._kernels.quantise(x, BLOCK)
        received, ids, weights, rows, handle = self._dispatch(sent, ids, weights)
        placed, m_indices, places = self._scatter(received, ids, rows)
        out = self.experts.grouped(placed, m_indices)
        gathered = torch.empty(received[0].shape, dtype=torch.bfloat16, device=x.device)
        self._kernels.ep_gather(out, ids, weights, places, gathered)
        return self._combine(gathered, handle)

    def _dispatch(
        self, sent: tuple[Tensor, Tensor], ids: Tensor, weights: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, list[int], Any]:
        """What arrived, its local ids (-1: another rank's) and weights, each local expert's padded rows, and combine's handle."""
        per_rank, per_node, per_expert, in_rank, event = self._buffer.get_dispatch_layout(
            ids,
            self._slots,
            previous_event=self._buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        received, ids, weights, rows, handle, event = self._buffer.dispatch(
            sent,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
            expert_alignment=_ALIGNMENT,
        )
        event.current_stream_wait()
        return received, ids, weights, rows, handle

    def _scatter(
        self, received: tuple[Tensor, Tensor], ids: Tensor, rows: list[int]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The contiguous layout: values and scales by expert, each row's expert, and where each token's rows went."""
        values, scales = received
        device, total = values.device, sum(rows)
        placed = torch.empty(total, values.shape[1], dtype=values.dtype, device=device)
        placed_scales = torch.empty(total, scales.shape[1], dtype=scales.dtype, device=device)
        m_indices = torch.empty(total, dtype=torch.int32, device=device)
        places = torch.empty_like(ids)
        counts = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        counts = counts.to(device, non_blocking=True)
        self._kernels.ep_scatter(
            values,
            scales,
            ids,
            *[counts] * self._counts,
            torch.empty_like(counts),
            placed,
            placed_scales,
            m_indices,
            places,
        )
        aligned = self._kernels.tma_align_input_scale(placed_scales)
        return (placed, aligned), m_indices, places

    def _combine(self, gathered: Tensor, handle: Any) -> Tensor:
        out, _, event = self._buffer.combine(
            gathered,
            handle,
            async_finish=True,
            previous_event=self._buffer.capture(),
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return out  # type: ignore[no-any-return]


def check_forms(layer: Layer, batch: Batch) -> None:
    """Is the fused form what torch computes, and the overlapped one the same? Outputs hold NaN beforehand.

    Raises:
        RuntimeError: with the error found and the one allowed.
    """
    layer.experts.poisoned = True
    fused, overlapped = layer.fused(batch), layer.overlapped(batch)
    layer.experts.poisoned = False
    hold("fused layer", fused, layer.expected(batch))
    apart = float((overlapped.float() - fused.float()).norm() / fused.float().norm())
    if not apart <= _APART:
        text = f"the overlapped layer differs from the fused one by {apart:.3f} of its norm"
        raise RuntimeError(f"{text}, at most {_APART} is right")


def measure(
    job: Job, rank: int, buffer: Any, id_type: Any, report: Callable[[str, int, Any], None]
) -> None:
    """Time both forms by ``job.prefill_tokens``, in every rank's process alike.

    Reports ``("prefill", tokens, (overlapped, fused))`` in microseconds a layer, as ``paired`` has them, and words as ``("said", 0,
    words)``. Tokens that may not fit into a GPU's memory are left out.

    Raises:
        RuntimeError: with the reason why this machine's forms cannot be compared.
    """
    _check_machine(job)
    local = min(job.experts // job.ranks, MOST_EXPERTS)
    job = job.with_experts(local * job.ranks)
    experts = experts_of(job.hidden, job.intermediate, local + 1)
    if not experts.as_sglang:
        raise RuntimeError(f"a server's kernels are not there, but {experts.description}")
    check(experts, job.hidden)  # It compiles, too: no rank may wait in DeepEP for that.
    layer = Layer(buffer, experts, Kernels.load(), job.experts + job.ranks)
    torch.manual_seed(1 + rank)
    check_forms(layer, draw(job, rank, _CHECKED_TOKENS, id_type))
    report("said", 0, f"a layer of {job.ranks} x {local} experts is the same fused and overlapped")
    for tokens in job.prefill_tokens:
        torch.cuda.empty_cache()
        if not _fits(job, tokens, local):
            report("said", 0, f"{tokens} tokens a rank are left out: too many for the memory")
            break
        batch = draw(job, rank, tokens, id_type)
        forms = partial(layer.overlapped, batch), partial(layer.fused, batch)
        overlapped, fused = (partial(_burst, form) for form in forms)
        report("prefill", tokens, paired(overlapped, fused, _slowest))


def _check_machine(job: Job) -> None:
    if job.top_k >= _MOST_IDS:
        raise RuntimeError(
            f"DeepEP takes {_MOST_IDS} experts a token, and fused are {job.top_k + 1}"
        )
    found = torch.cuda.get_device_capability()
    if found != _HOPPER:
        text = f"shared experts in FP8 stay fused on SM {found[0]}{found[1]}"
        raise RuntimeError(f"{text}: scales of dense and grouped layers differ")


def _fits(job: Job, tokens: int, local: int) -> bool:
    """Is there memory for three layers of this on every rank? The host is ahead of the GPU."""
    rows = tokens * (job.top_k + 1) + (local + 1) * _ALIGNMENT
    # Bytes of a placed row: FP8 in, BF16 up, activated, FP8 activated, BF16 down. Of a received one: FP8 in, BF16 gathered.
    grouped = rows * (3 * job.hidden + 7 * job.intermediate)
    needed = 3 * (grouped + tokens * job.ranks * 3 * job.hidden)
    free, _ = torch.cuda.mem_get_info()
    fits = torch.tensor(int(needed < free), device="cuda")
    distributed.all_reduce(fits, op=distributed.ReduceOp.MIN)
    return bool(fits)


def _burst(form: Callable[[], Tensor]) -> float:
    """Microseconds of a layer by the host's clock, after all ranks met."""
    distributed.all_reduce(torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_LAYERS):
        form()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e6 / _LAYERS


def _slowest(times: Sequence[float]) -> list[float]:
    """Of each burst that of the slowest rank."""
    all_times = torch.tensor(times, dtype=torch.float64, device="cuda")
    distributed.all_reduce(all_times, op=distributed.ReduceOp.MAX)
    return [float(us) for us in all_times.tolist()]


def paired(
    overlapped: Callable[[], float],
    fused: Callable[[], float],
    slowest: Callable[[Sequence[float]], Sequence[float]],
) -> tuple[float, float]:
    """``(overlapped, fused)``: the second is the median of the fused bursts, and the first that times the median ratio of a pair.

    So their ratio is that of bursts side by side, whose clock rates are alike. The form that begins changes from pair to pair.
    """
    bursts = overlapped, fused
    for burst in bursts * _WARM:
        burst()
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(_PAIRS):
        for which in (pair % 2, 1 - pair % 2):
            times[which].append(bursts[which]())
    beside, within = map(slowest, times)
    ratio = statistics.median(o / f for o, f in zip(beside, within, strict=True))
    middle = statistics.median(within)
    return middle * ratio, middle
