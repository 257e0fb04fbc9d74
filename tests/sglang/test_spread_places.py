"""Spread places in the real sglang: the map of a server with redundant experts and without a placement."""

import json
import logging
import types

import pytest
import torch

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked
import test_primaries_first as maps
from inside import RANK, RANKS

from waterfill_rs.placement.spread import spread
from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.sglang import compat, primaries_first, spread_places, trivial_places

LOGICAL, REDUNDANT, LAYERS, EACH = maps.LOGICAL, maps.REDUNDANT, maps.LAYERS, maps.EACH
PHYSICAL = LOGICAL + REDUNDANT
server = maps.server


class OtherForCausalLM:
    """Not one of DeepSeek's."""


@pytest.fixture
def places(server, sglang, monkeypatch):
    """``made(**config)`` is what sglang makes of a model of DeepSeek V3; ``server.given`` has the arguments."""
    from sglang.srt import model_loader
    from sglang.srt.layers.moe import utils
    from sglang.srt.models.deepseek_v2 import DeepseekV3ForCausalLM

    monkeypatch.setattr(model_loader, "get_model_architecture", lambda config: (config.model, ""))
    monkeypatch.setattr(utils, "get_moe_a2a_backend", lambda: utils.MoeA2ABackend.DEEPEP)
    monkeypatch.setattr(spread_places, "_agreed", [])
    monkeypatch.setattr(spread_places, "_rows", [])
    server.given.ep_num_redundant_experts = REDUNDANT

    def made(**config):
        config = {"model": DeepseekV3ForCausalLM, "quantization": None} | config
        return server.metadata.init_trivial(types.SimpleNamespace(**config), RANK)

    return types.SimpleNamespace(made=made, **vars(server))


def rows(metadata):
    return metadata.physical_to_logical_map.tolist()


def reason():
    seams, _ = compat.find()
    (found,) = spread_places.against_hook(seams)
    return found


def test_a_server_without_a_placement_has_its_experts_spread(places):
    made = places.made()
    assert rows(made) == [spread(LOGICAL, REDUNDANT, RANKS)] * LAYERS
    assert maps.is_consistent(made) and maps.firsts(made) == [LOGICAL // RANKS] * LAYERS
    assert made.physical_to_logical_map.dtype == torch.int64
    assert spread_places.is_spread(rows(made)) and not spread_places.against_hook(compat.find()[0])
    # The same again: a process may make it more than once.
    assert rows(places.made()) == rows(made)


def test_where_experts_do_not_divide_over_ranks_they_stay(places, monkeypatch):
    common = places.metadata._init_common()
    ranks = next(n for n in range(RANK + 1, 99) if LOGICAL % n and (LOGICAL + REDUNDANT) % n == 0)
    local = {"ep_size": ranks, "num_local_physical_experts": (LOGICAL + REDUNDANT) // ranks}
    monkeypatch.setattr(places.metadata, "_init_common", staticmethod(lambda *_: common | local))
    assert is_trivial(rows(places.made()))
    assert reason() == f"{LOGICAL} + {REDUNDANT} experts do not divide over {ranks} ranks each"


@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_sglangs_routers_and_loaders_go_by_it(places, sglang, algorithm):
    """Each logical id comes to a physical expert that has its weights, and each of a rank's slots is loaded."""
    from sglang.srt.eplb import expert_location_dispatch as dispatch

    with sglang.moe.override(ep_dispatch_algorithm=algorithm, moe_a2a_backend="deepep"):
        made = places.in_force(places.made())
        assert not is_trivial(rows(made))
        for layer, row in enumerate(rows(made)):
            info = dispatch.ExpertLocationDispatchInfo.init_new(layer)
            ids = torch.arange(LOGICAL).repeat(16, 1)
            physical = dispatch.topk_ids_logical_to_physical(ids, info)
            assert torch.equal(torch.tensor(row)[physical], ids)
            loaded = {
                slot: logical
                for logical in range(LOGICAL)
                for slot in made.logical_to_all_physical(layer, logical)
            }
            own = range(RANK * EACH, (RANK + 1) * EACH)
            assert [loaded[slot] for slot in own] == [row[slot] for slot in own]
            assert all(row[slot] == logical for slot, logical in loaded.items())


def test_where_sglang_maps_no_ids_the_trivial_places_stay(places, sglang):
    """The vital one: with another map sglang would run wrong experts, because it takes logical ids for physical ones."""
    from sglang.srt.eplb import expert_location_dispatch as dispatch

    with sglang.moe.override(ep_dispatch_algorithm=None):
        made = places.in_force(places.made())
        assert is_trivial(rows(made))
        assert dispatch.ExpertLocationDispatchInfo.init_new(0) is None
        ids = torch.arange(LOGICAL)
        assert torch.equal(torch.tensor(rows(made)[0])[ids], ids)
    assert "give --ep-dispatch-algorithm static" in reason()
    # What the arguments hold is what was asked for; what sglang made of it counts.
    places.given.ep_dispatch_algorithm = "static"
    spread_places._agreed.clear()
    with sglang.moe.override(ep_dispatch_algorithm=None):
        assert is_trivial(rows(places.made()))
    with sglang.moe.override(ep_dispatch_algorithm="fake"):
        spread_places._agreed.clear()
        assert is_trivial(rows(places.made()))
        assert "--ep-dispatch-algorithm fake is none of static, dynamic, lp" in reason()


@pytest.mark.parametrize(
    "given, config, words",
    [
        ({"enable_waterfill": False}, {}, "--enable-waterfill was not given"),
        ({"load_format": "sharded_state"}, {}, "--load-format sharded_state"),
        ({"elastic_ep_backend": "mooncake"}, {}, "--elastic-ep-backend mooncake"),
        ({"speculative_algorithm": "EAGLE"}, {}, "--speculative-algorithm EAGLE"),
        ({"enable_lora": True}, {}, "--enable-lora"),
        ({"lora_paths": ["a"]}, {}, "--enable-lora"),
        ({"kt_weight_path": "/x"}, {}, "--kt-weight-path"),
        ({"quantization": "modelopt_fp4"}, {}, "quantized as modelopt_fp4"),
        ({"moe_a2a_backend": "megamoe"}, {}, "--moe-a2a-backend megamoe: sglang takes"),
        ({}, {"quantization": "moe_wna16"}, "quantized as moe_wna16"),
        ({}, {"model": OtherForCausalLM}, "not known of OtherForCausalLM"),
        ({}, {"model": None}, "sglang could not be asked"),
    ],
)
def test_where_it_is_not_for_us_trivial_places_stay(places, given, config, words):
    vars(places.given).update(given)
    assert is_trivial(rows(places.made(**config)))
    assert words in reason()


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_weights_that_go_by_the_map_are_spread(places, quantization):
    from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM

    made = places.made(model=DeepseekV4ForCausalLM, quantization=quantization)
    assert spread_places.is_spread(rows(made))


def test_a_later_map_of_other_sizes_stays_though_places_were_agreed_on(places, monkeypatch):
    assert spread_places.is_spread(rows(places.made()))
    monkeypatch.setattr(spread_places, "spread", refuse)
    made = places.made()
    assert is_trivial(rows(made)) and not spread_places._agreed[0]


def refuse(*_):
    raise ValueError("they do not divide")


def test_on_other_gpus_they_stay(places, monkeypatch):
    """sglang 0.5.13 maps ids on CUDA alone."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert is_trivial(rows(places.made()))
    assert reason().startswith("this torch has no CUDA")


def test_layers_that_do_not_run_on_deepep_keep_trivial_places(places, monkeypatch):
    """Up to 0.5.22 megamoe's batches above its cap, and layers without a backend, do not map ids."""
    from sglang.srt.layers.moe import utils

    for backend in (utils.MoeA2ABackend.MEGAMOE, utils.MoeA2ABackend.NONE):
        spread_places._agreed.clear()
        monkeypatch.setattr(utils, "get_moe_a2a_backend", lambda backend=backend: backend)
        assert is_trivial(rows(places.made()))
        assert f"--moe-a2a-backend {backend.value}: sglang takes" in reason()


def test_replicas_left_to_sglang_stay_where_they_are(places, monkeypatch):
    monkeypatch.setenv("WATERFILL_RS_REPLICAS", "sglang")
    assert is_trivial(rows(places.made()))
    assert reason() == "WATERFILL_RS_REPLICAS=sglang"


def test_without_redundant_experts_or_metadata_nothing_changes(places, monkeypatch):
    in_order = torch.arange(LOGICAL).repeat(LAYERS, 1)
    common = places.metadata._init_common()
    none = {key: LOGICAL for key in common if key.endswith("num_physical_experts")}
    few = common | none | {"num_local_physical_experts": LOGICAL // RANKS}
    monkeypatch.setattr(places.metadata, "_init_common", staticmethod(lambda *_: few))
    assert torch.equal(places.made().physical_to_logical_map, in_order)
    monkeypatch.setattr(places.metadata, "_init_common", staticmethod(lambda *_: None))
    assert places.made() is None and not spread_places._agreed


class Peers(maps.Peers):
    """Ranks that agree on the order, and answer as they are told to where to put experts."""

    def agree(self, reasons, question, answer):
        self.asked.append((question, answer))
        return list(reasons) or (self.answer if question == "places" else [])


def test_all_ranks_are_asked_once_and_one_keeps_all_from_it(places, monkeypatch):
    for answer in ([], ["EP rank 1: --enable-lora"]):
        spread_places._agreed.clear()
        primaries_first._agreed.clear()
        peers = Peers(answer)
        monkeypatch.setattr(primaries_first, "peers_of_maps", lambda _, peers=peers: peers)
        for _ in range(2):
            assert is_trivial(rows(places.made())) == bool(answer)
        assert [question for question, _ in peers.asked] == ["order", "places"]
        assert all("install the same waterfill-rs on all ranks" in told for _, told in peers.asked)
        assert spread_places.against_hook(compat.find()[0]) == answer


def test_ranks_of_other_versions_or_maps_do_not_agree(monkeypatch):
    peers = Peers([])
    monkeypatch.setattr(primaries_first, "peers_of_maps", lambda _: peers)
    for version in ("1", "2"):
        monkeypatch.setattr(primaries_first.waterfill_rs, "__version__", version)
        for row in ([0, 1], [1, 0]):
            primaries_first.all_agree(None, [], "order", row)
    assert len({answer for _, answer in peers.asked}) == 4


def test_a_rank_that_keeps_the_order_keeps_the_places(places, monkeypatch):
    monkeypatch.setattr(primaries_first, "_agreed", [["EP rank 2: no hook"]])
    assert is_trivial(rows(places.made())) and reason() == "EP rank 2: no hook"


def test_without_the_hook_there_is_a_reason(places, monkeypatch):
    seams, _ = compat.find()
    raw = places.metadata.init_trivial.__wrapped__
    monkeypatch.setattr(places.metadata, "init_trivial", staticmethod(raw))
    assert is_trivial(rows(places.made()))
    assert reason() == f"{seams.location_trivial} is not waterfill-rs's after registration"
    monkeypatch.setattr(compat, "_TRIVIAL", ("no such name",))
    assert "init_trivial takes" in reason()


def test_spread_slots_are_not_given_away(places, tmp_path):
    """A server that loads them would have trivial places."""
    from sglang.srt.model_loader.loader import ShardedStateLoader

    places.made()
    with pytest.raises(RuntimeError, match="stand in the order of waterfill-rs"):
        ShardedStateLoader.save_model(torch.nn.Linear(2, 2), str(tmp_path))


def test_rank_0_says_so(places, caplog):
    trivial_places._tell_once_of_spread.cache_clear()
    places.in_force(places.made())
    seams, _ = compat.find()
    with caplog.at_level(logging.INFO):
        for rank in (1, 0, 0):
            trivial_places.tell(places.given, rank, seams)
    assert caplog.text.count("16 redundant experts are spread over the ranks") == 1
    assert "trivial places" not in caplog.text


# Flags

DISPATCHES = """
import argparse, json, logging, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
told, found = [], []
logging.getLogger("waterfill_rs").addHandler(logging.Handler())
logging.getLogger("waterfill_rs").handlers[0].emit = lambda record: told.append(record.getMessage())
for flags in json.loads(sys.argv[1]):
    before, told[:] = dict(os.environ), []
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args(["--model-path", "dummy", "--device", "cpu", *flags])
    found.append([ServerArgs.from_cli_args(parsed).ep_dispatch_algorithm, list(told)])
    os.environ.clear()
    os.environ.update(before)
print(json.dumps(found))
"""
ON = ["--enable-waterfill", "--ep-num-redundant-experts", "16"]
SET = "--ep-dispatch-algorithm is set to static"


def test_redundant_experts_alone_have_sglang_map_ids():
    cases = [
        (ON, "static"),
        ([*ON, "--enable-eplb"], "static"),
        ([*ON, "--ep-dispatch-algorithm", "dynamic"], "dynamic"),
        ([*ON, "--init-expert-location", "placed.json"], None),
        ([*ON, "--waterfill-rs-replicas", "sglang"], None),
        ([*ON, "--waterfill-rs", "off"], None),
        ([*ON, "--speculative-algorithm", "EAGLE"], None),
        ([*ON, "--enable-lora"], None),
        ([*ON, "--moe-a2a-backend", "megamoe"], None),
        ([*ON, "--quantization", "modelopt_fp4"], None),
        (ON[:1], None),
        (ON[1:], None),
    ]
    done = forked.run(DISPATCHES, json.dumps([flags for flags, _ in cases]))
    assert done.returncode == 0, done.stderr[-2000:]
    for (flags, expected), (found, told) in zip(
        cases, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert found == expected, flags
        assert any(SET in line for line in told) == (expected == "static"), flags
