"""Placements of the shared rows on real routing, beside shared experts at home: ``routing.py ROUTING.npz``.

ROUTING.npz holds ``topk``, integers ``[tokens, layers, K]``, and ``offsets`` ``[prompts + 1]``, where prompts begin. Odd
prompts are replayed. Experts lie in order (trivial), and packed by what even prompts routed: packing by the tokens that
are replayed flatters. Up to 256 tokens over all ranks a pass is decode, one token of each prompt. Else ranks have whole
prompts.

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

import numpy as np

RANKS = (8, 16, 32)
TOKENS = (8, 32, 64, 128, 256, 1024)
PASSES = 4
DECODE = 256
"""Tokens over all ranks up to which a pass is decode."""
SKIPPED = (20, 40, 80)
"""Tokens of a prompt before its first in decode; before another of the same prompt, where there are too few prompts."""
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
    with np.load(arguments.routing) as content:
        topk, offsets = content["topk"].astype(np.int32), content["offsets"]
    experts = 1 << int(topk.max()).bit_length()
    replayed = [topk[offsets[i] : offsets[i + 1]] for i in range(1, len(offsets) - 1, 2)]
    unseen = np.concatenate(
        [topk[offsets[i] : offsets[i + 1]] for i in range(0, len(offsets) - 1, 2)]
    )
    torch_alone = _measured(TORCH_ALONE)[1]
    failures = []
    for placement in ("trivial", "packed"):
        print(_heading(placement, arguments.cost_model), flush=True)
        for ranks in arguments.ep:
            for tokens in arguments.tokens:
                passes = _passes(replayed, ranks, tokens)
                if not passes:
                    continue
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    _write(folder / "dump", passes, ranks, experts, arguments.uneven)
                    mapping = (
                        _trivial(topk, experts)
                        if placement == "trivial"
                        else _packed(unseen, experts, ranks)
                    )
                    (folder / "map.json").write_text(
                        json.dumps({"physical_to_logical_map": mapping.tolist()})
                    )
                    rows, seconds, peak = _replay(folder, arguments.cost_model)
                print(_line(rows, ranks, tokens), flush=True)
                failures += _failures(rows, f"{placement}, EP{ranks}, {tokens} tokens")
                if seconds > MOST_SECONDS or peak - torch_alone > MOST_MIB:
                    failures.append(
                        f"EP{ranks}, {tokens} tokens: {seconds:.1f} s, {peak - torch_alone:.0f} MiB"
                    )
                print(
                    f"  {seconds:.1f} s, {peak - torch_alone:.0f} MiB beyond torch", file=sys.stderr
                )
    print("\n".join(failures))
    return int(bool(failures))


def _arguments() -> argparse.Namespace:
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("routing", type=Path, metavar="ROUTING.npz")
    parser.add_argument("--ep", type=numbers, default=RANKS, help="EP sizes, like 8,16")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="tokens a rank, like 8,64")
    parser.add_argument(
        "--uneven", action="store_true", help="ranks with odd numbers have an eighth of the tokens"
    )
    parser.add_argument("--cost-model", default="rows", help="as waterfill-rs replay takes it")
    return parser.parse_args()


def _passes(prompts: list[np.ndarray], ranks: int, tokens: int) -> list[np.ndarray]:
    """Up to ``PASSES`` times ids ``[ranks * tokens, layers, K]``; none where the prompts do not have that many."""
    draws, needed = np.random.default_rng(0), ranks * tokens
    if needed <= DECODE:
        order = draws.permutation(len(prompts))
        streams = [prompts[i][first:] for first in SKIPPED for i in order]
        long = [stream for stream in streams if len(stream) >= PASSES][:needed]
        if len(long) < needed:
            return []
        return [np.stack([stream[step] for stream in long]) for step in range(PASSES)]
    held = sum(map(len, prompts))
    count = min(PASSES, held // needed)
    orders = (draws.permutation(len(prompts)) for _ in range(count))
    return [np.concatenate([prompts[i] for i in order])[:needed] for order in orders]


def _write(folder: Path, passes: list[np.ndarray], ranks: int, experts: int, uneven: bool) -> None:
    """As sglang's recorder in mode per_token, one file a rank, experts in order. ``uneven``: odd ranks have an eighth."""
    import torch

    folder.mkdir()
    layers = passes[0].shape[1]
    places = torch.arange(experts).repeat(layers, 1)
    for rank in range(ranks):
        records = []
        for number, ids in enumerate(passes):
            mine = np.split(ids, ranks)[rank]
            if uneven and rank % 2:
                mine = mine[: max(1, len(mine) // 8)]
            mode = 2 if len(ids) <= DECODE else 1
            record = {
                "forward_pass_id": number,
                "rank": rank,
                "forward_mode": mode,
                "topk_ids_of_layer": torch.from_numpy(mine).transpose(0, 1).contiguous(),
            }
            records.append({**record, "gatherer_key": "primary", "misc_objects": []})
        content = {"records": records, "last_physical_to_logical_map": places}
        torch.save(content, folder / f"expert_distribution_recorder_0.0_{rank}.pt")


def _trivial(topk: np.ndarray, experts: int) -> np.ndarray:
    return np.tile(np.arange(experts), (topk.shape[1], 1))


def _packed(topk: np.ndarray, experts: int, ranks: int) -> np.ndarray:
    """``[layers, experts]``, the expert at each place: the heaviest expert left to the lightest rank with room."""
    mapping = np.empty((topk.shape[1], experts), np.int64)
    room = experts // ranks
    for layer, found in enumerate(mapping):
        rows = np.bincount(topk[:, layer].ravel(), minlength=experts)
        held: list[list[int]] = [[] for _ in range(ranks)]
        for expert in np.argsort(-rows, kind="stable"):
            open_ranks = [own for own in held if len(own) < room]
            min(open_ranks, key=lambda own: rows[own].sum()).append(int(expert))
        found[:] = [expert for own in held for expert in own]
    return mapping


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


def _line(rows: dict[str, list[dict]], ranks: int, tokens: int) -> str:
    mean = sum(row["mean"] for row in rows["home"])
    cells = [f"{_cost(rows[policy]) / mean:.3f}" if rows[policy] else "" for policy in POLICIES]
    for policy in COPIED:
        copies = [row["extra_copies"] for row in rows[policy]]
        cells.append(f"{sum(copies) / len(copies):.4f}" if copies else "")
    both = zip(rows["own-counts"], rows["home"], strict=True)
    worse = sum(own["max"] > WORSE * home["max"] for own, home in both) / len(rows["home"])
    return f"| {ranks} | {tokens} | {' | '.join(cells)} | {worse:.1%} |"


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
