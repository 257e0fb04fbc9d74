"""Placements of the shared rows compared, layer by layer: the one place where policies are scored."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import waterfill_rs
from waterfill_rs import CostModel, _native
from waterfill_rs.policies import live_replicas

__all__ = ["MOVE_ROUTED", "POLICIES", "Batch", "Layer", "Result", "compare"]

MOVE_ROUTED = ("joint", "single-replica", "replicas")
"""Those that choose replicas too, so routed rows move: a bound of those that leave routed rows where they are is not theirs."""

POLICIES = ("home", "sglang-static", "sglang-dynamic", "own-counts", "live", *MOVE_ROUTED)
"""In the order of tables. Each is there only where what it needs is known: see ``compare``."""


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
class Layer:
    """One layer of one pass, as far as it is known.

    ``routed`` ``[P]`` and ``tokens`` ``[R]`` always are. ``sources``, each rank's own counts ``[P]``, and
    ``batches``, each rank's tokens, may not be; ``mapping`` ``[P]``, the logical expert of each physical
    one, is there where some have replicas; ``sglangs``: what modes of sglang's Waterfill chose, by policy, ``[rows]`` a rank;
    ``live`` ``[R][R]``: the quotas that ranks really had, where they ran (else the planner's); ``phase``:
    prefill or decode, where that is known.
    """

    layer: int
    pass_id: int
    routed: list[int]
    tokens: list[int]
    sources: list[list[int]] | None = None
    batches: list[Batch] | None = None
    mapping: list[int] | None = None
    sglangs: Mapping[str, list[array[int]]] | None = None
    live: list[list[int]] | None = None
    phase: str | None = None

    @staticmethod
    def of_batches(layer: int, pass_id: int, batches: list[Batch], **known: Any) -> Layer:
        """Everything from the tokens: ``batches`` is one a rank."""
        sources = [batch.counts for batch in batches]
        routed = [sum(counts) for counts in zip(*sources, strict=True)]
        tokens = [batch.tokens for batch in batches]
        return Layer(layer, pass_id, routed, tokens, sources, batches, **known)


@dataclass(frozen=True)
class Result:
    """One layer, pass and policy. ``optimum`` is the least that any placement's slowest rank can have.

    ``routed_max``, ``max``, ``mean``, ``home_mean`` and ``optimum`` are in the cost model's unit. ``home_mean`` is the mean of
    shared experts at home, the same for all policies: under a cost model each has a ``mean`` of its own, so what is divided
    by it cannot be compared. Under policies of ``MOVE_ROUTED`` routed rows move, and the optimum is their own. ``extra_copies`` a
    token: None where no tokens are known. ``loads`` ``[R]``: each rank's cost in the same unit, of routed and
    shared rows; ``max`` is its most, ``mean`` its mean.
    """

    layer: int
    pass_id: int
    policy: str
    tokens: int
    routed_max: int
    max: int
    mean: float
    home_mean: float
    optimum: int
    extra_copies: float | None
    loads: Sequence[int]
    phase: str | None = None

    def as_json(self) -> dict[str, object]:
        """With the key ``pass``, which Python reserves."""
        fields = {**vars(self), "pass": self.pass_id, "loads": list(self.loads)}
        del fields["pass_id"]
        return fields


@dataclass(frozen=True)
class _Choice:
    """Where a policy puts the shared rows, ``[R]``, and the routed rows, ``[P]``."""

    received: list[int]
    routed: list[int]
    optimum: int
    copies: int | None


def compare(
    layer: Layer,
    policies: Collection[str] = POLICIES,
    cost_model: CostModel | None = None,
) -> Iterator[Result]:
    """The policies asked for, as far as they can be known.

    ``own-counts`` needs each rank's counts, sglang's modes its tokens and what they chose, those of ``MOVE_ROUTED`` replicas.
    ``single-replica`` is for decode alone: elsewhere it would put all rows of a hot expert on one rank.
    """
    model = CostModel.rows() if cost_model is None else cost_model
    ranks = len(layer.tokens)
    visits = [visit for batch in layer.batches or () for visit in batch.visits]
    live = waterfill_rs.plan(
        layer.routed,
        layer.tokens,
        ranks=ranks,
        physical_experts=len(layer.routed),
        visits=visits or None,
        cost_model=model,
    )
    found = {
        policy: _choose(layer, policy, live, model) for policy in POLICIES if policy in policies
    }
    choices = {policy: choice for policy, choice in found.items() if choice is not None}
    alone, at_home, by_policy = _costs(layer, choices, model)
    total = sum(layer.tokens)
    for policy, choice in choices.items():
        loads = by_policy[policy]
        yield Result(
            layer=layer.layer,
            pass_id=layer.pass_id,
            policy=policy,
            tokens=total,
            routed_max=max(alone),
            max=max(loads),
            mean=sum(loads) / ranks,
            home_mean=sum(at_home) / ranks,
            optimum=choice.optimum,
            extra_copies=None if choice.copies is None else choice.copies / max(1, total),
            # A fifth of a list's memory: a recording has hundreds of thousands of results.
            loads=array("q", loads),
            phase=layer.phase,
        )


def _costs(
    layer: Layer, choices: dict[str, _Choice], model: CostModel
) -> tuple[list[int], list[int], dict[str, list[int]]]:
    """Each rank's cost ``[R]``: of its routed rows alone, with shared rows at home, and under each policy."""
    ranks = len(layer.tokens)
    alike = [policy for policy in choices if policy not in ("home", *MOVE_ROUTED)]
    placements = [[0] * ranks, layer.tokens, *(choices[policy].received for policy in alike)]
    alone, at_home, *others = _native.costs(layer.routed, placements, ranks=ranks, cost_model=model)
    by_policy = {"home": at_home, **dict(zip(alike, others, strict=True))}
    for policy in (policy for policy in choices if policy in MOVE_ROUTED):
        choice = choices[policy]
        (by_policy[policy],) = _native.costs(
            choice.routed, [choice.received], ranks=ranks, cost_model=model
        )
    return alone, at_home, by_policy


def _choose(layer: Layer, policy: str, live: waterfill_rs.Plan, model: CostModel) -> _Choice | None:
    ranks = len(layer.tokens)
    if policy in MOVE_ROUTED:
        if layer.mapping is None or (policy == "single-replica" and layer.phase != "decode"):
            return None
        plan = live_replicas.plan(policy, layer.routed, layer.tokens, layer.mapping, model)
        # Tokens then visit other ranks than they did, so their copies are not known.
        rows, shared, least = plan.replica_rows, plan.shared_rows, plan.optimum
        if policy == "replicas":  # It plans by rows, whatever the unit here.
            (loads,) = _native.costs(rows, [shared], ranks=ranks, cost_model=model)
            least = max(loads)
        return _Choice(shared, rows, least, None)
    if policy in ("sglang-static", "sglang-dynamic"):
        chosen = (layer.sglangs or {}).get(policy)
        if layer.batches is None or chosen is None:
            return None
        received = [0] * ranks
        for counter in map(Counter, chosen):
            received = [rows + counter[rank] for rank, rows in enumerate(received)]
        return _Choice(received, layer.routed, live.optimum, _copies(layer.batches, chosen))
    if layer.batches is None and layer.live is None and policy in ("home", "live"):
        # Without tokens there are no copies to count, and the sums of quotas are known.
        received = layer.tokens if policy == "home" else live.shared_rows
        return _Choice(received, layer.routed, live.optimum, None)
    quotas = _quotas(layer, policy, live, model)
    if quotas is None:
        return None
    copies = None
    if layer.batches is not None:
        both = enumerate(zip(layer.batches, quotas, strict=True))
        copies = _copies(layer.batches, [batch.assign(own, rank) for rank, (batch, own) in both])
    received = [sum(column) for column in zip(*quotas, strict=True)]
    return _Choice(received, layer.routed, live.optimum, copies)


def _quotas(
    layer: Layer, policy: str, live: waterfill_rs.Plan, model: CostModel
) -> list[list[int]] | None:
    """``[R][R]``: how many of each rank's tokens go to each rank."""
    ranks = len(layer.tokens)
    if policy == "live" and layer.live is not None:
        return layer.live
    if policy == "live":
        return [live.quotas_of(rank) for rank in range(ranks)]
    if policy == "home":
        return [[n * (r == d) for d in range(ranks)] for r, n in enumerate(layer.tokens)]
    if layer.sources is None:
        return None
    nowhere = [[0] * ranks] * ranks
    visits = nowhere if layer.batches is None else [batch.visits for batch in layer.batches]
    return [
        waterfill_rs.own_quotas(
            counts, visits[rank], layer.tokens[rank], ranks=ranks, rank=rank, cost_model=model
        )
        for rank, counts in enumerate(layer.sources)
    ]


def _copies(batches: list[Batch], chosen: list[array[int]]) -> int:
    choices = enumerate(zip(batches, chosen, strict=True))
    return sum(batch.extra_copies(shared, rank) for rank, (batch, shared) in choices)
