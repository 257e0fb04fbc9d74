"""Tokens that dispatch sends with replicas: ``copies.py [ROUTING.npz] [--tokens 1024]``.

ROUTING.npz is that of ``routing.py``, which is synthetic without a file. Half of the prompts are routed, and ``waterfill-rs place``
places experts by the others. A *copy* is a token sent to a rank that is not its own, however many of its rows run there. Copies
of routed rows are counted, with three choices of replicas:

    primary   each expert on its primary replica
    live      a server's: the plan says how many rows of each source a replica runs, and rows fill replicas in order
    visited   the same rows of each source and replica, but rows first go where their token goes anyway

Ranks are threads at a real board. ``--unfused`` makes plans without shared rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dumps
import numpy as np
import torch
import torch.distributed as dist

from waterfill_rs import _native
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.placement import place

SHAPES = ((4, 16), (8, 16), (8, 32), (16, 16), (32, 32))
"""EP size and redundant experts."""
PATIENT = BoardSettings(cap_us=60_000_000)


def placed(routing: dumps.Routing, ranks: int, redundant: int) -> list[list[int]]:
    """The map ``[P]`` of each layer, by the prompts that are not routed."""
    columns = routing.unseen.transpose(1, 0, 2)
    rows = [np.bincount(ids.ravel(), minlength=routing.experts).tolist() for ids in columns]
    return [place.place([one], ranks=ranks, redundant=redundant) for one in rows]


def chosen(
    maps: Sequence[Sequence[int]], passes: Sequence[np.ndarray], ranks: int, fused: bool
) -> list[np.ndarray]:
    """Physical ids ``[ranks, tokens, layers, K]`` of each pass, given by primary replicas, as live plans choose them."""
    store, experts = dist.HashStore(), len(maps[0])
    redundant = experts - len(set(maps[0]))

    def run(rank: int) -> list[np.ndarray]:
        tables = ReplicaTables(ranks, redundant, torch.tensor(maps))
        member = Member(ranks, experts, rank)
        exchange = open_exchange(store, member, settings=PATIENT, replicas=tables)
        found = []
        for ids in passes:
            mine, layers = torch.from_numpy(np.split(ids, ranks)[rank]), []
            for layer in range(len(maps)):
                given = mine[:, layer].contiguous()
                if fused:
                    wide = exchange.expand(given, torch.ones(given.shape), 1.0, layer=layer)[0]
                    up = wide[:, :-1]
                else:
                    up = exchange.move_up(given, layer=layer)
                layers.append((up - up // (experts // ranks + 1)).numpy())
            found.append(np.stack(layers, axis=1))
        ended = exchange.tally()
        if ended["live"] != ended["calls"]:
            raise RuntimeError(
                f"rank {rank}: not all calls had a plan, so nothing is told: {ended}"
            )
        exchange.close()
        return found

    with ThreadPoolExecutor(ranks) as threads:
        of_ranks = list(threads.map(run, range(ranks)))
    return [np.stack(of_pass) for of_pass in zip(*of_ranks, strict=True)]


def copies(ids: np.ndarray, each: int) -> int:
    """Of physical ids ``[ranks, tokens, K]``, with ``each`` experts on a rank."""
    ranks = len(ids)
    visits = np.zeros((*ids.shape[:2], ranks), bool)
    np.put_along_axis(visits, ids // each, True, axis=2)
    visits[np.arange(ranks), :, np.arange(ranks)] = False
    return int(visits.sum())


def visited_first(ids: np.ndarray, mapping: Sequence[int], each: int, home: int) -> np.ndarray:
    """Ids ``[tokens, K]`` of one source with as many rows on each replica, first where their token goes anyway."""
    replicas: dict[int, list[int]] = {}
    for physical, logical in enumerate(mapping):
        replicas.setdefault(logical, []).append(physical)
    left = np.bincount(ids.ravel(), minlength=len(mapping)).tolist()
    out, visits, open_rows = ids.tolist(), [], []
    for token, row in enumerate(out):
        fixed = [p for p in row if len(replicas[mapping[p]]) == 1]
        visits.append({home, *(p // each for p in fixed)})
        open_rows += [(token, column) for column, p in enumerate(row) if p not in fixed]

    def take(token: int, column: int, options: list[int]) -> None:
        best = max(options, key=lambda p: left[p])
        left[best] -= 1
        out[token][column] = best
        visits[token].add(best // each)

    def options(token: int, column: int) -> tuple[list[int], list[int]]:
        """Replicas that have rows left, and those of them on visited ranks."""
        there = [p for p in replicas[mapping[ids[token, column]]] if left[p]]
        return there, [p for p in there if p // each in visits[token]]

    # First rows for which it matters where they go, then those that no visited rank takes, last those that any rank takes.
    for wanted in ("some", "none", "any"):
        waiting = []
        for token, column in open_rows:
            there, visited = options(token, column)
            if (
                wanted == "any"
                or (wanted == "none" and not visited)
                or 0 < len(visited) < len(there)
            ):
                take(token, column, visited or there)
            else:
                waiting.append((token, column))
        open_rows = waiting
    return np.array(out)


def judge(
    routing: dumps.Routing, passes: Sequence[np.ndarray], ranks: int, redundant: int, fused: bool
) -> tuple[int, int, int]:
    """Copies: primary, live, visited."""
    maps = placed(routing, ranks, redundant)
    each = len(maps[0]) // ranks
    first = np.array([_primary(ranks, mapping) for mapping in maps])
    given = [
        np.stack([first[layer][ids[:, layer]] for layer in range(len(maps))], axis=1).astype(
            np.int32
        )
        for ids in passes
    ]
    sums = [0, 0, 0]
    for ids, live in zip(given, chosen(maps, given, ranks, fused), strict=True):
        for layer, mapping in enumerate(maps):
            primary, lived = np.stack(np.split(ids[:, layer], ranks)), live[:, :, layer]
            of_ranks = enumerate(lived)
            best = np.stack([visited_first(one, mapping, each, rank) for rank, one in of_ranks])
            for i, choice in enumerate((primary, lived, best)):
                sums[i] += copies(choice, each)
    return sums[0], sums[1], sums[2]


def _primary(ranks: int, mapping: Sequence[int]) -> list[int]:
    """``[E]`` the primary replica of each logical expert."""
    primaries = _native.ReplicaTable(ranks, mapping).primaries
    of = dict(zip(mapping, primaries, strict=True))
    return [of[logical] for logical in range(len(of))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("routing", type=Path, metavar="ROUTING.npz", nargs="?")
    parser.add_argument("--tokens", type=int, default=1024, help="a rank (default: 1024)")
    parser.add_argument("--unfused", action="store_true", help="plans without shared rows")
    asked = parser.parse_args()
    routing = dumps.read(asked.routing)
    print(
        "| EP | redundant | tokens | passes | primary | live | visited | live over primary | visited over live |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for ranks, redundant in SHAPES:
        if (routing.experts + redundant) % ranks:
            continue
        passes = dumps.passes(routing.replayed, ranks, asked.tokens)
        if not passes:
            print(f"| {ranks} | {redundant} | {asked.tokens} | 0 |", flush=True)
            continue
        primary, live, visited = judge(routing, passes, ranks, redundant, not asked.unfused)
        tokens = len(passes) * ranks * asked.tokens * routing.layers
        each = " | ".join(f"{count / tokens:.3f}" for count in (primary, live, visited))
        more = f"{live / primary - 1:+.2%} | {visited / live - 1:+.2%}"
        print(
            f"| {ranks} | {redundant} | {asked.tokens} | {len(passes)} | {each} | {more} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
