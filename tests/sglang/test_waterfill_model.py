"""The model of sglang's Waterfill against sglang's own balancer and kernels, run by Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

COMMON = """
import types
import torch
from sglang.srt.layers.moe import waterfill
from waterfill_rs.replay.sglang_waterfill import dynamic_ranks, static_ranks

def ids_of(rows, top_k, skew, ranks, rank):
    generator = torch.Generator().manual_seed(ranks * 1000 + rows + rank)
    ids = (torch.rand(rows, top_k, generator=generator) ** (1 + skew) * ranks * 4).int()
    ids[torch.rand(rows, top_k, generator=generator) < 0.1] = -1
    ids[torch.rand(rows, generator=generator) < 0.1] = -1
    return ids

def balancer(ranks, rank):
    return waterfill.WaterfillBalancer(ranks * 4, ranks, rank, 0, 1.0)

def sglangs(own, ids):
    output = types.SimpleNamespace(
        topk_ids=ids, topk_weights=torch.ones(ids.shape), router_logits=None
    )
    shared = own.expand_topk(output, len(ids)).topk_ids[:, -1]
    return torch.where(shared < 0, -1, shared // 5)
"""

STATIC = """
cases = 0
for ranks in (1, 2, 4, 8, 16):  # at 32 the interpreter refuses the mask of all ranks
    for rows, top_k, skew in ((64, 6, 0.0), (65, 8, 0.5), (100, 1, 3.0), (257, 6, 1.0)):
        for rank in sorted({0, ranks // 2, ranks - 1}):
            ids = ids_of(rows, top_k, skew, ranks, rank)
            own = balancer(ranks, rank)
            assert own.use_static_waterfill
            model = static_ranks(ids, physical_experts=ranks * 4, ranks=ranks, rank=rank)
            assert torch.equal(model.long(), sglangs(own, ids).long()), (ranks, rows, top_k, rank)
            cases += 1
print("equal in", cases, "cases")
"""

DYNAMIC = """
plans = []
plan = waterfill.WaterfillBalancer._build_dynamic_dispatch_plan

def seen(self, *arguments, **named):
    plans.append(plan(self, *arguments, **named))
    return plans[-1]

waterfill.WaterfillBalancer._build_dynamic_dispatch_plan = seen
cases, small, nowhere, ways = 0, 0, 0, [0, 0]
for ranks in (1, 2, 4, 8, 16, 32):
    for rows, top_k, skew in (
        ((257, 200), 8, 0.0),
        ((100, 70, 0, 200), 6, 0.3),
        ((64, 63, 257), 1, 0.0),
        ((130, 20), 8, 3.0),
        ((80, 300), 2, 1.0),
    ):
        if ranks == 32 and skew < 1:
            continue  # the interpreter refuses the mask of all ranks
        sizes = [rows[rank % len(rows)] for rank in range(ranks)]
        ids = [ids_of(size, top_k, skew, ranks, rank) for rank, size in enumerate(sizes)]
        balancers = [balancer(ranks, rank) for rank in range(ranks)]
        counts = [torch.bincount(own[own >= 0] // 4, minlength=ranks) for own in ids]

        def reduce(local, rows):
            assert torch.equal(local, counts[rank]) and rows == sizes[rank]
            return sum(counts), torch.tensor(sizes)

        waterfill.WaterfillBalancer._all_reduce_dynamic_rank_load = staticmethod(reduce)
        model = dynamic_ranks(ids, physical_experts=ranks * 4)
        for rank in sorted({0, min(1, ranks - 1), ranks - 1}):
            assert not balancers[rank].use_static_waterfill
            wanted = sglangs(balancers[rank], ids[rank])
            assert torch.equal(model[rank].long(), wanted.long()), (ranks, rows, top_k, rank)
            cases += 1
            if sizes[rank] < 64:
                small += 1
                continue
            made = plans[-1]
            ways[made.allow_all_ranks] += 1
            below = made.rank_load < made.target_total
            reach = (below[ids[rank].clamp(min=0) // 4] & (ids[rank] >= 0)).any(1) | below[rank]
            nowhere += int((~reach & (ids[rank] >= 0).any(1)).sum())
print("equal in", cases, "cases: small", small, "visited", ways[0], "everywhere", ways[1])
print("rows whose ranks are all above the level:", nowhere)
"""


def interpreted(code, **settings):
    """What the code prints: sglang's kernels run by Triton's interpreter, without this package's plugin."""
    env = {"TRITON_INTERPRET": "1", "WATERFILL_RS": "off", "TORCHDYNAMO_DISABLE": "1", **settings}
    command = [sys.executable, "-c", COMMON + code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_every_draw_of_static_mode_is_sglangs():
    assert interpreted(STATIC) == "equal in 48 cases"


def test_every_draw_of_dynamic_mode_is_sglangs():
    said = interpreted(DYNAMIC, SGLANG_DISABLE_STATIC_WATERFILL="1")
    assert said.splitlines() == [
        "equal in 66 cases: small 14 visited 33 everywhere 19",
        "rows whose ranks are all above the level: 284",
    ]


def test_small_batches_stay_at_home_and_sizes_are_those_of_the_kernel():
    torch = pytest.importorskip("torch")
    from waterfill_rs.replay.sglang_waterfill import MIN_TOKENS, dynamic_ranks, serves, static_ranks

    ids = torch.zeros(MIN_TOKENS - 1, 3, dtype=torch.int32)
    assert static_ranks(ids, physical_experts=8, ranks=4, rank=2).tolist() == [2] * 63
    homes = [own.tolist() for own in dynamic_ranks([ids] * 4, physical_experts=8)]
    assert homes == [[rank] * 63 for rank in range(4)]
    assert [ranks for ranks in range(70) if serves(ranks)] == [1, 2, 4, 8, 16, 32]
