"""The kernel over a board: live plans, a planner that is not there, and a board full of foreign bytes."""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import time

import numpy as np
import pytest
import torch
from batches import SHARED_WEIGHT, batch, on_cpu, planned, same

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander

EXPERTS, TOP_K = 48, 6
SECOND = 1_000_000


class Group:
    """Ranks of one process: a board, and an expander and a stream each."""

    def __init__(self, ranks: int, *, per_expert: bool = True, planner: bool = True) -> None:
        name = f"waterfill-test-{os.getpid()}-{secrets.token_hex(4)}"
        experts = EXPERTS if per_expert else ranks
        self.board = _native.Board.create(name, ranks, experts, secrets.randbits(128))
        self.ranks = ranks
        self.expanders = [
            Expander(
                "cuda",
                physical_experts=EXPERTS,
                ranks=ranks,
                rank=rank,
                top_k=TOP_K,
                board=self.board,
            )
            for rank in range(ranks)
        ]
        self.streams = [torch.cuda.Stream() for _ in range(ranks)]
        self.planner = self.plan() if planner else None

    def plan(self) -> _native.PlannerThread:
        return _native.PlannerThread(self.board, CostModel.rows(), patience_us=SECOND, pace="spin")

    def step(self, batches, cap_us=SECOND):
        there = [(ids.cuda(), weights.cuda()) for ids, weights in batches]
        torch.cuda.synchronize()
        out = []
        for run, stream, tensors in zip(self.expanders, self.streams, there, strict=True):
            with torch.cuda.stream(stream):
                out.append(run(*tensors, SHARED_WEIGHT, cap_us=cap_us))
        torch.cuda.synchronize()
        return out

    def tallies(self):
        return [run.tally() for run in self.expanders]

    def close(self) -> None:
        if self.planner is not None:
            self.planner.stop()
        self.board.unlink()


@pytest.fixture
def group(request):
    made = Group(**getattr(request, "param", {"ranks": 2}))
    yield made
    made.close()


def batches(seed: int, ranks: int) -> list:
    rows = [(seed * 37 + rank * 101) % 300 * (seed % 5 > 0) + rank for rank in range(ranks)]
    return [batch(seed * 100 + rank, rows[rank], TOP_K, EXPERTS) for rank in range(ranks)]


@pytest.mark.parametrize(
    "group",
    [dict(ranks=ranks, per_expert=each) for ranks in (1, 2, 3, 4) for each in (True, False)],
    indirect=True,
)
def test_live_plans_are_the_planners(group):
    ranks = group.ranks
    for seed in range(40):
        made = batches(seed, ranks)
        for rank, (out, quotas) in enumerate(
            zip(group.step(made), planned(made, EXPERTS), strict=True)
        ):
            where = dict(experts=EXPERTS, ranks=ranks, rank=rank)
            assert same(out, on_cpu(*made[rank], quotas=quotas, **where)), (
                f"seed {seed} rank {rank}"
            )
    live = {"live": 40, "none": 0, "timed_out": 0, "broken": 0, "torn": 0}
    assert group.tallies() == [live] * ranks
    # From outside the same is seen, and how long the calls waited.
    seen = group.board.snapshot()["by_rank"]
    assert [{name: tally[name] for name in live} for tally in seen] == group.tallies()
    for tally in seen:
        assert sum(count for _, count in tally["wait_us"]["buckets"]) == 40
        assert 0 <= tally["wait_us"]["p50"] <= tally["wait_us"]["max"] < SECOND


@pytest.mark.parametrize("group", [dict(ranks=2, planner=False)], indirect=True)
def test_without_a_planner_the_cap_is_kept_and_counted(group):
    made = batches(3, 2)
    group.step(made, cap_us=1)  # Both find their breakers closed, and time out.
    before = group.tallies()
    begun = time.perf_counter()
    for _ in range(20):
        out = group.step(made, cap_us=2_000)
    seconds = time.perf_counter() - begun
    for rank in range(2):
        where = dict(experts=EXPERTS, ranks=2, rank=rank)
        assert same(out[rank], on_cpu(*made[rank], **where))
    assert before == [{"live": 0, "none": 0, "timed_out": 1, "broken": 0, "torn": 0}] * 2
    assert group.tallies() == [{"live": 0, "none": 0, "timed_out": 2, "broken": 19, "torn": 0}] * 2
    assert seconds < 1, f"{seconds} s for 20 steps, one of which waits 2 ms"
    group.planner = group.plan()
    for _ in range(200):
        group.step(made)
        if all(tally["live"] >= 5 for tally in group.tallies()):
            return
    pytest.fail(f"not live again: {group.tallies()}")


@pytest.mark.parametrize("group", [dict(ranks=3)], indirect=True)
def test_foreign_bytes_change_nothing_but_the_balance(group):
    with open(group.board.path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    words = np.frombuffer(memory, dtype=np.uint64)
    stop = threading.Event()
    random = np.random.default_rng(7)

    def scribble(words: np.ndarray) -> None:
        while not stop.is_set():
            at = random.integers(16, len(words), 64)
            near = words[at] + random.integers(0, 3, 64).astype(np.uint64)
            wild = random.integers(0, 2**63, 64).astype(np.uint64)
            words[at] = np.where(random.random(64) < 0.5, near, wild)

    writer = threading.Thread(target=scribble, args=(words,))
    writer.start()
    try:
        for seed in range(10_000 if os.environ.get("WATERFILL_SOAK") else 1500):
            made = batches(seed % 50, 3)
            for rank, (ids, weights) in enumerate(group.step(made, cap_us=50)):
                lawful(rank, made[rank], ids.cpu(), weights.cpu())
    finally:
        stop.set()
        writer.join()


def test_without_a_ranks_counts_there_is_no_plan_for_any_and_the_next_is_live_again(group):
    first, second = batches(7, 2)
    group.step([first, second])
    begun = time.perf_counter()
    with torch.cuda.stream(group.streams[0]):
        ids, weights = first
        out = group.expanders[0](ids.cuda(), weights.cuda(), SHARED_WEIGHT, cap_us=5 * SECOND)
    group.streams[0].synchronize()
    assert 0.9 < time.perf_counter() - begun < 2, "the planner's patience"
    assert same(out, on_cpu(*first, experts=EXPERTS, ranks=2, rank=0))
    begun = time.perf_counter()
    with torch.cuda.stream(group.streams[1]):
        ids, weights = second
        out = group.expanders[1](ids.cuda(), weights.cuda(), SHARED_WEIGHT, cap_us=5 * SECOND)
    group.streams[1].synchronize()
    assert time.perf_counter() - begun < 0.2, "it is told at once that there is no plan"
    assert same(out, on_cpu(*second, experts=EXPERTS, ranks=2, rank=1))
    group.step([first, second])
    tally = {"live": 2, "none": 1, "timed_out": 0, "broken": 0, "torn": 0}
    assert group.tallies() == [tally] * 2


def test_a_planner_that_is_gone_is_not_waited_for():
    group = Group(2, planner=False)
    gone = group.plan()
    watches = [_native.DeviceEnd(group.board, rank, False) for rank in range(2)]
    gone.stop()
    time.sleep(0.1)
    made = batches(3, 2)
    begun = time.perf_counter()
    for _ in range(20):
        group.step(made, cap_us=5 * SECOND)
    assert time.perf_counter() - begun < 1
    broken = {"live": 0, "none": 0, "timed_out": 0, "broken": 20, "torn": 0}
    assert group.tallies() == [broken] * 2
    assert [tally["alive"] for tally in group.board.snapshot()["by_rank"]] == [True, True]
    assert group.board.snapshot()["planner"]["alive"] is False
    for watch in watches:
        watch.leave()
    group.close()


def lawful(rank: int, made, ids, weights) -> None:
    """Routed columns as ever; a shared expert of some rank for each token, none for padding."""
    expected_ids, expected_weights = on_cpu(*made, experts=EXPERTS, ranks=3, rank=rank)
    assert torch.equal(ids[:, :-1], expected_ids[:, :-1])
    assert torch.equal(weights, expected_weights)
    each = EXPERTS // 3 + 1
    token = expected_ids[:, -1] >= 0
    shared = ids[:, -1]
    assert bool(((shared >= 0) == token).all())
    assert bool((shared[token] % each == each - 1).all() and (shared[token] < 3 * each).all())


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_a_graph_over_the_board_goes_on_counting(mode):
    group = Group(2)
    try:
        tensors = []
        graphs = []
        for rank in range(2):
            ids = torch.zeros((64, TOP_K), dtype=torch.int32, device="cuda")
            weights = torch.zeros((64, TOP_K), device="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode=mode):
                out = group.expanders[rank](ids, weights, SHARED_WEIGHT, cap_us=SECOND)
            tensors.append((ids, weights, out))
            graphs.append(graph)
        for seed in range(50):
            made = [batch(seed * 2 + rank, 64, TOP_K, EXPERTS) for rank in range(2)]
            for (ids, weights, _), (new_ids, new_weights) in zip(tensors, made, strict=True):
                ids.copy_(new_ids)
                weights.copy_(new_weights)
            torch.cuda.synchronize()
            for graph, stream in zip(graphs, group.streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for rank, quotas in enumerate(planned(made, EXPERTS)):
                expected = on_cpu(*made[rank], experts=EXPERTS, ranks=2, rank=rank, quotas=quotas)
                assert same(tensors[rank][2], expected), f"seed {seed} rank {rank}"
        assert [tally["live"] for tally in group.tallies()] == [50, 50]
    finally:
        group.close()
