"""Ids moved up by themselves or by primary replicas: as on the CPU, the same in a CUDA graph, and no call of the board's."""

from __future__ import annotations

import os
import secrets

import pytest
import torch
from batches import SHARED_WEIGHT, batch, on_cpu, same

from waterfill_rs import _native
from waterfill_rs.cuda import Expander
from waterfill_rs.exchange.device import DeviceExchange
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.torch import move_up

# Both sides of a block of 256 ids at top 8, a decode, prefills.
ROWS = [0, 1, 31, 32, 33, 128, 1000, 8192, 16385]
CAPTURE_MODES = ["global", "thread_local", "relaxed"]


def expander(experts, ranks, top_k, ids=torch.int32) -> Expander:
    where = dict(physical_experts=experts, ranks=ranks, rank=ranks // 2)
    return Expander("cuda", top_k=top_k, ids=ids, **where)


def moved_on_cpu(topk_ids, experts, ranks):
    """An id past the last expert, which is an error there, taken for none."""
    known = topk_ids.masked_fill(topk_ids >= experts, -1)
    return move_up(known, physical_experts=experts, ranks=ranks)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("ranks, experts", [(1, 1), (1, 257), (8, 256), (72, 288), (1024, 1024)])
def test_it_equals_the_cpu(ranks, experts, ids):
    for top_k in (1, 6, 8, 32):
        run = expander(experts, ranks, top_k, ids)
        for seed, rows in enumerate(ROWS):
            topk_ids, _ = batch(seed, rows, top_k, experts, ids=ids)
            moved = run.move_up(topk_ids.cuda())
            assert moved.dtype == torch.int64 and moved.is_contiguous(), f"{rows} rows"
            expected = moved_on_cpu(topk_ids, experts, ranks)
            assert torch.equal(moved.cpu(), expected), f"{rows} rows, top {top_k}"


def test_more_ids_than_one_wave_of_blocks():
    topk_ids = torch.arange(3_000_000 * 8, dtype=torch.int32).remainder(256).view(-1, 8)
    moved = expander(256, 8, 8).move_up(topk_ids.cuda())
    assert torch.equal(moved.cpu(), moved_on_cpu(topk_ids, 256, 8))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("ranks", [1, 8, 256])
def test_ids_at_every_boundary(ranks, ids):
    each, limits = 256 // ranks, torch.iinfo(ids)
    known = [-1, 0, each - 1, each, 255, 256, 257, -2, limits.min, limits.max, limits.max - 1]
    if ids == torch.int64:
        known += [2**31 - 1, 2**31, 2**32, 2**32 + 5, 2**62, -(2**31), -(2**32) + 5]
    topk_ids = torch.tensor(known, dtype=ids)[:, None].contiguous()
    moved = expander(256, ranks, 1, ids).move_up(topk_ids.cuda())
    assert moved.flatten().tolist() == [
        i if i < 0 else i + i // each if i < 256 else -1 for i in known
    ]


def test_a_slice_that_is_aligned_to_one_id_alone():
    topk_ids, _ = batch(1, 100, 7, 256)
    there = topk_ids.cuda()[1:]
    assert there.data_ptr() % 8
    moved = expander(256, 8, 7).move_up(there)
    assert torch.equal(moved.cpu(), moved_on_cpu(topk_ids[1:], 256, 8))


def test_it_dispatches_by_device():
    topk_ids, _ = batch(2, 100, 6, 256)
    where = dict(physical_experts=256, ranks=8)
    assert torch.equal(move_up(topk_ids.cuda(), **where).cpu(), move_up(topk_ids, **where))


def test_torch_compile_keeps_it_in_one_graph():
    topk_ids, _ = batch(3, 100, 6, 256)

    @torch.compile(fullgraph=True, backend="eager")
    def layer(ids):
        return move_up(ids, physical_experts=256, ranks=8) + 0

    assert torch.equal(layer(topk_ids.cuda()).cpu(), moved_on_cpu(topk_ids, 256, 8))


@pytest.mark.parametrize("mode", CAPTURE_MODES)
def test_a_graph_gives_what_the_cpu_gives(mode):
    run = expander(256, 8, 6)
    topk_ids = torch.zeros((128, 6), dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    # The first launch is within the capture: the driver has nothing left to do lazily.
    with torch.cuda.graph(graph, capture_error_mode=mode):
        moved = run.move_up(topk_ids)
        none = run.move_up(topk_ids[:0])
    assert none.shape == (0, 6)
    for seed in range(20):
        ids, _ = batch(seed, 128, 6, 256)
        topk_ids.copy_(ids)
        moved.fill_(-7)
        graph.replay()
        assert torch.equal(moved.cpu(), moved_on_cpu(ids, 256, 8)), f"seed {seed}"


def test_it_may_be_on_another_stream_than_the_calls():
    run = expander(256, 8, 6)
    topk_ids, topk_weights = batch(4, 500, 6, 256)
    there, weights, other = topk_ids.cuda(), topk_weights.cuda(), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        wide = run(there, weights, SHARED_WEIGHT)
        with torch.cuda.stream(other):
            moved = run.move_up(there)
    torch.cuda.synchronize()
    assert same(wide, on_cpu(topk_ids, topk_weights, experts=256, ranks=8, rank=4))
    assert torch.equal(moved.cpu(), moved_on_cpu(topk_ids, 256, 8))


def test_what_does_not_fit_is_refused():
    run = expander(256, 8, 6)
    ids = torch.zeros((9, 6), dtype=torch.int32, device="cuda")
    for wrong, text in [
        (ids.long(), "topk_ids is torch.int64"),
        (ids.float(), "topk_ids is torch.float32"),
        (ids.cpu(), "topk_ids is on cpu"),
        (ids[:, :5], r"topk_ids has shape \(9, 5\)"),
        (ids.view(-1), r"topk_ids has shape \(54,\)"),
        (ids[0, 0], r"topk_ids has shape \(\)"),
        (ids[:, :, None], r"topk_ids has shape \(9, 6, 1\)"),
        (ids.t().contiguous().t(), "topk_ids has strides"),
    ]:
        with pytest.raises(ValueError, match=text):
            run.move_up(wrong)
    for wrong in (ids.view(-1), ids[:, :0]):
        with pytest.raises(ValueError, match="give \\[N, K\\], K at least 1"):
            move_up(wrong, physical_experts=256, ranks=8)
    with pytest.raises(ValueError, match="250"):
        move_up(ids, physical_experts=250, ranks=8)


# By primary replicas


def primaries_on_cpu(topk_ids, primaries, logical, experts, ranks):
    """Ids by their primary replicas where those are of the same logical expert, moved up."""
    known = (topk_ids >= 0) & (topk_ids < experts)
    own = topk_ids.masked_fill(~known, 0).long()
    by = primaries[own].long()
    fits = known & (by >= 0) & (by < experts)
    fits &= logical[by.clamp(0, experts - 1)] == logical[own]
    return moved_on_cpu(torch.where(fits, by, topk_ids.long()).to(topk_ids.dtype), experts, ranks)


def replicated(seed, ranks, experts, redundant):
    """A map of the server's, and the core's primary replicas of it: ``[P]`` int32 and int64."""
    draws = torch.Generator().manual_seed(seed)
    logical = experts - redundant
    more = torch.randint(logical, (redundant,), generator=draws)
    mapped = torch.cat([torch.arange(logical), more])[torch.randperm(experts, generator=draws)]
    table = _native.ReplicaTable(ranks, mapped.tolist())
    return torch.tensor(table.primaries, dtype=torch.int32), mapped


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "ranks, experts, redundant", [(1, 2, 1), (4, 80, 16), (8, 288, 32), (72, 360, 72)]
)
def test_by_primaries_it_equals_the_cpu(ranks, experts, redundant, ids):
    for top_k in (1, 6, 8):
        run, changed = expander(experts, ranks, top_k, ids), 0
        for seed, rows in enumerate(ROWS):
            primaries, logical = replicated(seed, ranks, experts, redundant)
            topk_ids, _ = batch(seed, rows, top_k, experts, ids=ids)
            there = primaries.cuda(), logical.cuda()
            expected = primaries_on_cpu(topk_ids, primaries, logical, experts, ranks)
            for tables in (there, there[:1]):  # The core's tables need no check.
                moved = run.move_up(topk_ids.cuda(), *tables)
                assert torch.equal(moved.cpu(), expected), f"{rows} rows, top {top_k}"
            alone = run.move_up(topk_ids.cuda(), None, there[1])
            assert torch.equal(alone.cpu(), moved_on_cpu(topk_ids, experts, ranks))
            changed += int((moved != alone).sum())
        assert changed > 0, f"top {top_k}"


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_a_primary_of_another_expert_is_not_taken(ids):
    run, draws = expander(256, 8, 6, ids), torch.Generator().manual_seed(1)
    logical = torch.randint(128, (256,), generator=draws)
    # Right ones, ones of other experts, and ones of none.
    primaries = torch.randint(-3, 260, (256,), generator=draws, dtype=torch.int32)
    primaries[::2] = torch.arange(256, dtype=torch.int32)[::2]
    primaries[5], primaries[7] = torch.iinfo(torch.int32).max, torch.iinfo(torch.int32).min
    topk_ids, _ = batch(7, 1000, 6, 256, ids=ids)
    moved = run.move_up(topk_ids.cuda(), primaries.cuda(), logical.cuda())
    expected = primaries_on_cpu(topk_ids, primaries, logical, 256, 8)
    assert torch.equal(moved.cpu(), expected)


@pytest.mark.parametrize("mode", CAPTURE_MODES)
def test_a_graph_goes_by_the_primaries_that_are_there_at_each_replay(mode):
    run = expander(80, 4, 6)
    topk_ids = torch.zeros((128, 6), dtype=torch.int32, device="cuda")
    primaries, logical = (table.cuda() for table in replicated(0, 4, 80, 16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        moved = run.move_up(topk_ids, primaries, logical)
    for seed in range(20):
        ids, _ = batch(seed, 128, 6, 80)
        tables = replicated(seed, 4, 80, 16)
        for there, now in zip((topk_ids, primaries, logical), (ids, *tables), strict=True):
            there.copy_(now)
        moved.fill_(-7)
        graph.replay()
        assert torch.equal(moved.cpu(), primaries_on_cpu(ids, *tables, 80, 4)), f"seed {seed}"


def test_tables_that_do_not_fit_are_refused():
    run = expander(256, 8, 6)
    ids = torch.zeros((9, 6), dtype=torch.int32, device="cuda")
    primaries = torch.arange(256, dtype=torch.int32, device="cuda")
    for wrong, beside, text in [
        (primaries.long(), None, "primaries is torch.int64"),
        (primaries.cpu(), None, "primaries is on cpu"),
        (primaries[1:], None, r"primaries has shape \(255,\)"),
        (primaries, primaries, "logical is torch.int32"),
        (primaries, primaries.long()[:9], r"logical has shape \(9,\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            run.move_up(ids, wrong, beside)


def test_an_exchange_with_tables_makes_no_call_of_it_either():
    """Two ranks of one process, of which one alone decodes: it waits for nobody."""
    name, logical = f"waterfill-primaries-{os.getpid()}", replicated(3, 2, 12, 4)[1][None]
    board = _native.Board.create(name, 2, 12, secrets.randbits(120), 4)
    board.unlink()
    tables = ReplicaTables(2, 4, logical.clone(), logical=logical.cuda())
    device = torch.device("cuda", torch.cuda.current_device())
    settings = dict(reason="a test", board=board, plans=True, replicas=tables)
    exchange = DeviceExchange(device, Member(2, 12, 0), **settings)
    topk_ids, topk_weights = batch(8, 50, 3, 12)
    for layer in (0, None):
        moved = exchange.move_up(topk_ids.cuda(), topk_weights.cuda(), layer=layer, live=False)
        primaries = torch.arange(12) if layer is None else torch.tensor(tables.primaries(0))
        expected = primaries_on_cpu(topk_ids, primaries, logical[0], 12, 2)
        assert torch.equal(moved.cpu(), expected)
    torch.cuda.synchronize()
    assert exchange.tally()["calls"] == 0
    exchange.close()


# In an exchange


@pytest.fixture
def live():
    """One rank's exchange over a board, and the board."""
    name, run = f"waterfill-move-{os.getpid()}", secrets.randbits(120)
    board = _native.Board.create(name, 1, 1, run)
    board.unlink()
    device = torch.device("cuda", torch.cuda.current_device())
    exchange = DeviceExchange(device, Member(1, 8, 0), reason="a test", board=board, plans=True)
    yield exchange
    torch.cuda.synchronize()
    exchange.close()


def test_it_is_no_call_of_the_boards(live):
    topk_ids, topk_weights = batch(5, 40, 6, 8)
    there = topk_ids.cuda(), topk_weights.cuda()
    for calls in (0, 1, 2):
        for rows in (40, 0, 7):
            moved = live.move_up(there[0][:rows], there[1][:rows])
            assert torch.equal(moved.cpu(), moved_on_cpu(topk_ids[:rows], 8, 1))
        torch.cuda.synchronize()
        assert live.tally()["calls"] == calls
        wide = live.expand(*there, SHARED_WEIGHT)
        assert same(wide, on_cpu(topk_ids, topk_weights, experts=8, ranks=1, rank=0))
    torch.cuda.synchronize()
    assert live.tally()["calls"] == live.tally()["live"] == 3


def test_the_first_call_of_all_is_not_captured(live):
    topk_ids, topk_weights = (tensor.cuda() for tensor in batch(6, 40, 6, 8))
    with (
        pytest.raises(RuntimeError, match="first Waterfill call is within the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        live.move_up(topk_ids, topk_weights)
    live.move_up(topk_ids, topk_weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = live.move_up(topk_ids, topk_weights)
    graph.replay()
    assert torch.equal(moved.cpu(), moved_on_cpu(topk_ids.cpu(), 8, 1))
