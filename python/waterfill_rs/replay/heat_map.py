"""Maps of ranks by layers as SVG: how much of the mean rank's load each rank has. No script, no network."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.report import most_of_usual

__all__ = ["STYLE", "HeatMap", "draw"]

_SHADES = 5
"""On either side of the mean."""

_LESS, _MORE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
"""Okabe and Ito's blue and vermilion, which colour-blind people tell apart."""

_MIDDLE = (0xEE, 0xEE, 0xEE)
"""At the mean. It differs from a page in light and in dark mode, and from paper."""

_LEFT, _TOP, _SIZE = 52, 18, 720
"""In pixels: room for the numbers of ranks and of layers, and how wide and high a map is to be where its cells can be so small."""


@dataclass(frozen=True)
class HeatMap:
    """``loads`` ``[L][R]`` and ``means`` ``[L]``, both a pass, in the cost model's unit. ``means`` are the mean rank's with
    shared experts at home. ``layers`` ``[L]``: their numbers."""

    name: str
    layers: list[int]
    loads: list[list[float]]
    means: list[float]

    @staticmethod
    def of(name: str, results: list[Result]) -> HeatMap:
        """One policy's results, each layer's over all passes."""
        cells: dict[int, list[Result]] = {}
        for result in sorted(results, key=lambda result: result.layer):
            cells.setdefault(result.layer, []).append(result)
        loads = [
            [sum(of_rank) / len(cell) for of_rank in zip(*(r.loads for r in cell), strict=True)]
            for cell in cells.values()
        ]
        means = [sum(r.home_mean for r in cell) / len(cell) for cell in cells.values()]
        return HeatMap(name, list(cells), loads, means)

    def above(self) -> list[list[float]]:
        """``[L][R]``: the part of the mean by which a load is above it; negative below."""
        pairs = zip(self.loads, self.means, strict=True)
        return [[load / mean - 1 for load in loads] for loads, mean in pairs]


def draw(maps: Sequence[HeatMap], unit: str) -> Iterator[str]:
    """The maps in the same colours, and a legend with numbers."""
    off = [abs(part) for one in maps for layer in one.above() for part in layer]
    step = _step(most_of_usual(off))
    yield _legend(step)
    yield '<div class="maps">'
    for one in maps:
        name = html.escape(one.name)
        yield f"<figure><figcaption>{name}</figcaption>"
        yield from _map(one, step, unit)
        yield "</figure>"
    yield "</div>"


def _map(one: HeatMap, step: float, unit: str) -> Iterator[str]:
    ranks = len(one.loads[0])
    side = max(9, min(30, _SIZE // max(ranks, len(one.layers))))
    width, height = _LEFT + side * len(one.layers), _TOP + side * ranks
    yield _open(width, height, one.name)
    yield f'<text x="{_LEFT - 4}" y="{_TOP - 6}" text-anchor="end">layer</text>'
    for column in _numbered(len(one.layers), side):
        x = _LEFT + side * column + side / 2
        yield f'<text x="{x}" y="{_TOP - 6}" text-anchor="middle">{one.layers[column]}</text>'
    for rank in _numbered(ranks, side):
        y = _TOP + side * rank + side / 2 + 3
        yield f'<text x="{_LEFT - 4}" y="{y}" text-anchor="end">rank {rank}</text>'
    size = f'width="{side}" height="{side}"'
    columns = zip(one.layers, one.loads, one.above(), strict=True)
    for column, (layer, loads, parts) in enumerate(columns):
        yield f'<g class="cells" transform="translate({_LEFT + side * column} {_TOP})">'
        for rank, (load, part) in enumerate(zip(loads, parts, strict=True)):
            said = f"layer {layer}, rank {rank}: {1 + part:.3f}, {_amount(load, unit)}"
            shade = _shade(part, step)
            yield f'<rect y="{side * rank}" {size} class="{shade}"><title>{said}</title></rect>'
        yield "</g>"
    yield "</svg>"


def _legend(step: float) -> str:
    """Each colour with the load over the mean in the middle of what it stands for; loads are never below zero."""
    shades = [shade for shade in range(-_SHADES, _SHADES + 1) if 1 + shade * step >= 0]
    side, wide = 14, 54
    parts = [_open(wide * len(shades), 2 * side + 4, "load over the mean")]
    for column, shade in enumerate(shades):
        sign = {-_SHADES: "\N{LESS-THAN OR EQUAL TO} ", _SHADES: "\N{GREATER-THAN OR EQUAL TO} "}
        number = f"{sign.get(shade, '')}{1 + shade * step:.{_digits(step)}f}"
        x = wide * column
        parts.append(f'<rect x="{x}" width="{wide}" height="{side}" class="{_name(shade)}"/>')
        parts.append(
            f'<text x="{x + wide // 2}" y="{2 * side}" text-anchor="middle">{number}</text>'
        )
    return "".join(parts) + "</svg>"


def _open(width: int, height: int, name: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(name)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    )


def _numbered(count: int, side: int) -> range:
    """Which rows or columns have room for their number: each, each second, fifth, tenth..."""
    every = next(every for every in (1, 2, 5, 10, 20, 50, 100) if every * side >= 18)
    return range(0, count, every)


def _amount(load: float, unit: str) -> str:
    """A pass. Times are in picoseconds, and shown in microseconds."""
    return f"{load:.0f} rows" if unit == "rows" else f"{load / 1e6:.1f} us"


def _step(most: float) -> float:
    """From one colour to the next: a round number, such that the outermost colour is about ``most`` above the mean."""
    steps = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
    return next((step for step in steps if step * _SHADES >= most), 20.0)


def _digits(step: float) -> int:
    return 3 if step < 0.01 else 2 if step < 0.1 else 1


def _shade(part: float, step: float) -> str:
    return _name(max(-_SHADES, min(_SHADES, round(part / step))))


def _name(shade: int) -> str:
    return f"{'less' if shade < 0 else 'more'}{abs(shade)}"


def _colour(shade: int) -> str:
    """From grey at the mean to the full colour."""
    full, part = _LESS if shade < 0 else _MORE, abs(shade) / _SHADES
    pairs = zip(_MIDDLE, full, strict=True)
    return "#" + "".join(f"{round(grey + (channel - grey) * part):02x}" for grey, channel in pairs)


STYLE = """
.maps { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 10px system-ui, sans-serif; }
.cells { shape-rendering: crispEdges; }
@media print { figure { break-inside: avoid; } }
""" + "".join(f".{_name(s)} {{ fill: {_colour(s)}; }}\n" for s in range(-_SHADES, _SHADES + 1))
"""For the page that the maps are in."""
