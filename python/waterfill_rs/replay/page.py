"""A replay as one HTML file: the tables and verdicts, and a map of ranks by layers. It needs no network and no script."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import waterfill_rs
from waterfill_rs.outputs import whole
from waterfill_rs.policies import report, routed_rows, summary, verdict
from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.report import Compared, printable
from waterfill_rs.replay import heat_map
from waterfill_rs.replay.heat_map import HeatMap

__all__ = ["write"]

_MAPS = {"home": "shared experts at home", "live": "live plan"}

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { max-width: 95rem; margin: 1rem auto; padding: 0 1rem; }
h1 { overflow-wrap: anywhere; }
pre { font-size: 0.85rem; overflow-x: auto; }
@media print { pre { white-space: pre-wrap; } }
"""


def write(path: Path, replayed: list[tuple[Compared, str]], unit: str) -> None:
    """Each recording, EP size and placement with a title that tells its shape. The file is whole or not there.

    Raises:
        ValueError: naming a file that cannot be written.
    """
    text = "\n".join(_page(replayed, unit))
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"page: {path}")


def _page(replayed: list[tuple[Compared, str]], unit: str) -> Iterator[str]:
    names = ", ".join(dict.fromkeys(_name(one) for one, _ in replayed))
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    # Nothing is loaded, whatever a name may hold.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield f"<title>{_text(names)}: waterfill-rs replay</title>"
    yield f"<style>{_STYLE}{heat_map.STYLE}</style></head><body>"
    yield f"<h1>{_text(names)}</h1>"
    if len(replayed) > 1:
        yield _table(report.print_sizes, [one for one, _ in replayed], unit)
    for one, title in replayed:
        yield f"<h2>{_text(title if len(replayed) == 1 else f'{_name(one)}: {title}')}</h2>"
        yield from _recording(one, unit)
    yield f"<footer>waterfill-rs {_text(waterfill_rs.__version__)}</footer></body></html>\n"


def _name(one: Compared) -> str:
    """The names of folders may be long."""
    return printable(one.recording, 120)


def _recording(one: Compared, unit: str) -> Iterator[str]:
    from waterfill_rs.replay import hottest

    for phase, results in summary.by_phase(one.results).items():
        yield f"<h3>{summary.heading(phase, results)}</h3>"
        yield _table(report.print_table, results, f"weighted by {unit}", unit)
        yield _table(hottest.print_hottest, results, one.hottest.get(phase, []))
        yield _words(verdict.print_verdict, results, one.top_k, unit)
        if totals := one.routed.get(phase):
            yield _table(routed_rows.print_routed_rows, totals, phase, unit, one.trivial)
        yield from _maps(results, unit)
    yield _words(verdict.print_total, one.results, unit)
    yield "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in one.notes) + "</ul>"


def _table(say: Callable[..., None], *arguments: Any) -> str:
    return f"<pre>{_text(_said(say, *arguments))}</pre>"


def _words(say: Callable[..., None], *arguments: Any) -> str:
    """Its lines are the terminal's; here they are as long as there is room."""
    said = _said(say, *arguments)
    return f"<p>{_text(said)}</p>" if said else ""


def _said(say: Callable[..., None], *arguments: Any) -> str:
    """What a function prints."""
    with redirect_stdout(io.StringIO()) as said:
        say(*arguments)
    return said.getvalue().strip("\n")


def _text(text: str) -> str:
    return html.escape("\n".join(printable(line) for line in text.split("\n")))


def _maps(results: list[Result], unit: str) -> Iterator[str]:
    """Of ``home`` and ``live``; of another policy where neither was asked for."""
    there = summary.present(results)
    policies = [policy for policy in _MAPS if policy in there] or there[:1]
    maps = []
    for policy in policies:
        mine = summary.of(results, policy)
        part = summary.ratio(mine) - 1
        off = f"{abs(part):.1%} {'above' if part > -0.0005 else 'below'} the mean"
        maps.append(HeatMap.of(f"{_MAPS.get(policy, policy)}: the slowest rank is {off}", mine))
    yield "<p>Each rank's load over the mean rank's, by layer, over all passes. Point at a cell for its numbers.</p>"
    yield from heat_map.draw(maps, unit)
