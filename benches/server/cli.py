"""``python benches/server``: compare engines and write what was found. ``python benches/server table FILE...``: tables of files.

A machine with 1 to 8 GPUs, sglang 0.5.13 or newer, DeepEP, and the wheel of waterfill-rs; ``make server-bench`` says more.
What sglang, DeepEP and NVSHMEM need on that machine comes from the environment (SGLANG_*, NVSHMEM_*), and goes to all engines.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from server import layer_outputs, memory, modes, phases, results, table, traffic
from server.bench import Bench
from server.phase import Phase
from server.phases import LAYERS, REQUESTS, TOKENS
from server.schedule import Clock
from server.workspace import Workspace

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "table":
        return _table(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        asked = phases.of_options(options)
        if options.dry_run:
            return _dry_run(options, asked)
        return _run(options, asked, begin)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benches/server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--recording",
        type=Path,
        help="an .npz with topk [tokens, layers, K] and offsets, or a folder of dumps (per_token)",
    )
    source.add_argument(
        "--dial", help="synthetic routing instead: routed max/mean, 1.0 to 1.5; several by commas"
    )
    parser.add_argument(
        "--prefill",
        help=f"tokens a rank; by default {TOKENS['prefill']}, or none where another phase is given",
    )
    parser.add_argument(
        "--decode",
        help=f"tokens a rank; by default {TOKENS['decode']}, or none where another phase is given",
    )
    parser.add_argument(
        "--mixed",
        type=int,
        nargs="?",
        const=REQUESTS,
        metavar="REQUESTS",
        help=f"mixed traffic: prefill and decode as requests come, so many a round ({REQUESTS})",
    )
    parser.add_argument(
        "--one-start",
        action="store_true",
        help="all phases with the same engines, started once; prefill then has what decode needs: graphs, DeepEP's auto mode",
    )
    parser.add_argument(
        "--placements",
        help="packed, trivial: by default both in prefill and trivial in decode; packed@8192 is for that number of tokens alone",
    )
    parser.add_argument(
        "--modes",
        help=f"some of {','.join(modes.MODES)}; home@decode is for that phase alone; by default those that a phase is about",
    )
    parser.add_argument(
        "--redundant",
        help="engines with so many redundant experts, several by commas; 0 places experts alone; --modes then says which are beside them: off",
    )
    parser.add_argument(
        "--placement",
        default="place",
        help="with --redundant, some of place, eplb, spread, trivial: the first two made from other traffic than is measured, which is a recording's "
        "first half, or a dial's other seed (place)",
    )
    parser.add_argument(
        "--replicas",
        default="auto",
        help="with --redundant, some of auto, live, sglang: who chooses replicas where waterfill-rs is on (auto)",
    )
    parser.add_argument(
        "--dispatch",
        default="static",
        help="with --redundant, some of static, dynamic: how sglang chooses replicas without Waterfill; the first with it too (static)",
    )
    parser.add_argument(
        "--rebalance",
        type=int,
        default=0,
        help="with --redundant: sglang's EPLB places those engines' experts anew after so many forwards (0: never)",
    )
    parser.add_argument(
        "--moved",
        action="store_true",
        help="with --redundant: one engine for all placements of a number, whose experts sglang moves between rounds as in a rebalance",
    )
    parser.add_argument("--ranks", type=int, help="GPUs, one a rank: by default all")
    parser.add_argument(
        "--layers",
        type=int,
        help=f"MoE layers; by default {LAYERS}, or as many as let all engines be up at once",
    )
    parser.add_argument(
        "--experts", type=int, help="routed experts: by default the recording's, 64 for a dial"
    )
    parser.add_argument("--top-k", type=int, default=6, help="of a dial")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument(
        "--patience",
        type=float,
        help="seconds: an engine that is not up by then, or takes longer for a round, is stopped, and the others go on",
    )
    parser.add_argument(
        "--sweeps",
        type=int,
        help="over all cells, or mixed rounds, at most; by default as many as there is time for",
    )
    parser.add_argument(
        "--together",
        type=int,
        help="engines on a GPU at the same time: by default what its memory holds",
    )
    parser.add_argument(
        "--outputs",
        action="store_true",
        help="before anything is timed: do engines answer what off answers, bit for bit? Only where off is among a phase's modes",
    )
    parser.add_argument(
        "--layer-outputs",
        action="store_true",
        help="before anything is timed: do MoE layers make of the same inputs what they make in off? "
        "Times beside it are not to be quoted: graphs have more kernels",
    )
    parser.add_argument(
        "--profiled",
        type=int,
        metavar="TOKENS",
        help="a rank, of the forward that is profiled at the end: by default the most",
    )
    parser.add_argument("--apart", action="store_true", help="one engine after the other")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="JSON: arguments of sglang.Engine over ours"
    )
    parser.add_argument(
        "--out", type=Path, help="results; by default a new file in benches/results"
    )
    parser.add_argument("--picture", type=Path, help="by default beside the results")
    parser.add_argument(
        "--logs", type=Path, help="folder for the engines' logs; by default they go with the run"
    )
    parser.add_argument("--commit", help="by default git's")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="no engine: the cells, and what models say of their rows",
    )
    return parser


def _table(files: Sequence[str]) -> int:
    if not files:
        print("error: table: give at least one file of results", file=sys.stderr)
        return 2
    try:
        print(table.markdown([results.read(Path(file)) for file in files]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _dry_run(options: argparse.Namespace, asked: Sequence[Phase]) -> int:
    for start in phases.starts(options, asked):
        plans = modes.union([phase.plans for phase in start])
        names = "-".join(phase.name for phase in start)
        print(f"{names}: engines {', '.join(map(_engine, plans))}; {start[0].layers} MoE layers")
        for phase in start:
            phase.model_rows()
            for cell, values in phase.modelled.items():
                told = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                where = f"{cell.name} + {cell.redundant}" if cell.placed else cell.name
                print(f"    {cell.tokens} tokens a rank, {where}: rows max/mean: {told}")
            if phase.name == "mixed":
                _tell_traffic(phase)
    return 0


def _engine(plan: modes.Plan) -> str:
    settings = [f"{name}={value}" for name, value in plan.settings.items()]
    return f"{plan.name} ({', '.join([*plan.modes, *settings])})"


def _tell_traffic(phase: Phase) -> None:
    sent = traffic.requests(phase.requests, phase.ranks, 0)
    print(
        f"    {len(sent)} requests a round, {sum(one.prompt for one in sent)} prompt tokens, {sum(one.new for one in sent)} new ones; "
        f"chunks of {phase.tokens[0]}"
    )
    for name, begin, end, _ in traffic.PARTS:
        of = [one for one in sent if begin <= one.at <= end]
        by_rank = [sum(one.rank == rank for one in of) for rank in range(phase.ranks)]
        print(f"    {name}, {begin:.0%} to {end:.0%} of the window: requests by rank {by_rank}")


def _end(number: int, _: Any) -> None:
    """As an interrupt: engines are stopped, and what was found is there."""
    raise SystemExit(128 + number)


def _run(options: argparse.Namespace, asked: Sequence[Phase], begin: float) -> int:
    signal.signal(signal.SIGTERM, _end)
    date = datetime.now(timezone.utc)
    names = "-".join(phase.name for phase in asked)
    out = options.out or RESULTS / f"server-{names}-{date:%Y%m%d-%H%M%S}.json"
    document: dict[str, Any] = {
        "machine": results.machine(asked[0].ranks),
        "date": f"{date:%Y-%m-%d %H:%M} UTC",
        "commit": options.commit or results.commit(),
        "sglang": None,
        "ranks": asked[0].ranks,
        "settings": _settings(options, asked[0]),
        "cells": [],
        "profiles": [],
    }
    with tempfile.TemporaryDirectory(prefix="server-bench-") as folder:
        logs = (options.logs or Path(folder) / "logs").resolve()
        logs.mkdir(parents=True, exist_ok=True)

        def save() -> None:
            document.update(_found(bench, asked))
            results.write(out, document)

        bench = Bench(
            Workspace(Path(folder)),
            logs,
            options.apart,
            options.sweeps,
            save,
            options.patience,
        )
        clock = Clock(time.monotonic, begin + options.limit)
        starts = phases.starts(options, asked)
        for i, start in enumerate(starts):
            together = phases.together(options, start)
            bench.run(start, clock.part(1 / (len(starts) - i)), together)
    print(table.markdown([document]))
    picture = options.picture or out.with_suffix(".png")
    drawn = _draw(document, picture)
    print(f"\nresults: {out}" + (f", picture: {picture}" if drawn else ""))
    return 0 if document["cells"] or document["mixed"] else 1


def _draw(document: dict[str, Any], picture: Path) -> bool:
    """Is there a picture? The results are written, so nothing that matplotlib raises ends the run as a failure.

    sglang, which is imported for its EPLB, was seen to leave a module of the name IPython that matplotlib cannot use.
    """
    try:
        return table.picture(document, picture)
    except Exception as error:
        print(f"no picture: {error!r}", file=sys.stderr)
        return False


def _found(bench: Bench, asked: Sequence[Phase]) -> dict[str, Any]:
    """What is known until now."""
    engines = bench.engines
    return {
        "sglang": engines.sglang,
        "cells": [cell for phase in asked for cell in phase.as_cells()],
        "profiles": [profile for phase in asked for profile in phase.profiles],
        "mixed": [entry for phase in asked for entry in phase.as_mixed()],
        "outputs": [entry for phase in asked for entry in phase.as_outputs()],
        "layers": [
            entry
            for phase in asked
            for entry in layer_outputs.entries(phase.name, phase.layers_found)
        ],
        "memory": [memory.entry(*names, ranks) for names, ranks in engines.memory.items()],
        "failures": list(engines.failures),
        "mismatches": [text for phase in asked for text in phase.mismatches],
    }


def _held_out(options: argparse.Namespace) -> str | None:
    """The traffic that placements were made from, where engines have redundant experts."""
    if options.redundant is None:
        return None
    return "the recording's first half" if options.recording else "the dial with another seed"


def _settings(options: argparse.Namespace, phase: Phase) -> dict[str, Any]:
    first = phase.recordings[0]
    return {
        "recording": first.name if options.recording else f"dial {options.dial}",
        "experts": first.experts,
        "top_k": first.top_k,
        "layers": phase.layers,
        "placements_from": _held_out(options),
        "requests": options.mixed,
        "one_start": options.one_start,
        "tokens_recorded_a_rank": first.tokens,
        "limit_s": options.limit,
        "apart": options.apart,
        "engine": options.engine,
        "environment": results.environment(),
        "command": " ".join(sys.argv[1:]),
    }
