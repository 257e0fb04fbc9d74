"""``waterfill-rs place``: where experts and their replicas should stand, from recorded routing, for ``--init-expert-location``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill_rs import outputs
from waterfill_rs.placement import place, primaries
from waterfill_rs.replay.command import given_path

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_command"]

Layers = list[list[int]]
"""``[L, E]`` rows or ``[L, P]`` experts."""

RESAMPLED = 4
"""Workloads like each given one, for the table."""


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "place",
        help="make a placement of experts and replicas from recorded routing",
        description=__doc__,
    )
    parser.add_argument(
        "recordings",
        nargs="+",
        type=given_path,
        metavar="RECORDING",
        help="a file or folder of one recording, of any mode; each is a workload, and all are of one model",
    )
    parser.add_argument("--ep", type=int, required=True, help="EP size of the server")
    parser.add_argument(
        "--redundant",
        type=int,
        required=True,
        help="redundant experts (sglang: --ep-num-redundant-experts)",
    )
    parser.add_argument(
        "--ranks-per-host",
        type=int,
        help="spread an expert's replicas over hosts of so many ranks (default: hosts do not matter)",
    )
    parser.add_argument(
        "--beside-eplb",
        action="store_true",
        help="show the installed sglang's EPLB in the table too",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the placement, a file that ends in .json",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError("place needs torch, which reads sglang's dumps: install torch") from error
    from waterfill_rs.replay import dump_files, placements

    output, ranks, redundant = arguments.output, arguments.ep, arguments.redundant
    if dump_files.is_read(output, arguments.recordings):
        raise ValueError(f"-o {output}: this file is read, and would be overwritten: give another")
    workloads = _workloads(arguments.recordings)
    experts = len(workloads[0][0])
    placements.check_divides(experts, "logical", ranks, redundant)
    per_host = arguments.ranks_per_host or 1
    place.check(experts, ranks, redundant, per_host)
    layers = len(workloads[0])
    table = {"trivial": placements.trivial(layers, experts, redundant).tolist()}
    if redundant:
        spread_out = placements.spread_out(layers, experts, redundant, ranks)
        table["spread"] = spread_out.tolist()
    if redundant and experts % ranks == 0:
        table = {"no redundant": placements.trivial(layers, experts, 0).tolist()} | table
    if arguments.beside_eplb:
        table["EPLB"] = _by_eplb(workloads, ranks, redundant)
    placed = list(_placed(workloads, table["trivial"], ranks, redundant, per_host))
    _write(output, placed)
    table["this"] = placed
    _print(arguments, workloads, table)


def _check(arguments: argparse.Namespace) -> None:
    """Before the work.

    Raises:
        ValueError: naming the option, its number, and what to give instead.
    """
    for name, least in (("ep", 1), ("redundant", 0), ("ranks_per_host", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if arguments.output.suffix != ".json":
        raise ValueError(
            f"-o {arguments.output}: sglang takes a file for --init-expert-location by its ending: give one in .json"
        )
    outputs.check_outputs(arguments.output)
    if arguments.beside_eplb and find_spec("sglang") is None:
        raise ValueError(
            "--beside-eplb: sglang is not installed here: install it, or leave this out"
        )


def _workloads(recordings: list[Path]) -> list[Layers]:
    """Rows of each recording, summed over its passes and ranks, scaled to as many in each layer.

    Raises:
        ValueError: naming the recording that cannot be read, or is not of the first one's model.
    """
    from waterfill_rs.replay import dump_files, dumps, what_if

    found: list[Tensor] = []
    for path in recordings:
        dump = dumps.read([path], None, dumps.ANY_TOP_K, placed_anew=True)
        found.append(what_if.logical_sums(dump))
        if found[-1].shape != found[0].shape:
            (layers, experts), (own_layers, own_experts) = found[0].shape, found[-1].shape
            raise ValueError(
                f"{dump_files.name_of(path)}: {own_experts} experts in {own_layers} layers, {dump_files.name_of(recordings[0])} "
                f"has {experts} in {layers}: give recordings of one model"
            )
    return [[place.scaled(rows) for rows in counts.tolist()] for counts in found]


def _by_eplb(workloads: list[Layers], ranks: int, redundant: int) -> Layers:
    """As sglang places experts for the sum of the workloads."""
    import torch

    from waterfill_rs.sglang import eplb

    mapping: Layers = eplb.by_eplb(torch.tensor(workloads).sum(0), redundant, ranks).tolist()
    return mapping


def _placed(
    workloads: list[Layers], trivial: Layers, ranks: int, redundant: int, per_host: int
) -> Iterator[list[int]]:
    """Layer by layer; a layer without rows is dense, and trivial."""
    last = time.monotonic()
    for layer, in_order in enumerate(trivial):
        if time.monotonic() - last > 1:
            last = time.monotonic()
            print(f"layer {layer} of {len(trivial)}", file=sys.stderr)
        of_layer = [rows[layer] for rows in workloads]
        if not any(map(any, of_layer)):
            yield in_order
        else:
            yield place.place(of_layer, ranks=ranks, redundant=redundant, ranks_per_host=per_host)


def _write(output: Path, placed: Layers) -> None:
    """A layer a line, and no other key: sglang takes each key for an argument."""
    text = ",\n".join(map(json.dumps, placed))
    with outputs.whole(output) as partial:
        partial.write_text(f'{{"physical_to_logical_map": [\n{text}\n]}}\n', encoding="utf-8")


def _print(
    arguments: argparse.Namespace, workloads: list[Layers], table: dict[str, Layers]
) -> None:
    """A line for each workload and for the worst resampled one, two columns for each placement and one more for the file."""
    from waterfill_rs.replay import dump_files

    ranks = arguments.ep
    of_layers = list(zip(*workloads, strict=True))
    dense = sum(not any(map(any, of_layer)) for of_layer in of_layers)
    layers = len(of_layers) - dense
    print(
        f"{ranks} ranks, {len(table['this'][0])} physical experts ({arguments.redundant} redundant), "
        f"{layers} layer{'s' * (layers != 1)}"
        + f", and {dense} without rows, placed trivially"
        * bool(dense)
    )
    print("max/mean of the ranks' routed rows, mean over layers")
    print("even: replicas split evenly; joint: split by joint plans")
    print("primary: each expert on its primary replica alone, for decode")
    print()
    names = [*map(dump_files.name_of, arguments.recordings), "worst resampled"]
    width = max(map(len, names))
    print(" ".join([" " * width, *(f"{name:>15}" for name in table)]))
    columns = [f"{'even':>8} {'joint':>6}" for _ in table]
    print(" ".join([" " * width, *columns, f"{'primary':>8}"]))
    worst = dict.fromkeys(table, 0.0)
    for name, rows in zip(names, workloads, strict=False):
        found = _print_line(f"{name:{width}}", [[one] for one in rows], table, ranks)
        worst = {placement: max(worst[placement], found[placement]) for placement in table}
    _print_line(f"{names[-1]:{width}}", list(map(_near, of_layers)), table, ranks)
    print()
    _print_order(table["this"], of_layers, ranks)
    _print_words(arguments, worst)


def _near(of_layer: tuple[list[int], ...]) -> list[list[int]]:
    """Resampled workloads ``[E]`` of one layer; none where it is dense."""
    return [one for rows in of_layer if any(rows) for one in place.resampled(rows, RESAMPLED)]


def _print_line(
    head: str, loads: list[list[list[int]]], table: dict[str, Layers], ranks: int
) -> dict[str, float]:
    """max/mean of each placement where replicas are split evenly, which are printed beside those of joint plans."""
    even = {name: _mean(mapping, loads, ranks, place.even) for name, mapping in table.items()}
    plans = [_mean(mapping, loads, ranks, place.joint) for mapping in table.values()]
    cells = [f"{one:8.3f} {plan:6.3f}" for one, plan in zip(even.values(), plans, strict=True)]
    if _not_first(table["this"], loads, ranks):
        cells.append(f"{'-':>8}")
    else:
        cells.append(f"{_mean(table['this'], loads, ranks, primaries.level):8.3f}")
    print(" ".join([head, *cells]))
    return even


def _not_first(
    placed: Layers, loads: Sequence[Sequence[Sequence[int]]], ranks: int
) -> dict[int, int]:
    """Layers with rows whose primary replicas are not first, and how many the fullest rank has at least."""
    return {
        layer: primaries.fewest(mapping, max(mapping) + 1, ranks)
        for layer, (mapping, of_layer) in enumerate(zip(placed, loads, strict=True))
        if any(map(any, of_layer)) and not primaries.are_first(mapping, max(mapping) + 1, ranks)
    }


def _print_order(placed: Layers, of_layers: Sequence[Sequence[Sequence[int]]], ranks: int) -> None:
    """Where primary replicas could not be first, that and why."""
    odd, experts = _not_first(placed, of_layers, ranks), len(of_layers[0][0])
    if experts % ranks:
        print(
            f"No order of primary replicas: {experts} logical experts do not divide over {ranks} ranks. Slots stay as they were."
        )
    elif odd:
        layers = ", ".join(map(str, odd))
        print(
            f"No order of primary replicas in {len(odd)} of {len(placed)} layers ({layers}): a rank has at least "
            f"{max(odd.values())} of them where {experts // ranks} would be even. Slots stay as they were there."
        )


def _mean(
    mapping: Layers,
    loads: list[list[list[int]]],
    ranks: int,
    measure: Callable[[list[int], list[int], int], float],
) -> float:
    """Over layers, of the worst of each layer's ``loads``."""
    found = [
        max(measure(experts, rows, ranks) for rows in of_layer if any(rows))
        for experts, of_layer in zip(mapping, loads, strict=True)
        if any(map(any, of_layer))
    ]
    return sum(found) / len(found)


def _print_words(arguments: argparse.Namespace, worst: dict[str, float]) -> None:
    """What to make of the table. ``worst``: of the given workloads, replicas split evenly."""
    if worst.get("no redundant", math.inf) < worst["trivial"]:
        print(
            f"{arguments.redundant} redundant experts placed trivially, sglang's default, make balance worse than none: "
            f"{worst['trivial']:.3f} for {worst['no redundant']:.3f}."
        )
    print(
        f"Worst resampled: of {RESAMPLED} workloads like each given one, its experts' rows times log-normal noise of {place.SPREAD}."
    )
    print(
        "With live replicas (--waterfill-rs-replicas) a server splits rows as 'joint' says, in batches of many rows. Without them "
        "sglang chooses replicas itself, roughly evenly, as 'even' says."
    )
    print(
        f"{arguments.output}: give it to sglang with --init-expert-location {arguments.output} "
        f"--ep-num-redundant-experts {arguments.redundant}."
    )
