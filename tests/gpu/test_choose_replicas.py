"""Live replicas: the kernel chooses those that the CPU's ports choose, and a graph reads the table as it is at each replay."""

from __future__ import annotations

import os
import secrets
import threading

import numpy as np
import pytest
import torch
from batches import SHARED_WEIGHT, batch, on_cpu, same

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander
from waterfill_rs.torch import move_up

SECOND = 1_000_000


def board_of(ranks: int, experts: int, redundant: int) -> _native.Board:
    name = f"waterfill-test-{os.getpid()}-{secrets.token_hex(4)}"
    return _native.Board.create(name, ranks, experts, secrets.randbits(128), redundant)


def random_map(seed: int, experts: int, redundant: int) -> list[int]:
    """Each logical expert once, and the popular ones, which are the first, again."""
    random = np.random.default_rng(seed)
    logical = experts - redundant
    popular = (random.random(redundant) ** 2 * logical).astype(int)
    return random.permutation([*range(logical), *popular]).tolist()


class Group:
    """Ranks of one process on a board each for the kernels and for the CPU's ports, with a planner each."""

    def __init__(
        self, ranks: int, experts: int, redundant: int, top_k: int, ids: torch.dtype
    ) -> None:
        self.ranks, self.experts, self.redundant, self.top_k = ranks, experts, redundant, top_k
        self.boards = [board_of(ranks, experts, redundant) for _ in range(2)]
        self.planners = [
            _native.PlannerThread(board, CostModel.rows(), patience_us=SECOND, pace="spin")
            for board in self.boards
        ]
        self.ports = [_native.Port(self.boards[1], rank, CostModel.rows()) for rank in range(ranks)]
        self.streams = [torch.cuda.Stream() for _ in range(ranks)]
        sizes = dict(physical_experts=experts, ranks=ranks, redundant=redundant, top_k=top_k)
        self.expanders = [
            Expander("cuda", rank=rank, ids=ids, board=self.boards[0], **sizes)
            for rank in range(ranks)
        ]

    def set_map(self, seed: int, layer: int = 0) -> None:
        """One that planners and ranks know from now on."""
        mapped = random_map(seed, self.experts, self.redundant)
        self.table = _native.ReplicaTable(self.ranks, mapped)
        for planner in self.planners:
            planner.set_map(layer, self.table)
        self.words = torch.tensor(self.table.words, dtype=torch.int32, device="cuda")
        self.logical = torch.tensor(mapped, dtype=torch.int64, device="cuda")

    def batches(self, seed: int, rows: list[int], ids: torch.dtype) -> list[torch.Tensor]:
        """Of physical ids, as a server chose them: its popular logical experts at any of their replicas."""
        made = zip(range(self.ranks), rows, strict=True)
        return [
            batch(seed * 100 + rank, n, self.top_k, self.experts, ids=ids)[0] for rank, n in made
        ]

    def on_device(self, made: list[torch.Tensor], moved: bool) -> list:
        there = [ids.cuda() for ids in made]
        torch.cuda.synchronize()
        out = []
        for run, stream, ids in zip(self.expanders, self.streams, there, strict=True):
            with torch.cuda.stream(stream):
                out.append(
                    run.choose_replicas(ids, self.words, self.logical, moved=moved, cap_us=SECOND)
                )
        torch.cuda.synchronize()
        return out

    def on_cpu(self, made: list[torch.Tensor], moved: bool) -> list:
        """Ids and quotas by the ports."""
        return by_ports(self.ports, made, self.table, moved)

    def close(self) -> None:
        for planner, board in zip(self.planners, self.boards, strict=True):
            planner.stop()
            board.unlink()


def by_ports(ports, made, table, moved) -> list:
    out = [ids.clone() if not moved else ids.long() for ids in made]

    ended = []

    def call(rank: int) -> None:
        ids = made[rank]
        given = (ids.data_ptr(), *ids.shape, ids.element_size() * 8)
        chosen = out[rank].data_ptr()
        ended.append(ports[rank].unsafe_choose_ptr(given, chosen, SECOND, table, moved))

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(len(ports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["live"] * len(ports)
    return [(ids, port.quotas) for ids, port in zip(out, ports, strict=True)]


def by_core(table, given: torch.Tensor, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """The core's choice by the quotas that `chosen` shows."""
    counts = torch.bincount(chosen[chosen >= 0].long(), minlength=experts).tolist()
    start = 2 + experts + table.redundant + 1
    quotas = [counts[expert] for expert in table.words[start : start + table.slots]]
    ids = _native.choose_replicas(table, quotas, given.flatten().tolist(), given.shape[1])
    return torch.tensor(ids, dtype=given.dtype).reshape(given.shape)


# The kernels of more ranks than four do not run side by side on one device for sure.
SHAPES = [(1, 6, 2, 3), (2, 20, 4, 6), (3, 33, 9, 1), (4, 48, 16, 8)]
LARGE_SHAPES = [(8, 288, 32, 8), (33, 66, 20, 6), (64, 320, 64, 8)]


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("ranks, experts, redundant, top_k", SHAPES)
def test_replicas_are_those_of_the_ports_and_of_the_core(ranks, experts, redundant, top_k, ids):
    group = Group(ranks, experts, redundant, top_k, ids)
    calls = 0
    try:
        for seed, rows in enumerate([0, 1, 32, 100, 256, 300, 1000, 4096, 9000]):
            group.set_map(seed)
            made = group.batches(seed, [max(0, rows - rank) for rank in range(ranks)], ids)
            for moved in (False, True):
                calls += 1
                found, expected = group.on_device(made, moved), group.on_cpu(made, moved)
                for rank in range(ranks):
                    case = f"{rows} rows, moved {moved}, rank {rank}"
                    (out, quotas), (on_cpu_ids, on_cpu_quotas) = found[rank], expected[rank]
                    assert torch.equal(out.cpu(), on_cpu_ids), case
                    if moved:
                        assert quotas is None and out.dtype is torch.int64
                        continue
                    assert quotas.tolist() == on_cpu_quotas, case
                    by_quotas = by_core(group.table, made[rank], out.cpu(), experts)
                    assert torch.equal(out.cpu(), by_quotas), case
                    chosen = made[rank] >= 0
                    logical = group.logical.cpu()
                    assert torch.equal(
                        logical[out.cpu()[chosen].long()], logical[made[rank][chosen].long()]
                    )
        live = {"live": calls, "none": 0, "timed_out": 0, "broken": 0, "torn": 0}
        assert [run.tally() for run in group.expanders] == [live] * ranks
        seen = group.boards[0].snapshot()["by_rank"]
        assert [tally["live"] for tally in seen] == [calls] * ranks
    finally:
        group.close()


@pytest.mark.parametrize("ranks, experts, redundant, top_k", LARGE_SHAPES)
def test_many_ranks_whose_counts_a_collective_brings(ranks, experts, redundant, top_k):
    group = Group(ranks, experts, redundant, top_k, torch.int32)
    try:
        # One rank posts for all, so no other makes a call.
        rank = ranks // 2
        run = group.expanders[rank]
        for seed, rows in enumerate([0, 1, 40, 128, 300, 1000]):
            group.set_map(seed)
            made = group.batches(seed, [max(0, rows - r) for r in range(ranks)], torch.int32)
            for moved in (False, True):
                gathered = torch.empty((ranks, run.words), dtype=torch.int32, device="cuda")
                for of, ids, words in zip(group.expanders, made, gathered, strict=True):
                    of.count(ids.cuda(), None, words, table=group.words, moved=moved)
                out, quotas = run.choose_replicas(
                    made[rank].cuda(),
                    group.words,
                    group.logical,
                    moved=moved,
                    cap_us=SECOND,
                    gathered=gathered.view(-1),
                )
                ids, on_cpu_quotas = group.on_cpu(made, moved)[rank]
                assert torch.equal(out.cpu(), ids), f"{rows} rows, moved {moved}"
                assert moved or quotas.tolist() == on_cpu_quotas
        assert run.tally()["live"] == 12
    finally:
        group.close()


def test_the_launch_that_follows_takes_the_quotas_and_does_not_count():
    group = Group(2, 20, 4, 6, torch.int32)
    try:
        for seed in range(20):
            group.set_map(seed)
            made = group.batches(seed, [200, 70 * (seed % 4)], torch.int32)
            found, expected = group.on_device(made, False), group.on_cpu(made, False)
            for rank in range(2):
                (ids, quotas), weights = found[rank], torch.rand(made[rank].shape)
                out = group.expanders[rank](ids, weights.cuda(), SHARED_WEIGHT, quotas=quotas)
                on_cpu_ids, on_cpu_quotas = expected[rank]
                where = dict(experts=20, ranks=2, rank=rank)
                assert same(out, on_cpu(on_cpu_ids, weights, quotas=on_cpu_quotas, **where))
        assert [run.tally()["live"] for run in group.expanders] == [20, 20]
    finally:
        group.close()


@pytest.fixture
def alone():
    """One rank without a planner."""
    board = board_of(1, 6, 2)
    shape = dict(physical_experts=6, ranks=1, rank=0, top_k=3)
    yield Expander("cuda", board=board, redundant=2, **shape)
    board.unlink()


def on_device(table: _native.ReplicaTable) -> torch.Tensor:
    return torch.tensor(table.words, dtype=torch.int32, device="cuda")


def test_without_a_plan_ids_stay_and_quotas_are_own(alone):
    table = on_device(_native.ReplicaTable(1, [0, 1, 2, 3, 0, 1]))
    ids, weights = batch(1, 300, 3, 6)
    ids[5, 1] = 6
    there, unpadded = ids.cuda(), torch.tensor([250], dtype=torch.int32, device="cuda")
    options = dict(cap_us=100, num_token_non_padded=unpadded)
    out, quotas = alone.choose_replicas(there, table, moved=False, **options)
    padded = ids.clone()
    padded[250:] = -1
    assert torch.equal(out.cpu(), padded)
    assert quotas.tolist() == [-1]
    expanded = alone(
        out, weights.cuda(), SHARED_WEIGHT, quotas=quotas, num_token_non_padded=unpadded
    )
    assert same(expanded, on_cpu(padded, weights, experts=6, ranks=1, rank=0, unpadded=250))
    moved, quotas = alone.choose_replicas(there, table, moved=True, **options)
    ids[5, 1] = -1
    assert quotas is None
    assert torch.equal(moved.cpu(), move_up(ids, physical_experts=6, ranks=1))
    assert alone.tally()["timed_out"] == 2


def test_counts_for_a_collective_are_those_of_the_board(alone):
    table = _native.ReplicaTable(1, [0, 1, 2, 3, 0, 1])
    ids, _ = batch(2, 300, 3, 6)
    counts = torch.bincount(ids[ids >= 0].long(), minlength=6).tolist()
    tokens = int((ids >= 0).any(dim=1).sum())
    assert alone.words == 1 + 1 + 1 + 2 + 1 + 1
    words = on_device(table)
    without = words.clone()
    without[0] = 0
    jobs = [counts[0] + counts[4], counts[1] + counts[5]]
    out = torch.empty(alone.words, dtype=torch.int32, device="cuda")
    for moved in (False, True):
        shared = [0, 0] if moved else [tokens, tokens]
        alone.count(ids.cuda(), None, out, table=words, moved=moved)
        assert out.tolist() == [*shared, counts[2] + counts[3], *jobs, 0b1100, table.words[0]]
        alone.count(ids.cuda(), None, out, table=without, moved=moved)
        assert out.tolist() == [*shared, sum(counts), 0, 0, 0b111111, 0]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_graph_reads_the_table_as_it_is_at_each_replay(moved, gathered):
    ranks = 1 if gathered else 2
    group = Group(ranks, 20, 4, 6, torch.int32)
    try:
        group.set_map(0)
        given = [torch.zeros((64, 6), dtype=torch.int32, device="cuda") for _ in range(ranks)]
        counted = [
            torch.zeros(run.words, dtype=torch.int32, device="cuda") for run in group.expanders
        ]
        graphs, out = [], []
        words, logical = group.words, group.logical
        for run, ids, posted in zip(group.expanders, given, counted, strict=True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                options = {}
                if gathered:
                    run.count(ids, None, posted, table=words, moved=moved)
                    options = dict(gathered=posted)
                out.append(
                    run.choose_replicas(ids, words, logical, moved=moved, cap_us=SECOND, **options)
                )
            graphs.append(graph)
        for seed in range(50):
            if seed % 5 == 0:  # A rebalance, in place.
                group.set_map(seed)
                words.copy_(group.words)
                logical.copy_(group.logical)
            made = group.batches(seed, [64] * ranks, torch.int32)
            for ids, new in zip(given, made, strict=True):
                ids.copy_(new)
            torch.cuda.synchronize()
            for graph, stream in zip(graphs, group.streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for rank, (ids, quotas) in enumerate(group.on_cpu(made, moved)):
                assert torch.equal(out[rank][0].cpu(), ids), f"seed {seed} rank {rank}"
                assert moved or out[rank][1].tolist() == quotas
        assert group.boards[0].snapshot()["planner"]["replicas"] == 50
    finally:
        group.close()


def test_a_map_that_the_planner_does_not_know_changes_no_id():
    group = Group(2, 20, 4, 6, torch.int32)
    try:
        group.set_map(0)
        other = _native.ReplicaTable(2, random_map(1, 20, 4))
        group.words = on_device(other)
        made = group.batches(0, [100, 100], torch.int32)
        for rank, (out, _) in enumerate(group.on_device(made, False)):
            assert torch.equal(out.cpu(), made[rank])
        group.words[0] = 0
        for rank, (out, _) in enumerate(group.on_device(made, False)):
            assert torch.equal(out.cpu(), made[rank])
        assert [run.tally()["live"] for run in group.expanders] == [2, 2]
    finally:
        group.close()


def test_a_table_of_another_map_than_the_servers_names_no_other_expert():
    """The map changed behind the table: only ids that are right by both maps are chosen."""
    group = Group(2, 20, 4, 6, torch.int32)
    try:
        for seed in range(20):
            group.set_map(seed)
            group.logical = torch.tensor(random_map(seed + 100, 20, 4), device="cuda")
            made = group.batches(seed, [300, 40], torch.int32)
            logical = group.logical.cpu()
            for rank, (out, _) in enumerate(group.on_device(made, False)):
                known = made[rank] >= 0
                found = out.cpu()[known].long()
                assert torch.equal(logical[found], logical[made[rank][known].long()])
    finally:
        group.close()


def refused(text, call, *args, **kwargs):
    with pytest.raises(ValueError, match=text):
        call(*args, **kwargs)


def test_what_does_not_fit_is_refused(alone):
    ids = torch.zeros((9, 3), dtype=torch.int32, device="cuda")
    table = on_device(_native.ReplicaTable(1, [0, 1, 2, 3, 0, 1]))
    choose = alone.choose_replicas
    options = dict(moved=True, cap_us=1)
    refused("topk_ids is torch.int64", choose, ids.long(), table, **options)
    refused(r"table has shape \(14,\)", choose, ids, table[:-1], **options)
    refused("table is on cpu", choose, ids, table.cpu(), **options)
    refused("logical is torch.int32", choose, ids, table, ids.view(-1)[:6], **options)
    refused(r"gathered has shape \(1,\)", choose, ids, table, gathered=table[:1], **options)
    weights = torch.zeros((9, 3), device="cuda")
    refused("2 redundant experts: choose replicas", alone, ids, weights, 1.0, cap_us=1)
    words = torch.zeros(alone.words, dtype=torch.int32, device="cuda")
    refused("2 redundant experts: count", alone.count, ids, weights, words)
    shape = dict(physical_experts=6, ranks=1, rank=0, top_k=3)
    without = Expander("cuda", **shape)
    refused("no redundant experts", without.choose_replicas, ids, table, **options)
    refused(
        "without a board",
        Expander("cuda", redundant=2, **shape).choose_replicas,
        ids,
        table,
        **options,
    )
    refused("6 redundant of 6 experts", Expander, "cuda", redundant=6, **shape)
    board = board_of(1, 6, 2)
    try:
        refused("2 redundant experts: give one with 0", Expander, "cuda", board=board, **shape)
    finally:
        board.unlink()
