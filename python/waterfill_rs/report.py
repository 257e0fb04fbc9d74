"""A comparison as a table, a picture and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waterfill_rs.comparison import POLICIES, Result

__all__ = ["check_outputs", "plot", "print_table", "print_verdict", "write_json"]


def _present(results: list[Result]) -> list[str]:
    found = {result.policy for result in results}
    return [policy for policy in POLICIES if policy in found]


def _of(results: list[Result], policy: str) -> list[Result]:
    return [result for result in results if result.policy == policy]


def _ratio(results: list[Result]) -> float:
    """Mean max/mean over layers and passes."""
    return sum(result.max / result.mean for result in results) / len(results)


def _copies(results: list[Result]) -> str:
    known = [result.extra_copies for result in results if result.extra_copies is not None]
    return f"{sum(known) / len(known):.4f}" if known else "not known"


def print_table(results: list[Result], title: str) -> None:
    """The policies and the bound: what the slowest rank can have at least, shared rows alone placed."""
    print(title)
    print(f"{'policy':<14}{'max/mean':>10}{'worst':>9}{'extra copies a token':>23}")
    for policy in _present(results):
        mine = _of(results, policy)
        worst = max(result.max / result.mean for result in mine)
        print(f"{policy:<14}{_ratio(mine):>10.4f}{worst:>9.4f}{_copies(mine):>23}")
    some = _of(
        results, next(p for p in _present(results) if p != "joint" or len(_present(results)) == 1)
    )
    print(f"{'bound':<14}{sum(r.optimum / r.mean for r in some) / len(some):>10.4f}")


def print_verdict(results: list[Result], top_k: int) -> None:
    """In words: what was seen, which layers can be levelled at all, and whether it is worth turning on."""
    home, live = _of(results, "home"), _of(results, "live")
    if not home or not live:
        return
    met = sum(result.max == result.optimum for result in live)
    own = _of(results, "own-counts")
    from_own = f"{_ratio(own) - 1:.1%} from own counts, " if own else ""
    print(
        f"\nThe slowest rank is {_ratio(home) - 1:.1%} above the mean with shared experts at home,\n"
        f"{from_own}{_ratio(live) - 1:.1%} from live counts: the optimum in {met} of {len(live)} layers."
    )
    by_layer: dict[int, list[bool]] = {}
    for result in home:
        by_layer.setdefault(result.layer, []).append(result.routed_max <= result.mean)
    always = sum(all(passes) for passes in by_layer.values())
    never = [layer for layer, passes in by_layer.items() if not any(passes)]
    print(
        f"Shared rows can level {always} of {len(by_layer)} layers in every pass (a routed max/mean up to "
        f"{1 + 1 / top_k:.3f})" + (f", and never layers {_ranges(never)}." if never else ".")
    )
    gain = _gain(home, live)
    worth = "worth turning on" if gain >= 0.02 else "little to gain here"
    own_gain = f", own counts {_gain(home, own):.1%}" if own else ""
    print(f"Live counts take {gain:.1%} off the slowest rank, on average{own_gain}: {worth}.")


def _gain(before: list[Result], after: list[Result]) -> float:
    """The part of the slowest rank's cost that is gone, mean over layers and passes."""
    return 1 - sum(a.max / b.max for b, a in zip(before, after, strict=True)) / len(before)


def _ranges(numbers: list[int]) -> str:
    """``1, 4-6``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


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
    colours = ("#888888", "#D55E00", "#E69F00", "#0072B2", "#009E73")
    layers = sorted({result.layer for result in results})
    for policy, colour in zip(POLICIES, colours, strict=True):
        mine = _of(results, policy)
        if not mine:
            continue
        passes = [[r.max / r.mean for r in mine if r.layer == layer] for layer in layers]
        means = [sum(one) / len(one) for one in passes]
        axes.plot(
            layers, means, ".-", color=colour, linewidth=1, label=f"{policy} {_ratio(mine):.3f}"
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


def write_json(results: list[Result], path: Path, **fields: object) -> None:
    """An object with these fields and ``rows``; the file is whole or not there.

    Raises:
        ValueError: naming a file that cannot be written.
    """
    check_outputs(path, None)
    rows = [result.as_json() for result in results]
    text = json.dumps({**fields, "rows": rows}, indent=1)
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
