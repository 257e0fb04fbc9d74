"""A placement of one layer's experts, replicas among them, made for joint plans of workloads that vary.

A *workload* is rows by logical expert ``[E]``. What counts is the slowest rank after a joint plan, above all of the worst
workload, and of traffic that nobody has seen. Shared rows are left out: they are the reserve.

1. Replicas go one by one to the expert that has most rows in any workload, over its replicas to the power of ``BREADTH``.
   A joint plan splits an expert's rows as it likes, so many experts with two replicas serve it better than few with many.
2. Experts with replicas are placed first. Each rank gets about as many, and an expert's replicas join ranks that no chain of
   replicas joined before: along such chains a joint plan moves rows from any rank to any other.
3. The other experts go to the rank that stays lightest over all workloads, those with most rows first.
   Where ranks cannot have equally many *primary replicas* then (``primaries.py``), a few swaps see to it (``repair.py``).
4. A local search swaps experts of the slowest rank and of others, never replicas.
5. Each rank's primary replicas come first, and its redundant ones last. Which experts it holds stays.

Searches judged by resampled workloads too, or that moved replicas, or the best of several starts, were no better on real
workloads that they had not seen: what serves those is that the chains join all ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import waterfill_rs
from waterfill_rs.placement import primaries
from waterfill_rs.placement.repair import repaired

__all__ = ["check", "even", "joint", "place", "resampled", "scaled"]

Rows = list[int]
"""``[E]``"""

ROWS = 1_000_000
"""Of a workload in a layer: each has the same say."""
BREADTH = 1.5
"""Of the values tried (1, 1.5, 2, 3) the best on real workloads."""
SPREAD = 0.3
"""Of the logarithm of an expert's rows, between a workload and a resampled one (standard deviation)."""
SEED = 20261127
_SWAPS = 12
"""Tried for one slowest rank, the most promising first."""
_FAILURES = 6
"""The search ends after so many slowest ranks in a row without a swap that helps."""
_STEPS = 400
"""The search ends after so many slowest ranks."""
_ROUNDED = 2
"""Rows below the slowest rank that are no room: plans are in whole rows."""


def check(experts: int, ranks: int, redundant: int, ranks_per_host: int) -> None:
    """Is there such a placement? Whether the experts divide over the ranks is ``placements.check_divides``'s to say.

    Raises:
        ValueError: naming the option, its number, and what would do.
    """
    most = experts * (ranks - 1)
    if redundant > most:
        raise ValueError(
            f"--redundant {redundant}: no rank has two replicas of an expert, so {experts} experts on {ranks} ranks have at most "
            f"{most} redundant ones: give no more"
        )
    if ranks_per_host < 1 or ranks % ranks_per_host:
        raise ValueError(
            f"--ranks-per-host {ranks_per_host}: {ranks} ranks do not divide over such hosts: give a divisor of {ranks}"
        )


def scaled(rows: Sequence[float]) -> Rows:
    """The same shares of ``ROWS`` rows; nothing stays nothing."""
    total = sum(rows)
    return [round(one * ROWS / total) for one in rows] if total else [0] * len(rows)


def resampled(workload: Sequence[int], number: int, seed: int = SEED) -> list[Rows]:
    """So many workloads near this one: each expert's rows times log-normal noise. One seed gives one answer."""
    draws = random.Random(seed)
    return [
        scaled([max(rows, 1) * math.exp(draws.gauss(0, SPREAD)) for rows in workload])
        for _ in range(number)
    ]


def even(mapping: Sequence[int], rows: Sequence[int], ranks: int) -> float:
    """max/mean of the ranks' rows where an expert's rows are split evenly over its replicas."""
    replicas = [0] * len(rows)
    for expert in mapping:
        replicas[expert] += 1
    share = [rows[expert] / replicas[expert] for expert in mapping]
    return max(primaries.by_rank(share, ranks)) * ranks / sum(rows)


def joint(mapping: Sequence[int], rows: Sequence[int], ranks: int) -> float:
    """max/mean of the ranks' rows after a joint plan, without shared rows."""
    return _plan(mapping, rows, ranks).optimum * ranks / sum(rows)


def place(
    workloads: Sequence[Sequence[int]],
    *,
    ranks: int,
    redundant: int,
    ranks_per_host: int = 1,
) -> list[int]:
    """Where one layer's experts stand, ``[P]``: the logical expert of each physical one. Equal workloads, equal answers.

    Args:
        workloads: rows by logical expert, ``[E]`` each; those without a row are left out.
        ranks_per_host: replicas of an expert are spread evenly over hosts of so many ranks, where there is room.

    Raises:
        ValueError: if there is no such placement, or no workload has a row.
    """
    given = [scaled(workload) for workload in workloads if any(workload)]
    if not given:
        raise ValueError("no workload has a row in this layer: give one that has")
    experts = len(given[0])
    check(experts, ranks, redundant, ranks_per_host)
    if (experts + redundant) % ranks:
        raise ValueError(f"{experts} + {redundant} experts do not divide over {ranks} ranks")
    held = Held(experts, ranks, redundant, ranks_per_host)
    start(held, given)
    level_primaries(held, given)
    search(held, given)
    return primaries.first(held.mapping(), given, ranks)


class Held:
    """Which experts each rank holds, while that changes. No rank holds an expert twice.

    ``of``: the experts of each rank. ``on``: the ranks of each expert. ``slots``: how many experts a rank has in the end.
    """

    def __init__(self, experts: int, ranks: int, redundant: int, ranks_per_host: int = 1) -> None:
        self.ranks = ranks
        self.slots = (experts + redundant) // ranks
        self.of: list[list[int]] = [[] for _ in range(ranks)]
        self.on: list[set[int]] = [set() for _ in range(experts)]
        self.ranks_per_host = ranks_per_host

    def mapping(self) -> list[int]:
        """``[P]``"""
        return [expert for held in self.of for expert in held]

    def stand_as(self, mapping: Sequence[int]) -> None:
        """``[P]``, other places of the same experts."""
        slots = self.slots
        self.of = [list(mapping[rank * slots : (rank + 1) * slots]) for rank in range(self.ranks)]
        for on in self.on:
            on.clear()
        for rank, held in enumerate(self.of):
            for expert in held:
                self.on[expert].add(rank)

    def beside(self, expert: int, rank: int) -> int:
        """How many replicas of the expert the rank's host holds."""
        host = rank // self.ranks_per_host
        return sum(other // self.ranks_per_host == host for other in self.on[expert])

    def put(self, expert: int, rank: int) -> None:
        self.of[rank].append(expert)
        self.on[expert].add(rank)

    def take(self, expert: int, rank: int) -> None:
        self.of[rank].remove(expert)
        self.on[expert].remove(rank)

    def swap(self, rank: int, slot: int, other: int, other_slot: int) -> None:
        """Two experts, neither of which is on both ranks. Swapped again, all is as before."""
        mine, theirs = self.of[rank][slot], self.of[other][other_slot]
        self.of[rank][slot], self.of[other][other_slot] = theirs, mine
        self.on[mine] ^= {rank, other}
        self.on[theirs] ^= {rank, other}


def start(held: Held, workloads: list[Rows]) -> None:
    """Steps 1 to 3, for a ``held`` without experts."""
    experts = len(held.on)
    most = [max(one) for one in zip(*workloads, strict=True)]
    replicas = _replicas(most, held)
    shares = [[rows[e] / replicas[e] for rows in workloads] for e in range(experts)]
    loads = [[0.0] * len(workloads) for _ in range(held.ranks)]
    joined = list(range(held.ranks))  # The least rank that a chain of replicas joins each one to.

    def fitness(expert: int, rank: int) -> tuple[float, ...]:
        """Of a rank with room; the least is the best."""
        after = [load + more for load, more in zip(loads[rank], shares[expert], strict=True)]
        if replicas[expert] == 1:
            return max(after), sum(after)
        chained = any(joined[rank] == joined[other] for other in held.on[expert])
        return held.beside(expert, rank), len(held.of[rank]), chained, max(after), sum(after)

    for expert in sorted(
        range(experts), key=lambda e: (replicas[e] == 1, -most[e] / replicas[e], e)
    ):
        for _ in range(replicas[expert]):
            room = [rank for rank in range(held.ranks) if len(held.of[rank]) < held.slots]
            can = [rank for rank in room if rank not in held.on[expert]]
            if can:
                rank = min(can, key=lambda rank: fitness(expert, rank))
            else:
                rank = _make_room(held, expert, room[0])
            held.put(expert, rank)
            chain = {joined[one] for one in held.on[expert]}
            joined = [min(chain) if one in chain else one for one in joined]
            for changed in {rank, room[0]} if not can else {rank}:
                own = [shares[e] for e in held.of[changed]]
                loads[changed] = [sum(one) for one in zip(*own, strict=True)]


def _replicas(most: list[int], held: Held) -> list[int]:
    """Step 1: ``[E]``, one for each rank at most."""
    replicas = [1] * len(most)
    for _ in range(held.slots * held.ranks - len(most)):
        can = (e for e, number in enumerate(replicas) if number < held.ranks)
        replicas[max(can, key=lambda e: most[e] / replicas[e] ** BREADTH)] += 1
    return replicas


def _make_room(held: Held, expert: int, room: int) -> int:
    """A full rank without the expert gives another one to the rank ``room``, and is the answer.

    There is one: not all ranks hold the expert, and all that have room do. And ``room`` holds fewer others than the full rank
    does, so one of these is not on ``room``.
    """
    full = min(
        (rank for rank in range(held.ranks) if rank not in held.on[expert]),
        key=lambda rank: (held.beside(expert, rank), rank),
    )
    moved = min(
        (one for one in held.of[full] if room not in held.on[one]),
        key=lambda one: (len(held.on[one]), one),
    )
    held.take(moved, full)
    held.put(moved, room)
    return full


def level_primaries(held: Held, workloads: list[Rows]) -> None:
    """The end of step 3: each rank can have as many primary replicas, if experts divide over ranks and swaps do it."""
    most = [max(one) for one in zip(*workloads, strict=True)]
    mapping = repaired(held.mapping(), most, held.ranks, held.ranks_per_host)
    held.stand_as(mapping)


def search(held: Held, workloads: list[Rows]) -> None:
    """Step 4. It never makes the worst of the workloads worse."""
    draws = random.Random(SEED)
    least = _measure(held, workloads)
    failures = 0
    for _ in range(_STEPS):
        if failures == _FAILURES:
            break
        mapping = held.mapping()
        worst = max(workloads, key=lambda rows: joint(mapping, rows, held.ranks))
        failures += 1
        for swap in _swaps(held, _plan(mapping, worst, held.ranks).replica_rows, draws):
            held.swap(*swap)
            found = _measure(held, workloads)
            if found < least:
                least, failures = found, 0
                break
            held.swap(*swap)


def _swaps(held: Held, rows: list[int], draws: random.Random) -> list[tuple[int, int, int, int]]:
    """What may relieve one of the slowest ranks, most promising first: those that leave it and the other most nearly equal.

    Args:
        rows: ``[P]``, as a joint plan has them.
    """
    slots = held.slots
    load = primaries.by_rank(rows, held.ranks)
    slowest = [rank for rank in range(held.ranks) if load[rank] >= max(load) - _ROUNDED]
    hot = draws.choice(slowest)
    alone = [[i for i, e in enumerate(of) if len(held.on[e]) == 1] for of in held.of]
    found = []
    for other in range(held.ranks):
        gap = load[hot] - load[other]
        for i in alone[hot] if other not in slowest else ():
            for j in alone[other]:
                moved = rows[hot * slots + i] - rows[other * slots + j]
                if 0 < moved < gap:
                    found.append((abs(gap / 2 - moved), (hot, i, other, j)))
    return [swap for _, swap in sorted(found)[:_SWAPS]]


def _measure(held: Held, workloads: list[Rows]) -> tuple[float, float]:
    """max/mean of the worst workload, then of all together."""
    mapping = held.mapping()
    found = [joint(mapping, rows, held.ranks) for rows in workloads]
    return max(found), sum(found)


def _plan(mapping: Sequence[int], rows: Sequence[int], ranks: int) -> waterfill_rs.Plan:
    """A joint plan splits an expert's rows anew, so here all of them come at its first replica."""
    routed, left = [], list(rows)
    for expert in mapping:
        routed.append(left[expert])
        left[expert] = 0
    return waterfill_rs.plan(
        routed, [0] * ranks, ranks=ranks, physical_to_logical=mapping, policy="joint"
    )
