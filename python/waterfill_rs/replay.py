"""``waterfill-rs replay``: what placements of the shared rows would have made of recorded routing."""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill_rs import cost_models, report
from waterfill_rs.comparison import POLICIES, Batch, Layer, Result, compare

if TYPE_CHECKING:
    from waterfill_rs.dumps import Counts, Tokens

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay", help="compare placements on routing that sglang recorded", description=__doc__
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        help="files of one recording, of any mode, or their folder, or JSON text",
    )
    parser.add_argument(
        "--ep", type=int, help="EP size (default: the number of ranks that recorded)"
    )
    parser.add_argument(
        "--top-k", type=int, help="routed experts a token, where counts are all there is"
    )
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, help="only this one; may be given again"
    )
    parser.add_argument("--cost-model", default="rows", help=cost_models.HELP)
    parser.add_argument("--json", type=Path, help="write every layer, pass and policy")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for name in ("ep", "top_k"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")
    report.check_outputs(arguments.json, arguments.plot)
    try:
        from waterfill_rs import dumps
    except ImportError as error:
        raise ValueError("replay needs torch, which reads sglang's dumps: install torch") from error
    cost_model = cost_models.parse(arguments.cost_model)
    policies: Sequence[str] = arguments.policy or POLICIES
    dump = dumps.read(arguments.paths, arguments.ep, arguments.top_k)
    layers = _with_progress(_layers(dump, "sglang-static" in policies), len(dump.passes))
    results = [result for layer in layers for result in compare(layer, policies, cost_model)]
    if not results:
        raise ValueError(f"{', '.join(policies)}: this dump does not hold what that needs")
    title = (
        f"{dump.ranks} ranks, {dump.experts} physical experts, top {dump.top_k}, "
        f"{len(dump.passes)} passes"
    )
    report.print_table(results, title)
    _print_left_out(results, policies, dump)
    report.print_verdict(results, dump.top_k)
    if arguments.json:
        shape = {"ranks": dump.ranks, "experts": dump.experts, "top_k": dump.top_k}
        report.write_json(results, arguments.json, **shape)
    if arguments.plot:
        report.plot(results, title, arguments.plot)


def _print_left_out(results: list[Result], policies: Sequence[str], dump: Tokens | Counts) -> None:
    """What had to be assumed, and which policies are not in the table, and why."""
    from waterfill_rs.dumps import Tokens

    reasons = {
        "sglang-static": "this dump holds counts, not tokens"
        if not isinstance(dump, Tokens)
        else f"its kernel does not take {dump.ranks} ranks",
        "own-counts": "this dump does not tell whose tokens the counts are",
        "joint": "no expert of this dump has replicas",
    }
    found = {result.policy for result in results}
    for policy in (policy for policy in policies if policy not in found):
        print(f"{policy} is left out: {reasons[policy]}.")
    for note in dump.notes:
        print(note)


def _layers(dump: Tokens | Counts, with_static: bool) -> Iterator[Layer]:
    """Every layer of every pass in which anything was routed; the others are dense."""
    from waterfill_rs.dumps import Tokens

    if isinstance(dump, Tokens):
        yield from _layers_of_tokens(dump, with_static)
    else:
        yield from _layers_of_counts(dump)


def _layers_of_tokens(dump: Tokens, with_static: bool) -> Iterator[Layer]:
    for pass_id, tensors in dump.passes.items():
        for layer in range(tensors[0].shape[0]):
            batches = []
            for ids in tensors:
                own = ids[layer, :, : dump.top_k].contiguous()
                rows, top_k = own.shape
                batches.append(
                    Batch.of(
                        own, own.data_ptr(), rows, top_k, experts=dump.experts, ranks=dump.ranks
                    )
                )
            if any(batch.tokens for batch in batches):
                static = _static(batches, dump) if with_static else None
                mapping = dump.mappings[layer] if dump.mappings else None
                yield Layer.of_batches(layer, pass_id, batches, mapping=mapping, static=static)


def _layers_of_counts(dump: Counts) -> Iterator[Layer]:
    for pass_id, counts in dump.passes.items():
        for layer in range(counts.shape[1]):
            known: list[list[int]] = counts[:, layer].tolist()
            routed = [sum(column) for column in zip(*known, strict=True)]
            if not any(routed):
                continue
            sources = known if len(known) == dump.ranks else None
            if sources:
                tokens = [-(-sum(own) // dump.top_k) for own in sources]
            else:
                total = -(-sum(routed) // dump.top_k)
                tokens = [(total + rank) // dump.ranks for rank in range(dump.ranks)]
            mapping = dump.mappings[layer] if dump.mappings else None
            yield Layer(layer, pass_id, routed, tokens, sources, mapping=mapping)


def _static(batches: list[Batch], dump: Tokens) -> list[array[int]] | None:
    """What sglang's static mode would choose; None for an EP size that it does not take."""
    from waterfill_rs import sglang_static

    if not sglang_static.serves(dump.ranks):
        return None
    shape = {"physical_experts": dump.experts, "ranks": dump.ranks}
    chosen = (
        sglang_static.shared_ranks(batch.owner, rank=rank, **shape)
        for rank, batch in enumerate(batches)
    )
    return [array("i", shared.tolist()) for shared in chosen]


def _with_progress(layers: Iterator[Layer], passes: int) -> Iterator[Layer]:
    """Say on stderr how far it is, about once a second."""
    seen: set[int] = set()
    last = time.monotonic()
    for layer in layers:
        seen.add(layer.pass_id)
        if time.monotonic() - last > 1:
            last = time.monotonic()
            print(f"pass {len(seen)} of {passes}, layer {layer.layer}", file=sys.stderr)
        yield layer
