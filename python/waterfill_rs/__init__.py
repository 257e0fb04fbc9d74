"""Which expert-parallel rank runs each token's shared expert, so that the slowest rank finishes soonest.

Plans from plain sequences of integers are here; tensors are in ``waterfill_rs.torch``, the wiring into
sglang in ``waterfill_rs.sglang``. Importing this package imports neither numpy nor torch nor sglang.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from waterfill_rs import _native
from waterfill_rs._native import CostModel, Plan, __version__

__all__ = ["CostModel", "Plan", "Score", "__version__", "level", "own_quotas", "plan", "score"]

Integers = Any
"""A sequence of integers, or anything with ``tolist()`` (numpy arrays, CPU tensors), of any shape."""


def plan(
    routed: Integers,
    tokens: Integers,
    *,
    ranks: int,
    physical_experts: int | None = None,
    physical_to_logical: Integers | None = None,
    visits: Integers | None = None,
    eligible: Sequence[bool] | None = None,
    cost_model: CostModel | None = None,
    policy: Literal["live", "joint"] = "live",
) -> Plan:
    """Plan where shared rows run: the slowest rank's exact optimum, then the fewest extra copies.

    Args:
        routed: rows (token, expert pairs) over all sources: ``[physical_experts]``, or its short form ``[ranks]``.
        tokens: ``[ranks]``, each source rank's tokens: its rows with at least one valid id.
        ranks: EP size, 1 to 1024, a power of two or not.
        physical_experts: routed experts over all ranks, redundant ones included; the length of
            ``physical_to_logical`` or of ``routed`` if not given.
        physical_to_logical: ``[physical_experts]``, which logical expert each one computes; for ``joint``.
        visits: ``[ranks, ranks]``, how many of source s's tokens have a routed expert on rank d.
        eligible: ``[ranks]``, ranks that may take shared rows; all if not given. Leave a rank of
            which nothing is known out: its missing counts would make it look empty.
        cost_model: what rows cost; rows themselves if not given.
        policy: ``live`` places the shared rows, ``joint`` splits replicated experts' rows too.

    Raises:
        ValueError: with the offending numbers, for lengths or values that do not fit.
    """
    routed = _flat(routed)
    mapping = None if physical_to_logical is None else _flat(physical_to_logical)
    if physical_experts is None:
        physical_experts = len(routed if mapping is None else mapping)
    return _native.plan(
        routed,
        _flat(tokens),
        ranks=ranks,
        physical_experts=physical_experts,
        physical_to_logical=mapping,
        visits=None if visits is None else _flat(visits),
        eligible=None if eligible is None else [bool(allowed) for allowed in _flat(eligible)],
        cost_model=CostModel.rows() if cost_model is None else cost_model,
        policy=policy,
    )


def own_quotas(
    routed: Integers,
    visits: Integers,
    tokens: int,
    *,
    ranks: int,
    rank: int,
    cost_model: CostModel | None = None,
) -> list[int]:
    """Quotas ``[ranks]`` of one rank that knows nobody else's counts: its own, shrunk towards their mean, levelled.

    Args:
        routed: ``[physical_experts]`` rows that this rank's tokens send to each expert.
        visits: ``[ranks]`` how many of its tokens have a routed expert on each rank.
        tokens: this rank's tokens: rows with at least one valid id.
        ranks: EP size.
        rank: this rank, at which ties are broken first.
        cost_model: what rows cost; rows themselves if not given.

    Raises:
        ValueError: with the offending numbers, for lengths or values that do not fit.
    """
    model = CostModel.rows() if cost_model is None else cost_model
    return _native.own_quotas(
        _flat(routed), _flat(visits), tokens, ranks=ranks, rank=rank, cost_model=model
    )


def level(
    routed: Integers, shared_rows: Integers, *, ranks: int, cost_model: CostModel | None = None
) -> tuple[int, float]:
    """The slowest and the mean rank's cost of ``routed`` ``[physical_experts]`` and ``shared_rows`` ``[ranks]``."""
    model = CostModel.rows() if cost_model is None else cost_model
    return _native.level(_flat(routed), _flat(shared_rows), ranks=ranks, cost_model=model)


class Score(NamedTuple):
    """How good a placement of one layer's shared rows is."""

    max: int
    """The slowest rank's cost, in the cost model's unit: what the layer takes."""
    mean: float
    """The mean rank's cost."""
    extra_copies: int
    """Shared rows on a rank that their token neither is on nor visits: what DeepEP's normal mode sends more."""
    extra_messages: int
    """Shared rows on another rank than their own: what DeepEP's low-latency mode sends more."""


def score(
    topk_ids: Sequence[Integers],
    shared_rank: Sequence[Integers],
    *,
    physical_experts: int,
    cost_model: CostModel | None = None,
) -> Score:
    """Score where every token's shared row went, all ranks together.

    Args:
        topk_ids: one ``[N, K]`` a rank, physical routed ids, negative for none.
        shared_rank: one ``[N]`` a rank, the rank that runs each row's shared expert; any number for a row
            without a valid id.
        physical_experts: routed experts over all ranks, redundant ones included.
        cost_model: what rows cost; rows themselves if not given.

    Raises:
        ValueError: with the offending numbers, for lengths, ids or ranks that do not fit.
    """
    ranks = len(topk_ids)
    if len(shared_rank) != ranks:
        raise ValueError(
            f"shared_rank of {len(shared_rank)} ranks, topk_ids of {ranks}: give one each"
        )
    routed, received = [0] * physical_experts, [0] * ranks
    copies = messages = 0
    for rank, (ids, chosen) in enumerate(zip(topk_ids, shared_rank, strict=True)):
        flat, shared = array("i", _flat(ids)), array("i", _flat(chosen))
        rows = len(shared)
        top_k = len(flat) // max(1, rows)
        if top_k * rows != len(flat) or (rows and not top_k):
            raise ValueError(
                f"rank {rank}: {len(flat)} ids and {rows} shared ranks: give [N, K] and [N]"
            )
        address = (flat.buffer_info()[0], rows, max(1, top_k), 32)
        counts, _, _ = _native.unsafe_count_ptr(address, physical_experts, ranks)
        more = _native.unsafe_traffic_ptr(
            address, shared.buffer_info()[0], physical_experts, ranks, rank
        )
        copies, messages = copies + more[0], messages + more[1]
        routed = [total + own for total, own in zip(routed, counts, strict=True)]
        for row, to in enumerate(shared):
            if any(expert >= 0 for expert in flat[row * top_k : (row + 1) * top_k]):
                received[to] += 1
    return Score(*level(routed, received, ranks=ranks, cost_model=cost_model), copies, messages)


def _flat(values: Integers) -> list[int]:
    items: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    if items and isinstance(items[0], list):
        return [value for row in items for value in row]
    return items
