"""Counts by a collective on the stream: gathered by hand on one GPU, and by NCCL between processes of one GPU each."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import SHARED_WEIGHT, batch, on_cpu, planned, same

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander
from waterfill_rs.torch import count

EXPERTS, TOP_K = 48, 6
SECOND = 1_000_000


class Rank:
    """A rank with a board and a planner of its own, as a process of the group exchange has them."""

    def __init__(self, ranks: int, rank: int, experts_of_board: int) -> None:
        name = f"waterfill-test-{os.getpid()}-{secrets.token_hex(4)}"
        board = _native.Board.create(name, ranks, experts_of_board, secrets.randbits(128))
        board.unlink()
        self.planner = _native.PlannerThread(
            board, CostModel.rows(), patience_us=2 * SECOND, pace="park"
        )
        shape = dict(physical_experts=EXPERTS, ranks=ranks, rank=rank, top_k=TOP_K)
        self.expander = Expander("cuda", **shape, board=board)


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_gathered_counts_give_every_rank_its_part_of_the_plan_of_all(ranks, per_expert):
    group = [Rank(ranks, rank, EXPERTS if per_expert else ranks) for rank in range(ranks)]
    for seed in range(20):
        rows = [(seed * 37 + rank * 401) % 3000 * (seed % 5 > 0) + rank for rank in range(ranks)]
        made = [batch(seed * 100 + rank, rows[rank], TOP_K, EXPERTS) for rank in range(ranks)]
        there = [(ids.cuda(), weights.cuda()) for ids, weights in made]
        words = group[0].expander.words
        gathered = torch.full((ranks * words,), -7, dtype=torch.int32, device="cuda")
        for rank, tensors in enumerate(there):
            own = gathered[rank * words : (rank + 1) * words]
            group[rank].expander.count(*tensors, own)
            counts, visits, tokens = count(made[rank][0], physical_experts=EXPERTS, ranks=ranks)
            loads = [sum(part) for part in torch.tensor(counts).view(ranks, -1).tolist()]
            expected = [tokens, *visits, *(counts if per_expert else loads)]
            assert own.tolist() == expected, f"seed {seed} rank {rank}"
        for rank, quotas in enumerate(planned(made, EXPERTS)):
            out = group[rank].expander(
                *there[rank], SHARED_WEIGHT, cap_us=SECOND, gathered=gathered
            )
            expected = on_cpu(*made[rank], experts=EXPERTS, ranks=ranks, rank=rank, quotas=quotas)
            assert same(out, expected), f"seed {seed} rank {rank}"
    for one in group:
        assert one.expander.tally() == {
            "live": 20,
            "none": 0,
            "timed_out": 0,
            "broken": 0,
            "torn": 0,
        }
        one.planner.stop()


def test_what_does_not_fit_is_refused():
    run = Rank(2, 0, 2).expander
    ids, weights = (tensor.cuda() for tensor in batch(1, 9, TOP_K, EXPERTS))
    words = torch.zeros(2 * run.words, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="gathered counts without cap_us"):
        run(ids, weights, 1.0, gathered=words)
    with pytest.raises(ValueError, match="cap_us 7 and quotas exclude"):
        run(ids, weights, 1.0, quotas=words[:2], cap_us=7)
    with pytest.raises(ValueError, match=r"gathered has shape \(5,\): give \(10,\)"):
        run(ids, weights, 1.0, gathered=words[:5], cap_us=1)
    with pytest.raises(ValueError, match="out is"):
        run.count(ids, weights, words[:5].long())


def test_ranks_with_a_gpu_each_are_levelled_by_nccl(tmp_path):
    ranks = min(torch.cuda.device_count(), 8)
    if ranks < 2:
        pytest.skip(
            f"{torch.cuda.device_count()} GPU here: NCCL takes one for each rank, 2 at least"
        )
    script = Path(__file__).parents[1] / "support" / "group_ranks.py"
    started = [
        subprocess.Popen([sys.executable, script, str(rank), str(ranks), tmp_path])
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=200) for process in started] == [0] * ranks
    finally:
        for process in started:
            process.kill()
