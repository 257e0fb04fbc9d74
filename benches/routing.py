"""Placements of the shared rows on routing, beside shared experts at home: the headline table, and with ``--all`` each shape.

    routing.py                    synthetic routing, with the statistics of DeepSeek-V2-Lite's (synthetic_routing.py)
    routing.py ROUTING.npz        recorded routing: topk, integers [tokens, layers, K], and offsets [prompts + 1]

``dumps.py`` says which prompts are replayed, and how experts are packed. Trivial: experts lie in order.

Fails if live counts miss the optimum in any layer and pass, if own counts cost more than home over a whole shape, or if
a replay takes more than 20 s or 1 GiB beyond what importing torch takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import dumps


class Shape(NamedTuple):
    """``uneven``: ranks with odd numbers have an eighth of the tokens."""

    placement: str
    ranks: int
    tokens: int
    uneven: bool = False

    def __str__(self) -> str:
        few = f", odd ranks {max(1, self.tokens // 8)}" if self.uneven else ""
        return f"{self.placement}, EP{self.ranks}, {self.tokens} tokens a rank{few}"


HEADLINE = tuple(Shape("packed", ranks, tokens) for ranks in (8, 16, 32) for tokens in (64, 1024))
"""The shapes of docs/performance.md."""
RANKS = (8, 16, 32)
TOKENS = (8, 32, 64, 128, 256, 1024)
POLICIES = ("home", "sglang-static", "sglang-dynamic", "own-counts", "live")
COPIED = POLICIES[1:]
WORSE = 1.01
MOST_SECONDS, MOST_MIB = 20.0, 1024.0

# Each prints its peak memory in KiB as the last line.
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
TORCH_ALONE = "import torch" + PEAK
REPLAY = "import sys; from waterfill_rs.cli import main; code = main()" + PEAK + "; sys.exit(code)"


def main() -> int:
    arguments = _arguments()
    shapes = _shapes(arguments)
    routing = dumps.read(arguments.routing)
    torch_alone = _measured(TORCH_ALONE)[1]
    failures, placement = [], ""
    for number, shape in enumerate(shapes, start=1):
        print(f"shape {number} of {len(shapes)}: {shape}", file=sys.stderr, flush=True)
        passes = dumps.passes(routing.replayed, shape.ranks, shape.tokens)
        if not passes:
            print("  left out: the prompts have fewer tokens", file=sys.stderr)
            continue
        if shape.placement != placement:
            placement = shape.placement
            print(_heading(placement, arguments.cost_model), flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            dumps.write(folder / "dump", passes, shape.ranks, routing.experts, shape.uneven)
            mapping = (
                dumps.trivial(routing.layers, routing.experts)
                if placement == "trivial"
                else dumps.packed(routing.unseen, routing.experts, shape.ranks)
            )
            dumps.write_placement(folder / "map.json", mapping)
            rows, seconds, peak = _replay(folder, arguments.cost_model)
        print(_line(rows, shape), flush=True)
        failures += _failures(rows, str(shape))
        if seconds > MOST_SECONDS or peak - torch_alone > MOST_MIB:
            failures.append(f"{shape}: {seconds:.1f} s, {peak - torch_alone:.0f} MiB")
        print(f"  {seconds:.1f} s, {peak - torch_alone:.0f} MiB beyond torch", file=sys.stderr)
    print("\n".join(failures))
    return int(bool(failures))


def _arguments() -> argparse.Namespace:
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("routing", type=Path, metavar="ROUTING.npz", nargs="?")
    parser.add_argument("--all", action="store_true", help="trivial and packed, every EP and size")
    parser.add_argument("--ep", type=numbers, help="of these only EP sizes like 8,16")
    parser.add_argument("--tokens", type=numbers, help="of these only tokens a rank like 8,64")
    parser.add_argument(
        "--uneven", action="store_true", help="of these each with odd ranks that have an eighth"
    )
    parser.add_argument("--cost-model", default="rows", help="as waterfill-rs replay takes it")
    return parser.parse_args()


def _shapes(asked: argparse.Namespace) -> list[Shape]:
    if not (asked.all or asked.ep or asked.tokens or asked.uneven):
        return list(HEADLINE)
    return [
        Shape(placement, ranks, tokens, asked.uneven)
        for placement in ("trivial", "packed")
        for ranks in asked.ep or RANKS
        for tokens in asked.tokens or TOKENS
    ]


def _replay(folder: Path, cost_model: str) -> tuple[dict[str, list[dict]], float, float]:
    """Rows by policy, and the replay's seconds and peak MiB."""
    options = (
        "--placement",
        folder / "map.json",
        "--cost-model",
        cost_model,
        "--json",
        folder / "out.json",
    )
    seconds, peak = _measured(REPLAY, "replay", folder / "dump", *options)
    rows = json.loads((folder / "out.json").read_text())["rows"]
    return (
        {policy: [row for row in rows if row["policy"] == policy] for policy in POLICIES},
        seconds,
        peak,
    )


def _measured(program: str, *arguments: object) -> tuple[float, float]:
    """Seconds and peak MiB of a Python process, start and imports included."""
    start = time.monotonic()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - start, int(done.stdout.split()[-1]) / 1024


def _heading(placement: str, cost_model: str) -> str:
    """A table's first lines, in Markdown."""
    names = [
        *POLICIES,
        *(f"copies, {policy}" for policy in COPIED),
        "own counts over 1% above home in",
    ]
    unit = "rows" if cost_model == "rows" else f"time ({cost_model})"
    return (
        f"\nExperts {placement}; {unit} of the slowest rank over those of the mean rank at home; extra copies a token\n"
        f"| EP | N | {' | '.join(names)} |\n" + "|---" * (2 + len(names)) + "|"
    )


def _line(rows: dict[str, list[dict]], shape: Shape) -> str:
    mean = sum(row["mean"] for row in rows["home"])
    cells = [f"{_cost(rows[policy]) / mean:.3f}" if rows[policy] else "" for policy in POLICIES]
    for policy in COPIED:
        copies = [row["extra_copies"] for row in rows[policy]]
        cells.append(f"{sum(copies) / len(copies):.4f}" if copies else "")
    both = zip(rows["own-counts"], rows["home"], strict=True)
    worse = sum(own["max"] > WORSE * home["max"] for own, home in both) / len(rows["home"])
    tokens = (
        f"{shape.tokens}, odd ranks {max(1, shape.tokens // 8)}" if shape.uneven else shape.tokens
    )
    return f"| {shape.ranks} | {tokens} | {' | '.join(cells)} | {worse:.1%} |"


def _cost(rows: list[dict]) -> float:
    return sum(row["max"] for row in rows)


def _failures(rows: dict[str, list[dict]], shape: str) -> list[str]:
    missed = sum(row["max"] != row["optimum"] for row in rows["live"])
    failures = [f"{shape}: live counts missed the optimum {missed} times"] if missed else []
    own, home = _cost(rows["own-counts"]), _cost(rows["home"])
    if own > home:
        failures.append(f"{shape}: own counts cost {own / home:.4f} of home")
    return failures


if __name__ == "__main__":
    sys.exit(main())
