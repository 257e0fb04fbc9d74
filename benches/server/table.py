"""Results as tables in Markdown, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from server import kernels, layer_outputs, memory, output_figures
from server.modes import MODES, WITH_REDUNDANT
from waterfill_rs._native import OUTCOMES

HEAD = (
    "| phase | tokens a rank | placement | mode | GPU ms | to off (quartiles) | to home (quartiles) | tokens/s "
    "| rows max/mean | optimum | live calls | overlapped | forwards |"
)
PLACED_HEAD = (
    "| phase | tokens a rank | placement | mode | GPU ms | to off (quartiles) | to off-static (quartiles) "
    "| to off-dynamic (quartiles) | tokens/s | rows max/mean | optimum | routed max/mean | optimum | active experts | least "
    "| live calls | forwards |"
)
VERDICT_HEAD = "| phase | tokens a rank | placement | auto to off (quartiles) | best of off, home, own, live | auto to it (quartiles) | |"
MIXED_HEAD = (
    "| placement | mode | seconds a round | new tokens/s | prompt tokens/s | seconds to off (quartiles) | overlapped | calls "
    "| rounds |"
)
TOO_SLOW = 1.005
"""A median ratio above it is marked: ``auto`` is to be nowhere slower by more."""
MARK = "**above 1.005**"
MOST_SHOWN = 6
MOST_COLUMNS = 4
"""Of panels in a picture."""


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """A table a document, with a line that says where it is from, and a table of what kernels took."""
    return "\n\n".join(part for document in documents for part in _parts(document))


def _parts(document: dict[str, Any]) -> list[str]:
    told = (
        f"{document['machine']}, EP{document['ranks']}, sglang {document['sglang']}, commit {document['commit']}, "
        f"{document['date']}"
    )
    parts = [told]
    cells = [cell for cell in document["cells"] if not cell.get("placed")]
    placed = [cell for cell in document["cells"] if cell.get("placed")]
    if cells or not (placed or document.get("mixed")):
        parts.append(_table(HEAD, map(_row, cells)))
    if placed:
        about = "Experts placed by other traffic, + redundant ones; off and auto have neither:"
        parts.append(f"{about}\n\n" + _table(PLACED_HEAD, map(_placed, placed)))
    judged = [cell for cell in cells if cell["mode"] == "auto"]
    if judged:
        parts.append("Verdict:\n\n" + _table(VERDICT_HEAD, map(_verdict, judged)))
    if mixed := document.get("mixed"):
        about = "Mixed traffic, medians over rounds; a ratio is of seconds for the same requests, below 1 is faster:"
        parts.append(f"{about}\n\n" + _table(MIXED_HEAD, map(_mixed, mixed)))
    parts += output_figures.lines(document.get("outputs", []))
    parts += layer_outputs.lines(document.get("layers", []))
    parts += memory.lines(document.get("memory", []))
    if failures := document.get("failures"):
        parts.append("Engines that failed or were late: " + "; ".join(failures) + ".")
    if mismatches := document.get("mismatches"):
        shown = mismatches[:MOST_SHOWN]
        more = f", and {len(mismatches) - len(shown)} more" if len(mismatches) > len(shown) else ""
        parts.append(
            f"Calls that do not add up ({len(mismatches)}): " + "; ".join(shown) + more + "."
        )
    elif "mismatches" in document:
        parts.append("Batches and calls add up in every round.")
    profiled = [cell for cell in document["cells"] if cell.get("breakdown")]
    if profiled:
        parts.append(_breakdowns(profiled))
    return parts


def _table(head: str, rows: Iterable[str]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def _verdict(cell: dict[str, Any]) -> str:
    found = cell.get("verdict") or {}
    best, ratio = found.get("best", ""), found.get("ratio_best")
    slow = any(one is not None and one > TOO_SLOW for one in (cell["ratio_off"], ratio))
    fields = (
        cell["phase"],
        cell["tokens"],
        cell["placement"],
        _ratio(cell["ratio_off"], cell["quartiles"]),
        best,
        _ratio(ratio, found.get("quartiles_best")),
        MARK if slow else "",
    )
    return "| " + " | ".join(map(str, fields)) + " |"


def _mixed(entry: dict[str, Any]) -> str:
    calls = entry["calls"] or {}
    total = sum(calls.values())
    told = ", ".join(f"{end} {calls[end]}" for end in OUTCOMES if calls.get(end))
    slow = entry["mode"] == "auto" and (entry["ratio_off"] or 0) > TOO_SLOW
    fields = (
        entry["placement"],
        entry["mode"],
        _number(entry["seconds"], ".3f"),
        _number(entry["new_tokens_per_s"], ",.0f"),
        _number(entry["prompt_tokens_per_s"], ",.0f"),
        _ratio(entry["ratio_off"], entry["quartiles"]) + (f" {MARK}" if slow else ""),
        _batches(entry["batches"]),
        f"{total}: {told}" if total else "",
        entry["rounds"],
    )
    return "| " + " | ".join(map(str, fields)) + " |"


def _batches(batches: dict[str, int] | None) -> str:
    """How many of the batches were overlapped."""
    if not batches:
        return ""
    return f"{batches.get('overlapped', 0)} of {sum(batches.values())}"


def _live(cell: dict[str, Any]) -> str:
    """The share of live calls, and how others ended."""
    share = cell["live_share"]
    others = {
        name: count
        for name, count in (cell.get("calls") or {}).items()
        if count and name not in ("calls", "live")
    }
    live = "" if share is None else f"{share:.2%}"
    if others:
        live += " (" + ", ".join(f"{name} {count}" for name, count in others.items()) + ")"
    return live


def _placed(cell: dict[str, Any]) -> str:
    fields = (
        cell["phase"],
        cell["tokens"],
        f"{cell['placement']} + {cell['redundant']}",
        cell["mode"],
        _number(cell["gpu_ms"], ".3f"),
        _ratio(cell["ratio_off"], cell["quartiles"]),
        _ratio(cell["ratio_static"], cell["quartiles_static"]),
        _ratio(cell["ratio_dynamic"], cell["quartiles_dynamic"]),
        _number(cell["tokens_per_s"], ",.0f"),
        _number(cell["rows_max_mean"], ".4f"),
        _number(cell["optimum"], ".4f"),
        _number(cell["routed_max_mean"], ".4f"),
        _number(cell["routed_optimum"], ".4f"),
        _number(cell["active_experts"], ".2f"),
        _number(cell["least_active"], ".2f"),
        _live(cell),
        cell["forwards"],
    )
    return "| " + " | ".join(map(str, fields)) + " |"


def _row(cell: dict[str, Any]) -> str:
    fields = (
        cell["phase"],
        cell["tokens"],
        cell["placement"],
        cell["mode"],
        _number(cell["gpu_ms"], ".3f"),
        _ratio(cell["ratio_off"], cell["quartiles"]),
        _ratio(cell["ratio_home"], cell.get("quartiles_home")),
        _number(cell["tokens_per_s"], ",.0f"),
        _number(cell["rows_max_mean"], ".4f"),
        _number(cell["optimum"], ".4f"),
        _live(cell),
        _number(cell.get("overlapped_share"), ".2%"),
        cell["forwards"],
    )
    return "| " + " | ".join(map(str, fields)) + " |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(value: float | None, between: Sequence[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ({between[0]:.4f}, {between[1]:.4f})" if between else "")


def _breakdowns(cells: Sequence[dict[str, Any]]) -> str:
    lines = [
        "One profiled forward, ms of GPU time by kernels, mean of ranks:",
        "",
        "| phase | tokens a rank | placement | mode | " + " | ".join(kernels.NAMES) + " | all |",
        "|" + "---|" * (len(kernels.NAMES) + 5),
    ]
    for cell in cells:
        values = [cell["breakdown"].get(name, 0.0) for name in kernels.NAMES]
        place = (cell["phase"], cell["tokens"], cell["placement"], cell["mode"])
        numbers = (f"{value:.2f}" for value in (*values, sum(values)))
        lines.append("| " + " | ".join([*map(str, place), *numbers]) + " |")
    return "\n".join(lines)


def picture(document: dict[str, Any], path: Path) -> bool:
    """Ratios to off with their quartiles, a panel for each phase and placement, in rows; False without matplotlib or figures."""
    try:
        # Without pyplot, which asks a notebook for its windows.
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cells = [cell for cell in document["cells"] if cell["ratio_off"] is not None]
    panels = list(dict.fromkeys(map(_panel_of, cells)))
    if not panels:
        return False
    columns = min(len(panels), MOST_COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 1 + 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=lines > 1)
    for axis, panel in zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_axis_off()
        else:
            _panel(axis, panel, [cell for cell in cells if _panel_of(cell) == panel])
    figure.supylabel("GPU time of a forward, ratio to Waterfill off", fontsize=10)
    shown = {}
    for axis in axes.flat:  # A panel may lack a mode.
        shown.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), fontsize=8)
    figure.suptitle(
        f"{document['machine']}, EP{document['ranks']}, sglang {document['sglang']}", fontsize=10
    )
    figure.savefig(path, dpi=130)
    return True


def _panel_of(cell: dict[str, Any]) -> tuple[str, str]:
    more = f" + {cell['redundant']}" if cell.get("placed") else ""
    return cell["phase"], cell["placement"] + more


def _panel(axis: Any, panel: tuple[str, str], cells: Sequence[dict[str, Any]]) -> None:
    tokens = sorted({cell["tokens"] for cell in cells})
    shown = [mode for mode in MODES if any(cell["mode"] == mode for cell in cells)]
    for i, mode in enumerate(shown):
        of = [cell for cell in cells if cell["mode"] == mode]
        x = [tokens.index(cell["tokens"]) + (i - (len(shown) - 1) / 2) * 0.11 for cell in of]
        y = [cell["ratio_off"] for cell in of]
        between = [cell["quartiles"] or [cell["ratio_off"]] * 2 for cell in of]
        errors = [[max(0.0, v - q[0]) for v, q in zip(y, between, strict=True)],
                  [max(0.0, q[1] - v) for v, q in zip(y, between, strict=True)]]  # fmt: skip
        axis.errorbar(
            x,
            y,
            yerr=errors,
            fmt="s" if mode in WITH_REDUNDANT else "o",
            markersize=4,
            capsize=2,
            label=mode,
            color=f"C{MODES.index(mode)}",
        )
    axis.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    axis.set_xticks(range(len(tokens)), [f"{n:,}" for n in tokens])
    axis.set_xlabel("tokens a rank")
    axis.set_title(", ".join(panel), fontsize=10)
