"""Placements of the shared rows compared, layer by layer: the one place where policies are scored."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import waterfill_rs
from waterfill_rs import _native

__all__ = ["POLICIES", "Batch", "Result", "compare"]

POLICIES = ("home", "own-counts", "live")


@dataclass(frozen=True)
class Batch:
    """One rank's tokens in one layer: expert ids ``[rows, top_k]``, int32, and what is counted of them."""

    ids: tuple[int, int, int, int]
    owner: object
    tokens: int
    counts: list[int]
    visits: list[int]

    @staticmethod
    def of(
        owner: object, address: int, rows: int, top_k: int, *, experts: int, ranks: int
    ) -> Batch:
        """Count the ids at ``address``, which ``owner`` keeps alive."""
        ids = (address, rows, top_k, 32)
        counts, visits, tokens = _native.unsafe_count_ptr(ids, experts, ranks)
        return Batch(ids, owner, tokens, counts, visits)

    def extra_copies(self, quotas: list[int], rank: int) -> int:
        """Shared rows that go to a rank which their token neither is on nor visits."""
        shared = array("i", bytes(4 * self.ids[1]))
        target, experts = shared.buffer_info()[0], len(self.counts)
        _native.unsafe_assign_ptr(self.ids, quotas, experts, rank, target)
        return _native.unsafe_traffic_ptr(self.ids, target, experts, len(quotas), rank)[0]


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


def compare(batches: list[Batch], layer: int, pass_id: int) -> Iterator[Result]:
    """The policies on one layer of one pass; ``batches`` is one a rank."""
    ranks = len(batches)
    routed = [sum(counts) for counts in zip(*(b.counts for b in batches), strict=True)]
    tokens = [batch.tokens for batch in batches]
    visits = [visit for batch in batches for visit in batch.visits]
    live = waterfill_rs.plan(routed, tokens, ranks=ranks, visits=visits)
    per_rank = len(routed) // ranks
    routed_max = max(sum(routed[r * per_rank : (r + 1) * per_rank]) for r in range(ranks))
    quotas = {
        "home": [[n * (r == d) for d in range(ranks)] for r, n in enumerate(tokens)],
        "own-counts": [_own_quotas(batch, rank, ranks) for rank, batch in enumerate(batches)],
        "live": [live.quotas_of(rank) for rank in range(ranks)],
    }
    for policy in POLICIES:
        shared = [sum(column) for column in zip(*quotas[policy], strict=True)]
        slowest, mean = waterfill_rs.level(routed, shared, ranks=ranks)
        copies = sum(b.extra_copies(quotas[policy][r], r) for r, b in enumerate(batches))
        yield Result(
            layer,
            pass_id,
            policy,
            sum(tokens),
            routed_max,
            slowest,
            mean,
            live.optimum,
            copies / max(1, sum(tokens)),
        )


def _own_quotas(batch: Batch, rank: int, ranks: int) -> list[int]:
    tokens = [batch.tokens * (r == rank) for r in range(ranks)]
    visits = [v * (r == rank) for r in range(ranks) for v in batch.visits]
    return waterfill_rs.plan(batch.counts, tokens, ranks=ranks, visits=visits).quotas_of(rank)
