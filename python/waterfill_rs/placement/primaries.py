"""Which replica of each expert a server uses in decode, its *primary replica*, and slots in that order.

In decode an expert's weights take longer than its rows, so a second replica in use costs more than it levels. Where the
first ``E / R`` slots of all ``R`` ranks hold each of ``E`` experts once, these are the primary replicas. A server leaves the
other slots out, and runs decode as if it had no redundant experts.

1. A plan of one replica an expert gives each rank as many active experts (``policy="single_replica"``), for the mean of the
   workloads and for each of them. The choice whose worst workload is most level is the start.
2. A search moves experts around: one from a slowest rank to another of its ranks, one from there, and so on, until one comes
   back to the first rank. So each rank has as many as before. It keeps what makes the slowest rank faster.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import waterfill_rs

__all__ = ["are_first", "by_rank", "counts", "fewest", "first", "level"]

Number = TypeVar("Number", int, float)

_SEED = 20261127
_FAILURES = 300
"""The search ends after so many ways in a row that do not help. Beside integer programs, three times as many found no more."""


def first(mapping: Sequence[int], workloads: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """``[P]``, each rank's experts with its primary replicas first. As it was, if no choice has as many on each rank.

    Args:
        mapping: ``[P]``, the logical expert of each physical one, none twice on a rank.
        workloads: rows by logical expert, ``[E]`` each, with the same sum.
    """
    experts = len(workloads[0])
    if fewest(mapping, experts, ranks) * ranks != experts:
        return list(mapping)
    mean = [sum(rows) // len(rows) for rows in zip(*workloads, strict=True)]
    starts = [_Choice(mapping, _chosen(mapping, rows, ranks), ranks) for rows in [mean, *workloads]]
    best = min(starts, key=lambda choice: max(map(max, map(choice.loads, workloads))))
    best.search(workloads)
    slots = len(mapping) // ranks
    primary = set(best.at)
    order = sorted(range(len(mapping)), key=lambda p: (p // slots, p not in primary))
    return [mapping[p] for p in order]


def are_first(mapping: Sequence[int], experts: int, ranks: int) -> bool:
    """Do the first ``E / R`` slots of all ranks hold each expert once?"""
    return experts % ranks == 0 and len(set(_primaries(mapping, experts, ranks))) == experts


def level(mapping: Sequence[int], rows: Sequence[int], ranks: int) -> float:
    """max/mean of the ranks' rows on primary replicas alone, which are first in ``mapping``."""
    of_primaries = [rows[expert] for expert in _primaries(mapping, len(rows), ranks)]
    return max(by_rank(of_primaries, ranks)) * ranks / sum(rows)


def fewest(mapping: Sequence[int], experts: int, ranks: int) -> int:
    """Primary replicas of the rank with most, in the choice that has the fewest there."""
    return max(by_rank(counts(mapping, experts, ranks), ranks))


def counts(mapping: Sequence[int], experts: int, ranks: int) -> list[int]:
    """``[P]`` 1 for each primary replica of such a choice, else 0."""
    at = set(_chosen(mapping, [1] * experts, ranks))
    return [int(p in at) for p in range(len(mapping))]


def by_rank(values: Sequence[Number], ranks: int) -> list[Number]:
    """Sums ``[R]`` of ``[P]``."""
    slots = len(values) // ranks
    return [sum(values[rank * slots : (rank + 1) * slots]) for rank in range(ranks)]


def _chosen(mapping: Sequence[int], rows: Sequence[int], ranks: int) -> list[int]:
    """The physical expert ``[E]`` that takes all rows of each logical one, as few active ones as can be on the fullest rank."""
    routed = [0] * len(mapping)
    place_of = {expert: p for p, expert in reversed(list(enumerate(mapping)))}
    for expert, p in place_of.items():
        routed[p] = max(rows[expert], 1)  # An expert without rows needs a place too.
    plan = waterfill_rs.plan(
        routed, [0] * ranks, ranks=ranks, physical_to_logical=mapping, policy="single_replica"
    )
    place_of |= {mapping[p]: p for p, taken in enumerate(plan.replica_rows) if taken}
    return [place_of[expert] for expert in range(len(rows))]


def _primaries(mapping: Sequence[int], experts: int, ranks: int) -> list[int]:
    """``[E]``, the logical experts in the first slots of each rank."""
    slots = len(mapping) // ranks
    return [expert for p, expert in enumerate(mapping) if p % slots < experts // ranks]


class _Choice:
    """A primary replica of each expert, while that changes.

    ``at``: the physical expert ``[E]``. ``movable``: of each rank, the experts with their primary replica there and others.
    """

    def __init__(self, mapping: Sequence[int], at: list[int], ranks: int) -> None:
        self.at = at
        self._ranks = ranks
        self._slots = len(mapping) // ranks
        self._replicas: list[list[int]] = [[] for _ in at]
        for p, expert in enumerate(mapping):
            self._replicas[expert].append(p)
        self._movable: list[list[int]] = [[] for _ in range(ranks)]
        for expert, p in enumerate(at):
            if len(self._replicas[expert]) > 1:
                self._movable[self._rank(p)].append(expert)

    def _rank(self, physical: int) -> int:
        return physical // self._slots

    def loads(self, rows: Sequence[int]) -> list[int]:
        """``[R]``"""
        found = [0] * self._ranks
        for expert, p in enumerate(self.at):
            found[self._rank(p)] += rows[expert]
        return found

    def search(self, workloads: Sequence[Sequence[int]]) -> None:
        """Step 2. It never makes the worst of the workloads worse."""
        draws = random.Random(_SEED)
        loads = [self.loads(rows) for rows in workloads]
        failures = 0
        while failures < _FAILURES:
            failures += 1
            most = max(map(max, loads))
            slowest = [rank for of in loads for rank, load in enumerate(of) if load == most]
            way = self._way(draws.choice(slowest), draws)
            after = [self._after(way, *both) for both in zip(loads, workloads, strict=True)]
            if max(map(max, after)) < most:
                self._move(way)
                loads, failures = after, 0

    def _way(self, rank: int, draws: random.Random) -> list[tuple[int, int]]:
        """Experts and the physical ones that they move to, back to ``rank`` by distinct ranks; empty where it led elsewhere."""
        way: list[tuple[int, int]] = []
        passed, at = {rank}, rank
        while self._movable[at]:
            expert = draws.choice(self._movable[at])
            to = draws.choice([p for p in self._replicas[expert] if p != self.at[expert]])
            way.append((expert, to))
            at = self._rank(to)
            if at in passed:
                break
            passed.add(at)
        return way if way and at == rank else []

    def _after(
        self, way: list[tuple[int, int]], loads: list[int], rows: Sequence[int]
    ) -> list[int]:
        """The ranks' rows once the experts have moved."""
        found = loads.copy()
        for expert, to in way:
            found[self._rank(self.at[expert])] -= rows[expert]
            found[self._rank(to)] += rows[expert]
        return found

    def _move(self, way: list[tuple[int, int]]) -> None:
        for expert, to in way:
            self._movable[self._rank(self.at[expert])].remove(expert)
            self._movable[self._rank(to)].append(expert)
            self.at[expert] = to
