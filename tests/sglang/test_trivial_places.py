"""The warning at start where redundant experts stand as sglang's default puts them, with sglang's own map."""

import logging
import types

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

from inside import EXPERTS, RANK, hash_layer, prepare

from waterfill_rs.sglang import preparation, spread_places, trivial_places
from waterfill_rs.sglang_versions import ROWS

REDUNDANT, LAYERS, SEAMS = 16, 3, ROWS[0]
WORDS = "16 redundant experts stand in trivial places, sglang's default"


@pytest.fixture(autouse=True)
def told_anew(monkeypatch):
    monkeypatch.setattr(spread_places, "_agreed", [])
    monkeypatch.setattr(spread_places, "_rows", [])
    trivial_places._tell_once.cache_clear()
    yield
    trivial_places._tell_once.cache_clear()


@pytest.fixture
def in_force(sglang, monkeypatch):
    """Puts a map in force: sglang's default, or the same with its last two experts changed about."""
    from sglang.srt.eplb import expert_location
    from sglang.srt.runtime_context import get_resources

    def put(changed=False):
        common = dict(
            num_physical_experts=EXPERTS + REDUNDANT,
            base_num_physical_experts=EXPERTS + REDUNDANT,
            model_config_for_expert_location=types.SimpleNamespace(
                num_layers=LAYERS, num_logical_experts=EXPERTS
            ),
        )
        kept = []

        def by_mapping(model_config, physical_to_logical_map, **_):
            kept.append(physical_to_logical_map.clone())

        metadata = expert_location.ExpertLocationMetadata
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "_init_common", staticmethod(lambda *_: common))
            patched.setattr(metadata, "init_by_mapping", staticmethod(by_mapping))
            metadata.init_trivial(None, RANK)
        (mapping,) = kept
        if changed:
            mapping[1, [-1, -2]] = mapping[1, [-2, -1]]
        found = types.SimpleNamespace(physical_to_logical_map=mapping)
        monkeypatch.setattr(get_resources(), "expert_location_metadata", found)

    return put


def arguments(redundant=REDUNDANT, **fields):
    return types.SimpleNamespace(ep_num_redundant_experts=redundant, **fields)


def test_sglangs_default_is_told_once_by_rank_0(in_force, caplog):
    in_force()
    trivial_places.tell(arguments(), 1, SEAMS)
    trivial_places.tell(arguments(redundant=0), 0, SEAMS)
    assert not caplog.text
    for _ in range(2):
        trivial_places.tell(arguments(), 0, SEAMS)
    assert caplog.text.count(WORDS) == 1
    assert "waterfill-rs place" in caplog.text and "--init-expert-location" in caplog.text
    assert "EPLB" not in caplog.text
    assert "because the placement that was given is the trivial one. Make" in caplog.text


def test_why_they_were_not_spread_is_told(in_force, caplog, monkeypatch):
    in_force()
    monkeypatch.setattr(spread_places, "_agreed", [["give --ep-dispatch-algorithm static", "more"]])
    trivial_places.tell(arguments(), 0, SEAMS)
    assert "not spread over the ranks, because give --ep-dispatch-algorithm static. Make a" in (
        caplog.text
    )


def test_with_eplb_it_is_so_until_the_first_rebalance(in_force, caplog):
    in_force()
    trivial_places.tell(arguments(enable_eplb=True), 0, SEAMS)
    assert f"{WORDS}, until EPLB rebalances: balance" in caplog.text


def test_another_map_and_none_are_not_told_of(in_force, caplog, monkeypatch):
    in_force(changed=True)
    trivial_places.tell(arguments(), 0, SEAMS)
    from sglang.srt.runtime_context import get_resources

    monkeypatch.setattr(get_resources(), "expert_location_metadata", None)
    trivial_places.tell(arguments(), 0, SEAMS)
    monkeypatch.setattr(trivial_places, "_LOCATION", "sglang.no_such.module")
    trivial_places.tell(arguments(), 0, SEAMS)
    assert not caplog.text


def test_a_server_that_stands_aside_still_tells_of_what_was_spread(
    sglang, in_force, caplog, monkeypatch
):
    from sglang.srt import runtime_context
    from sglang.srt.runtime_context import get_resources

    in_force()
    trivial_places._tell_once_of_spread.cache_clear()
    spread_out = get_resources().expert_location_metadata.physical_to_logical_map
    given = arguments()
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: given)
    why = ["no kernel of ours runs here"]
    monkeypatch.setattr(preparation.eligibility, "against_machine", lambda: list(why))
    for rows in ([], [spread_out[0].tolist()]):
        monkeypatch.setattr(spread_places, "_rows", rows)
        with sglang.moe.override(ep_num_redundant_experts=REDUNDANT), caplog.at_level(logging.INFO):
            prepare(sglang, hash_layer(sglang))
        assert why[0] in caplog.text
        assert ("are spread over the ranks" in caplog.text) == bool(rows)
    assert WORDS not in caplog.text


def test_a_servers_preparation_tells(sglang, in_force, caplog, monkeypatch):
    from sglang.srt import runtime_context

    in_force()
    told = []
    monkeypatch.setattr(trivial_places, "tell", lambda *given: told.append(given))
    given = arguments()
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: given)
    with sglang.moe.override(ep_num_redundant_experts=REDUNDANT), caplog.at_level(logging.INFO):
        prepare(sglang, hash_layer(sglang))
    assert told == [(given, RANK, SEAMS)]
    assert "waterfill-rs active" in caplog.text
