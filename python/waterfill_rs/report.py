"""A comparison as a table, a picture and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from waterfill_rs.comparison import POLICIES, Result
from waterfill_rs.summary import bound, copies, level_share, mean, microseconds, of, present, ratio

if TYPE_CHECKING:
    from waterfill_rs.hottest import Expert

__all__ = ["Compared", "check_outputs", "plot", "print_sizes", "print_table", "write_json"]

MEANING = (
    "us a pass: the slowest rank's time, summed over layers, mean over passes. max/mean: to the mean rank's time with\n"
    "shared experts at home."
)


@dataclass(frozen=True)
class Compared:
    """A recording under one EP size and placement. ``redundant``: experts beyond one of each; ``notes``: what had to be
    assumed, and what is left out; ``hottest``: the hottest experts of each phase."""

    recording: str
    ranks: int
    experts: int
    redundant: int
    top_k: int
    notes: list[str]
    results: list[Result]
    hottest: dict[str | None, list[Expert]] = field(default_factory=dict)


def print_table(results: list[Result], title: str, unit: str = "rows") -> None:
    """The policies and the bound: what the slowest rank can have at least, shared rows alone placed.

    ``unit``: ``rows``, or ``time`` where a cost model is given, which has a column of microseconds more.
    """
    timed = unit == "time"
    print(title)
    if timed:
        print(MEANING)
    head = f"{'policy':<14}{'max/mean':>10}{'worst':>9}"
    print(head + f"{'us a pass':>13}" * timed + f"{'extra copies a token':>23}")
    for policy in present(results):
        mine = of(results, policy)
        worst = max(result.max / result.home_mean for result in mine)
        row = f"{policy:<14}{ratio(mine):>10.4f}{worst:>9.4f}"
        print(row + f"{microseconds(mine):>13.1f}" * timed + f"{copies(mine):>23}")
    least, least_us = bound(results)
    print(f"{'bound':<14}{least:>10.4f}" + f"{'':>9}{least_us:>13.1f}" * timed)


def print_sizes(compared: list[Compared], unit: str) -> None:
    """Recordings, EP sizes and placements, a line for each phase; with a cost model microseconds too."""
    policies = [p for p in POLICIES if any(p in present(one.results) for one in compared)]
    width = max(9, *(len(one.recording) for one in compared)) + 2
    print(f"\nmax/mean, weighted by {unit}; level: the part of them that shared rows can level.")
    if unit == "rows":
        print("routed: of routed rows alone. Above 1 + 1/K place experts first.")
    routed = f"{'routed':>10}" if unit == "rows" else ""
    _print_lines(
        compared,
        width,
        routed + _names(policies) + f"{'level':>9}",
        lambda one, mine: _cells(mine, policies, one.top_k, unit),
    )
    if unit == "time":
        print(f"\n{MEANING}")
        _print_lines(
            compared, width, _names([*policies, "bound"]), lambda _, mine: _times(mine, policies)
        )


def _print_lines(
    compared: list[Compared],
    width: int,
    head: str,
    cells: Callable[[Compared, list[Result]], str],
) -> None:
    print(f"{'recording':<{width}}{'EP':>4}{'redundant':>11}  {'passes':<9}{head}")
    for one in compared:
        for phase in sorted({r.phase for r in one.results}, key=lambda phase: phase != "prefill"):
            mine = [result for result in one.results if result.phase == phase]
            start = (
                f"{one.recording:<{width}}{one.ranks:>4}{one.redundant:>11}  {phase or 'all':<9}"
            )
            print(start + cells(one, mine))


def _names(columns: list[str]) -> str:
    return "".join(f"{name:>{_width(name)}}" for name in columns)


def _width(column: str) -> int:
    return max(10, len(column) + 2)


def _cells(results: list[Result], policies: list[str], top_k: int, unit: str) -> str:
    first = of(results, present(results)[0])
    cells = ""
    if unit == "rows":
        # Of a token's K + 1 rows K are routed.
        routed = mean(first) * top_k / (top_k + 1)
        cells = f"{sum(result.routed_max for result in first) / routed:>10.4f}"
    for policy in policies:
        mine = of(results, policy)
        cells += f"{f'{ratio(mine):.4f}' if mine else '-':>{_width(policy)}}"
    return f"{cells}{level_share(first):>9.1%}"


def _times(results: list[Result], policies: list[str]) -> str:
    cells = ""
    for policy in policies:
        mine = of(results, policy)
        cells += f"{f'{microseconds(mine):.1f}' if mine else '-':>{_width(policy)}}"
    return cells + f"{bound(results)[1]:>{_width('bound')}.1f}"


def check_outputs(json_path: Path | None, plot_path: Path | None) -> None:
    """Before hours of work: could both files be written?

    Raises:
        ValueError: naming the file and what is in the way, or matplotlib that is missing.
    """
    for path in (path for path in (json_path, plot_path) if path is not None):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not path.name or path.is_dir():
            raise ValueError(f"{path}: cannot be written: give a file, not a folder")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: cannot be written: {folder} is no folder to write in")
    if plot_path is not None:
        _format(plot_path)


def _format(path: Path) -> str:
    """The kind of picture that the file's name asks for; matplotlib made ready to draw it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'waterfill-rs[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase

    kind = path.suffix.removeprefix(".").lower() or "png"
    known: list[str] = sorted(FigureCanvasBase.get_supported_filetypes())
    if kind not in known:
        raise ValueError(f"{path}: no picture of the kind {kind!r}: give one of {', '.join(known)}")
    return kind


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it is written, and goes if it cannot be."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        if partial.is_file():
            partial.unlink()


def plot(results: list[Result], title: str, path: Path) -> None:
    """A picture of max/mean by layer, mean over passes; the file is whole or not there.

    Raises:
        ValueError: without matplotlib, or naming a file that cannot be written.
    """
    check_outputs(None, path)
    kind = _format(path)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colours = ("#888888", "#D55E00", "#CC79A7", "#E69F00", "#0072B2", "#009E73")
    layers = sorted({result.layer for result in results})
    for policy, colour in zip(POLICIES, colours, strict=True):
        mine = of(results, policy)
        if not mine:
            continue
        passes = [[r.max / r.mean for r in mine if r.layer == layer] for layer in layers]
        means = [sum(one) / len(one) for one in passes]
        axes.plot(
            layers, means, ".-", color=colour, linewidth=1, label=f"{policy} {ratio(mine):.3f}"
        )
        low, high = [min(one) for one in passes], [max(one) for one in passes]
        axes.fill_between(layers, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("slowest rank / mean rank")
    axes.set_title(f"{title}\nline: mean over passes; band: least to most", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    with _whole(path) as partial:
        figure.savefig(partial, dpi=150, format=kind)
    pyplot.close(figure)
    print(f"picture: {path}")


def write_json(path: Path, **fields: object) -> None:
    """An object with these fields; the file is whole or not there.

    Raises:
        ValueError: naming a file that cannot be written.
    """
    check_outputs(path, None)
    text = json.dumps(fields, indent=1)
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
