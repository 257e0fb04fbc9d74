"""A comparison as a table, a picture and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from waterfill_rs.comparison import POLICIES, Result

__all__ = ["plot", "print_table", "print_verdict", "write_json"]


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
    gain = 1 - sum(b.max / h.max for h, b in zip(home, live, strict=True)) / len(home)
    worth = "worth turning on" if gain >= 0.02 else "little to gain here"
    print(f"Live counts take {gain:.1%} off the slowest rank, on average: {worth}.")


def _ranges(numbers: list[int]) -> str:
    """``1, 4-6``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def plot(results: list[Result], title: str, path: Path) -> None:
    """A picture of max/mean by layer, mean over passes. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'waterfill-rs[plot]'") from error
    matplotlib.use("Agg")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def write_json(results: list[Result], path: Path, **fields: object) -> None:
    """An object with these fields and ``rows``; the file is whole or not there."""
    rows = [result.as_json() for result in results]
    text = json.dumps({**fields, "rows": rows}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
