"""Placements of the shared rows compared, layer by layer: the one place where policies are scored."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import waterfill_rs
from waterfill_rs import _native

__all__ = ["POLICIES", "Batch", "Result", "compare"]

POLICIES = ("home", "sglang-static", "own-counts", "live")
"""In the order of tables. ``sglang-static`` is there only where its choices are given."""


@dataclass(frozen=True)
class Batch:
    """One rank's tokens in one layer: expert ids ``[rows, top_k]``, int32, and what is counted of them."""

    ids: tuple[int, int, int, int]
    owner: Any
    tokens: int
    counts: list[int]
    visits: list[int]

    @staticmethod
    def of(owner: Any, address: int, rows: int, top_k: int, *, experts: int, ranks: int) -> Batch:
        """Count the ids at ``address``, which ``owner`` keeps alive."""
        ids = (address, rows, top_k, 32)
        counts, visits, tokens = _native.unsafe_count_ptr(ids, experts, ranks)
        return Batch(ids, owner, tokens, counts, visits)

    def assign(self, quotas: list[int], rank: int) -> array[int]:
        """Each row's shared rank, ``[rows]`` int32, -1 for a row that is no token."""
        shared = array("i", bytes(4 * self.ids[1]))
        address, experts = shared.buffer_info()[0], len(self.counts)
        _native.unsafe_assign_ptr(self.ids, quotas, experts, rank, address)
        return shared

    def extra_copies(self, shared: array[int], rank: int) -> int:
        """Shared rows that go to a rank which their token neither is on nor visits."""
        address, experts, ranks = shared.buffer_info()[0], len(self.counts), len(self.visits)
        return _native.unsafe_traffic_ptr(self.ids, address, experts, ranks, rank)[0]


@dataclass(frozen=True)
class Result:
    """One layer, pass and policy. ``optimum`` is the least that any placement's slowest rank can have."""

    layer: int
    pass_id: int
    policy: str
    tokens: int
    routed_max: int
    max: int
    mean: float
    optimum: int
    extra_copies: float

    def as_json(self) -> dict[str, object]:
        """With the key ``pass``, which Python reserves."""
        fields = {**asdict(self), "pass": self.pass_id}
        del fields["pass_id"]
        return fields


def compare(
    batches: list[Batch], layer: int, pass_id: int, static: list[array[int]] | None = None
) -> Iterator[Result]:
    """The policies on one layer of one pass; ``batches`` is one a rank.

    ``static``: what sglang's static mode chose, each row's shared rank ``[rows]`` for each rank.
    """
    ranks = len(batches)
    routed = [sum(counts) for counts in zip(*(b.counts for b in batches), strict=True)]
    tokens = [batch.tokens for batch in batches]
    visits = [visit for batch in batches for visit in batch.visits]
    live = waterfill_rs.plan(routed, tokens, ranks=ranks, visits=visits)
    per_rank = len(routed) // ranks
    routed_max = max(sum(routed[r * per_rank : (r + 1) * per_rank]) for r in range(ranks))
    home = [[n * (r == d) for d in range(ranks)] for r, n in enumerate(tokens)]
    own = [_own_quotas(batch, rank, ranks) for rank, batch in enumerate(batches)]
    chosen = {
        "home": _assign(batches, home),
        "own-counts": _assign(batches, own),
        "live": _assign(batches, [live.quotas_of(rank) for rank in range(ranks)]),
    }
    if static is not None:
        chosen["sglang-static"] = static
    for policy in (policy for policy in POLICIES if policy in chosen):
        everywhere = [Counter(shared) for shared in chosen[policy]]
        received = [sum(counter[rank] for counter in everywhere) for rank in range(ranks)]
        slowest, mean = waterfill_rs.level(routed, received, ranks=ranks)
        choices = zip(batches, chosen[policy], strict=True)
        copies = sum(b.extra_copies(shared, rank) for rank, (b, shared) in enumerate(choices))
        yield Result(
            layer=layer,
            pass_id=pass_id,
            policy=policy,
            tokens=sum(tokens),
            routed_max=routed_max,
            max=slowest,
            mean=mean,
            optimum=live.optimum,
            extra_copies=copies / max(1, sum(tokens)),
        )


def _assign(batches: list[Batch], quotas: list[list[int]]) -> list[array[int]]:
    both = zip(batches, quotas, strict=True)
    return [batch.assign(own, rank) for rank, (batch, own) in enumerate(both)]


def _own_quotas(batch: Batch, rank: int, ranks: int) -> list[int]:
    tokens = [batch.tokens * (r == rank) for r in range(ranks)]
    visits = [v * (r == rank) for r in range(ranks) for v in batch.visits]
    return waterfill_rs.plan(batch.counts, tokens, ranks=ranks, visits=visits).quotas_of(rank)
