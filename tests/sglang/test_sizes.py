"""What is merely not served never ends a server of ``auto``: checked at preparation, told once, sglang's own stays."""

import logging
import types

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import torch
from inside import EXPERTS, RANKS, TOP_K, hash_layer, prepare

from waterfill_rs.sglang import sizes

SGLANGS, OURS = "sglang.srt.layers.moe.waterfill", "waterfill_rs.sglang.balancer"
STAYS = "waterfill-rs is off, sglang's own Waterfill stays: "
SLOTS = EXPERTS // RANKS + 1
TOO_MANY_RANKS = 2048


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WATERFILL_RS", "WATERFILL_RS_REQUIRE", "WATERFILL_RS_EXCHANGE"):
        monkeypatch.delenv(name, raising=False)


def moe(router, slots=SLOTS):
    """Of sglang's MoE layer what is looked at."""
    layer = torch.nn.Module()
    layer.topk, layer.experts = router, types.SimpleNamespace(num_local_experts=slots)
    return layer


def whose(*routers):
    return {type(router.waterfill_balancer).__module__ for router in routers}


def parallel(ranks):
    from sglang.srt.runtime_context import get_parallel

    names = ("tp_size", "attn_tp_size", "moe_ep_size")
    return get_parallel().override(**dict.fromkeys(names, ranks))


def test_more_ranks_than_ours_leave_sglangs_own(sglang, caplog):
    router = hash_layer(sglang)
    with parallel(TOO_MANY_RANKS), caplog.at_level(logging.WARNING):
        prepare(sglang, router, experts=2 * TOO_MANY_RANKS)
        prepare(sglang, router, experts=2 * TOO_MANY_RANKS)  # A second time changes nothing.
    assert whose(router) == {SGLANGS}
    assert caplog.text.count(STAYS) == 1 and f"{TOO_MANY_RANKS} ranks: give a number" in caplog.text


@pytest.mark.parametrize("variables", [{"WATERFILL_RS": "rust"}, {"WATERFILL_RS_REQUIRE": "1"}])
def test_required_they_stop_the_server_with_all_reasons(sglang, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    router = hash_layer(sglang)
    with parallel(TOO_MANY_RANKS), pytest.raises(SystemExit) as stopped:
        prepare(sglang, moe(router, slots=9), experts=2 * TOO_MANY_RANKS)
    _, *reasons = str(stopped.value).splitlines()
    assert len(reasons) == 2
    assert f"{TOO_MANY_RANKS} ranks: give a number" in stopped.value.code
    assert "9 slots a rank" in stopped.value.code


def test_draft_layers_without_the_redundant_experts_that_are_counted(sglang, caplog):
    """As DeepSeek V4's draft layers are: theirs has no redundant experts, and sglang counts them for it too."""
    target, draft = hash_layer(sglang), hash_layer(sglang)
    with (
        sglang.moe.override(ep_num_redundant_experts=RANKS),
        caplog.at_level(logging.WARNING),
    ):
        prepare(sglang, moe(target, SLOTS + 1))
        prepare(sglang, moe(draft, SLOTS))
    assert whose(target) == {OURS} and whose(draft) == {SGLANGS}
    told = f"1 of 1 MoE layers have {SLOTS} slots a rank, and Waterfill counts {SLOTS + 1}"
    assert caplog.text.count(STAYS) == 1 and told in caplog.text


def test_layers_that_differ_leave_sglangs_own(sglang, caplog):
    from waterfill_rs.sglang import compat, preparation

    name = compat.find()[0].balancer
    routers = [hash_layer(sglang) for _ in range(2)]

    def prepare_unalike(**_):
        for number, router in enumerate(routers, start=1):
            router.waterfill_balancer = compat.resolve(name)(number * EXPERTS, RANKS, 3, None, 1.0)

    ours, originals = {name: compat.resolve(name)}, {name: sglang.own_balancer}
    hook = preparation.Preparation(compat.find()[0], ours, originals).hook
    with caplog.at_level(logging.WARNING):
        hook(prepare_unalike, model=torch.nn.ModuleList(routers), model_config=None)
    assert whose(*routers) == {SGLANGS}
    assert caplog.text.count(STAYS) == 1 and "differ in (ranks, experts, rank)" in caplog.text


class Expander:
    """Refuses as the kernel does; the real one is made on a GPU, in tests/gpu."""

    max_rows = 100

    def __init__(self, device, *, physical_experts, ranks, rank, top_k, redundant):
        if top_k > 32:
            raise ValueError(f"top_k {top_k}: give 1 to 32 routed experts a token")


def against(*top_ks, tokens=100, experts=EXPERTS):
    """On a CUDA device, for routers of these top-k."""
    routers = [types.SimpleNamespace(topk=top_k) for top_k in top_ks]
    balancer = types.SimpleNamespace(world_size=RANKS, num_routed_experts=experts, rank=0)
    device = torch.device("cuda:0")
    return sizes.against_sizes(
        torch.nn.Module(), routers, [balancer] * len(routers), device, tokens
    )


def test_the_kernels_limits_are_reasons_at_preparation(monkeypatch):
    from waterfill_rs import cuda

    monkeypatch.setattr(cuda, "Expander", Expander)
    assert against(8, 8) == []
    (reason,) = against(33)
    assert reason == "no kernel can be made for this model: top_k 33: give 1 to 32 routed experts a token"  # fmt: skip
    (reason,) = against(8, 6)
    assert reason == "layers of one model route tokens to [6, 8] experts, and a kernel is of one number"  # fmt: skip
    (reason,) = against(8, tokens=101)
    assert "a prefill may have 101 tokens a rank, and the kernel takes 100" in reason
    assert "--chunked-prefill-size" in reason


def test_shared_columns_of_a_router_are_not_routed_experts(sglang):
    config = types.SimpleNamespace(top_k=9, num_shared_topk_slots=1)
    assert sizes.routed_experts(types.SimpleNamespace(topk_config=config)) == 8
    assert sizes.routed_experts(hash_layer(sglang)) == TOP_K
    assert sizes.routed_experts(sglang.topk.TopK(TOP_K, layer_id=1)) == TOP_K
