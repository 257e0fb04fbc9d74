"""``waterfill-rs replay``: what placements of the shared rows would have made of recorded routing."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill_rs import outputs
from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.policies import picture, report, routed_rows, summary, verdict
from waterfill_rs.policies.comparison import POLICIES, Layer, Result, compare
from waterfill_rs.policies.report import Compared
from waterfill_rs.policies.routed_rows import RoutedRows
from waterfill_rs.replay import cost_models, page

if TYPE_CHECKING:
    from waterfill_rs.replay.dumps import Counts, Tokens
    from waterfill_rs.replay.what_if import Places

__all__ = ["add_command", "given_path"]


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay", help="compare placements on routing that sglang recorded", description=__doc__
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=given_path,
        help="files of one recording, of any mode, or their folder, or JSON text",
    )
    parser.add_argument(
        "--ep",
        type=_sizes,
        help="EP size (default: the number of ranks that recorded); several, like 8,16,32: one table of them",
    )
    parser.add_argument(
        "--top-k", type=int, help="routed experts a token, where counts are all there is"
    )
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, help="only this one; may be given again"
    )
    parser.add_argument(
        "--forward-mode",
        choices=("prefill", "decode", "all"),
        default="all",
        help="only its passes",
    )
    parser.add_argument(
        "--least-tokens",
        type=int,
        default=0,
        help="only passes with so many tokens, over all ranks",
    )
    parser.add_argument(
        "--redundant", type=int, help="what if there were so many redundant experts"
    )
    parser.add_argument(
        "--placement",
        type=given_path,
        help="what if experts stood as in sglang's default ('trivial'), as waterfill-rs spreads them without a placement "
        "('spread'), as sglang's EPLB places them ('eplb'), as waterfill-rs place does ('place'), or as a file says that --init-expert-location takes",
    )
    parser.add_argument(
        "--beside", type=given_path, help="another recording, in one table with this one"
    )
    parser.add_argument("--cost-model", default="rows", help=cost_models.HELP)
    parser.add_argument("--json", type=Path, help="write every layer, pass and policy")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.add_argument(
        "--html", type=Path, help="write a page with tables and a map of ranks by layers"
    )
    parser.set_defaults(run=_run)


def given_path(text: str) -> Path:
    """An option's or argument's path, which may be JSON text."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a file or a folder")
    return Path(text)


def _sizes(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(size) for size in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a whole number, or several like 8,16,32"
        ) from None


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError("replay needs torch, which reads sglang's dumps: install torch") from error
    from waterfill_rs.replay import json_file

    unit = "rows" if arguments.cost_model == "rows" else "time"
    _check_inputs_stay(arguments)
    with _one_thread(), _no_collector():
        replayed = list(_replay(arguments))
    if len(replayed) == 1:
        _print_one(replayed[0], unit)
    else:
        _print_notes(replayed)
        report.print_sizes(replayed, unit)
        _print_traps(replayed)
    if arguments.json:
        beside = [arguments.beside] if arguments.beside else []
        paths = [*arguments.paths, *beside]
        json_file.write(arguments.json, replayed, paths, arguments.cost_model)
    if arguments.plot:
        picture.plot_layers(replayed[0], _title(replayed[0]), unit, arguments.plot)
    if arguments.html:
        page.write(arguments.html, [(one, _title(one)) for one in replayed], unit)


def _check(arguments: argparse.Namespace) -> None:
    """Before the work.

    Raises:
        ValueError: naming the option, its number, and what to give instead.
    """
    least = [("ep", size, 1) for size in arguments.ep or ()]
    least += [("top_k", arguments.top_k, 1), ("redundant", arguments.redundant, 0)]
    least += [("least_tokens", arguments.least_tokens, 0)]
    for name, value, bound in least:
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {bound}")
    several = arguments.beside is not None or len(arguments.ep or ()) > 1
    if arguments.plot and several:
        raise ValueError("--plot draws one recording at one EP size: give one --ep, no --beside")
    outputs.check_outputs(arguments.json, arguments.plot, arguments.html)
    picture.check(arguments.plot)


def _check_inputs_stay(arguments: argparse.Namespace) -> None:
    """No output may take the place of what is read.

    Raises:
        ValueError: naming the option and the file.
    """
    from waterfill_rs.replay import dump_files

    read = [*arguments.paths, arguments.beside, arguments.placement, Path(arguments.cost_model)]
    for name in ("json", "plot", "html"):
        path = getattr(arguments, name)
        if path is not None and dump_files.is_read(path, [one for one in read if one is not None]):
            raise ValueError(
                f"--{name} {path}: this file is read, and would be overwritten: give another"
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, then as before: with several, each small operation waits for cores that others use."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's collector of cycles paused: results are many and have none, and it walks through all of them again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _replay(arguments: argparse.Namespace) -> Iterator[Compared]:
    """Every recording under every EP size, as far as it was asked for."""
    from waterfill_rs.replay import hottest, phases, recorded_layers

    cost_model = cost_models.parse(arguments.cost_model)
    policies: Sequence[str] = arguments.policy or POLICIES
    for name, recorded, dump in _dumps(arguments):
        found, note = phases.phases_of(recorded)
        chosen = _chosen(recorded, found, arguments)
        layers = _with_progress(recorded_layers.layers(dump, policies, chosen), len(chosen))
        placed = _by_place(dump) if "replicas" in policies else None
        results: list[Result] = []
        routed: dict[str | None, dict[str, RoutedRows]] = {}
        for layer in layers:
            results += compare(layer, policies, cost_model)
            if "replicas" in policies:
                own = placed[layer.layer] if placed else None
                totals = routed.setdefault(layer.phase, {})
                routed_rows.measure(layer, own, cost_model, totals)
        left_out = list(recorded_layers.left_out({r.policy for r in results}, policies, dump))
        if not results:
            raise ValueError(f"{name}, EP{dump.ranks}: {' '.join(left_out)} No --policy is left.")
        redundant = 0 if dump.mappings is None else dump.experts - max(dump.mappings[0]) - 1
        shape = (dump.ranks, dump.experts, redundant, dump.top_k)
        if len(chosen) < len(found):
            left_out.append(
                f"{len(found) - len(chosen)} of {len(found)} passes are left out: --forward-mode {arguments.forward_mode}, "
                f"--least-tokens {arguments.least_tokens}."
            )
        notes = [*left_out, *dump.notes, note]
        hot = {
            phase: hottest.hottest(dump, own) for phase, own in summary.by_phase(results).items()
        }
        yield Compared(name, *shape, notes, results, hot, routed, trivial=placed is not None)


def _by_place(dump: Tokens | Counts) -> list[list[int]] | None:
    """Where ``waterfill-rs place`` would put the experts of a recording whose redundant ones stand trivially; else None."""
    from waterfill_rs.replay import placements, what_if

    if dump.mappings is None or not is_trivial(dump.mappings):
        return None
    sums = what_if.logical_sums(dump)
    redundant = dump.experts - sums.shape[1]
    if redundant > sums.shape[1] * (dump.ranks - 1):
        return None
    mapping: list[list[int]] = placements.placed(sums, redundant, dump.ranks).tolist()
    return mapping


def _dumps(
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, Tokens | Counts, Tokens | Counts]]:
    """Names, recordings as their servers ran, and with their experts placed as was asked for."""
    both = [arguments.paths, *([[arguments.beside]] if arguments.beside else [])]
    names = _names([paths[0] for paths in both])
    for number, (name, paths) in enumerate(zip(names, both, strict=True)):
        try:
            for recorded, placed in _placed(paths, arguments):
                yield name, recorded, placed
        except ValueError as error:
            raise ValueError(f"--beside: {error}" if number else str(error)) from error


def _names(recordings: list[Path]) -> list[str]:
    """Short ones; longer ones where these are the same."""
    from waterfill_rs.replay import dump_files

    names = [_name(path) for path in recordings]
    if len(set(names)) < len(names):
        names = [dump_files.name_of(path) for path in recordings]
    if len(set(names)) < len(names):
        names[-1] += " (--beside)"
    return names


def _name(path: Path) -> str:
    """Of a recording: its file's or folder's."""
    from waterfill_rs.replay import dump_files

    name = dump_files.name_of(path)
    return path.resolve().name if name == str(path) else name


def _placed(
    paths: list[Path], arguments: argparse.Namespace
) -> Iterator[tuple[Tokens | Counts, Tokens | Counts]]:
    """A recording as its server ran, and with its experts placed as was asked for, for each EP size."""
    from waterfill_rs.replay import dumps, what_if

    sizes: list[int] = arguments.ep or []
    placement = arguments.placement
    if len(sizes) < 2 and arguments.redundant is None and placement is None:
        dump = dumps.read(paths, sizes[0] if sizes else None, arguments.top_k)
        yield dump, dump
        return
    dump = dumps.read(paths, None, arguments.top_k, placed_anew=True)
    if not sizes and dump.ranks == 1:
        raise ValueError(f"{_name(paths[0])}: does not tell the EP size: give --ep")
    places = what_if.Places(dump, arguments.redundant, placement or Path("trivial"))
    sizes, left_out = _dividing(places, sizes or [dump.ranks])
    dump.notes.extend(left_out)
    for ranks in sizes:
        placed = places.over(ranks)
        # Counts over all ranks do not tell their server's EP size, so it is taken to be the one asked for.
        sized = isinstance(dump, dumps.Counts) and dump.ranks == 1
        yield placed if sized else dump, placed


def _dividing(places: Places, sizes: list[int]) -> tuple[list[int], list[str]]:
    """The EP sizes over which the experts divide, and a sentence on each other one.

    Raises:
        ValueError: if they divide over none.
    """
    from waterfill_rs.replay.placements import DoesNotDivideError

    left_out = {}
    for ranks in sizes:
        try:
            places.check(ranks)
        except DoesNotDivideError as error:
            left_out[ranks] = str(error)
    if len(left_out) == len(sizes):
        raise ValueError("; ".join(left_out.values()))
    dividing = [ranks for ranks in sizes if ranks not in left_out]
    return dividing, [f"EP {ranks} is left out: {error}." for ranks, error in left_out.items()]


def _chosen(
    dump: Tokens | Counts, found: dict[int, str | None], arguments: argparse.Namespace
) -> dict[int, str | None]:
    """The passes that were asked for, with their phases."""
    from waterfill_rs.replay import phases

    least, mode = arguments.least_tokens, arguments.forward_mode
    tokens = {pass_id: sum(phases.tokens_of(dump, pass_id)) for pass_id in found}
    chosen = {
        pass_id: phase
        for pass_id, phase in found.items()
        if mode in ("all", phase) and tokens[pass_id] >= least
    }
    if not chosen and mode != "all" and dump.summed:
        raise ValueError(
            f"--forward-mode {mode}: the counts are sums over passes, which have no phase: leave it out"
        )
    if not chosen:
        numbers = {
            phase: list(found.values()).count(phase) for phase in dict.fromkeys(found.values())
        }
        held = ", ".join(f"{number} {phase or 'sums'}" for phase, number in numbers.items())
        raise ValueError(
            f"--forward-mode {mode} --least-tokens {least}: no pass is left of {held}; "
            f"the largest has {max(tokens.values())} tokens"
        )
    return chosen


def _title(replayed: Compared) -> str:
    redundant = f" ({replayed.redundant} redundant)" if replayed.redundant else ""
    return (
        f"{replayed.ranks} rank{'s' * (replayed.ranks != 1)}, {replayed.experts} physical experts{redundant}, top {replayed.top_k}, "
        f"{summary.passes_in_words(replayed.results)}"
    )


def _print_one(replayed: Compared, unit: str) -> None:
    """A table and a verdict for each phase, and one over both."""
    from waterfill_rs.replay import hottest

    print(_title(replayed))
    for phase, results in summary.by_phase(replayed.results).items():
        print()
        report.print_table(results, summary.heading(phase, results), unit)
        hottest.print_hottest(results, replayed.hottest.get(phase, []))
        verdict.print_verdict(results, replayed.top_k, unit)
        routed_rows.print_routed_rows(replayed.routed.get(phase, {}), phase, unit, replayed.trivial)
    verdict.print_total(replayed.results, unit)
    print()
    for note in replayed.notes:
        print(note)


def _print_traps(replayed: list[Compared]) -> None:
    """Where redundant experts stand trivially, what that does."""
    for one in (one for one in replayed if one.trivial):
        for phase, totals in one.routed.items():
            print(f"\n{one.recording}, EP{one.ranks}, {phase or 'all'}: {routed_rows.trap(totals)}")


def _print_notes(replayed: list[Compared]) -> None:
    """What was assumed: once where it holds for all of them."""
    common = [note for note in replayed[0].notes if all(note in one.notes for one in replayed)]
    for note in common:
        print(note)
    for one in replayed:
        own = [note for note in one.notes if note not in common]
        if own:
            print(f"{one.recording}, EP{one.ranks}: {' '.join(own)}")


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
