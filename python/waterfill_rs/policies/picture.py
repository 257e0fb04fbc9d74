"""Two pictures, with matplotlib: of a recording, layer by layer, and of one step, rank by rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill_rs.outputs import whole
from waterfill_rs.policies import summary
from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.report import Compared, most_of_usual, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check", "draw_layers", "draw_ranks", "plot_layers", "plot_ranks"]

# Okabe and Ito's colours, and a wine of Tol's, which colour-blind people tell apart. In the order of drawing each line is thinner than the one
# before, so that of equal ones both are seen.
_LINES: dict[str, dict[str, Any]] = {
    "home": {"color": "#999999", "linewidth": 4.6},
    "sglang-static": {"color": "#D55E00", "linewidth": 4.1},
    "sglang-dynamic": {"color": "#E69F00", "linewidth": 3.6},
    "own-counts": {"color": "#56B4E9", "linewidth": 3.1},
    "live": {"color": "#0072B2", "linewidth": 2.6},
    "joint": {"color": "#009E73", "linewidth": 2.1, "linestyle": "--"},
    "single-replica": {"color": "#F0E442", "linewidth": 1.6},
    "replicas": {"color": "#882255", "linewidth": 1.1},
    "bound": {"color": "#000000", "linewidth": 0.6, "linestyle": (0, (1, 2))},
}
_ROUTED = {"color": "#CC79A7", "linewidth": 1.0}
_BANDS = ("home", "live")


def check(path: Path | None) -> None:
    """Before hours of work: can a picture be drawn, and of the kind that the file's name asks for?

    Raises:
        ValueError: without matplotlib, or naming the kind and those that there are.
    """
    if path is not None:
        _kind(path)


def plot_layers(one: Compared, title: str, unit: str, path: Path) -> None:
    """The picture of a recording; see ``draw_layers``. The file is whole or not there.

    Raises:
        ValueError: without matplotlib, or naming a file that cannot be written.
    """
    width = 3 + 6 * len(summary.by_phase(one.results))
    _write(path, (width, 6.5), lambda figure: draw_layers(figure, one, title, unit))


def plot_ranks(results: list[Result], tokens: int, path: Path) -> None:
    """The picture of one run of a layer; see ``draw_ranks``. The file is whole or not there.

    Raises:
        ValueError: without matplotlib, or naming a file that cannot be written.
    """
    _write(path, (9.5, 4.8), lambda figure: draw_ranks(figure, results, tokens))


def draw_layers(figure: Figure, one: Compared, title: str, unit: str) -> None:
    """Slowest rank over mean rank, by layer: a column for each phase.

    Above: policies and the bound, weighted over passes as tables are. Below: routed rows alone, and the line above which
    shared rows cannot level. Bands, for two of the policies and for routed rows, are from the least to the most of a pass.
    """
    phases = summary.by_phase(one.results)
    grid = figure.subplots(2, len(phases), sharex="col", squeeze=False, height_ratios=(3, 1))
    figure.suptitle(f"{printable(one.recording, 80)}\n{title}", fontsize=11, parse_math=False)
    for column, (phase, results) in enumerate(phases.items()):
        bands = "; line: all of them, band: least to most" * (summary.passes(results) > 1)
        _draw_policies(grid[0][column], results, summary.heading(phase, results) + bands)
        _draw_routed(grid[1][column], results, one.top_k, unit)


def _draw_policies(axes: Axes, results: list[Result], heading: str) -> None:
    layers = sorted({result.layer for result in results})
    drawn = []
    for name, style in _LINES.items():
        mine = _bound(results) if name == "bound" else summary.of(results, name)
        if mine:
            label = f"{name} {summary.ratio(mine):.3f}"
            drawn += _draw_line(axes, mine, name in _BANDS, style, label)
    _clip(axes, layers, drawn)
    axes.set_ylabel("slowest rank / mean rank")
    _legend(axes, heading)


def _draw_routed(axes: Axes, results: list[Result], top_k: int, unit: str) -> None:
    """In rows K of a token's K + 1 are routed, so their mean is that part of the whole. Time has no such part."""
    part, limit, name = 1.0, 1.0, "the mean of routed and shared"
    if unit == "rows":
        part, limit = top_k / (top_k + 1), 1 + 1 / top_k
        name = f"1 + 1/{top_k} = {limit:.3f}"
    first = summary.of(results, summary.present(results)[0])
    routed = [replace(r, max=r.routed_max, home_mean=r.home_mean * part) for r in first]
    drawn = _draw_line(axes, routed, True, _ROUTED, f"routed alone {summary.ratio(routed):.3f}")
    label = f"{name}: shared rows cannot level what is above"
    axes.axhline(limit, color="black", linewidth=0.8, linestyle="--", label=label)
    layers = sorted({result.layer for result in first})
    _clip(axes, layers, [*drawn, [limit] * len(layers)])
    axes.set_ylabel("routed alone")
    axes.set_xlabel("layer")
    axes.locator_params(axis="x", integer=True)
    _legend(axes, None)


def _draw_line(
    axes: Axes, results: list[Result], band: bool, style: dict[str, Any], label: str
) -> list[list[float]]:
    """max/mean by layer; gives the values drawn, the edges of the band too."""
    cells: dict[int, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.layer):
        cells.setdefault(result.layer, []).append(result)
    drawn = [[summary.ratio(cell) for cell in cells.values()]]
    size = style["linewidth"] + 1.5
    axes.plot(list(cells), drawn[0], **style, marker="o", markersize=size, label=label)
    if band:
        passes = [[result.max / result.home_mean for result in cell] for cell in cells.values()]
        least, most = [min(cell) for cell in passes], [max(cell) for cell in passes]
        axes.fill_between(list(cells), least, most, color=style["color"], alpha=0.2, linewidth=0)
        drawn += [least, most]
    return drawn


def _bound(results: list[Result]) -> list[Result]:
    """As if it were a policy. ``joint``, the last, has a bound of its own."""
    first = summary.of(results, summary.present(results)[0])
    return [replace(result, max=result.optimum) for result in first]


def _clip(axes: Axes, layers: list[int], lines: Sequence[Sequence[float]]) -> None:
    """The upper edge such that outliers do not squash the rest: they are marked there, with their numbers."""
    tops = [max(values) for values in zip(*lines, strict=True)]
    top = 1 + max(0.01, most_of_usual([value - 1 for value in tops]))
    bottom = min(1.0, *(min(values) for values in lines))
    margin = 0.06 * (top - bottom)
    axes.set_ylim(bottom - margin, top + margin)
    beyond = [(layer, value) for layer, value in zip(layers, tops, strict=True) if value > top]
    if not beyond:
        return
    edge = [top + margin] * len(beyond)
    axes.plot(
        [layer for layer, _ in beyond],
        edge,
        "^",
        color="black",
        markersize=4,
        clip_on=False,
        label="beyond the edge",
    )
    for layer, value in beyond:
        axes.text(
            layer,
            top + margin / 2,
            f"{value:.2f}",
            fontsize=6,
            rotation=90,
            va="top",
            ha="center",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )


def draw_ranks(figure: Figure, results: list[Result], tokens: int) -> None:
    """A bar a rank, routed rows and shared rows on them: shared experts at home, and beside it the live plan.

    Of all layers and passes it is the one that is usual: its home value is the median. ``tokens``: each rank's, so that
    at home so many of its rows are shared.
    """
    home, live = summary.of(results, "home"), summary.of(results, "live")
    usual = sorted(range(len(home)), key=lambda i: home[i].max / home[i].home_mean)[len(home) // 2]
    routed = [load - tokens for load in home[usual].loads]
    both = figure.subplots(1, 2, sharey=True)
    _draw_bars(both[0], home[usual], routed, "shared experts at home")
    _draw_bars(both[1], live[usual], routed, "live plan: shared rows go where there is room")
    both[0].set_ylabel("rows")
    arrow = "\N{RIGHTWARDS ARROW}"
    figure.suptitle(
        f"Slowest rank: {_above(home[usual]):.1%} above the mean {arrow} {_above(live[usual]):.1%}",
        fontsize=16,
        fontweight="bold",
    )
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title=f"layer {home[usual].layer}, step {home[usual].pass_id}: the median of {len(home)} layers and steps; "
        f"over all of them {summary.ratio(home) - 1:.1%} {arrow} {summary.ratio(live) - 1:.1%}",
    )


def _draw_bars(axes: Axes, result: Result, routed: list[int], name: str) -> None:
    ranks = range(len(routed))
    shared = [load - rows for load, rows in zip(result.loads, routed, strict=True)]
    slowest = result.loads.index(max(result.loads))
    side = ("left", "center", "center", "right")[4 * slowest // len(routed)]
    axes.bar(ranks, routed, color="#BBBBBB", label="routed rows")
    axes.bar(ranks, shared, bottom=routed, color="#0072B2", label="shared rows")
    axes.axhline(result.home_mean, color="black", linestyle="--", linewidth=1, label="mean")
    label = "least that any plan's slowest rank can have"
    axes.axhline(result.optimum, color="#D55E00", linestyle=":", linewidth=1.5, label=label)
    axes.annotate(
        f"rank {slowest}: {_above(result):+.1%}",
        (slowest, result.loads[slowest]),
        xytext=(0, 4),
        textcoords="offset points",
        ha=side,
        color="#D55E00",
        fontweight="bold",
    )
    axes.set_title(name, fontsize=11)
    axes.set_xlabel("rank")
    axes.margins(y=0.12)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _above(result: Result) -> float:
    return result.max / result.home_mean - 1


def _legend(axes: Axes, heading: str | None) -> None:
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        title=heading,
        frameon=False,
        fontsize=8,
        title_fontsize=9,
    )


def _write(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    kind = _kind(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with whole(path) as partial:
        figure.savefig(partial, dpi=150, format=kind)
    print(f"picture: {path}")


def _kind(path: Path) -> str:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'waterfill-rs[plot]'") from error
    kind = path.suffix.removeprefix(".").lower() or "png"
    known: list[str] = sorted(FigureCanvasBase.get_supported_filetypes())
    if kind not in known:
        raise ValueError(f"{path}: no picture of the kind {kind!r}: give one of {', '.join(known)}")
    return kind
