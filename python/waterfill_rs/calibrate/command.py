"""``waterfill-rs calibrate``: what this machine's GPU takes for a dense MLP, a grouped GEMM, dispatch, and a layer's prefill."""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import waterfill_rs
from waterfill_rs import outputs
from waterfill_rs.calibrate.job import Dispatched, Plan
from waterfill_rs.machine import Curve, Machine

if TYPE_CHECKING:
    from waterfill_rs.calibrate.kernels import Experts

__all__ = ["GROUP", "Times", "add_command", "machine_from", "measure"]

GROUP = 8
"""Experts of the largest measured grouped call."""

Timer = Callable[[Sequence[Callable[[], object]]], float]
"""Microseconds of a call, by calls that are run one after the other."""


FULL = Plan(
    dense_tokens=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    tiles=(1, 2, 4, 8, 16, 32),
    dispatch_tokens=(64, 256, 1024, 2048, 4096, 8192),
    prefill_tokens=(512, 1024, 2048, 4096, 8192, 16384),
    batches=15,
)
QUICK = Plan(
    dense_tokens=(64, 512, 2048, 8192),
    tiles=(1, 4, 16),
    dispatch_tokens=(256, 2048, 8192),
    prefill_tokens=(1024, 4096, 8192),
    batches=7,
)


@dataclass(frozen=True)
class Times:
    """Measured microseconds of the kernels."""

    dense: dict[int, float]
    """By tokens."""
    grouped: dict[tuple[int, int], float]
    """By active experts and the rows of each."""


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate", help="measure this machine's GPU for cost models", description=__doc__
    )
    parser.add_argument("--json", type=Path, help="write the figures, for --cost-model and others")
    parser.add_argument("--hidden", type=int, default=7168, help="width of a token (7168)")
    parser.add_argument("--intermediate", type=int, default=2048, help="width of an expert (2048)")
    parser.add_argument(
        "--top-k", type=int, default=8, help="dispatch and prefill: experts a token (8)"
    )
    parser.add_argument(
        "--experts", type=int, default=256, help="dispatch and prefill: experts (256)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer points, half the time")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    _check_shape(arguments)
    outputs.check_outputs(arguments.json)
    name = _gpu()
    import torch

    from waterfill_rs.calibrate import dispatch, kernels, timing

    plan = QUICK if arguments.quick else FULL
    hidden, intermediate = arguments.hidden, arguments.intermediate
    _say(f"{name}: random experts of {hidden} x {intermediate}; new kernels are compiled")
    try:
        experts = kernels.make(hidden, intermediate, GROUP)
        _say(f"timing {experts.description}")
        kernels.check(experts, hidden)
        _say("the kernels compute what torch computes")
        times = measure(experts, timing.GpuTimer(plan.batches), plan, _inputs(hidden))
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{error} Stop what else runs on {name}") from error
    launch = timing.launch_us()
    source = (
        f"waterfill-rs {waterfill_rs.__version__} calibrate, {datetime.date.today().isoformat()}, "
        f"{experts.description}, {_versions()}"
    )
    del experts
    dispatched: Dispatched | str = dispatch.measure(
        (hidden, intermediate), arguments.top_k, arguments.experts, plan, _say
    )
    machine = machine_from(name, source, (hidden, intermediate), times, dispatched, launch)
    for line in table(machine, times, dispatched):
        print(line)
    if arguments.json:
        machine.save(arguments.json)
        print(f"written to {arguments.json}")


def _check_shape(arguments: argparse.Namespace) -> None:
    for name in ("hidden", "intermediate"):
        value = getattr(arguments, name)
        if value % 128 or not 128 <= value <= 65536:
            raise ValueError(f"--{name} {value}: give a multiple of 128 from 128 to 65536")
    if not 1 <= arguments.top_k <= 32:
        raise ValueError(f"--top-k {arguments.top_k}: give 1 to 32")
    if not arguments.top_k <= arguments.experts <= 4096:
        text = f"give at least --top-k ({arguments.top_k}) and at most 4096"
        raise ValueError(f"--experts {arguments.experts}: {text}")


def _gpu() -> str:
    """The current GPU's name, as torch gives it.

    Raises:
        RuntimeError: naming what is missing.
    """
    try:
        import torch
    except ImportError as error:
        text = f"calibrate needs torch, which sglang brings, and a GPU: {error}"
        raise RuntimeError(f"{text}: run it in sglang's environment") from error
    if torch.version.cuda is None:
        text = f"this torch ({torch.__version__}) is built without CUDA"
        raise RuntimeError(f"calibrate needs a GPU, and {text}: run it in sglang's environment")
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        text = f"torch {torch.__version__} sees none (CUDA_VISIBLE_DEVICES is {visible})"
        raise RuntimeError(f"calibrate needs a GPU, and {text}: see nvidia-smi")
    return torch.cuda.get_device_name()


def _versions() -> str:
    import torch

    return f"torch {torch.__version__}, CUDA {torch.version.cuda}"


def _inputs(hidden: int) -> Callable[[int], Any]:
    """Random tokens: a number of them to ``[tokens, hidden]`` in BF16 on the GPU."""
    import torch

    def inputs(tokens: int) -> Any:
        return torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")

    return inputs


def measure(
    experts: Experts,
    timer: Timer,
    plan: Plan,
    inputs: Callable[[int], Any],
    say: Callable[[str], None] | None = None,
) -> Times:
    """Time the dense MLP by tokens and the grouped GEMM by active experts and rows.

    Each timing runs through all of the experts' weights, so none of them is in the L2 cache when its turn comes.
    ``inputs`` makes ``[rows, hidden]``.
    """
    say = say or _say
    dense = {}
    for tokens in plan.dense_tokens:
        x = inputs(tokens)
        dense[tokens] = timer([partial(experts.dense, x, e) for e in range(experts.count)])
        say(f"dense MLP, {tokens} tokens: {dense[tokens]:.1f} us")
    grouped = {}
    for active, rows in _calls(plan, experts.alignment):
        grouped[active, rows] = timer(_grouped(experts, inputs, active, rows))
        say(f"grouped GEMM, {active} x {rows} rows: {grouped[active, rows]:.1f} us")
    return Times(dense, grouped)


def _calls(plan: Plan, alignment: int) -> list[tuple[int, int]]:
    """``(active experts, rows of each)``: one and the full group by rows, and the first rows by experts too."""
    by_experts = [(active, alignment) for active in (1, 2, 4, GROUP)]
    by_rows = [(active, tiles * alignment) for active in (1, GROUP) for tiles in plan.tiles]
    return list(dict.fromkeys(by_experts + by_rows))


def _grouped(
    experts: Experts, inputs: Callable[[int], Any], active: int, rows: int
) -> list[Callable[[], object]]:
    """Calls with the same rows and each time other experts, ``active`` of them."""
    dispatched = experts.dispatched(inputs(active * rows))
    starts = range(0, experts.count - active + 1, active)
    layouts = [experts.layout(range(start, start + active), rows) for start in starts]
    return [partial(experts.grouped, dispatched, layout) for layout in layouts]


def machine_from(
    name: str,
    source: str,
    shape: tuple[int, int],
    times: Times,
    dispatched: Dispatched | str,
    launch_us: float | None,
) -> Machine:
    """The machine that these times describe.

    With a call's own time c and an expert's e(rows), n experts take ``c + n e(rows)``. At the fewest rows one expert and a full
    group give both; for more rows the group gives e. A time below that of fewer rows is noise and is lifted to it.

    Raises:
        RuntimeError: if a group takes no longer than one expert.
    """
    least = min(rows for _, rows in times.grouped)
    alone, group = times.grouped[1, least], times.grouped[GROUP, least]
    active = min((group - alone) / (GROUP - 1), alone)
    if active <= 0:
        text = f"{GROUP} experts took {group:.1f} us and one {alone:.1f}"
        raise RuntimeError(f"{text}: the GPU is in use by others, measure again when it is idle")
    call = alone - active
    shares = {
        rows: call + (us - call) / GROUP
        for (experts, rows), us in times.grouped.items()
        if experts == GROUP
    }
    expert_us = _rising(shares)
    known = dispatched if isinstance(dispatched, Dispatched) else None
    return Machine(
        name=name,
        source=source,
        shape=shape,
        expert_us=expert_us,
        active_expert_us=min(round(active, 2), expert_us[0][1]),
        dense_us=_rising(times.dense),
        dispatch_us=_rising(known.times) if known else (),
        dispatch_ranks=known.ranks if known else None,
        dispatch_top_k=known.top_k if known else None,
        launch_us=None if launch_us is None else round(launch_us, 2),
        prefill_us=_prefill(known.prefill) if known else (),
    )


def _prefill(times: dict[int, tuple[float, float]] | str) -> tuple[tuple[int, float, float], ...]:
    if isinstance(times, str):
        return ()
    return tuple((tokens, round(o, 1), round(f, 1)) for tokens, (o, f) in sorted(times.items()))


def _rising(times: dict[int, float]) -> Curve:
    curve: list[tuple[int, float]] = []
    for rows in sorted(times):
        us = round(times[rows], 2)
        curve.append((rows, max(us, curve[-1][1]) if curve else us))
    return tuple(curve)


def table(machine: Machine, times: Times, dispatched: Dispatched | str) -> Iterable[str]:
    """The lines of the results. All times are microseconds."""
    yield f"{machine.name}, experts of {machine.shape[0]} x {machine.shape[1]}, microseconds"
    yield from _columns(("tokens", "dense MLP"), machine.dense_us)
    yield ""
    rows_of = sorted({rows for _, rows in times.grouped})
    counts = sorted({experts for experts, _ in times.grouped})
    header = ("rows", *(f"{n} expert{'s' if n > 1 else ''}" for n in counts))
    cells = [(rows, *(times.grouped.get((n, rows)) for n in counts)) for rows in rows_of]
    yield from _columns(header, cells)
    yield ""
    yield f"an active expert {machine.active_expert_us:.1f}, a grouped call beyond its experts {machine.call_us:.1f}"
    if machine.launch_us is not None:
        yield f"the host launches an eager kernel in {machine.launch_us:.1f}"
    if isinstance(dispatched, str):
        yield f"dispatch was not measured: {dispatched}"
        return
    yield ""
    over = f"dispatch over {dispatched.ranks} ranks, top {dispatched.top_k}"
    yield from _columns(("tokens", over), machine.dispatch_us)
    if isinstance(dispatched.prefill, str):
        yield f"prefill was not measured: {dispatched.prefill}"
        return
    yield ""
    yield f"a layer's prefill over {dispatched.ranks} ranks, tokens a rank, shared expert overlapped or fused"
    yield from _columns(
        ("tokens", "overlapped", "fused", "ratio"),
        [(tokens, o, f, f"{o / f:.3f}") for tokens, o, f in machine.prefill_us],
    )
    yield _steps(machine, dispatched.ranks)


def _steps(machine: Machine, ranks: int) -> str:
    """From how many tokens on prefill overlaps, in words."""
    words = {True: "overlaps", False: "is fused"}
    answers = [
        (tokens, machine.prefill_overlaps(tokens, ranks)) for tokens, _, _ in machine.prefill_us
    ]
    changes = [
        f", from {tokens} tokens a rank on it {words[bool(overlaps)]}"
        for (_, before), (tokens, overlaps) in itertools.pairwise(answers)
        if overlaps != before
    ]
    first = f"by these figures prefill {words[bool(answers[0][1])]}"
    return first + ("".join(changes) or " at any number of tokens")


def _columns(header: Sequence[str], lines: Iterable[Sequence[float | str | None]]) -> Iterable[str]:
    widths = [max(10, len(cell) + 2) for cell in header]
    yield "".join(cell.rjust(width) for cell, width in zip(header, widths, strict=True))
    for rows, *rest in lines:
        cells = [f"{rows}", *map(_cell, rest)]
        yield "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _cell(us: float | str | None) -> str:
    if isinstance(us, str):
        return us
    return "-" if us is None else f"{us:.1f}"


def _say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
