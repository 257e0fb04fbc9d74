"""``waterfill-rs demo``: R rank processes route whole documents and expand live through a board; then
placements of the shared rows are compared. No GPU, no model.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import waterfill_rs
from waterfill_rs import outputs
from waterfill_rs._native import OUTCOMES
from waterfill_rs.config import PACES
from waterfill_rs.demo import rank_processes
from waterfill_rs.demo.rank_processes import Outcome, Setup
from waterfill_rs.demo.workload import Router, documents
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.policies import picture, report, verdict
from waterfill_rs.policies.comparison import Batch, Layer, Result, compare

__all__ = ["add_command"]

CAP_US = 250_000
"""A server's, but shorter: a stopped rank is to be seen within the demo."""


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="live rank processes on real text: no GPU, no model", description=__doc__
    )
    parser.add_argument(
        "paths", nargs="*", help="files or folders of text (default: Python's own sources)"
    )
    for name, default, text in (
        ("ranks", 8, "rank processes"),
        ("experts", 256, "routed experts over all ranks"),
        ("top-k", 6, "experts a token"),
        ("tokens", 256, "tokens a rank and step"),
        ("layers", 3, "layers, each one exchange a step"),
        ("steps", 40, "forward passes"),
        ("step-ms", 10, "milliseconds from one step to the next"),
        ("stall-ms", 300, "how long a stalled rank is stopped"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument(
        "--kill", action="append", metavar="RANK@STEP", help="SIGKILL that rank there"
    )
    parser.add_argument(
        "--stall", action="append", metavar="RANK@STEP", help="SIGSTOP that rank, later SIGCONT"
    )
    parser.add_argument(
        "--planner", choices=PACES, default="park", help="who plans at the board (park)"
    )
    parser.add_argument(
        "--cap-us",
        type=int,
        default=CAP_US,
        help=f"longest wait of an exchange, in microseconds ({CAP_US})",
    )
    parser.add_argument("--json", type=Path, help="write ranks, and every layer, step and policy")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    outputs.check_outputs(arguments.json, arguments.plot)
    picture.check(arguments.plot)
    setup = _setup(arguments)
    streams = _streams(documents(arguments.paths), setup.ranks, setup.tokens * setup.steps)
    progress = _Progress(setup.steps)
    print(
        f"{setup.ranks} rank processes on {_cores()} cores: {setup.steps} steps of {setup.layers} hash layers, "
        f"{setup.tokens} tokens a rank and step, {setup.experts} experts, top {setup.top_k}; "
        f"an exchange waits at most {setup.board.cap_us} us",
        flush=True,
    )
    outcome = rank_processes.run(setup, streams, progress)
    ranks = [_of_rank(rank, tally, setup) for rank, tally in enumerate(outcome.by_rank)]
    _print_ranks(ranks, outcome, setup)
    results = _compare(setup, streams, outcome)
    if results:
        report.print_table(results, "\nPlacements of the same tokens; live: what the processes did")
        print()
        verdict.print_verdict(results, setup.top_k)
    else:
        print("\nNo step was made by all ranks: nothing to compare.")
    if arguments.json:
        shape = {"ranks": setup.ranks, "experts": setup.experts, "top_k": setup.top_k}
        rows = [result.as_json() for result in results]
        outputs.write_json(arguments.json, **shape, by_rank=ranks, rows=rows)
    if arguments.plot and results:
        picture.plot_ranks(results, setup.tokens, arguments.plot)
    _check(ranks, setup)


def _setup(arguments: argparse.Namespace) -> Setup:
    for name in ("ranks", "experts", "top_k", "tokens", "layers", "steps", "step_ms", "stall_ms"):
        _at_least_1(name, getattr(arguments, name))
    ranks, steps = arguments.ranks, arguments.steps
    # What ranks would refuse one by one is refused here, once.
    Router(arguments.experts, arguments.top_k, 0)
    waterfill_rs.plan([0] * ranks, [0] * ranks, ranks=ranks, physical_experts=arguments.experts)
    _at_least_1("cap_us", arguments.cap_us)
    return Setup(
        ranks=ranks,
        experts=arguments.experts,
        top_k=arguments.top_k,
        layers=arguments.layers,
        steps=steps,
        tokens=arguments.tokens,
        step_s=arguments.step_ms / 1000,
        stall_s=arguments.stall_ms / 1000,
        board=BoardSettings(cap_us=arguments.cap_us, pace=arguments.planner),
        kill=_moments("--kill", arguments.kill or (), ranks, steps),
        stall=_moments("--stall", arguments.stall or (), ranks, steps),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")


def _moments(flag: str, texts: Sequence[str], ranks: int, steps: int) -> dict[int, int]:
    """``RANK@STEP``, one a rank."""
    moments: dict[int, int] = {}
    for text in texts:
        rank, _, step = text.partition("@")
        if not (rank.isdigit() and step.isdigit() and int(rank) < ranks and int(step) < steps):
            raise ValueError(
                f"{flag} {text}: give RANK@STEP, a rank below {ranks} and a step below {steps}"
            )
        if int(rank) in moments:
            raise ValueError(f"{flag} {text}: rank {rank} is named twice")
        moments[int(rank)] = int(step)
    return moments


class _Progress:
    """On stderr, about once a second."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._last = time.monotonic()

    def __call__(self, step: int) -> None:
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            print(f"step {step} of {self._steps}", file=sys.stderr, flush=True)


def _of_rank(rank: int, tally: Mapping[str, Any], setup: Setup) -> dict[str, Any]:
    """What the board says of a rank, dead ones too."""
    fallbacks = {name: tally[name] for name in OUTCOMES if name != "live"}
    return {
        "rank": rank,
        "steps": tally["calls"] // setup.layers,
        "exchanges": tally["calls"],
        "live": tally["live"],
        "timeouts": tally["timed_out"],
        "fallbacks": sum(fallbacks.values()),
        "fallbacks_by_reason": fallbacks,
        "wait_us": {name: tally["wait_us"][name] for name in ("p50", "p99", "max")},
    }


def _print_ranks(ranks: list[dict[str, Any]], outcome: Outcome, setup: Setup) -> None:
    columns = ("rank", "steps", "exchanges", "live", "timeouts", "fallbacks")
    print("".join(f"{name:>11}" for name in columns) + "   wait us: p50      p99      max")
    for rank in ranks:
        numbers = "".join(f"{rank[name]:>11}" for name in columns)
        waits = "".join(f"{rank['wait_us'][name]:>9.0f}" for name in ("p50", "p99", "max"))
        print(f"{numbers}       {waits}   {_fate(rank['rank'], outcome, setup)}".rstrip())
    planner = outcome.planner
    missed = {rank: calls for rank, calls in enumerate(planner["missed"]) if calls}
    print(
        f"{planner['whole']} plans from all ranks' counts, {planner['partial']} without gone ranks, "
        f"{planner['late'] + planner['silent']} calls without a plan because a rank was late"
        + (f" (calls missed, by rank: {missed})." if missed else ".")
    )


def _fate(rank: int, outcome: Outcome, setup: Setup) -> str:
    words = []
    if rank in setup.stall:
        words.append(f"stopped at step {setup.stall[rank]} for {setup.stall_s:.1f} s")
    if rank in setup.kill and rank in outcome.lost:
        words.append(f"killed at step {setup.kill[rank]}")
    elif rank in outcome.lost:
        words.append(f"ended early, exit code {outcome.lost[rank]}")
    return ", ".join(words)


def _check(ranks: list[dict[str, Any]], setup: Setup) -> None:
    """Whoever was not killed did all steps, or this demo has failed."""
    short = {
        rank["rank"]: rank["steps"]
        for rank in ranks
        if rank["rank"] not in setup.kill and rank["steps"] != setup.steps
    }
    if short:
        raise RuntimeError(f"steps done, of {setup.steps}, by rank: {short}")


def _compare(setup: Setup, streams: list[list[int]], outcome: Outcome) -> list[Result]:
    """Each call that all ranks made."""
    results: list[Result] = []
    routers = [Router(setup.experts, setup.top_k, layer) for layer in range(setup.layers)]
    whole = {call: by for call, by in outcome.quotas.items() if len(by) == setup.ranks}
    for (step, layer), by_rank in sorted(whole.items(), key=lambda item: item[0][::-1]):
        part = slice(step * setup.tokens, (step + 1) * setup.tokens)
        batches = [_batch(routers[layer], stream[part], setup.ranks) for stream in streams]
        quotas = [by_rank[rank] for rank in range(setup.ranks)]
        results += compare(Layer.of_batches(layer, step, batches, live=quotas))
    return results


def _batch(router: Router, tokens: list[int], ranks: int) -> Batch:
    ids = router.route(tokens)
    address, rows = ids.buffer_info()[0], len(tokens)
    return Batch.of(ids, address, rows, router.top_k, experts=router.experts, ranks=ranks)


def _streams(texts: Iterator[list[int]], ranks: int, length: int) -> list[list[int]]:
    """``ranks`` runs of ``length`` tokens, each of whole documents until it is full."""
    streams = []
    for rank in range(ranks):
        stream: list[int] = []
        while len(stream) < length:
            document = next(texts, None)
            if document is None:
                raise ValueError(
                    f"the text ends at {len(stream)} of {length} tokens of rank {rank}: "
                    "give more files, fewer ranks, tokens or steps"
                )
            stream += document
        streams.append(stream[:length])
    return streams
