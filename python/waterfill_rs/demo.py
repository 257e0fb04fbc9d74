"""``waterfill-rs demo``: whole documents a rank, routed over R ranks; placements of the shared rows compared."""

from __future__ import annotations

import argparse
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import waterfill_rs
from waterfill_rs import _native
from waterfill_rs.workload import Router, documents

__all__ = ["POLICIES", "Batch", "Result", "add_command", "compare"]

POLICIES = ("home", "own-counts", "live")


@dataclass(frozen=True)
class Batch:
    """One rank's tokens in one layer: expert ids ``[tokens, top_k]`` and what is counted of them."""

    ids: array[int]
    tokens: int
    top_k: int
    counts: list[int]
    visits: list[int]

    @staticmethod
    def of(router: Router, tokens: list[int], ranks: int) -> Batch:
        ids = router.route(tokens)
        address = (ids.buffer_info()[0], len(tokens), router.top_k, 32)
        counts, visits, valid = _native.unsafe_count_ptr(address, router.experts, ranks)
        return Batch(ids, valid, router.top_k, counts, visits)

    def extra_copies(self, quotas: list[int], rank: int) -> int:
        """Shared rows that go to a rank which their token neither is on nor visits."""
        address = (self.ids.buffer_info()[0], self.tokens, self.top_k, 32)
        shared = array("i", bytes(4 * self.tokens))
        target, experts = shared.buffer_info()[0], len(self.counts)
        _native.unsafe_assign_ptr(address, quotas, experts, rank, target)
        return _native.unsafe_traffic_ptr(address, target, experts, len(quotas), rank)[0]


@dataclass(frozen=True)
class Result:
    """One layer, step and policy. ``optimum`` is the least that any placement's slowest rank can have."""

    layer: int
    step: int
    policy: str
    tokens: int
    routed_max: int
    max: int
    mean: float
    optimum: int
    extra_copies: float


def compare(batches: list[Batch], layer: int, step: int) -> Iterator[Result]:
    """The policies on one layer of one step; ``batches`` is one a rank."""
    ranks = len(batches)
    routed = [sum(counts) for counts in zip(*(b.counts for b in batches), strict=True)]
    tokens = [batch.tokens for batch in batches]
    visits = [visit for batch in batches for visit in batch.visits]
    live = waterfill_rs.plan(routed, tokens, ranks=ranks, visits=visits)
    per_rank = len(routed) // ranks
    routed_max = max(sum(routed[r * per_rank : (r + 1) * per_rank]) for r in range(ranks))
    quotas = {
        "home": [[n * (r == d) for d in range(ranks)] for r, n in enumerate(tokens)],
        "own-counts": [_own_quotas(batch, rank, ranks) for rank, batch in enumerate(batches)],
        "live": [live.quotas_of(rank) for rank in range(ranks)],
    }
    for policy in POLICIES:
        shared = [sum(column) for column in zip(*quotas[policy], strict=True)]
        slowest, mean = waterfill_rs.level(routed, shared, ranks=ranks)
        copies = sum(b.extra_copies(quotas[policy][r], r) for r, b in enumerate(batches))
        yield Result(
            layer,
            step,
            policy,
            sum(tokens),
            routed_max,
            slowest,
            mean,
            live.optimum,
            copies / sum(tokens),
        )


def _own_quotas(batch: Batch, rank: int, ranks: int) -> list[int]:
    tokens = [batch.tokens * (r == rank) for r in range(ranks)]
    visits = [v * (r == rank) for r in range(ranks) for v in batch.visits]
    return waterfill_rs.plan(batch.counts, tokens, ranks=ranks, visits=visits).quotas_of(rank)


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="compare placements on real text: no GPU, no model", description=__doc__
    )
    parser.add_argument(
        "paths", nargs="*", help="files or folders of text (default: Python's own sources)"
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a rank and step")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write every layer, step and policy")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for name in ("ranks", "experts", "top_k", "tokens", "layers", "steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)}: give at least 1"
            )
    results = _route_and_compare(arguments)
    _print_table(results, arguments)
    if arguments.json:
        header = {"ranks": arguments.ranks, "experts": arguments.experts, "top_k": arguments.top_k}
        _write(
            arguments.json, json.dumps({**header, "rows": [asdict(r) for r in results]}, indent=1)
        )
    if arguments.plot:
        _plot(results, arguments)


def _route_and_compare(arguments: argparse.Namespace) -> list[Result]:
    ranks, steps = arguments.ranks, arguments.steps
    streams = _streams(documents(arguments.paths), ranks, arguments.tokens * steps)
    results: list[Result] = []
    for layer in range(arguments.layers):
        router = Router(arguments.experts, arguments.top_k, layer)
        for step in range(steps):
            part = slice(step * arguments.tokens, (step + 1) * arguments.tokens)
            batches = [Batch.of(router, stream[part], ranks) for stream in streams]
            results += compare(batches, layer, step)
    return results


def _streams(texts: Iterator[list[int]], ranks: int, length: int) -> list[list[int]]:
    """``ranks`` runs of ``length`` tokens, each of whole documents until it is full."""
    streams = []
    for rank in range(ranks):
        stream: list[int] = []
        while len(stream) < length:
            document = next(texts, None)
            if document is None:
                raise ValueError(
                    f"the text ends at {len(stream)} of {length} tokens of rank {rank}: "
                    "give more files, fewer ranks, tokens or steps"
                )
            stream += document
        streams.append(stream[:length])
    return streams


def _mean(results: list[Result], policy: str) -> tuple[float, float, float]:
    """Mean and largest max/mean over layers and steps, and mean extra copies a token."""
    mine = [result for result in results if result.policy == policy]
    ratios = [result.max / result.mean for result in mine]
    return sum(ratios) / len(mine), max(ratios), sum(r.extra_copies for r in mine) / len(mine)


def _print_table(results: list[Result], arguments: argparse.Namespace) -> None:
    a = arguments
    print(
        f"{a.ranks} ranks, {a.experts} experts, top {a.top_k}, {a.tokens} tokens a rank, "
        f"{a.layers} hash layers x {a.steps} steps, whole documents a rank"
    )
    print(f"{'policy':<12}{'max/mean':>10}{'worst':>9}{'extra copies a token':>23}")
    for policy in POLICIES:
        mean, worst, copies = _mean(results, policy)
        print(f"{policy:<12}{mean:>10.4f}{worst:>9.4f}{copies:>23.4f}")
    live = [result for result in results if result.policy == "live"]
    bound = sum(r.optimum / r.mean for r in live) / len(live)
    print(f"{'bound':<12}{bound:>10.4f}")
    home, own, best = (_mean(results, policy)[0] for policy in POLICIES)
    met = sum(result.max == result.optimum for result in live)
    print(
        f"\nThe slowest rank has {home - 1:.1%} more rows than the mean with shared experts at home,"
    )
    print(
        f"{own - 1:.1%} from own counts, {best - 1:.1%} from live counts: the optimum in {met} of {len(live)} layers."
    )


def _plot(results: list[Result], arguments: argparse.Namespace) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'waterfill-rs[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    looks = zip(POLICIES, ("#888888", "#E69F00", "#0072B2"), ("o", "s", "D"), strict=True)
    for policy, colour, marker in looks:
        ratios = [r.max / r.mean for r in results if r.policy == policy]
        axes.plot(ratios, marker, color=colour, markersize=5, label=policy)
    live = [r for r in results if r.policy == "live"]
    axes.step(
        range(len(live)),
        [r.optimum / r.mean for r in live],
        where="mid",
        color="black",
        label="bound",
    )
    for layer in range(1, arguments.layers):
        axes.axvline(layer * arguments.steps - 0.5, color="#cccccc", linewidth=1)
    axes.set_xlabel("layer and step")
    axes.set_ylabel("rows of the slowest rank / mean")
    axes.set_title(
        f"{arguments.ranks} ranks, {arguments.tokens} tokens a rank, whole documents a rank"
    )
    axes.legend(frameon=False)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.plot, dpi=150)
    print(f"picture: {arguments.plot}")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
