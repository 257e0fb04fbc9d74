"""What meets Waterfill in a server: redundant experts, EPLB, draft models, padding, elastic EP, determinism."""

import argparse
import inspect
import logging
import re
import types

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import torch
from inside import EXPERTS, RANK, RANKS, TOKENS, TOP_K, hash_layer, level_of, prepare, routed_only

from waterfill_rs.sglang import eligibility, refusal

REDUNDANT = 16
PHYSICAL = EXPERTS + REDUNDANT


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WATERFILL_RS", "WATERFILL_RS_REQUIRE", "WATERFILL_RS_EXCHANGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def arguments(monkeypatch):
    """Sets fields of the arguments in force, at the place where they are read."""

    def use(**fields):
        from sglang.srt import runtime_context

        monkeypatch.setattr(
            runtime_context, "get_server_args", lambda: types.SimpleNamespace(**fields)
        )

    return use


def inputs():
    torch.manual_seed(0)
    return torch.zeros(TOKENS, 8), torch.randn(TOKENS, EXPERTS), torch.randint(20, 60, (TOKENS,))


def placement(mapping):
    """sglang's, with one physical expert for each logical one: ``mapping`` ``[E]``."""
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    return ExpertLocationDispatchInfo(
        ep_dispatch_algorithm="static",
        partial_logical_to_rank_dispatch_physical_map=mapping,
        partial_logical_to_all_physical_map=mapping[:, None],
        partial_logical_to_all_physical_map_num_valid=torch.ones_like(mapping),
        num_physical_experts=PHYSICAL,
    )


def test_redundant_experts_before_and_after_a_rebalance(sglang):
    layer = hash_layer(sglang)
    with sglang.moe.override(ep_num_redundant_experts=REDUNDANT):
        prepare(sglang, layer)
    slot = PHYSICAL // RANKS
    assert layer.waterfill_balancer.num_routed_experts == PHYSICAL
    torch.manual_seed(7)
    for mapping in (torch.arange(EXPERTS) + REDUNDANT, torch.randperm(PHYSICAL)[:EXPERTS]):
        given = {"expert_location_dispatch_info": placement(mapping)}
        routed = routed_only(sglang, layer, *inputs(), **given).topk_ids
        ids = layer(*inputs(), **given).topk_ids
        assert routed.max() >= EXPERTS, "a physical id above the logical ones"
        assert torch.equal(ids[:, :-1], routed + routed // slot)
        assert (ids[:, -1] % (slot + 1) == slot).all()
        rows = torch.bincount(ids.flatten() // (slot + 1), minlength=RANKS)
        before = torch.bincount(routed.flatten() // slot, minlength=RANKS)
        assert int(rows.max()) == level_of(before, TOKENS)


def test_target_and_draft_models_have_an_exchange_each(sglang):
    target, draft = [hash_layer(sglang), hash_layer(sglang)], [hash_layer(sglang)]
    prepare(sglang, *target)
    prepare(sglang, *draft)
    prepare(sglang, *target)  # A second time changes nothing.
    exchanges = [layer.waterfill_balancer.exchange for layer in (*target, *draft)]
    assert exchanges[0] is exchanges[1] is not exchanges[2]
    for layer in (*target, *draft):
        layer(*inputs())
    assert [exchanges[0].tally()["calls"], exchanges[2].tally()["calls"]] == [2, 1]


def test_padded_rows_get_no_shared_row(sglang):
    layer = hash_layer(sglang)
    prepare(sglang, layer)
    real = 70
    padded = layer(*inputs(), num_token_non_padded=torch.tensor(real))
    assert (padded.topk_ids[real:] == -1).all()
    assert (padded.topk_weights[real:, -1] == 0).all()
    shared = padded.topk_ids[:real, -1] // (EXPERTS // RANKS + 1)
    assert torch.bincount(shared, minlength=RANKS).sum() == real


def test_two_batch_overlap_levels_each_half(sglang):
    layer = hash_layer(sglang)
    prepare(sglang, layer)
    halves = [[tensor[part] for tensor in inputs()] for part in (slice(0, 90), slice(90, None))]
    shapes = [layer(*half).topk_ids.shape for half in halves]
    assert shapes == [(90, TOP_K + 1), (TOKENS - 90, TOP_K + 1)]


def test_a_layer_without_waterfill_gives_what_sglangs_gives(sglang):
    ours, theirs = hash_layer(sglang), sglang.original(TOP_K, EXPERTS, vocab_size=1000, layer_id=0)
    for layer in (ours, theirs):
        layer.enable_waterfill = False
    prepare(sglang, ours)
    for one, other in zip(ours(*inputs()), theirs(*inputs()), strict=True):
        assert torch.equal(one, other)


def test_elastic_ep_leaves_sglangs_own_and_says_so(sglang, arguments, caplog):
    layer = hash_layer(sglang)
    arguments(elastic_ep_backend="mooncake")
    with caplog.at_level(logging.WARNING):
        prepare(sglang, layer)
    assert "sglang's own Waterfill stays: --elastic-ep-backend mooncake" in caplog.text
    assert type(layer.waterfill_balancer).__module__ == "sglang.srt.layers.moe.waterfill"
    assert layer(*(tensor[:9] for tensor in inputs())).topk_ids.shape == (9, TOP_K + 1)


def test_a_server_moves_experts_by_eplb_or_where_ranks_may_leave():
    def moves(**fields):
        return eligibility.moves_experts(types.SimpleNamespace(**fields))

    assert not moves() and not moves(enable_eplb=False, elastic_ep_backend=None)
    assert moves(enable_eplb=True) and moves(elastic_ep_backend="nixl")


def test_every_reason_at_once_where_required(sglang, arguments, monkeypatch):
    monkeypatch.setenv("WATERFILL_RS", "rust")
    monkeypatch.setenv("WATERFILL_RS_EXCHANGE", "group")
    arguments(elastic_ep_backend="nixl", enable_deterministic_inference=True)
    with pytest.raises(SystemExit) as stopped:
        prepare(sglang, hash_layer(sglang))
    assert "--elastic-ep-backend nixl" in str(stopped.value)
    assert "exchange group with --enable-deterministic-inference" in str(stopped.value)


@pytest.mark.parametrize("exchange", ["auto", "board"])
def test_deterministic_inference_uses_own_counts(sglang, arguments, monkeypatch, caplog, exchange):
    monkeypatch.setenv("WATERFILL_RS_EXCHANGE", exchange)
    arguments(enable_deterministic_inference=True)
    layer = hash_layer(sglang)
    with caplog.at_level(logging.INFO):
        prepare(sglang, layer)
    assert layer.waterfill_balancer.exchange.name == "solo"
    assert "exchange solo, because --enable-deterministic-inference" in caplog.text
    assert ("exchange solo, and not board" in caplog.text) == (exchange == "board")
    once, again = layer(*inputs()), layer(*inputs())
    assert torch.equal(once.topk_ids, again.topk_ids)


class PanicException(BaseException):
    """As pyo3's: no Exception."""


def panics(*_, **__):
    raise PanicException("index out of bounds")


DEFECT = "a defect in the Rust core, please report it: index out of bounds"


def test_a_panic_in_a_call_is_an_error_that_sglang_handles(sglang, monkeypatch):
    layer = hash_layer(sglang)
    prepare(sglang, layer)
    end = types.SimpleNamespace(unsafe_expand_ptr=panics)
    with monkeypatch.context() as patch:
        patch.setattr(layer.waterfill_balancer.exchange, "_end", end)
        with pytest.raises(RuntimeError, match=DEFECT):
            layer(*inputs())
    assert layer(*inputs()).topk_ids.shape == (TOKENS, TOP_K + 1)


@pytest.mark.parametrize("backend", ["auto", "rust"])
def test_a_panic_while_ranks_are_joined_stops_the_server(sglang, monkeypatch, backend):
    from waterfill_rs import _native

    monkeypatch.setenv("WATERFILL_RS", backend)
    monkeypatch.setattr(_native, "Solo", panics)
    with pytest.raises(SystemExit, match=DEFECT):
        prepare(sglang, hash_layer(sglang))


def test_a_panic_while_a_kernel_is_made_is_a_reason(monkeypatch):
    from waterfill_rs import cuda

    monkeypatch.setattr(cuda, "Expander", panics)
    (reason,) = eligibility.against_device(torch.device("cuda"))
    assert "no kernel can be made for cuda" in reason and DEFECT in reason


def test_sglang_has_every_argument_that_is_looked_at(sglang):
    """One that is gone would be read as off."""
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    sources = inspect.getsource(eligibility) + inspect.getsource(refusal)
    read = re.findall(r'getattr\(arguments, "(\w+)"', sources)
    assert len(set(read)) == 6
    for name in (*read, "enable_waterfill"):
        assert hasattr(get_server_args(), name), name
    assert {"use_ray", "enable_waterfill"} <= {action.dest for action in parser._actions}


def test_two_streams_at_once_leave_sglangs_own_and_say_so(sglang, arguments, caplog):
    layer = hash_layer(sglang)
    arguments(enable_pdmux=True)
    prepare(sglang, layer)
    assert "sglang's own Waterfill stays: --enable-pdmux" in caplog.text
    assert type(layer.waterfill_balancer).__module__ == "sglang.srt.layers.moe.waterfill"


def test_packed_ids_of_the_routed_columns_are_left_behind(sglang):
    """Since 0.5.23 a router may give them beside, for FlashInfer's and Marlin's experts, which then read nothing else."""
    layer = hash_layer(sglang)
    prepare(sglang, layer)
    routed = routed_only(sglang, layer, *inputs())
    packed = sglang.topk.StandardTopKOutputPacked(*routed, packed_topk_ids=routed.topk_ids)
    expanded = layer.waterfill_balancer.expand_topk(packed, TOKENS)
    assert type(expanded) is sglang.topk.StandardTopKOutput
    assert expanded.topk_ids.shape == (TOKENS, TOP_K + 1)
    assert expanded.router_logits is routed.router_logits


def test_layers_prepared_past_our_hook_are_told_once(sglang, monkeypatch, caplog):
    from waterfill_rs.sglang import balancer

    layer = hash_layer(sglang)
    prepare(sglang, layer)
    layer.waterfill_balancer.exchange = None
    balancer._tell_not_joined.cache_clear()
    monkeypatch.setenv("WATERFILL_RS_REQUIRE", "1")
    with pytest.raises(RuntimeError, match="prepared past its hook"):
        layer(*inputs())
    monkeypatch.setenv("WATERFILL_RS_REQUIRE", "0")
    for _ in range(2):
        assert layer(*inputs()).topk_ids.shape == (TOKENS, TOP_K + 1)
    assert caplog.text.count("prepared past its hook") == 1


@pytest.fixture
def preparation(sglang):
    """Of a process that serves no model yet."""
    from waterfill_rs.sglang import compat, preparation

    return preparation.Preparation(compat.find()[0], {}, {})


def without_layers(preparation, **configuration):
    config = types.SimpleNamespace(**configuration)
    done = preparation.hook(
        lambda **_: "prepared", model=torch.nn.Linear(2, 2), model_config=config
    )
    assert done == "prepared"


def test_waterfill_on_a_model_without_such_layers_is_told(preparation, arguments, caplog):
    arguments(enable_waterfill=False)
    without_layers(preparation)
    arguments(enable_waterfill=True)
    without_layers(preparation, is_draft_model=True)
    assert not caplog.text
    without_layers(preparation)
    assert (
        "waterfill-rs balances nothing: --enable-waterfill is on, and no MoE layer" in caplog.text
    )


def test_waterfill_on_a_model_without_such_layers_stops_it_where_required(
    preparation, arguments, monkeypatch, caplog
):
    monkeypatch.setenv("WATERFILL_RS_REQUIRE", "1")
    arguments(enable_waterfill=True)
    with pytest.raises(SystemExit, match="no MoE layer here has Waterfill"):
        without_layers(preparation)
    arguments(enable_waterfill=True, pp_size=2)
    without_layers(preparation)
    assert "balances nothing" in caplog.text, "another stage may have them"


def test_a_model_whose_first_weights_are_offloaded_runs_where_the_others_are():
    from waterfill_rs.sglang.preparation import _device

    def weight(device):
        return types.SimpleNamespace(device=torch.device(device))

    def model(*devices):
        return types.SimpleNamespace(parameters=lambda: map(weight, devices), buffers=list)

    assert _device(model("cpu", "meta", "cuda:3", "cpu")) == torch.device("cuda:3")
    assert _device(model("cpu", "cpu")) == torch.device("cpu")


# sglang's recorder


def metadata():
    return types.SimpleNamespace(
        num_layers=2,
        num_logical_experts=EXPERTS,
        num_physical_experts=EXPERTS,
        num_local_physical_experts=EXPERTS // RANKS,
        physical_to_logical_map=torch.arange(EXPERTS).repeat(2, 1),
        ep_size=RANKS,
    )


@pytest.fixture
def on_cpu(sglang, monkeypatch):
    """The recorder's devices; and Waterfill's slots are coming."""
    from waterfill_rs.sglang import recorder

    monkeypatch.setattr(recorder, "_serving", True)
    monkeypatch.setattr(sglang.recording, "get_device", lambda: "cpu")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    return sglang.recording


def counts():
    """Rows that the local experts received, then the shared slot's."""
    return [*range(10, 10 + EXPERTS // RANKS), 99]


def receive(gatherer):
    if hasattr(gatherer, "_objects_of_layer"):
        rest = dict.fromkeys(
            ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert")
        )
        for _ in range(2):
            gatherer.on_deepep_dispatch_normal(
                layer_idx=1, local_physical_count_of_layer=counts(), **rest
            )
    else:
        for _ in range(2):
            gatherer.on_deepep_dispatch_low_latency(
                layer_idx=1, local_physical_count_of_layer=torch.tensor(counts(), dtype=torch.int)
            )
    return gatherer.collect()


GATHERERS = {
    # Layers without MoE have 8 entries and those with it 9.
    "_DeepepNormalSinglePassGatherer": (ValueError, r"length 8 at dim 1 \(got 9\)"),
    "_DeepepLowLatencySinglePassGatherer": (RuntimeError, r"\(8\) must match .* \(9\)"),
}


@pytest.mark.parametrize("name", GATHERERS)
def test_receiving_gatherers_fail_without_us_and_count_with_us(sglang, on_cpu, name):
    error, text = GATHERERS[name]
    with pytest.raises(error, match=text):
        receive(sglang.sglangs[name](metadata(), RANK))
    gatherer = getattr(on_cpu, name)(metadata(), RANK)
    collected = receive(gatherer)
    local = slice(RANK * EXPERTS // RANKS, (RANK + 1) * EXPERTS // RANKS)
    assert collected["global_physical_count"][1, local].tolist() == [2 * n for n in counts()[:-1]]
    assert collected["global_physical_count"].sum() == 2 * sum(counts()[:-1])
    assert collected["waterfill_shared_rows"].tolist() == [0, 2 * 99]
    gatherer.reset()
    assert gatherer.collect()["waterfill_shared_rows"].tolist() == [0, 0]


@pytest.mark.parametrize("name", GATHERERS)
def test_without_our_layers_gatherers_are_sglangs(sglang, on_cpu, monkeypatch, name):
    from waterfill_rs.sglang import recorder

    monkeypatch.setattr(recorder, "_serving", False)
    error, text = GATHERERS[name]
    with pytest.raises(error, match=text):
        receive(getattr(on_cpu, name)(metadata(), RANK))


def test_mode_auto_counts_before_dispatch_under_waterfill_only(sglang, on_cpu, arguments):
    mode = dict(
        expert_distribution_recorder_mode="stat", moe_a2a_backend="deepep", deepep_mode="auto"
    )
    make = on_cpu._SinglePassGatherer.init_new
    with sglang.moe.override(**mode):
        arguments(enable_waterfill=False)
        with pytest.raises(NotImplementedError):
            make(metadata(), RANK)
        arguments(enable_waterfill=True)
        gatherer = make(metadata(), RANK)
    gatherer.on_select_experts(layer_idx=0, topk_ids=torch.tensor([[1, 2], [2, -1]]))
    assert gatherer.collect()["global_physical_count"][0, :3].tolist() == [0, 1, 2]


def test_a_recording_in_low_latency_mode_is_written(sglang, on_cpu, monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path))
    mode = dict(
        expert_distribution_recorder_mode="per_pass",
        moe_a2a_backend="deepep",
        deepep_mode="low_latency",
    )
    with sglang.moe.override(**mode):
        recorder = on_cpu._ExpertDistributionRecorderReal(metadata(), RANK)
        recorder.start_record()
        with recorder.with_forward_pass(5, None), recorder.with_current_layer(1):
            recorder.on_deepep_dispatch_low_latency(torch.tensor(counts(), dtype=torch.int))
        recorder.dump_record()
    (file,) = tmp_path.iterdir()
    (record,) = torch.load(file, weights_only=True)["records"]
    assert record["waterfill_shared_rows"].tolist() == [0, 99]
    assert int(record["global_physical_count"].sum()) == sum(counts()[:-1])
