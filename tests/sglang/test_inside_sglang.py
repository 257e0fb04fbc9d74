"""The real sglang, on the CPU, with the package entering through its plugin entry point."""

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import types

import forked
import torch
from inside import EXPERTS, RANK, RANKS, TOKENS, TOP_K, hash_layer, level_of, prepare, routed_only

from waterfill_rs.torch import expand_topk, move_up


def check_expansion(sglang, routed, expanded, shared_weight):
    from sglang.srt.layers.moe.waterfill import expand_topk_with_shared_expert

    ids, weights = expand_topk_with_shared_expert.__wrapped__(
        routed.topk_ids, routed.topk_weights, EXPERTS, RANKS, RANK, shared_weight
    )
    assert expanded.topk_ids.dtype == routed.topk_ids.dtype
    assert torch.equal(expanded.topk_ids[:, :-1], ids[:, :-1])
    assert torch.equal(expanded.topk_weights, weights)
    slot = EXPERTS // RANKS
    shared = expanded.topk_ids[:, -1]
    assert torch.equal(shared % (slot + 1), torch.full_like(shared, slot))
    received = torch.bincount(expanded.topk_ids.flatten() // (slot + 1), minlength=RANKS)
    before = torch.bincount(routed.topk_ids.flatten() // slot, minlength=RANKS)
    assert int(received.max()) == level_of(before, TOKENS)


def test_every_name_of_the_classes_is_ours(sglang):
    from sglang.srt.eplb import expert_distribution

    from waterfill_rs.sglang import plugin
    from waterfill_rs.sglang.balancer import WaterfillBalancer

    ours = {name.rpartition(".")[2]: replacement for name, replacement in plugin.hooked.items()}
    assert sglang.waterfill.WaterfillBalancer is ours.pop("WaterfillBalancer") is WaterfillBalancer
    router = ours.pop("HashTopK")
    assert sglang.hash_topk.HashTopK is sglang.setup.HashTopK is router
    assert issubclass(router, sglang.original)
    assert len(ours) == 2
    for name, gatherer in ours.items():
        assert getattr(expert_distribution, name) is gatherer


def test_the_doctors_look_sees_every_class_that_is_ours(sglang):
    from waterfill_rs.sglang import loaded_hooks, plugin

    found = loaded_hooks.found()
    assert set(plugin.hooked) < set(found) and all(found.values())
    assert len(found) == 18


def test_hash_layer_refuses_to_run_before_preparation(sglang):
    layer = hash_layer(sglang)
    with pytest.raises(RuntimeError, match="must be prepared by ModelRunner"):
        layer(torch.zeros(4, 8), torch.randn(4, EXPERTS), torch.arange(4))
    with pytest.raises(RuntimeError, match="must be prepared by ModelRunner"):
        layer.empty_topk_output(torch.device("cpu"))


def test_hash_layer_expands_with_our_balancer(sglang):
    layer = hash_layer(sglang)
    prepare(sglang, layer)
    torch.manual_seed(0)
    # Few distinct tokens: their table rows are near each other, so the ranks' counts are uneven.
    inputs = torch.zeros(TOKENS, 8), torch.randn(TOKENS, EXPERTS), torch.randint(0, 40, (TOKENS,))
    routed = routed_only(sglang, layer, *inputs)
    assert routed.topk_ids.shape == (TOKENS, TOP_K)
    check_expansion(sglang, routed, layer(*inputs), 1 / 1.5)


def test_idle_rank_gets_an_empty_expansion(sglang):
    layer = hash_layer(sglang)
    prepare(sglang, layer)
    empty = layer.empty_topk_output(torch.device("cpu"))
    assert empty.topk_ids.shape == empty.topk_weights.shape == (0, TOP_K + 1)


def test_v3_layer_goes_through_the_same_balancer(sglang):
    layer = sglang.topk.TopK(TOP_K, layer_id=2, routed_scaling_factor=2.5)
    prepare(sglang, layer)
    torch.manual_seed(1)
    inputs = torch.zeros(TOKENS, 8), torch.randn(TOKENS, EXPERTS) + torch.linspace(0, 2, EXPERTS)
    forward = layer.forward_native
    expanded = forward(*inputs)
    balancer, layer.waterfill_balancer, layer.enable_waterfill = (
        layer.waterfill_balancer,
        None,
        False,
    )
    routed = forward(*inputs)
    layer.waterfill_balancer, layer.enable_waterfill = balancer, True
    check_expansion(sglang, routed, expanded, balancer.shared_weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_router_weights_in_other_precisions_are_served(sglang, dtype):
    """As sglang's own serves them: weights come back in the precision that they have."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    layer = hash_layer(sglang)
    prepare(sglang, layer)
    balancer = layer.waterfill_balancer
    torch.manual_seed(0)
    logits = torch.randn(9, EXPERTS).to(dtype)
    routed = routed_only(sglang, layer, torch.zeros(9, 8), logits, torch.arange(9))
    weights = routed.topk_weights.to(dtype)
    given = StandardTopKOutput(weights, routed.topk_ids, routed.router_logits)
    expanded = balancer.expand_topk(given, 9)
    like = balancer.expand_topk(given._replace(topk_weights=weights.float()), 9)
    assert expanded.topk_weights.dtype == dtype
    assert torch.equal(expanded.topk_ids, like.topk_ids)
    assert torch.equal(expanded.topk_weights, like.topk_weights.to(dtype))
    assert layer(torch.zeros(9, 8), logits, torch.arange(9)).topk_ids.shape == (9, TOP_K + 1)


class OneKernel:
    """As on a GPU, where a kernel takes the type of the first call alone; what it would expand, on the CPU."""

    def __init__(self):
        self.seen, self.live = [], []

    def expand(self, ids, weights, shared_weight, *, layer):
        self.seen.append((ids.dtype, weights.dtype))
        where = dict(physical_experts=EXPERTS, ranks=RANKS, rank=RANK, shared_weight=shared_weight)
        return expand_topk(ids, weights, **where)

    def move_up(self, ids, *, layer, live):
        self.seen.append((ids.dtype, None))
        self.live.append(live)
        return move_up(ids, physical_experts=EXPERTS, ranks=RANKS)


def test_a_kernel_of_one_type_serves_routers_of_any(sglang):
    """Layers give weights of several types, sglang before 0.5.14 int64 where experts are placed; idle ranks int32 and float32."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    layer = hash_layer(sglang)
    prepare(sglang, layer)
    balancer = layer.waterfill_balancer
    balancer.exchange = OneKernel()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for width in (torch.int32, torch.int64):
            ids, weights = torch.arange(6, dtype=width)[None], torch.rand(1, 6).to(dtype)
            expanded = balancer.expand_topk(StandardTopKOutput(weights, ids, None), 1)
            assert torch.equal(expanded.topk_weights[:, :6], weights)
            assert expanded.topk_ids.dtype == width and expanded.topk_weights.dtype == dtype
    layer.empty_topk_output(torch.device("cpu"))
    assert set(balancer.exchange.seen) == {(torch.int32, torch.float32)}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("exchange", [None, OneKernel])
def test_an_overlapped_batch_keeps_its_weights(sglang, exchange, live):
    """They are not converted, and settle no kernel's type. Its layer says whether its replicas are chosen live."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    layer = hash_layer(sglang)
    prepare(sglang, layer)
    balancer = layer.waterfill_balancer
    balancer.overlap = types.SimpleNamespace(runs=True, chooses_live=live)
    if exchange:
        balancer.exchange = exchange()
    weights = torch.rand(1, 6).half()
    for width in (torch.int32, torch.int64):
        ids = torch.arange(6, dtype=width)[None]
        moved = balancer.expand_topk(StandardTopKOutput(weights, ids, None), 1)
        assert moved.topk_ids.shape == (1, 6) and moved.topk_weights is weights
    if exchange:
        assert balancer.exchange.seen == [(torch.int32, None)] * 2
        assert balancer.exchange.live == [live] * 2


def test_experts_that_do_not_divide_are_refused_with_the_numbers(sglang):
    with pytest.raises(ValueError, match="63 physical routed experts do not divide over 8"):
        prepare(sglang, hash_layer(sglang), experts=63)


def test_another_replacement_stops_the_server_only_where_waterfill_is_on(sglang, monkeypatch):
    plain, waterfilled = sglang.topk.TopK(TOP_K, layer_id=1), hash_layer(sglang)
    plain.enable_waterfill = False
    monkeypatch.setattr(sglang.hash_topk, "HashTopK", sglang.original)
    prepare(sglang, plain)
    assert plain.waterfill_balancer is None
    with pytest.raises(
        SystemExit, match=r"hash_topk\.HashTopK is not waterfill-rs's after registration"
    ):
        prepare(sglang, plain, waterfilled)


def test_a_layer_that_sglang_does_not_prepare_stops_the_server(sglang):
    stranger = torch.nn.Module()
    stranger.enable_waterfill, stranger.waterfill_balancer = True, None
    with pytest.raises(SystemExit, match="1 of 2 MoE layers are not balanced by waterfill-rs"):
        prepare(sglang, hash_layer(sglang), stranger)


LOADED = """
from sglang.srt.plugins import load_plugins; load_plugins()
from sglang.srt.layers.moe import hash_topk, waterfill
import sys
print(hash_topk.HashTopK.__module__, waterfill.WaterfillBalancer.__module__, "waterfill_rs.torch" in sys.modules)
"""


def test_off_leaves_sglang_untouched():
    done = forked.run(LOADED, WATERFILL_RS="off")
    assert done.stdout.split()[-3:] == [
        "sglang.srt.layers.moe.hash_topk",
        "sglang.srt.layers.moe.waterfill",
        "False",
    ], done.stderr


def test_a_wrong_value_stops_the_process_and_says_which():
    done = forked.run(LOADED, WATERFILL_RS="none")
    assert done.returncode == 1
    assert "WATERFILL_RS='none': give one of auto, rust, upstream, off" in done.stderr
