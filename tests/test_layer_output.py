"""The layer's output does not depend on who runs the shared rows: three policies, one result."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

import waterfill_rs
from waterfill_rs.torch import count, expand_topk

CASES = 1000


def layer(x, ids, weights, experts, shared, ranks):
    """A MoE layer on expanded ids, in float32 from bfloat16: every slot by the expert that its id names."""
    slots = len(experts) // ranks + 1
    rank, place = ids.clamp(min=0) // slots, ids.clamp(min=0) % slots
    routed = rank * (slots - 1) + place
    chosen = torch.where(
        (place == slots - 1)[..., None, None], shared, experts[routed.clamp(max=len(experts) - 1)]
    )
    rows = torch.einsum("nkio,ni->nko", chosen.float(), x.float())
    return (rows * (weights * (ids >= 0)).float()[..., None]).sum(1).bfloat16()


def test_home_own_counts_and_live_give_the_same_layer_output():
    torch.manual_seed(0)
    moved = 0
    for _ in range(CASES):
        ranks = int(torch.randint(1, 9, ()))
        experts, top_k = ranks * int(torch.randint(1, 5, ())), int(torch.randint(1, 4, ()))
        top_k = min(top_k, experts)
        rows = [int(n) for n in torch.randint(0, 7, (ranks,))]
        ids = [torch.rand(n, experts).argsort(1)[:, :top_k].int().contiguous() for n in rows]
        ids = [torch.where(torch.rand(one.shape) < 0.1, -1, one).contiguous() for one in ids]
        counted = [count(one, physical_experts=experts, ranks=ranks) for one in ids]
        tokens = [tokens for _, _, tokens in counted]
        routed = [sum(c) for c in zip(*(counts for counts, _, _ in counted), strict=True)]
        visits = [visits for _, visits, _ in counted]
        plan = waterfill_rs.plan(routed, tokens, ranks=ranks, visits=visits)
        weights_of = torch.randn(experts, 4, 4).bfloat16()
        shared = torch.randn(4, 4).bfloat16()
        for rank in range(ranks):
            x, weights = torch.randn(rows[rank], 4).bfloat16(), torch.rand(rows[rank], top_k)
            home = [tokens[rank] * (r == rank) for r in range(ranks)]
            shape = {"physical_experts": experts, "ranks": ranks, "rank": rank}
            outputs = []
            for quotas in (home, None, plan.quotas_of(rank)):
                wide = expand_topk(ids[rank], weights, **shape, shared_weight=0.5, quotas=quotas)
                outputs.append(layer(x, *wide, weights_of, shared, ranks))
            moved += sum(plan.quotas_of(rank)) - plan.quotas_of(rank)[rank]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert moved > CASES  # The plans did differ from home.
