"""Random batches, and what the CPU makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

import waterfill_rs
from waterfill_rs.torch import count, expand_topk

SHARED_WEIGHT = 0.4


def batch(
    seed: int,
    rows: int,
    top_k: int,
    experts: int,
    *,
    ids: torch.dtype = torch.int32,
    weights: torch.dtype = torch.float32,
    popular: float = 1.5,
    clean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ids and weights on the CPU; a ninth of the rows padding and a twelfth of the slots empty unless ``clean``."""
    random = torch.Generator().manual_seed(seed)
    drawn = (torch.rand((rows, top_k), generator=random).pow(popular) * experts).long()
    if not clean:
        drawn[torch.rand((rows, top_k), generator=random) < 1 / 12] = -1
        drawn[torch.rand(rows, generator=random) < 1 / 9] = -1
    return drawn.to(ids), torch.rand((rows, top_k), generator=random).to(weights)


def on_cpu(
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    experts: int,
    ranks: int,
    rank: int,
    quotas: list[int] | None = None,
    unpadded: int | None = None,
) -> tuple[Tensor, Tensor]:
    """By ``waterfill_rs.torch``, ids past the last expert and padded rows taken for no expert."""
    known = topk_ids.masked_fill(topk_ids >= experts, -1)
    if unpadded is not None:
        known[max(0, unpadded) :] = -1
    return expand_topk(
        known,
        topk_weights,
        physical_experts=experts,
        ranks=ranks,
        rank=rank,
        shared_weight=SHARED_WEIGHT,
        quotas=quotas,
    )


def same(device: tuple[Tensor, Tensor], cpu: tuple[Tensor, Tensor]) -> bool:
    """Bit for bit."""
    (ids, weights), (cpu_ids, cpu_weights) = device, cpu
    return torch.equal(ids.cpu(), cpu_ids) and torch.equal(weights.cpu(), cpu_weights)


def random_quotas(seed: int, topk_ids: Tensor, ranks: int, rank: int) -> list[int]:
    """A third at home, the others anywhere; they add up to the tokens."""
    random = torch.Generator().manual_seed(seed)
    tokens = int((topk_ids >= 0).any(dim=1).sum())
    to = torch.randint(0, ranks, (tokens,), generator=random)
    to[torch.rand(tokens, generator=random) < 1 / 3] = rank
    return torch.bincount(to, minlength=ranks).tolist()


def planned(made: list[tuple[Tensor, Tensor]], experts: int) -> list[list[int]]:
    """Every rank's quotas, from all ranks' counts."""
    ranks = len(made)
    counted = [count(ids, physical_experts=experts, ranks=ranks) for ids, _ in made]
    plan = waterfill_rs.plan(
        [sum(of) for of in zip(*(counts for counts, _, _ in counted), strict=True)],
        [tokens for _, _, tokens in counted],
        ranks=ranks,
        physical_experts=experts,
        visits=[visits for _, visits, _ in counted],
    )
    return [plan.quotas_of(rank) for rank in range(ranks)]
