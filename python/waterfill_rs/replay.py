"""``waterfill-rs replay``: what placements of the shared rows would have made of recorded routing."""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill_rs import report
from waterfill_rs.comparison import Batch, Layer, Result, compare

if TYPE_CHECKING:
    from waterfill_rs.dumps import Dump

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay", help="compare placements on routing that sglang recorded", description=__doc__
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, help="per_token dumps of one recording, or their folder"
    )
    parser.add_argument("--ep", type=int, help="EP size (default: the number of files)")
    parser.add_argument("--json", type=Path, help="write every layer, pass and policy")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    try:
        from waterfill_rs import dumps
    except ImportError as error:
        raise ValueError("replay needs torch, which reads sglang's dumps: install torch") from error
    dump = dumps.read(arguments.paths, arguments.ep)
    results = list(_with_progress(_results(dump), len(dump.passes)))
    title = (
        f"{dump.ranks} ranks, {dump.experts} physical experts, top {dump.top_k}, "
        f"{len(dump.passes)} passes"
    )
    report.print_table(results, title)
    if all(result.policy != "sglang-static" for result in results):
        print(f"sglang-static is left out: its kernel does not take {dump.ranks} ranks.")
    _print_layers(results, dump)
    if arguments.json:
        shape = {"ranks": dump.ranks, "experts": dump.experts, "top_k": dump.top_k}
        report.write_json(results, arguments.json, **shape)
    if arguments.plot:
        report.plot(results, title, arguments.plot)


def _results(dump: Dump) -> Iterator[Result]:
    for pass_id, tensors in dump.passes.items():
        for layer in range(tensors[0].shape[0]):
            batches = []
            for ids in tensors:
                own = ids[layer, :, : dump.top_k].contiguous()
                address, rows = own.data_ptr(), own.shape[0]
                batches.append(
                    Batch.of(own, address, rows, dump.top_k, experts=dump.experts, ranks=dump.ranks)
                )
            if any(batch.tokens for batch in batches):  # else a dense layer
                static = _static(batches, dump)
                yield from compare(Layer.of_batches(layer, pass_id, batches, static=static))


def _static(batches: list[Batch], dump: Dump) -> list[array[int]] | None:
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


def _with_progress(results: Iterator[Result], passes: int) -> Iterator[Result]:
    """Say on stderr how far it is, about once a second."""
    seen: set[int] = set()
    last = time.monotonic()
    for result in results:
        seen.add(result.pass_id)
        if time.monotonic() - last > 1:
            last = time.monotonic()
            print(f"pass {len(seen)} of {passes}, layer {result.layer}", file=sys.stderr)
        yield result


def _print_layers(results: list[Result], dump: Dump) -> None:
    """Which layers can be levelled at all, and what live counts give."""
    home = [result for result in results if result.policy == "home"]
    live = [result for result in results if result.policy == "live"]
    most = 1 + 1 / dump.top_k
    routed_mean = [result.mean * dump.top_k / (dump.top_k + 1) for result in home]
    can = [h.routed_max / mean <= most for h, mean in zip(home, routed_mean, strict=True)]
    gain = sum(h.max / b.max for h, b in zip(home, live, strict=True)) / len(home) - 1
    print(
        f"{sum(can)} of {len(can)} layers can be levelled by shared rows (routed max/mean up to "
        f"{most:.3f}). Live counts take {gain:.1%} off the slowest rank's rows, on average."
    )
