"""``expand_topk`` and ``move_up`` on CPU tensors, against the contract written out row by row."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs.torch import assign, count, expand_topk, move_up, traffic


def batch(rows, top_k, experts, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (rows, top_k), generator=generator)
    ids[torch.rand(rows, top_k, generator=generator) < 0.1] = -1
    ids[torch.rand(rows, generator=generator) < 0.1] = -1
    return ids.to(dtype), torch.rand(rows, top_k, generator=generator)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "ranks, rows, top_k", [(1, 9, 2), (8, 300, 6), (12, 50, 8), (72, 128, 6), (144, 64, 3)]
)
def test_expansion_keeps_the_contract(ranks, rows, top_k, id_dtype, weight_dtype):
    per_rank = 3
    experts, rank = ranks * per_rank, ranks // 2
    ids, weights = batch(rows, top_k, experts, id_dtype, seed=rows)
    weights = weights.to(weight_dtype)
    before = ids.clone(), weights.clone()
    out_ids, out_weights = expand_topk(
        ids, weights, physical_experts=experts, ranks=ranks, rank=rank, shared_weight=0.4
    )
    assert torch.equal(ids, before[0]) and torch.equal(weights, before[1])
    assert out_ids.dtype == id_dtype and out_weights.dtype == weight_dtype
    valid = ids >= 0
    assert torch.equal(out_ids[:, :-1], torch.where(valid, ids + ids // per_rank, ids))
    assert torch.equal(out_weights[:, :-1], torch.where(valid, weights, torch.zeros_like(weights)))
    padding = ~valid.any(dim=1)
    shared = out_ids[:, -1]
    assert (shared[padding] == -1).all() and (out_weights[padding, -1] == 0).all()
    assert (shared[~padding] % (per_rank + 1) == per_rank).all()
    assert (out_weights[~padding, -1] == torch.tensor(0.4).to(weight_dtype)).all()


def test_quotas_are_met_and_nothing_beyond_the_output_is_written():
    ids, _ = batch(100, 6, 64, torch.int32, seed=3)
    counts, visits, tokens = count(ids, physical_experts=64, ranks=8)
    assert sum(counts) == int((ids >= 0).sum()) and max(visits) <= tokens
    quotas = [tokens - 35, 5, 5, 5, 5, 5, 5, 5]
    shared = assign(ids, quotas, physical_experts=64, rank=0)
    assert torch.bincount(shared[shared >= 0], minlength=8).tolist() == quotas
    copies, messages = traffic(ids, shared, physical_experts=64, ranks=8, rank=0)
    assert messages == 35 and copies == 0


def test_idle_rank_gets_an_empty_expansion():
    ids, weights = torch.empty(0, 6, dtype=torch.int32), torch.empty(0, 6)
    out = expand_topk(ids, weights, physical_experts=64, ranks=8, rank=1, shared_weight=1.0)
    assert out[0].shape == out[1].shape == (0, 7)


GOOD = dict(physical_experts=16, ranks=4, rank=1, shared_weight=1.0)
IDS, WEIGHTS = torch.zeros(5, 3, dtype=torch.int32), torch.zeros(5, 3)
REFUSED = {
    "float ids": (IDS.float(), WEIGHTS, {}, "topk_ids is torch.float32"),
    "int16 ids": (IDS.short(), WEIGHTS, {}, "topk_ids is torch.int16"),
    "half weights": (IDS, WEIGHTS.half(), {}, "topk_weights is torch.float16"),
    "double weights": (IDS, WEIGHTS.double(), {}, "topk_weights is torch.float64"),
    "flat ids": (IDS.flatten(), WEIGHTS, {}, "topk_ids has shape"),
    "no columns": (IDS[:, :0], WEIGHTS, {}, "topk_ids has shape"),
    "other rows": (IDS, WEIGHTS[:4], {}, "topk_weights has shape"),
    "other columns": (IDS, torch.zeros(5, 4), {}, "topk_weights has shape"),
    "strided ids": (torch.zeros(3, 5, dtype=torch.int32).T, WEIGHTS, {}, "contiguous"),
    "strided weights": (IDS, torch.zeros(3, 5).T, {}, "contiguous"),
    "ids on meta": (IDS.to("meta"), WEIGHTS, {}, "is on meta"),
    "weights on meta": (IDS, WEIGHTS.to("meta"), {}, "is on meta"),
    "id too large": (IDS + 16, WEIGHTS, {}, "expert id 16 in row 0, column 0"),
    "no division": (IDS, WEIGHTS, dict(physical_experts=18), "18 physical experts over 4"),
    "rank too large": (IDS, WEIGHTS, dict(rank=4), "rank 4"),
    "negative rank": (IDS, WEIGHTS, dict(rank=-1), "rank -1"),
    "short quotas": (IDS, WEIGHTS, dict(quotas=[1, 1, 1, 1]), "add up to 4 and it has 5"),
    "negative quotas": (IDS, WEIGHTS, dict(quotas=[6, -1, 0, 0]), r"quotas\[1\] is -1"),
    "negative experts": (IDS, WEIGHTS, dict(physical_experts=-16), "physical_experts is -16"),
    "quotas of other ranks": (IDS, WEIGHTS, dict(quotas=[5]), "quotas has 1 entries: give 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_its_numbers(name):
    ids, weights, changes, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        expand_topk(ids, weights, **{**GOOD, **changes})


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ranks, per_rank", [(1, 1), (1, 256), (8, 32), (72, 4), (1024, 1)])
def test_ids_alone_move_past_the_shared_experts(ranks, per_rank, id_dtype):
    experts = ranks * per_rank
    ids, _ = batch(50, 6, experts, id_dtype, seed=ranks)
    ids[0, 0], ids[0, 1], ids[0, 2] = 0, per_rank - 1, experts - 1
    ids[0, 3], ids[0, 4] = min(per_rank, experts - 1), torch.iinfo(id_dtype).min
    before = ids.clone()
    moved = move_up(ids, physical_experts=experts, ranks=ranks)
    assert torch.equal(ids, before)
    assert moved.dtype == torch.int64 and moved.is_contiguous()
    expected = [[i + i // per_rank if i >= 0 else i for i in row] for row in ids.tolist()]
    assert moved.tolist() == expected
    shape = dict(physical_experts=experts, ranks=ranks)
    wide, _ = expand_topk(ids, torch.rand(50, 6), rank=0, shared_weight=1.0, **shape)
    assert torch.equal(moved, wide[:, :-1].long())


def test_idle_rank_has_no_ids_to_move():
    moved = move_up(torch.empty(0, 6, dtype=torch.int32), physical_experts=64, ranks=8)
    assert moved.shape == (0, 6) and moved.dtype == torch.int64


OF_IDS = ["float ids", "int16 ids", "flat ids", "no columns", "strided ids", "ids on meta"]


@pytest.mark.parametrize("name", [*OF_IDS, "id too large", "no division", "negative experts"])
def test_ids_that_do_not_fit_are_not_moved(name):
    ids, _, changes, text = REFUSED[name]
    sizes = {**dict(physical_experts=16, ranks=4), **changes}
    with pytest.raises(ValueError, match=text):
        move_up(ids, **sizes)


@pytest.mark.parametrize("value", [16, 2**31, 2**32, 2**32 + 5, 2**63 - 1])
def test_ids_past_the_last_expert_are_not_moved(value):
    ids = IDS.long()
    ids[4, 1] = value
    with pytest.raises(ValueError, match=f"expert id {value} in row 4, column 1"):
        move_up(ids, physical_experts=16, ranks=4)


def test_a_user_without_a_home_keeps_no_kernels(monkeypatch):
    import pwd

    from waterfill_rs import cuda

    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cuda._cache() == "/somewhere/waterfill-rs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cuda._cache() is None
