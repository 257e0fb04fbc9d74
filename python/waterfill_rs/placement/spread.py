"""Where redundant experts stand in a server that was given no placement: the same in every layer, without any counts.

*Spread* places have three properties that trivial ones lack: each rank has as many primary replicas, they come first, and
chains of replicas join all ranks, so that a joint plan can move rows from any rank to any other.

1. Experts are dealt to the ranks of a host in turn: neighbours, which routers often choose together, come on different ranks.
   A host has the experts that it would have without redundant ones, so a token's own experts are on no more hosts.
2. Round by round each rank takes a *guest*, an expert of another rank: of the next rank first, then of ranks further away.
   A rank gives its experts in order, and no rank takes one that it holds.
"""

from __future__ import annotations

__all__ = ["spread"]


def spread(experts: int, redundant: int, ranks: int, ranks_per_host: int) -> list[int]:
    """One layer's map ``[P]``: the logical expert of each physical one, each rank's own experts first.

    A rank has an expert twice only where there are more physical experts than ``experts * ranks``.

    Args:
        ranks_per_host: hosts are left alone where the ranks do not divide over them.

    Raises:
        ValueError: if the experts, or the redundant ones with them, make no such map.
    """
    slots, odd = divmod(experts + redundant, ranks)
    if odd or experts < 1 or redundant < 0:
        raise ValueError(f"{experts} + {redundant} experts do not divide over {ranks} ranks")
    if ranks_per_host < 1 or ranks % ranks_per_host:
        ranks_per_host = ranks
    own = _dealt(experts, ranks, ranks_per_host)
    held = [list(of) for of in own]
    given = [0] * ranks
    rounds = slots - min(map(len, own))
    for turn in range(rounds):
        step = 1 + turn * max(1, (ranks - 1) // rounds) % max(1, ranks - 1)
        for rank in range(ranks):
            if len(held[rank]) < slots:
                hosts = [(rank + step + more) % ranks for more in range(ranks)]
                held[rank].append(_guest(held[rank], hosts, own, given))
    return [expert for of in held for expert in of]


def _dealt(experts: int, ranks: int, ranks_per_host: int) -> list[list[int]]:
    """The experts of each rank, before there are guests."""
    own: list[list[int]] = [[] for _ in range(ranks)]
    hosts = ranks // ranks_per_host
    for host in range(hosts):
        first, end = (-(-experts * one // hosts) for one in (host, host + 1))
        for expert in range(first, end):
            own[host * ranks_per_host + (expert - first) % ranks_per_host].append(expert)
    return own


def _guest(held: list[int], hosts: list[int], own: list[list[int]], given: list[int]) -> int:
    """The next expert of the first of ``hosts``, which are ranks, that has one which is not ``held``.

    Where all experts are held, the next one of the first that has any. ``given``: how many each rank gave, and goes on.
    """
    for twice in (False, True):
        for host in hosts:
            for more in range(len(own[host])):
                expert = own[host][(given[host] + more) % len(own[host])]
                if twice or expert not in held:
                    given[host] += more + 1
                    return expert
    raise AssertionError("there is an expert")
