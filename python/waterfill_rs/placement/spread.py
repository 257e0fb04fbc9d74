"""Where redundant experts stand in a server that was given no placement: the same in every layer, without any counts.

*Spread* places have three properties that trivial ones lack: each rank has as many primary replicas, they come first, and
chains of replicas join all ranks, so that a joint plan can move rows from any rank to any other.

1. Experts are dealt to the ranks in turn: neighbours, which are often hot together, come on different ranks.
2. Round by round each rank takes a *guest*, an expert of another rank: of the next rank first, then of ranks further away.
   A rank gives its experts in order, and no rank takes one that it holds.

Hosts do not matter. Dealt to the ranks of one host, neighbours would make that host the slowest.
"""

from __future__ import annotations

__all__ = ["spread"]


def spread(experts: int, redundant: int, ranks: int) -> list[int]:
    """One layer's map ``[P]``: the logical expert of each physical one, each rank's own experts first, none twice on a rank.

    Raises:
        ValueError: if the experts, or the redundant ones, do not divide over the ranks, or are too many to stand apart.
    """
    if experts < 1 or experts % ranks or redundant % ranks:
        raise ValueError(f"{experts} + {redundant} experts do not divide over {ranks} ranks each")
    if not 0 <= redundant <= experts * (ranks - 1):
        raise ValueError(
            f"{redundant} redundant experts have no places on {ranks} ranks where no rank has one of {experts} experts twice"
        )
    own = [list(range(rank, experts, ranks)) for rank in range(ranks)]
    held = [list(of) for of in own]
    given = [0] * ranks
    rounds = redundant // ranks
    for turn in range(rounds):
        step = 1 + turn * max(1, (ranks - 1) // rounds) % (ranks - 1)
        for rank in range(ranks):
            givers = [(rank + step + more) % ranks for more in range(ranks)]
            held[rank].append(_guest(held[rank], givers, own, given))
    return [expert for of in held for expert in of]


def _guest(held: list[int], givers: list[int], own: list[list[int]], given: list[int]) -> int:
    """The next expert of the first rank of ``givers`` that has one which is not ``held``. ``given``: how many each rank gave."""
    for rank in givers:
        for more in range(len(own[rank])):
            expert = own[rank][(given[rank] + more) % len(own[rank])]
            if expert not in held:
                given[rank] += more + 1
                return expert
    raise AssertionError("a rank with a free slot does not hold all experts")
