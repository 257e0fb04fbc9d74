"""Which expert-parallel rank runs each token's shared expert, so that the slowest rank finishes soonest.

Plans from plain sequences of integers are here; tensors are in ``waterfill_rs.torch``, the wiring into
sglang in ``waterfill_rs.sglang``. Importing this package imports neither numpy nor torch nor sglang.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Literal, NamedTuple

from waterfill_rs import _native
from waterfill_rs._native import CostModel, Plan, __version__
from waterfill_rs.integers import Integers, flat, misfit

# A fork's child has copies of this process's locks at boards, and is no rank.
os.register_at_fork(after_in_child=_native.leave_boards_in_child)

__all__ = [
    "CostModel",
    "Plan",
    "Score",
    "__version__",
    "max_and_mean",
    "own_quotas",
    "plan",
    "score",
]


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
    policy: Literal["live", "joint", "single_replica", "replicas"] = "live",
) -> Plan:
    """Plan where shared rows run: the slowest rank's exact optimum, then the fewest extra copies that counts can tell.

    Args:
        routed: rows (token, expert pairs) over all sources: ``[physical_experts]``, or its short form ``[ranks]``.
        tokens: ``[ranks]``, each source rank's tokens: its rows with at least one valid id.
        ranks: EP size, 1 to 1024, a power of two or not.
        physical_experts: routed experts over all ranks, redundant ones included; the length of
            ``physical_to_logical`` or of ``routed`` if not given.
        physical_to_logical: ``[physical_experts]``, which logical expert each one computes; for policies that move
            replicated experts' rows.
        visits: ``[ranks, ranks]``, how many of source s's tokens have a routed expert on rank d.
        eligible: ``[ranks]``, ranks that may take shared rows, and replicated experts' rows where the policy moves them; all
            if not given. Leave a rank of which nothing is known out: its missing counts would make it look empty.
        cost_model: what rows cost; rows themselves if not given.
        policy: ``live`` places the shared rows. ``joint`` splits replicated experts' rows too: in rows, the slowest rank
            has as few as can be. ``single_replica`` puts all rows of an expert on one replica: first the most active experts
            of a rank are as few as can be, then the slowest rank's cost is as little as a search finds. ``replicas``: one of
            these two, as a server does: the one under which the slowest rank's routed rows take less, where an active expert
            costs its rows or its weights, 184 rows, whichever is more. It plans by rows, takes a rank's experts without
            replicas together, and starts from an even division; ``cost_model`` is asked for the shared rows alone.

    Raises:
        ValueError: with the offending numbers, for lengths or values that do not fit.
    """
    routed, tokens = flat(routed), flat(tokens)
    places = None if visits is None else flat(visits)
    mapping = None if physical_to_logical is None else flat(physical_to_logical)
    if physical_experts is None:
        physical_experts = len(routed if mapping is None else mapping)
        if cost_model is not None and physical_experts == ranks and cost_model.cost(2) != 2:
            raise ValueError(
                f"routed has {ranks} counts, and the cost model needs one an expert: give those, or "
                f"physical_experts={ranks} if each rank has one expert"
            )
    elif mapping is not None and len(mapping) != physical_experts:
        raise ValueError(
            f"physical_to_logical has {len(mapping)} entries, physical_experts is {physical_experts}: "
            "give one entry an expert"
        )
    sizes = {"ranks": ranks, "physical_experts": physical_experts}
    try:
        return _native.plan(
            routed,
            tokens,
            **sizes,
            physical_to_logical=mapping,
            visits=places,
            eligible=None if eligible is None else [bool(allowed) for allowed in flat(eligible)],
            cost_model=CostModel.rows() if cost_model is None else cost_model,
            policy=policy,
        )
    except (OverflowError, TypeError) as error:
        lists = {"physical_to_logical": mapping or [], "visits": places or []}
        raise misfit(error, routed=routed, tokens=tokens, **sizes, **lists) from error


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

    With a cost model of time the layer is taken to be its own counts times the ranks, and tokens stay home where moving
    them would make its slowest rank no faster.

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
    routed, visits = flat(routed), flat(visits)
    try:
        return _native.own_quotas(routed, visits, tokens, ranks=ranks, rank=rank, cost_model=model)
    except (OverflowError, TypeError) as error:
        sizes = {"tokens": tokens, "ranks": ranks, "rank": rank}
        raise misfit(error, routed=routed, visits=visits, **sizes) from error


def max_and_mean(
    routed: Integers, shared_rows: Integers, *, ranks: int, cost_model: CostModel | None = None
) -> tuple[int, float]:
    """The slowest and the mean rank's cost of ``routed`` ``[physical_experts]`` and ``shared_rows`` ``[ranks]``.

    Raises:
        ValueError: with the offending numbers, for lengths or values that do not fit.
    """
    model = CostModel.rows() if cost_model is None else cost_model
    routed, shared_rows = flat(routed), flat(shared_rows)
    try:
        return _native.max_and_mean(routed, shared_rows, ranks=ranks, cost_model=model)
    except (OverflowError, TypeError) as error:
        raise misfit(error, routed=routed, shared_rows=shared_rows, ranks=ranks) from error


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
        flat_ids, shared = _int32(f"topk_ids of rank {rank}", ids), _int32("shared_rank", chosen)
        rows = len(shared)
        top_k = len(flat_ids) // max(1, rows)
        if top_k * rows != len(flat_ids) or (rows and not top_k):
            raise ValueError(
                f"rank {rank}: {len(flat_ids)} ids and {rows} shared ranks: give [N, K] and [N]"
            )
        address = (flat_ids.buffer_info()[0], rows, max(1, top_k), 32)
        counts, _, _ = _native.unsafe_count_ptr(address, physical_experts, ranks)
        more = _native.unsafe_traffic_ptr(
            address, shared.buffer_info()[0], physical_experts, ranks, rank
        )
        copies, messages = copies + more[0], messages + more[1]
        routed = [total + own for total, own in zip(routed, counts, strict=True)]
        for row, to in enumerate(shared):
            if any(expert >= 0 for expert in flat_ids[row * top_k : (row + 1) * top_k]):
                received[to] += 1
    costs = max_and_mean(routed, received, ranks=ranks, cost_model=cost_model)
    return Score(*costs, copies, messages)


def _int32(name: str, values: Integers) -> array[int]:
    try:
        return array("i", flat(values))
    except (OverflowError, TypeError) as error:
        raise ValueError(f"{name}: {error}: give integers of 32 bits") from error
