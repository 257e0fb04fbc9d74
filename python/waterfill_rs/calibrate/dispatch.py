"""DeepEP's dispatch in normal mode between this machine's GPUs, one process each, timed as sglang calls it.

The same processes then time a layer's prefill, see ``prefill``.
"""

from __future__ import annotations

import queue
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from waterfill_rs.calibrate.job import Dispatched, Job, Plan

__all__ = ["measure"]

_SILENT_S = 180  # New kernels are compiled between two reports.
_WARM = 3
_TIMED = 15
_HEAD_START_US = 300  # In which the host launches what is timed.

Work = Callable[[int, Job, Any], None]
"""What a rank's process does: rank, job and the queue of reports, each ``(part, tokens, result)``, or words that say what failed.

Parts are ``dispatch``, ``prefill``, ``said`` with words as its result, and ``end``.
"""


def measure(
    shape: tuple[int, int], top_k: int, experts: int, plan: Plan, say: Callable[[str], None]
) -> Dispatched | str:
    """Dispatch of FP8 tokens by tokens a rank, over 8, 4 or 2 GPUs, and a layer's prefill; the slowest rank's time counts.

    Layout, exchange of counts and transfer are in it. In words why, where it cannot be measured.

    Args:
        shape: ``(hidden, intermediate)`` of an expert.
    """
    import torch

    gpus = torch.cuda.device_count()
    ranks = next((ranks for ranks in (8, 4, 2) if ranks <= gpus and experts % ranks == 0), None)
    if ranks is None:
        return f"{gpus} GPU{'s' * (gpus != 1)} visible, and {experts} experts over 2, 4 or 8 are needed"
    if not all(torch.cuda.can_device_access_peer(0, peer) for peer in range(1, ranks)):
        return f"GPU 0 cannot reach the memory of the other {ranks - 1}"
    try:
        import deep_ep  # noqa: F401
    except Exception as error:  # Its import compiles and checks libraries, and fails in many ways.
        return f"deep_ep cannot be imported ({_line(error)})"
    torch.cuda.empty_cache()
    tokens = plan.dispatch_tokens, plan.prefill_tokens
    job = Job(ranks, *shape, top_k, experts, *tokens, _free_port())
    say(f"dispatch between {ranks} GPUs: starting a process on each")
    return _collect(job, _rank, say)


def _collect(job: Job, work: Work, say: Callable[[str], None]) -> Dispatched | str:
    """Run ``work`` in a process a rank. The first error, death or long silence ends all; dispatch that was measured is kept."""
    dispatch: dict[int, float] = {}
    prefill: dict[int, tuple[float, float]] = {}
    failed = ""
    try:
        for part, tokens, result in _reports(job, work):
            if part == "said":
                say(result)
            elif part == "dispatch":
                dispatch[tokens] = result
                say(f"dispatch, {tokens} tokens a rank: {result:.1f} us")
            else:
                prefill[tokens] = result
                text = "overlapped {:.1f} us, fused {:.1f} us a layer".format(*result)
                say(f"prefill, {tokens} tokens a rank: {text}")
    except RuntimeError as error:
        failed = str(error)
    if failed and len(dispatch) < len(job.dispatch_tokens):
        return failed
    if not failed and not prefill:
        failed = f"not even {min(job.prefill_tokens)} tokens a rank fit into memory"
    return Dispatched(job.ranks, job.top_k, dispatch, failed or prefill)


def _reports(job: Job, work: Work) -> Iterator[tuple[str, int, Any]]:
    """What the ranks' processes report until the end.

    Raises:
        RuntimeError: a rank failed, or nothing came for long.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    processes = [
        context.Process(target=_reporting, args=(work, rank, job, reports), daemon=True)
        for rank in range(job.ranks)
    ]
    try:
        for process in processes:
            process.start()
        while (found := _next(reports, processes))[0] != "end":
            yield found
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _next(reports: Any, processes: Sequence[Any]) -> tuple[str, int, Any]:
    deadline = time.monotonic() + _SILENT_S
    while time.monotonic() < deadline:
        try:
            found = reports.get(timeout=1)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode]
            if dead:
                raise RuntimeError(f"a rank's process ended with code {dead[0]}") from None
            continue
        if isinstance(found, str):
            raise RuntimeError(found)
        part, tokens, result = found
        return part, tokens, result
    raise RuntimeError(f"the ranks' processes reported nothing for {_SILENT_S} s")


def _reporting(work: Work, rank: int, job: Job, reports: Any) -> None:
    try:
        work(rank, job, reports)
    except Exception as error:  # Whatever it is, the command has to hear of it.
        reports.put(f"rank {rank}: {_line(error)}")


def _rank(rank: int, job: Job, reports: Any) -> None:
    import deep_ep
    import torch
    from torch import distributed

    def report(part: str, tokens: int, result: Any) -> None:
        if rank == 0:
            reports.put((part, tokens, result))

    torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    distributed.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{job.port}", rank=rank, world_size=job.ranks
    )
    group = distributed.new_group(list(range(job.ranks)))
    sides = (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)
    hints = [side(job.ranks).get_nvl_buffer_size_hint(2 * job.hidden, job.ranks) for side in sides]
    buffer = deep_ep.Buffer(group, max(hints), 0)
    id_type = getattr(deep_ep, "topk_idx_t", torch.int64)
    _check(buffer, _tokens(job, 256, id_type), job)
    for count in job.dispatch_tokens:
        batch = _tokens(job, count, id_type)
        report("dispatch", count, _slowest(partial(_dispatch, buffer, batch, job)))
    from waterfill_rs.calibrate import prefill  # It loads more of torch than dispatch needs.

    prefill.measure(job, rank, buffer, id_type, report)
    report("end", 0, None)
    distributed.barrier(device_ids=[rank])  # Without them torch warns on the terminal.
    torch.cuda.synchronize()
    distributed.destroy_process_group()


def _tokens(job: Job, count: int, id_type: Any) -> tuple[Any, Any, Any]:
    """FP8 tokens with their scales, ids ``[count, K]`` of distinct experts evenly drawn, and weights."""
    import torch

    from waterfill_rs.calibrate.kernels import quantise_rows

    x = torch.randn(count, job.hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(count, job.experts, device="cuda").topk(job.top_k).indices
    weights = torch.rand(count, job.top_k, device="cuda")
    values, scales = quantise_rows(x)
    return (values, scales.contiguous()), ids.to(id_type), weights


def _dispatch(buffer: Any, batch: tuple[Any, Any, Any], job: Job) -> Any:
    x, ids, weights = batch
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, job.experts)
    return buffer.dispatch(
        x,
        topk_idx=ids,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=128,
    )


def _check(buffer: Any, batch: tuple[Any, Any, Any], job: Job) -> None:
    """A token comes back from combine as often as ranks had it, so its sum over them is known."""
    import torch

    received, _, _, _, handle, _ = _dispatch(buffer, batch, job)
    back, _, _ = buffer.combine(_whole(received).bfloat16(), handle)
    visits = (batch[1] // (job.experts // job.ranks)).sort(dim=1).values
    copies = 1 + (visits[:, 1:] != visits[:, :-1]).sum(dim=1, keepdim=True)
    expected = _whole(batch[0]) * copies
    error = float((back.float() - expected).norm() / expected.norm())
    if not error < 0.02:
        raise RuntimeError(f"tokens came back from combine wrong, by {error:.3f} of their norm")
    torch.cuda.synchronize()


def _whole(x: tuple[Any, Any]) -> Any:
    return x[0].float() * x[1].repeat_interleave(128, dim=1)


def _slowest(call: Callable[[], Any]) -> float:
    """Median microseconds of the slowest rank. All start together, after a collective on the GPU."""
    import torch
    from torch import distributed

    from waterfill_rs.calibrate.timing import sleep

    event: Any = partial(torch.cuda.Event, enable_timing=True)  # Untyped.
    flag = torch.zeros(1, device="cuda")
    times = []
    for _ in range(_WARM + _TIMED):
        start, end = event(), event()
        torch.cuda.synchronize()
        distributed.all_reduce(flag)
        sleep(_HEAD_START_US)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    slowest = torch.tensor(times[_WARM:], device="cuda")
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    return float(statistics.median(slowest.tolist()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
