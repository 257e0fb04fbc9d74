"""``waterfill-rs demo``: whole documents a rank, routed over R ranks; placements of the shared rows compared."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waterfill_rs import report
from waterfill_rs.comparison import Batch, Layer, Result, compare
from waterfill_rs.workload import Router, documents

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="compare placements on real text: no GPU, no model", description=__doc__
    )
    parser.add_argument(
        "paths", nargs="*", help="files or folders of text (default: Python's own sources)"
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a rank and step")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write every layer, step and policy")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for name in ("ranks", "experts", "top_k", "tokens", "layers", "steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)}: give at least 1"
            )
    results = _route_and_compare(arguments)
    a = arguments
    report.print_table(
        results,
        f"{a.ranks} ranks, {a.experts} experts, top {a.top_k}, {a.tokens} tokens a rank, "
        f"{a.layers} hash layers x {a.steps} steps, whole documents a rank",
    )
    report.print_verdict(results, a.top_k)
    if a.json:
        report.write_json(results, a.json, ranks=a.ranks, experts=a.experts, top_k=a.top_k)
    if a.plot:
        title = f"{a.ranks} ranks, {a.tokens} tokens a rank, whole documents a rank"
        report.plot(results, title, a.plot)


def _route_and_compare(arguments: argparse.Namespace) -> list[Result]:
    ranks, steps = arguments.ranks, arguments.steps
    streams = _streams(documents(arguments.paths), ranks, arguments.tokens * steps)
    results: list[Result] = []
    for layer in range(arguments.layers):
        router = Router(arguments.experts, arguments.top_k, layer)
        for step in range(steps):
            part = slice(step * arguments.tokens, (step + 1) * arguments.tokens)
            batches = [_batch(router, stream[part], ranks) for stream in streams]
            results += compare(Layer.of_batches(layer, step, batches))
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
