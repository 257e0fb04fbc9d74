"""Swaps after which each rank of a map can have as many primary replicas (``primaries.py``), for maps that others made.

EPLB levels rows, and knows no primary replicas. In its maps a rank may have more experts that stand nowhere else than it may
have primary replicas, which are ``E / R``. It also makes *twins*: several replicas of an expert on one rank.

1. Each expert is given one of its ranks, and each rank takes ``E / R``: as many experts as can be, by augmenting paths.
2. If some are left out, ranks are *full* from which nobody can go to make room for them, and *free* if room can be made there.
   An expert of a full rank is swapped for one that a free rank can do without. Each swap lets one more expert in, and none
   could let in two, so they are as few as can be.
3. Of all such swaps one within a host is made, if there is one. Of these it is the one whose hotter rank then has the fewest
   rows.

The map stays as it was where no swap is left before all experts are in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

__all__ = ["repaired"]

_Swap = tuple[int, int, int, int]
"""A full rank, its expert, a free rank, and its expert."""
_NOWHERE = -1


def repaired(
    mapping: Sequence[int], rows: Sequence[float], ranks: int, ranks_per_host: int = 1
) -> list[int]:
    """``[P]``, a map with as many primary replicas on each rank. As it was, if it is so already or swaps do not make it so.

    No swap makes a twin. Equal arguments, equal answers.

    Args:
        mapping: ``[P]``, the logical expert of each physical one.
        rows: by logical expert ``[E]``, none below 0.
        ranks_per_host: swaps stay within hosts of so many ranks where they can. With 1 hosts do not matter.
    """
    divide = len(rows) % ranks == len(mapping) % ranks == 0
    if not divide or set(mapping) != set(range(len(rows))):
        return list(mapping)
    found = _Map(mapping, rows, ranks, ranks_per_host)
    while not found.are_all_in():
        best = found.best_swap()
        if best is None:
            return list(mapping)
        found.swap(*best)
    return found.row


class _Map:
    """A map ``row`` while it changes, and the rank that each expert is given."""

    def __init__(
        self, mapping: Sequence[int], rows: Sequence[float], ranks: int, ranks_per_host: int
    ) -> None:
        self.row = list(mapping)
        self._ranks_per_host = ranks_per_host
        self._slots = len(self.row) // ranks
        self._on: list[dict[int, int]] = [{} for _ in rows]
        """``[E]`` how many replicas each rank has, of those that have one."""
        for physical, expert in enumerate(self.row):
            self._put(expert, physical // self._slots)
        self._share = [of / sum(on.values()) for of, on in zip(rows, self._on, strict=True)]
        """``[E]`` rows of one replica, if they are split evenly."""
        self._load = [sum(self._share[e] for e in self._held(rank)) for rank in range(ranks)]
        self._at = [_NOWHERE] * len(rows)
        """``[E]``"""
        self._room = [len(rows) // ranks] * ranks
        self._full: set[int] = set()

    def are_all_in(self) -> bool:
        """Step 1, and the full ranks."""
        self._full.clear()
        for expert, at in enumerate(self._at):
            if at == _NOWHERE and not self._full.issuperset(self._on[expert]):
                self._give_rank(expert)
        return not self._full

    def _give_rank(self, expert: int) -> None:
        """Give it one of its ranks, once others have left for their other ranks; else all ranks that were asked are full."""
        came: dict[int, tuple[int, int]] = dict.fromkeys(self._on[expert], (expert, _NOWHERE))
        """Who wants to come to a rank, and from where."""
        queue = list(came)
        for rank in queue:
            if self._room[rank]:
                self._room[rank] -= 1
                while rank != _NOWHERE:
                    mover, before = came[rank]
                    self._at[mover] = rank
                    rank = before
                return
            for mover in self._movable(rank):
                for other in self._on[mover]:
                    if other not in came:
                        came[other] = mover, rank
                        queue.append(other)
        self._full |= came.keys()

    def _movable(self, rank: int) -> list[int]:
        """Experts that the rank was given, and that stand on others too."""
        return [e for e in self._held(rank) if self._at[e] == rank and len(self._on[e]) > 1]

    def _held(self, rank: int) -> list[int]:
        return self.row[rank * self._slots : (rank + 1) * self._slots]

    def best_swap(self) -> _Swap | None:
        """Steps 2 and 3. No swap leaves the hotter of two ranks below their mean, so most pairs of ranks need no look."""
        free = self._free()
        pairs = sorted(
            (self._are_apart(rank, other), (self._load[rank] + self._load[other]) / 2, rank, other)
            for rank in self._full
            for other in free
        )
        best: tuple[bool, float, _Swap] | None = None
        for apart, mean, rank, other in pairs:
            if best is not None and (apart, mean) > best[:2]:
                break
            for hotter, swap in self._swaps(rank, other, free):
                if best is None or (apart, hotter, swap) < best:
                    best = apart, hotter, swap
        return None if best is None else best[2]

    def _swaps(self, rank: int, other: int, free: set[int]) -> Iterator[tuple[float, _Swap]]:
        """Of a full and a free rank: for each expert of the latter the two of the former that level them best."""
        gap = self._load[rank] - self._load[other]
        mine = self._may_go(rank)
        for theirs in self._spare(other, free):
            if rank not in self._on[theirs]:
                share = self._share[theirs]
                at = bisect_left(mine, (share + gap / 2,))
                for my_share, expert in mine[max(at - 1, 0) : at + 1]:
                    moved = my_share - share
                    hotter = max(self._load[rank] - moved, self._load[other] + moved)
                    yield hotter, (rank, expert, other, theirs)

    def _may_go(self, rank: int) -> list[tuple[float, int]]:
        """Experts of a full rank that were left out, or given to full ranks: their shares and they, the least first."""
        of_full = self._full | {_NOWHERE}
        return sorted((self._share[e], e) for e in set(self._held(rank)) if self._at[e] in of_full)

    def _free(self) -> set[int]:
        free = {rank for rank, room in enumerate(self._room) if room}
        before = 0
        while before < len(free):
            before = len(free)
            free |= {
                at
                for on, at in zip(self._on, self._at, strict=True)
                if at not in free and not free.isdisjoint(on)
            }
        return free - {_NOWHERE}

    def _spare(self, rank: int, free: set[int]) -> list[int]:
        """Experts that a free rank can do without: given to others, twins, or on another free rank."""
        return [
            e
            for e in dict.fromkeys(self._held(rank))
            if self._at[e] != rank or self._on[e][rank] > 1 or self._on[e].keys() & free != {rank}
        ]

    def _are_apart(self, rank: int, other: int) -> bool:
        return rank // self._ranks_per_host != other // self._ranks_per_host

    def swap(self, rank: int, mine: int, other: int, theirs: int) -> None:
        """``mine`` goes from ``rank`` to ``other``, and ``theirs`` back. One replica of a twin goes."""
        for expert, source, to in ((mine, rank, other), (theirs, other, rank)):
            self._take(expert, source)
            self._put(expert, to)
            self._load[source] -= self._share[expert]
            self._load[to] += self._share[expert]
        here, there = self._slot(mine, rank), self._slot(theirs, other)
        self.row[here], self.row[there] = theirs, mine

    def _slot(self, expert: int, rank: int) -> int:
        return self.row.index(expert, rank * self._slots)

    def _put(self, expert: int, rank: int) -> None:
        self._on[expert][rank] = self._on[expert].get(rank, 0) + 1

    def _take(self, expert: int, rank: int) -> None:
        """Who has left the rank that it was given is left out."""
        self._on[expert][rank] -= 1
        if not self._on[expert][rank]:
            del self._on[expert][rank]
            if self._at[expert] == rank:
                self._at[expert] = _NOWHERE
                self._room[rank] += 1
