"""The model of sglang's static mode against sglang's own kernel, run by Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

CODE = """
import torch
from sglang.kernels.ops.moe import deepep_waterfill_kernels as kernels
from waterfill_rs.sglang_static import shared_ranks

cases = 0
for ranks in (1, 2, 4, 8, 16):  # at 32 the interpreter refuses the mask of all ranks
    for rows, top_k, skew in ((64, 6, 0.0), (65, 8, 0.5), (100, 1, 3.0), (257, 6, 1.0)):
        for rank in sorted({0, ranks // 2, ranks - 1}):
            generator = torch.Generator().manual_seed(ranks * 1000 + rows + rank)
            experts = ranks * 4
            drawn = torch.rand(rows, top_k, generator=generator) ** (1 + skew)
            ids = (drawn * experts).int()
            ids[torch.rand(rows, top_k, generator=generator) < 0.1] = -1
            ids[torch.rand(rows, generator=generator) < 0.1] = -1
            valid = ids[ids >= 0]
            load = torch.bincount(valid // 4, minlength=ranks)
            wanted, _ = kernels.materialize_waterfill_dispatch_fused(
                ids, torch.rand(rows, top_k), load, experts, ranks, rank, 1.0, allow_all_ranks=True
            )
            shared = wanted[:, -1]
            wanted_rank = torch.where(shared < 0, -1, shared // 5)
            model = shared_ranks(ids, physical_experts=experts, ranks=ranks, rank=rank)
            assert torch.equal(model.long(), wanted_rank.long()), (ranks, rows, top_k, rank)
            cases += 1
print("equal in", cases, "cases")
"""


def test_every_draw_is_that_of_sglangs_kernel():
    env = {**os.environ, "TRITON_INTERPRET": "1", "WATERFILL_RS": "off"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "equal in 48 cases", done.stderr[-2000:]


def test_small_batches_stay_at_home_and_sizes_are_those_of_the_kernel():
    torch = pytest.importorskip("torch")
    from waterfill_rs.sglang_static import MIN_TOKENS, serves, shared_ranks

    ids = torch.zeros(MIN_TOKENS - 1, 3, dtype=torch.int32)
    assert shared_ranks(ids, physical_experts=8, ranks=4, rank=2).tolist() == [2] * 63
    assert [ranks for ranks in range(70) if serves(ranks)] == [1, 2, 4, 8, 16, 32]
