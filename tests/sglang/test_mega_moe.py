"""Waterfill over sglang's backend megamoe, where a rank without rows asks no router."""

import types

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import torch
from inside import hash_layer, prepare


@pytest.fixture
def megamoe(sglang, monkeypatch):
    """sglang's module of that backend, in force, without its kernels and all that leads to them."""
    from sglang.srt.layers.moe import mega_moe, utils

    monkeypatch.delenv("WATERFILL_RS_REQUIRE", raising=False)
    monkeypatch.setattr(utils, "get_moe_a2a_backend", lambda: utils.MoeA2ABackend("megamoe"))
    monkeypatch.setattr(mega_moe, "_run_mega_routed", lambda moe, hidden, *_: hidden)
    return mega_moe


def layer_of(router):
    return types.SimpleNamespace(
        topk=router,
        layer_id=0,
        alt_stream=None,
        num_fused_shared_experts=1,
        mega_shared_l1_weights=None,
        _forward_shared_experts=lambda _: None,
    )


def test_a_rank_without_rows_posts(sglang, megamoe):
    router = hash_layer(sglang)
    prepare(sglang, router)
    exchange = router.waterfill_balancer.exchange
    for rows, calls in ((0, 1), (5, 1), (0, 2)):  # With rows sglang's own path asks the router.
        given = torch.zeros(rows, 8)
        assert megamoe.forward_mega_moe(layer_of(router), given, None) is given
        assert exchange.tally()["calls"] == calls


def test_a_layer_without_our_balancer_is_left_alone(sglang, megamoe):
    router = hash_layer(sglang)
    router.enable_waterfill = False
    router.empty_topk_output = None  # Called, it would raise.
    given = torch.zeros(0, 8)
    assert megamoe.forward_mega_moe(layer_of(router), given, None) is given


def unknown(megamoe, monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.6.0")


def other_arguments(megamoe, monkeypatch):
    monkeypatch.setattr(megamoe, "forward_mega_moe", lambda layer, hidden: hidden)


def unhooked(megamoe, monkeypatch):
    sglangs = megamoe.forward_mega_moe.__wrapped__
    monkeypatch.setattr(megamoe, "forward_mega_moe", sglangs)


REFUSED = {
    unknown: "not known of sglang 0.6.0 is what a rank without rows does there",
    other_arguments: "mega_moe.forward_mega_moe takes ('layer', 'hidden')",
    unhooked: "mega_moe.forward_mega_moe is not waterfill-rs's after registration",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_where_it_cannot_be_made_to_post_megamoe_is_refused(
    sglang, megamoe, monkeypatch, caplog, change
):
    change(megamoe, monkeypatch)
    router = hash_layer(sglang)
    prepare(sglang, router)
    assert type(router.waterfill_balancer).__module__ == "sglang.srt.layers.moe.waterfill"
    assert "sglang's own Waterfill stays: --moe-a2a-backend megamoe: " in caplog.text
    assert REFUSED[change] in caplog.text


def test_where_it_is_refused_and_required_the_server_ends(sglang, megamoe, monkeypatch):
    unknown(megamoe, monkeypatch)
    monkeypatch.setenv("WATERFILL_RS_REQUIRE", "1")
    with pytest.raises(SystemExit, match="--moe-a2a-backend megamoe"):
        prepare(sglang, hash_layer(sglang))


def test_vision_routers_are_refused_by_name():
    import torch

    from waterfill_rs.sglang import eligibility

    gate = torch.nn.Module()
    model = torch.nn.ModuleList([gate])
    gate.e_score_correction_bias_vl = None
    assert eligibility.against_routers(model) == []
    gate.e_score_correction_bias_vl = torch.nn.Parameter(torch.zeros(4))
    (reason,) = eligibility.against_routers(model)
    assert "vision routers" in reason and "e_score_correction_bias_vl" in reason
