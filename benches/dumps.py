"""Dumps as sglang's recorder writes them, for ``waterfill-rs replay``: ``dumps.py FOLDER --ranks 8 --tokens 1024``.

FOLDER gets ``dump``, one file a rank (mode per_token, experts in order), and ``packed.json``, a placement for it. The
routing is synthetic (``synthetic_routing.py``), or that of ``--routing ROUTING.npz``: ``topk``, integers
``[tokens, layers, K]``, and ``offsets`` ``[prompts + 1]``, where prompts begin.

Odd prompts are written, and experts are packed by what even prompts routed: packing by the tokens that are replayed
flatters. Up to 256 tokens over all ranks a pass is decode, one token of each prompt. Else ranks have whole prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import synthetic_routing

PASSES = 4
DECODE = 256
"""Tokens over all ranks up to which a pass is decode."""
SKIPPED = (20, 40, 80)
"""Tokens of a prompt before its first in decode; before another of the same prompt, where there are too few prompts."""


@dataclass(frozen=True)
class Routing:
    """Expert ids ``[tokens, layers, K]`` of each prompt to be replayed, and of all others together; the number of experts."""

    replayed: list[np.ndarray]
    unseen: np.ndarray
    experts: int

    @property
    def layers(self) -> int:
        return self.unseen.shape[1]


def read(file: Path | None) -> Routing:
    """The recorded routing of ``file``; synthetic where it is None.

    Experts are those that its entry ``experts`` says, else the highest id and one more, which has to be a power of two.

    Raises:
        ValueError: neither holds.
    """
    if file is None:
        return split(*synthetic_routing.routing())
    with np.load(file) as content:
        topk, offsets = content["topk"].astype(np.int32), content["offsets"]
        if "experts" in content:
            return split(topk, offsets, int(content["experts"]))
    highest = int(topk.max())
    if (highest + 1) & highest:
        raise ValueError(
            f"{file}: the highest id is {highest}, and {highest + 1} experts are no power of two: "
            "add an entry 'experts' with their number"
        )
    return split(topk, offsets)


def split(topk: np.ndarray, offsets: np.ndarray, experts: int | None = None) -> Routing:
    prompts = [topk[offsets[i] : offsets[i + 1]] for i in range(len(offsets) - 1)]
    return Routing(
        prompts[1::2], np.concatenate(prompts[::2]), experts or 1 << int(topk.max()).bit_length()
    )


def passes(prompts: list[np.ndarray], ranks: int, tokens: int) -> list[np.ndarray]:
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


def write(
    folder: Path, passes: list[np.ndarray], ranks: int, experts: int, uneven: bool = False
) -> None:
    """One file a rank into a new folder, experts in order. ``uneven``: odd ranks have an eighth of their tokens."""
    import torch

    folder.mkdir(parents=True)
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


def trivial(layers: int, experts: int) -> np.ndarray:
    """``[layers, experts]``, the expert at each place: in order."""
    return np.tile(np.arange(experts), (layers, 1))


def packed(topk: np.ndarray, experts: int, ranks: int) -> np.ndarray:
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


def write_placement(file: Path, mapping: np.ndarray) -> None:
    """As ``waterfill-rs replay --placement`` reads it."""
    file.write_text(json.dumps({"physical_to_logical_map": mapping.tolist()}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--routing", type=Path, metavar="ROUTING.npz")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="a rank")
    parser.add_argument(
        "--uneven", action="store_true", help="ranks with odd numbers have an eighth of the tokens"
    )
    asked = parser.parse_args()
    routing = read(asked.routing)
    if asked.ranks < 1 or routing.experts % asked.ranks:
        parser.error(f"{routing.experts} experts do not divide over {asked.ranks} ranks")
    made = passes(routing.replayed, asked.ranks, asked.tokens)
    if not made:
        held = sum(map(len, routing.replayed))
        parser.error(
            f"{asked.ranks} ranks of {asked.tokens} tokens: the odd prompts have {held} tokens"
        )
    dump, placement = asked.folder / "dump", asked.folder / "packed.json"
    if dump.exists():
        parser.error(f"{dump} is there already: give another folder")
    write(dump, made, asked.ranks, routing.experts, asked.uneven)
    write_placement(placement, packed(routing.unseen, routing.experts, asked.ranks))
    print(f"waterfill-rs replay {dump} --placement {placement}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
