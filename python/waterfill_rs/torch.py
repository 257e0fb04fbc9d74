"""The plan applied to torch tensors without copies: on the CPU, or by one launch on a CUDA device.

Ids are physical routed ids ``[N, K]``, int32 or int64, negative for none; weights ``[N, K]``, float32
or bfloat16. Errors are ``ValueError`` with the numbers, raised before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import waterfill_rs
from waterfill_rs import _native
from waterfill_rs.integers import misfit
from waterfill_rs.tensors import check, ids_at, weights_at

__all__ = ["assign", "count", "expand_topk", "move_up", "traffic"]


def count(
    topk_ids: Tensor, *, physical_experts: int, ranks: int
) -> tuple[list[int], list[int], int]:
    """Routed rows per physical expert, tokens that visit each rank, and the number of tokens."""
    ids = ids_at(topk_ids)
    try:
        return _native.unsafe_count_ptr(ids, physical_experts, ranks)
    except (OverflowError, TypeError) as error:
        raise misfit(error, physical_experts=physical_experts, ranks=ranks) from error


def assign(topk_ids: Tensor, quotas: Sequence[int], *, physical_experts: int, rank: int) -> Tensor:
    """Each row's shared rank, int32 ``[N]``: ``quotas`` (``[R]``) met exactly, visited ranks preferred.

    A row without a valid id gets -1.
    """
    ids = ids_at(topk_ids)
    shared_rank = torch.empty(topk_ids.shape[0], dtype=torch.int32)
    try:
        _native.unsafe_assign_ptr(ids, quotas, physical_experts, rank, shared_rank.data_ptr())
    except (OverflowError, TypeError) as error:
        sizes = {"physical_experts": physical_experts, "rank": rank}
        raise misfit(error, quotas=list(quotas), **sizes) from error
    return shared_rank


def traffic(
    topk_ids: Tensor, shared_rank: Tensor, *, physical_experts: int, ranks: int, rank: int
) -> tuple[int, int]:
    """Extra copies (DeepEP normal mode) and extra messages (low-latency mode) of one source's shared rows."""
    ids = ids_at(topk_ids)
    check("shared_rank", shared_rank, {torch.int32: 32}, (topk_ids.shape[0],))
    sizes = {"physical_experts": physical_experts, "ranks": ranks, "rank": rank}
    try:
        return _native.unsafe_traffic_ptr(ids, shared_rank.data_ptr(), **sizes)
    except (OverflowError, TypeError) as error:
        raise misfit(error, **sizes) from error


def expand_topk(
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    physical_experts: int,
    ranks: int,
    rank: int,
    shared_weight: float,
    quotas: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Widen ids and weights ``[N, K]`` to ``[N, K + 1]``: the last column is the shared expert.

    With ``e = physical_experts // ranks``, a routed id ``i`` becomes ``i + i // e``, and the shared
    expert on rank ``r`` is ``r * (e + 1) + e``. An invalid slot keeps its id and gets weight 0; a row
    without a valid id gets shared id -1 and weight 0. Inputs are untouched.

    Args:
        shared_weight: weight of the shared expert's row: 1 / routed_scaling_factor, or 1.0 where the
            factor is in the routed weights already.
        quotas: ``[ranks]``, this rank's quotas from a plan; for CUDA tensors best an int32 tensor beside them. Without them
            the plan is from this rank's own counts. Live ones are an exchange's: ``waterfill_rs.exchange.interface``.
    """
    if topk_ids.is_cuda:
        return _expand_on_device(
            topk_ids, topk_weights, physical_experts, ranks, rank, shared_weight, quotas
        )
    ids = ids_at(topk_ids)
    rows, top_k = topk_ids.shape
    weights = weights_at(topk_weights, (rows, top_k))
    if quotas is None:
        quotas = _own_quotas(topk_ids, physical_experts, ranks, rank)
    if isinstance(quotas, Tensor):
        quotas = quotas.tolist()
    if len(quotas) != ranks:
        raise ValueError(f"quotas has {len(quotas)} entries: give {ranks}, one a rank")
    out_ids = torch.empty((rows, top_k + 1), dtype=topk_ids.dtype)
    out_weights = torch.empty((rows, top_k + 1), dtype=topk_weights.dtype)
    try:
        _native.unsafe_expand_ptr(
            ids,
            weights,
            (out_ids.data_ptr(), out_weights.data_ptr()),
            quotas,
            physical_experts,
            rank,
            shared_weight,
        )
    except (OverflowError, TypeError) as error:
        sizes = {"physical_experts": physical_experts, "rank": rank}
        raise misfit(error, quotas=list(quotas), **sizes) from error
    return out_ids, out_weights


def move_up(topk_ids: Tensor, *, physical_experts: int, ranks: int) -> Tensor:
    """Routed ids alone, as ``expand_topk`` moves them past the shared experts: int64 ``[N, K]``, which DeepEP takes.

    For a batch whose shared rows are not routed. With ``e = physical_experts // ranks``, an id ``i`` becomes
    ``i + i // e``, and a negative one stays as it is. The input is untouched.

    Raises:
        ValueError: an id at or above ``physical_experts``. On a CUDA device, where the call is one launch, it becomes
            -1 instead.
    """
    if topk_ids.is_cuda:
        from waterfill_rs import cuda

        return cuda.move_up(topk_ids, physical_experts, ranks)
    ids = ids_at(topk_ids)
    out = torch.empty(topk_ids.shape, dtype=torch.int64)
    try:
        _native.unsafe_move_up_ptr(ids, out.data_ptr(), physical_experts, ranks)
    except (OverflowError, TypeError) as error:
        raise misfit(error, physical_experts=physical_experts, ranks=ranks) from error
    return out


def _expand_on_device(
    topk_ids: Tensor,
    topk_weights: Tensor,
    physical_experts: int,
    ranks: int,
    rank: int,
    shared_weight: float,
    quotas: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One launch on the current stream; quotas are a tensor of the device, or own ones."""
    from waterfill_rs import cuda

    if quotas is not None and not isinstance(quotas, Tensor):
        quotas = torch.tensor(quotas, dtype=torch.int32, device=topk_ids.device)
    return cuda.expand_topk(
        topk_ids, topk_weights, physical_experts, ranks, rank, shared_weight, quotas
    )


def _own_quotas(topk_ids: Tensor, physical_experts: int, ranks: int, rank: int) -> list[int]:
    """Quotas when nobody else's counts are known."""
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank}: give a rank from 0 to {ranks - 1}")
    counts, visits, tokens = count(topk_ids, physical_experts=physical_experts, ranks=ranks)
    return waterfill_rs.own_quotas(counts, visits, tokens, ranks=ranks, rank=rank)
