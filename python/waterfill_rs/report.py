"""A comparison as a table, a picture and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from waterfill_rs.comparison import POLICIES, Result

__all__ = ["plot", "print_table", "write_json"]


def _present(results: list[Result]) -> list[str]:
    found = {result.policy for result in results}
    return [policy for policy in POLICIES if policy in found]


def _mean(results: list[Result], policy: str) -> tuple[float, float, float]:
    """Mean and largest max/mean over layers and steps, and mean extra copies a token."""
    mine = [result for result in results if result.policy == policy]
    ratios = [result.max / result.mean for result in mine]
    return sum(ratios) / len(mine), max(ratios), sum(r.extra_copies for r in mine) / len(mine)


def print_table(results: list[Result], title: str) -> None:
    """The policies, the bound, and two lines that say what was seen."""
    print(title)
    print(f"{'policy':<14}{'max/mean':>10}{'worst':>9}{'extra copies a token':>23}")
    policies = _present(results)
    for policy in policies:
        mean, worst, copies = _mean(results, policy)
        print(f"{policy:<14}{mean:>10.4f}{worst:>9.4f}{copies:>23.4f}")
    live = [result for result in results if result.policy == "live"]
    bound = sum(r.optimum / r.mean for r in live) / len(live)
    print(f"{'bound':<14}{bound:>10.4f}")
    home, own, best = (_mean(results, p)[0] for p in ("home", "own-counts", "live"))
    met = sum(result.max == result.optimum for result in live)
    print(
        f"\nThe slowest rank has {home - 1:.1%} more rows than the mean with shared experts at home,"
    )
    print(
        f"{own - 1:.1%} from own counts, {best - 1:.1%} from live counts: the optimum in {met} of {len(live)} layers."
    )


def plot(results: list[Result], title: str, path: Path) -> None:
    """A picture of max/mean by layer and pass. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'waterfill-rs[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colours = dict(zip(POLICIES, ("#888888", "#D55E00", "#E69F00", "#0072B2"), strict=True))
    for policy in _present(results):
        ratios = [r.max / r.mean for r in results if r.policy == policy]
        axes.plot(ratios, ".", color=colours[policy], markersize=7, label=policy)
    live = [r for r in results if r.policy == "live"]
    axes.step(
        range(len(live)),
        [r.optimum / r.mean for r in live],
        where="mid",
        color="black",
        label="bound",
    )
    axes.set_xlabel("layer and pass, in the order of the input")
    axes.set_ylabel("rows of the slowest rank / mean")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def write_json(results: list[Result], path: Path, *, ranks: int, experts: int, top_k: int) -> None:
    """An object with ``ranks``, ``experts``, ``top_k`` and ``rows``; the file is whole or not there."""
    rows = [result.as_json() for result in results]
    text = json.dumps({"ranks": ranks, "experts": experts, "top_k": top_k, "rows": rows}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
