"""The kernel equals the CPU path bit for bit, refuses what does not fit, and is the same in a CUDA graph."""

from __future__ import annotations

import functools

import pytest
import torch
from batches import SHARED_WEIGHT, batch, on_cpu, random_quotas, same

from waterfill_rs.cuda import Expander
from waterfill_rs.torch import expand_topk

# Each is compiled by itself.
ALL_RANKS = [*range(1, 18), 24, 31, 32, 33, 40, 48, 63, 64, 65, 72, 144, 256, 1024]
# With 2049 a cluster's last blocks have none.
ALL_ROWS = [0, 1, 7, 8, 32, 128, 256, 257, 1000, 1024, 1025, 2049, 4096, 16384]


@functools.lru_cache(maxsize=64)
def expander(experts, ranks, rank, top_k, ids=torch.int32, weights=torch.float32) -> Expander:
    return Expander(
        "cuda",
        physical_experts=experts,
        ranks=ranks,
        rank=rank,
        top_k=top_k,
        ids=ids,
        weights=weights,
    )


def check(seed, rows, top_k, experts, ranks, *, ids=torch.int32, weights=torch.float32, **options):
    """Own counts, then given quotas."""
    rank = seed % ranks
    run = expander(experts, ranks, rank, top_k, ids, weights)
    if rows > run.max_rows:
        pytest.skip(f"{rows} rows: at most {run.max_rows} fit this device's shared memory")
    topk_ids, topk_weights = batch(seed, rows, top_k, experts, ids=ids, weights=weights, **options)
    case = f"{rows} rows, top {top_k}, {experts} experts on {ranks} ranks, rank {rank}"
    there = (topk_ids.cuda(), topk_weights.cuda())
    where = dict(experts=experts, ranks=ranks, rank=rank)
    assert same(run(*there, SHARED_WEIGHT), on_cpu(topk_ids, topk_weights, **where)), case
    quotas = random_quotas(seed, topk_ids, ranks, rank)
    given = torch.tensor(quotas, dtype=torch.int32, device="cuda")
    by_kernel = run(*there, SHARED_WEIGHT, quotas=given)
    assert same(by_kernel, on_cpu(topk_ids, topk_weights, quotas=quotas, **where)), case + ", given"


@pytest.mark.parametrize("ranks", ALL_RANKS)
def test_any_number_of_ranks(ranks):
    for seed, rows in enumerate([1, 32, 500, 1024, 2500]):
        check(ranks * 7 + seed, rows, 6, ranks * (1 + (ranks + seed) % 5), ranks)


@pytest.mark.parametrize("rows", ALL_ROWS)
@pytest.mark.parametrize("ranks", [1, 8, 12, 32, 64, 72, 144, 256, 1024])
def test_any_number_of_rows(ranks, rows):
    experts = max(256 // ranks, 2) * ranks
    for seed in range(3):
        check(seed * 31 + rows, rows, 6, experts, ranks, popular=[1.0, 1.5, 4.0][seed])


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 32])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_any_top_k_and_dtype(top_k, ids, weights):
    for seed, rows in enumerate([5, 200, 1024, 3000]):
        check(seed, rows, top_k, 256, 8, ids=ids, weights=weights)
        check(seed, rows, top_k, 72, 72, ids=ids, weights=weights)


def test_strange_ids_name_no_expert():
    run = expander(256, 8, 3, 6, torch.int64)
    topk_ids, topk_weights = batch(1, 300, 6, 256, ids=torch.int64)
    strange = [256, 257, 2**31 - 1, 2**31, 2**32, 2**32 + 5, 2**62, -1, -2, -(2**31), -(2**32) + 5]
    for i, value in enumerate(strange):
        topk_ids[i * 20, i % 6] = value
    topk_ids[7] = 999
    expected = on_cpu(topk_ids, topk_weights, experts=256, ranks=8, rank=3)
    assert same(run(topk_ids.cuda(), topk_weights.cuda(), SHARED_WEIGHT), expected)


@pytest.mark.parametrize("unpadded", [-1, 0, 1, 100, 128, 1500, 4000])
@pytest.mark.parametrize("rows", [128, 2000, 9000])
def test_rows_past_the_unpadded_ones_are_padding(rows, unpadded):
    run = expander(256, 8, 3, 6)
    topk_ids, topk_weights = batch(2, rows, 6, 256, clean=True)
    count = torch.tensor(unpadded, dtype=torch.int32, device="cuda")
    there = topk_ids.cuda(), topk_weights.cuda()
    by_kernel = run(*there, SHARED_WEIGHT, num_token_non_padded=count)
    expected = on_cpu(topk_ids, topk_weights, experts=256, ranks=8, rank=3, unpadded=unpadded)
    assert same(by_kernel, expected)


def test_quotas_that_do_not_add_up_are_refused_and_counted():
    run = Expander("cuda", physical_experts=256, ranks=8, rank=3, top_k=6)
    topk_ids, topk_weights = batch(3, 100, 6, 256)
    for wrong in ([0] * 8, [2**31 - 1] * 8, [-1] * 8):
        quotas = torch.tensor(wrong, dtype=torch.int32, device="cuda")
        by_kernel = run(topk_ids.cuda(), topk_weights.cuda(), SHARED_WEIGHT, quotas=quotas)
        assert same(by_kernel, on_cpu(topk_ids, topk_weights, experts=256, ranks=8, rank=3))
    assert run.tally() == {"live": 0, "none": 0, "timed_out": 0, "broken": 0, "torn": 3}


def test_expand_topk_dispatches_by_device():
    topk_ids, topk_weights = batch(4, 100, 6, 256)
    where = dict(physical_experts=256, ranks=8, rank=1, shared_weight=SHARED_WEIGHT)
    for quotas in (None, random_quotas(4, topk_ids, 8, 1)):
        expected = expand_topk(topk_ids, topk_weights, quotas=quotas, **where)
        assert same(
            expand_topk(topk_ids.cuda(), topk_weights.cuda(), quotas=quotas, **where), expected
        )


def test_torch_compile_keeps_it_in_one_graph():
    topk_ids, topk_weights = batch(5, 100, 6, 256)
    where = dict(physical_experts=256, ranks=8, rank=1, shared_weight=SHARED_WEIGHT)

    @torch.compile(fullgraph=True, backend="eager")
    def layer(ids, weights):
        ids, weights = expand_topk(ids, weights, **where)
        return ids + 0, weights * 1

    expected = expand_topk(topk_ids, topk_weights, **where)
    assert same(layer(topk_ids.cuda(), topk_weights.cuda()), expected)


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
@pytest.mark.parametrize("given", [False, True])
def test_a_graph_gives_what_eager_gives(mode, given):
    graphs = []
    quotas = torch.zeros(8, dtype=torch.int32, device="cuda") if given else None
    for rows in (1, 64, 1024, 4096):
        run = Expander("cuda", physical_experts=256, ranks=8, rank=3, top_k=6)
        topk_ids = torch.zeros((rows, 6), dtype=torch.int32, device="cuda")
        topk_weights = torch.zeros((rows, 6), device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=mode):
            out = run(topk_ids, topk_weights, SHARED_WEIGHT, quotas=quotas)
        graphs.append((graph, topk_ids, topk_weights, out))
    for seed in range(200):
        graph, topk_ids, topk_weights, out = graphs[seed % len(graphs)]
        ids, weights = batch(seed, len(topk_ids), 6, 256)
        rows = random_quotas(seed, ids, 8, 3) if given else None
        expected = on_cpu(ids, weights, experts=256, ranks=8, rank=3, quotas=rows)
        if given:
            quotas.copy_(torch.tensor(rows, dtype=torch.int32))
        topk_ids.copy_(ids)
        topk_weights.copy_(weights)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        there = [tensor.cuda() for tensor in expected]
        for _ in range(21):
            out[0].fill_(-7)
            out[1].fill_(-7)
            graph.replay()
            different += (out[0] != there[0]).sum() + (out[1] != there[1]).sum()
        assert int(different) == 0, f"seed {seed}"


def refused(text, call, *args, **kwargs):
    with pytest.raises(ValueError, match=text):
        call(*args, **kwargs)


def test_what_does_not_fit_is_refused():
    run = expander(256, 8, 3, 6)
    ids = torch.zeros((9, 6), dtype=torch.int32, device="cuda")
    weights = torch.zeros((9, 6), device="cuda")
    quotas = torch.zeros(8, dtype=torch.int32, device="cuda")
    refused("topk_ids is torch.int64", run, ids.long(), weights, 1.0)
    refused("topk_ids is torch.float32", run, weights, weights, 1.0)
    refused("topk_weights is torch.bfloat16", run, ids, weights.bfloat16(), 1.0)
    refused("topk_weights is torch.float16", run, ids, weights.half(), 1.0)
    refused("topk_ids is on cpu", run, ids.cpu(), weights, 1.0)
    refused("topk_weights is on cpu", run, ids, weights.cpu(), 1.0)
    refused(r"topk_ids has shape \(9, 5\)", run, ids[:, :5], weights, 1.0)
    refused(r"topk_ids has shape \(54,\)", run, ids.view(-1), weights, 1.0)
    refused(r"topk_ids has shape \(\)", run, ids[0, 0], weights, 1.0)
    refused(r"topk_ids has shape \(9, 6, 1\)", run, ids[:, :, None], weights, 1.0)
    refused(r"topk_weights has shape \(\)", run, ids, weights[0, 0], 1.0)
    refused(r"topk_weights has shape \(8, 6\)", run, ids, weights[:8], 1.0)
    refused("topk_ids has strides", run, ids.t().contiguous().t(), weights, 1.0)
    refused("topk_weights has strides", run, ids, weights.t().contiguous().t(), 1.0)
    refused("quotas is torch.int64", run, ids, weights, 1.0, quotas=quotas.long())
    refused("quotas is on cpu", run, ids, weights, 1.0, quotas=quotas.cpu())
    refused(r"quotas has shape \(7,\)", run, ids, weights, 1.0, quotas=quotas[:7])
    refused(
        "num_token_non_padded is torch.int64",
        run,
        ids,
        weights,
        1.0,
        num_token_non_padded=quotas[:1].long(),
    )
    refused("without a board", run, ids, weights, 1.0, cap_us=100)
    many = torch.zeros((run.max_rows + 1, 6), dtype=torch.int32, device="cuda")
    refused("rows of top 6", run, many, torch.zeros(many.shape, device="cuda"), 1.0)
    refused("give ranks|ranks", Expander, "cuda", physical_experts=250, ranks=8, rank=0, top_k=6)
    refused("rank 8", Expander, "cuda", physical_experts=256, ranks=8, rank=8, top_k=6)
    refused("top_k 33", Expander, "cuda", physical_experts=256, ranks=8, rank=0, top_k=33)
    refused(
        "float16",
        Expander,
        "cuda",
        physical_experts=256,
        ranks=8,
        rank=0,
        top_k=6,
        weights=torch.float16,
    )
    refused("give a CUDA device", Expander, "cpu", physical_experts=256, ranks=8, rank=0, top_k=6)
