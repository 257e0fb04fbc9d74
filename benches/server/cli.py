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

from server import modes, recording, results, table
from server.bench import Bench, Phase
from server.model import gib_an_engine
from server.schedule import Cell, Clock, prompt_length
from server.workspace import Workspace

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOKENS = {"prefill": "1024,4096,8192", "decode": "8,64,128"}
PLACEMENTS = {"prefill": "packed,trivial", "decode": "trivial"}
DIAL_TOKENS = 16384


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "table":
        return _table(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        phases = _phases(options)
        if options.dry_run:
            return _dry_run(phases)
        return _run(options, phases, begin)
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
        help=f"tokens a rank; by default {TOKENS['prefill']}, or none where --decode is given",
    )
    parser.add_argument(
        "--decode",
        help=f"tokens a rank; by default {TOKENS['decode']}, or none where --prefill is given",
    )
    parser.add_argument(
        "--placements",
        help="packed, trivial: by default both in prefill and trivial in decode; packed@8192 is for that number of tokens alone",
    )
    parser.add_argument(
        "--modes", help=f"some of {','.join(modes.MODES)}; by default all that a phase can have"
    )
    parser.add_argument("--ranks", type=int, help="GPUs, one a rank: by default all")
    parser.add_argument("--layers", type=int, default=26, help="MoE layers")
    parser.add_argument(
        "--experts", type=int, help="routed experts: by default the recording's, 64 for a dial"
    )
    parser.add_argument("--top-k", type=int, default=6, help="of a dial")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument(
        "--sweeps",
        type=int,
        help="over all cells, at most; by default as many as there is time for",
    )
    parser.add_argument(
        "--together",
        type=int,
        help="engines on a GPU at the same time: by default what its memory holds",
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


def _numbers(name: str, text: str) -> list[int]:
    """
    Raises:
        ValueError: what is not a number from 1 on.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--{name} {text!r}: give numbers from 1 on, with commas between")
    return sorted({int(part) for part in parts})


def _phases(options: argparse.Namespace) -> list[Phase]:
    """What is to be measured, with its recordings read and checked."""
    ranks = options.ranks or len(results.gpus())
    if not 1 <= ranks <= 8:
        raise ValueError(f"{ranks} GPUs: 1 to 8 are needed, or --ranks")
    asked = {"prefill": options.prefill, "decode": options.decode}
    if all(text is None for text in asked.values()):
        asked = dict(TOKENS)
    recordings = _recordings(options, ranks)
    phases = []
    for name, text in asked.items():
        if tokens := _numbers(name, text or ""):
            phases.append(_phase(options, name, tokens, recordings))
    if not phases:
        raise ValueError("nothing to measure: give --prefill or --decode")
    return phases


def _places(text: str) -> tuple[list[str], dict[str, list[int]]]:
    """Names of placements, and the numbers of tokens of those that are for some alone."""
    names, only = [], {}
    for part in text.split(","):
        name, at, count = part.strip().partition("@")
        if at:
            only.setdefault(name, []).extend(_numbers("placements", count))
        if name not in names:
            names.append(name)
    return names, only


def _recordings(options: argparse.Namespace, ranks: int) -> list[recording.Recording]:
    if options.recording:
        return [recording.read(options.recording, ranks, options.experts)]
    shape = (ranks, options.experts or 64, options.top_k, options.layers, DIAL_TOKENS)
    try:
        ratios = [float(part) for part in options.dial.split(",")]
    except ValueError:
        raise ValueError(f"--dial {options.dial!r}: give numbers from 1.0 to 1.5") from None
    return [recording.synthetic(ratio, *shape) for ratio in ratios]


def _phase(
    options: argparse.Namespace, name: str, tokens: list[int], recordings: list[recording.Recording]
) -> Phase:
    if name == "prefill":
        for count in tokens:
            prompt_length(count)
    else:
        recordings = [recording.for_decode(one) for one in recordings]
    asked = options.modes.split(",") if options.modes else modes.BY_DEFAULT[name]
    # Given for both phases: what only prefill can have is left out of decode.
    if name == "decode" and not (options.prefill is None and options.decode is not None):
        asked = [mode for mode in asked if mode != "sglang-dynamic"]
    plans = modes.engines(name, asked)
    only: dict[str, list[int]] = {}
    if recordings[0].placed:
        places = [(one, recording.place("", one)) for one in recordings]
    else:
        names, only = _places(options.placements or PLACEMENTS[name])
        places = [(recordings[0], recording.place(one, recordings[0])) for one in names]
    cells = [
        Cell(name, count, i, placement.name, placement.redundant)
        for count in tokens
        for i, (_, placement) in enumerate(places)
        if count in only.get(placement.name, tokens)
    ]
    return Phase(
        name,
        plans,
        cells,
        [one for one, _ in places],
        [placement for _, placement in places],
        options.engine,
        options.layers,
    )


def _dry_run(phases: Sequence[Phase]) -> int:
    for phase in phases:
        phase.model_rows()
        print(
            f"{phase.name}: engines {', '.join(f'{p.name} ({chr(44).join(p.modes)})' for p in phase.plans)}"
        )
        for cell, values in phase.modelled.items():
            told = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"    {cell.tokens} tokens a rank, {cell.name}: rows max/mean: {told}")
    return 0


def _end(number: int, _: Any) -> None:
    """As an interrupt: engines are stopped, and what was found is there."""
    raise SystemExit(128 + number)


def _run(options: argparse.Namespace, phases: Sequence[Phase], begin: float) -> int:
    signal.signal(signal.SIGTERM, _end)
    date = datetime.now(timezone.utc)
    names = "-".join(phase.name for phase in phases)
    out = options.out or RESULTS / f"server-{names}-{date:%Y%m%d-%H%M%S}.json"
    document: dict[str, Any] = {
        "machine": results.machine(phases[0].ranks),
        "date": f"{date:%Y-%m-%d %H:%M} UTC",
        "commit": options.commit or results.commit(),
        "sglang": None,
        "ranks": phases[0].ranks,
        "settings": _settings(options, phases[0]),
        "cells": [],
        "profiles": [],
    }
    with tempfile.TemporaryDirectory(prefix="server-bench-") as folder:
        logs = (options.logs or Path(folder) / "logs").resolve()
        logs.mkdir(parents=True, exist_ok=True)

        def save() -> None:
            document["sglang"] = bench.sglang
            document["cells"] = [cell for phase in phases for cell in phase.as_cells()]
            document["profiles"] = [profile for phase in phases for profile in phase.profiles]
            results.write(out, document)

        bench = Bench(
            Workspace(Path(folder)),
            logs,
            _together(options, phases[0]),
            options.apart,
            options.sweeps,
            save,
        )
        clock = Clock(time.monotonic, begin + options.limit)
        for i, phase in enumerate(phases):
            bench.run(phase, clock.part(1 / (len(phases) - i)))
    print(table.markdown([document]))
    picture = options.picture or out.with_suffix(".png")
    drawn = table.picture(document, picture)
    print(f"\nresults: {out}" + (f", picture: {picture}" if drawn else ""))
    return 0 if document["cells"] else 1


def _settings(options: argparse.Namespace, phase: Phase) -> dict[str, Any]:
    first = phase.recordings[0]
    return {
        "recording": first.name if options.recording else f"dial {options.dial}",
        "experts": first.experts,
        "top_k": first.top_k,
        "layers": options.layers,
        "tokens_recorded_a_rank": first.tokens,
        "limit_s": options.limit,
        "apart": options.apart,
        "engine": options.engine,
        "environment": results.environment(),
        "command": " ".join(sys.argv[1:]),
    }


def _together(options: argparse.Namespace, phase: Phase) -> int:
    """Engines that fit on a GPU; where its memory is not known, all."""
    if options.together:
        return options.together
    memory = [mib for _, mib in results.gpus()]
    if not memory:
        return len(modes.MODES)
    needed = gib_an_engine(options.layers, phase.recordings[0].experts, phase.ranks)
    return max(1, int(min(memory) / 1024 / needed))
