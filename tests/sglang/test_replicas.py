"""Redundant experts in the real sglang: live replicas through its own maps, rebalances and routers, and why not."""

import json
import logging
import re
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked
import replica_ranks
import torch
from inside import EXPERTS, RANK, RANKS, hash_layer, prepare

import waterfill_rs
from waterfill_rs.exchange.replicas import ReplicaTables

CODE = "import sys, replica_ranks; replica_ranks.main(int(sys.argv[1]), *sys.argv[2:])"
LINE = "replicas: live in prefill, primary ones in decode with groups left out in {} of 3 layers, 4 redundant experts, "


def two_ranks(folder, algorithm, maps="alike", **environment):
    def run(rank):
        environment.setdefault("WATERFILL_RS_TIMEOUT_US", "10000000")
        return forked.run(CODE, str(rank), str(folder), algorithm, maps, **environment)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def written(folder, ranks):
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def total(calls, name):
    return [sum(column) for column in zip(*(call[name] for call in calls), strict=True)]


def planned(calls):
    """Rows of the live plan of a call, from the counts of both ranks."""
    return waterfill_rs.plan(
        total(calls, "sglangs"),
        [call["tokens"] for call in calls],
        ranks=2,
        physical_to_logical=calls[0]["map"],
        policy="replicas",
    ).replica_rows


def is_planned(calls):
    rows, expected = total(calls, "ours"), planned(calls)
    return max(sum(rows[:10]), sum(rows[10:])) == max(sum(expected[:10]), sum(expected[10:]))


def takes_primaries(calls):
    """Has each expert all its rows on its primary replica?"""
    primaries = waterfill_rs._native.ReplicaTable(2, calls[0]["map"]).primaries
    expected = [0] * len(primaries)
    for physical, rows in enumerate(total(calls, "sglangs")):
        expected[primaries[physical]] += rows
    return total(calls, "ours") == expected


@pytest.mark.parametrize(
    "algorithm, asked",
    [("static", "auto"), ("dynamic", "auto"), ("lp", "auto"), ("static", "live")],
)
def test_replicas_are_the_plans_or_primary_before_and_after_a_rebalance(tmp_path, algorithm, asked):
    ranks = two_ranks(tmp_path, algorithm, WATERFILL_RS_REPLICAS=asked)
    found, by_plans = written(tmp_path, ranks), replica_ranks.CALLS
    if asked == "auto":  # One in three is decode, and no call.
        by_plans -= replica_ranks.CALLS // 3
    for of_rank in found:
        assert of_rank["live"] and not of_rank["draft"] and of_rank["refused"] is None
        assert of_rank["drafted"] == [0, 1, 2, 3], "a draft model's ids stay"
        assert of_rank["tally"]["live"] == of_rank["tally"]["calls"] == by_plans
        assert of_rank["maps"] == replica_ranks.maps_of(3).tolist()
        for call in of_rank["calls"]:
            assert call["logical"]["ours"] == call["logical"]["sglangs"], "what a recorder counts"
            fused = call["kind"] == replica_ranks.FUSED
            assert call["used"] == (0 if fused else replica_ranks.SLOTS - 1)
    other = of_plans = 0
    for calls in zip(*(of_rank["calls"] for of_rank in found), strict=True):
        if asked == "auto" and calls[0]["kind"] == replica_ranks.DECODE:
            assert takes_primaries(calls)
            of_plans += not is_planned(calls)
        else:
            assert is_planned(calls)
            of_plans += not takes_primaries(calls)
        other += total(calls, "ours") != total(calls, "sglangs")
    assert other > replica_ranks.CALLS // 2 and of_plans > 3, "plans and primaries differ"
    expected = LINE.format(0) if asked == "auto" else "replicas: live, 4 redundant experts, "
    (told,) = (line for line in ranks[0].stderr.splitlines() if "replicas: live" in line)
    assert expected in told and told.endswith(" replicated")
    assert "replicas: as sglang chooses, because this is a draft model" in ranks[0].stderr


def test_where_primaries_come_first_decode_has_their_slots_alone_and_no_map_may_change(tmp_path):
    ranks = two_ranks(tmp_path, "static", "first")
    first = replica_ranks.LOGICAL // 2
    for of_rank in written(tmp_path, ranks):
        assert len(of_rank["calls"]) == 3
        for call in of_rank["calls"]:
            whole = 0 if call["kind"] == replica_ranks.FUSED else replica_ranks.SLOTS - 1
            decodes = call["kind"] == replica_ranks.DECODE
            assert call["used"] == (first if decodes else whole)
            if decodes:
                assert not any(call["ours"][first:10] + call["ours"][10 + first :])
        assert of_rank["refused"].startswith(
            f"the map of layer 1 changed, and the first {first} experts of each rank are not"
        )
    assert LINE.format(3) in ranks[0].stderr


def test_a_server_that_moves_experts_leaves_no_slots_out(tmp_path):
    ranks = two_ranks(tmp_path, "static", "moves")
    for of_rank in written(tmp_path, ranks):
        assert of_rank["refused"] is None and len(of_rank["calls"]) == replica_ranks.CALLS
        used = {call["used"] for call in of_rank["calls"] if call["kind"] != replica_ranks.FUSED}
        assert used == {replica_ranks.SLOTS - 1}
    for calls in zip(*(found["calls"] for found in written(tmp_path, ranks)), strict=True):
        assert calls[0]["kind"] != replica_ranks.DECODE or takes_primaries(calls)
    assert LINE.format(0) in ranks[0].stderr
    reason = "primary replicas are not put first, because --enable-waterfill was not given"
    assert reason in ranks[0].stderr and reason not in ranks[1].stderr


def test_with_eplb_primaries_are_put_first_and_a_layer_that_cannot_have_them_so_stays(tmp_path):
    ranks = two_ranks(tmp_path, "static", "eplb")
    first, each = replica_ranks.LOGICAL // 2, replica_ranks.PHYSICAL // 2
    found = written(tmp_path, ranks)
    for of_rank in found:
        assert of_rank["refused"] is None and len(of_rank["calls"]) == replica_ranks.CALLS
        started, ended = of_rank["started"], of_rank["maps"]
        assert started != of_rank["given"]
        assert [ended[layer] == started[layer] for layer in range(3)] == [True, False, True]
        for row in (*started, *ended):
            assert waterfill_rs._native.ReplicaTable(2, row).first_primaries == first
        for call in of_rank["calls"]:
            if call["kind"] == replica_ranks.DECODE:
                assert call["used"] == first
                assert not any(call["ours"][first:each] + call["ours"][each + first :])
            elif call["kind"] == replica_ranks.BESIDE:
                assert call["used"] == replica_ranks.SLOTS - 1
    for calls in zip(*(of_rank["calls"] for of_rank in found), strict=True):
        decodes = calls[0]["kind"] == replica_ranks.DECODE
        assert takes_primaries(calls) if decodes else is_planned(calls)
    assert (
        LINE.format(3) in ranks[0].stderr
        and "primary replicas are not put first" not in ranks[0].stderr
    )
    assert ranks[0].stderr.count("2 of 3 layers keep their map of experts in this rebalance") == 2
    assert "keep their map" not in ranks[1].stderr


def test_a_rank_that_keeps_sglangs_order_has_all_keep_it(tmp_path):
    """Each makes its map by itself, so a rank that is told otherwise must not have another one."""
    ranks = two_ranks(tmp_path, "static", "disagrees")
    for of_rank in written(tmp_path, ranks):
        assert of_rank["started"] == of_rank["given"] and not of_rank["live"]
        assert of_rank["maps"] == written(tmp_path, ranks)[0]["maps"]
    assert "EP rank 1: WATERFILL_RS_REPLICAS=sglang" in ranks[0].stderr


@pytest.mark.parametrize("asked", ["auto", "live"])
def test_ranks_whose_maps_differ_are_named(tmp_path, asked):
    ranks = two_ranks(tmp_path, "static", "differs", WATERFILL_RS_REPLICAS=asked)
    reason = (
        r"EP rank [01]: its map of experts has fingerprint [0-9a-f]{8}, its setting is (auto|live)"
    )
    if asked == "live":
        for done in ranks:
            assert done.returncode == 1
            assert re.search(f"- replicas cannot be chosen live: {reason}", done.stderr)
    else:
        assert not any(of_rank["live"] for of_rank in written(tmp_path, ranks))
        assert re.search(f"replicas: as sglang chooses, because {reason}", ranks[0].stderr)


def test_ranks_agree_on_their_settings_too():
    from waterfill_rs.config import Config
    from waterfill_rs.sglang.replicas import Replicas

    tables = ReplicaTables(2, 4, replica_ranks.maps_of(1))

    def answer(asked, moves, *against_order):
        made = Replicas(None, Config(replicas=asked), 4, 100, moves=moves)
        made._against_order = [*against_order]
        return made._answer(tables)

    asked, narrows = ("auto", "live"), ([False], [True], [True, "no hook"])
    answers = [answer(each, *moves) for each in asked for moves in narrows]
    assert answers[0] == answers[1] == answer("auto", False, "no hook")
    assert len(set(answers)) == 4


def test_sglangs_choice_was_asked_for(tmp_path):
    ranks = two_ranks(tmp_path, "static", WATERFILL_RS_REPLICAS="sglang")
    for of_rank in written(tmp_path, ranks):
        assert not of_rank["live"]
        assert all(call["ours"] == call["sglangs"] for call in of_rank["calls"])
    assert "replicas: as sglang chooses, because WATERFILL_RS_REPLICAS=sglang" in ranks[0].stderr


# One rank, and what keeps its layers from it


@pytest.fixture
def placed(sglang, monkeypatch):
    """sglang's map in force, of ``redundant`` experts more; none of these tests leaves it there."""
    from sglang.srt.eplb import expert_location

    def place(redundant, **fields):
        physical = EXPERTS + redundant
        there = types.SimpleNamespace(
            num_physical_experts=physical,
            num_logical_experts=EXPERTS,
            physical_to_logical_map=torch.arange(physical).repeat(2, 1) % EXPERTS,
        )
        there.physical_to_logical_map_cpu = there.physical_to_logical_map
        # More than there are: whatever map a test gives, all are listed.
        there.logical_to_all_physical_map = torch.arange(physical).repeat(2, EXPERTS, 1)
        vars(there).update(fields)
        monkeypatch.setattr(expert_location, "get_global_expert_location_metadata", lambda: there)
        return there

    monkeypatch.delenv("WATERFILL_RS_REPLICAS", raising=False)
    return place


def prepared(sglang, caplog, redundant=RANKS, layer=None):
    layer = layer or hash_layer(sglang)
    caplog.clear()
    with sglang.moe.override(ep_num_redundant_experts=redundant), caplog.at_level(logging.INFO):
        prepare(sglang, layer)
    (told,) = (r.getMessage() for r in caplog.records if "waterfill-rs active" in r.getMessage())
    assert layer.waterfill_balancer.exchange.replicas is None
    return told.partition("; replicas: ")[2]


def beyond(sglang):
    layer = hash_layer(sglang)
    layer.layer_id = 2
    return layer


WHY_NOT = {
    "own counts": ({}, {}, "exchange solo has own counts alone"),
    "no map of such size": (
        {"num_physical_experts": 71},
        {},
        "sglang's map is of 71 physical experts, and Waterfill counts 72",
    ),
    "an expert without a replica": (
        {"physical_to_logical_map_cpu": torch.arange(72).repeat(2, 1) % 63},
        {},
        "layer 0: the map has 9 redundant experts, and the board was made for 8",
    ),
    "other layers": ({}, {"layer": beyond}, "sglang's map of 2 layers has none of this model's"),
}


@pytest.mark.parametrize("name", WHY_NOT)
def test_why_sglang_chooses_is_told_and_ends_a_server_that_asked(
    sglang, placed, caplog, monkeypatch, name
):
    fields, made, reason = WHY_NOT[name]
    placed(RANKS, **fields)
    made = {key: make(sglang) for key, make in made.items()}
    assert prepared(sglang, caplog, **made) == f"as sglang chooses, because {reason}"
    monkeypatch.setenv("WATERFILL_RS_REPLICAS", "live")
    again = {key: WHY_NOT[name][1][key](sglang) for key in made}
    with pytest.raises(SystemExit, match=f"replicas cannot be chosen live: {reason}"):
        prepared(sglang, caplog, **again)


def test_without_redundant_experts_nothing_is_told_unless_live_was_asked_for(
    sglang, placed, caplog, monkeypatch
):
    placed(0)
    assert prepared(sglang, caplog, redundant=0) == ""
    monkeypatch.setenv("WATERFILL_RS_REPLICAS", "live")
    with pytest.raises(SystemExit, match="there are no redundant experts: give --ep-num-redund"):
        prepared(sglang, caplog, redundant=0)


def test_a_draft_model_is_sglangs_whatever_was_asked_for(sglang, placed, caplog, monkeypatch):
    placed(RANKS)
    monkeypatch.setenv("WATERFILL_RS_REPLICAS", "live")
    layer = hash_layer(sglang)
    layer.is_draft = True
    assert prepared(sglang, caplog, layer=layer) == (
        "as sglang chooses, because this is a draft model, whose experts stay where they are"
    )


def test_a_slot_that_sglang_loads_no_weights_into_is_not_chosen(sglang, placed, caplog):
    there = placed(RANKS)
    each = (EXPERTS + RANKS) // RANKS
    own = RANK * each
    there.physical_to_logical_map[1, own + 1] = there.physical_to_logical_map[1, own]
    for expert in set(range(EXPERTS)) - set(there.physical_to_logical_map[1].tolist()):
        there.physical_to_logical_map[1, -1 if RANK == 0 else 0] = expert  # It stands somewhere.
    there.logical_to_all_physical_map[1, :, own + 1] = -1
    expert = int(there.physical_to_logical_map[1, own])
    assert (
        f"expert {expert} stands twice on rank {RANK} in layer 1, and sglang loads the weights of one of them"
        in prepared(sglang, caplog)
    )


def test_tables_follow_no_update_of_another_map_and_tell_of_one_that_they_cannot_use(
    sglang, placed, monkeypatch, caplog
):
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    from waterfill_rs.sglang import replicas

    there = placed(RANKS)
    tables = ReplicaTables(RANKS, RANKS, there.physical_to_logical_map_cpu)
    before = tables.fingerprints
    monkeypatch.setattr(replicas, "_followed", [(there, tables)])
    there.physical_to_logical_map_cpu[1, 0] = 1
    replicas.follow_update(None, types.SimpleNamespace(), there, [1])
    assert tables.fingerprints == before
    replicas.follow_update(None, there, there, update_layer_ids=[0])
    assert tables.fingerprints == before
    replicas.follow_update(None, there, there, update_layer_ids=[1])
    assert 0 < tables.fingerprints[1] != before[1] and not caplog.text
    there.physical_to_logical_map_cpu[1, EXPERTS] = 1
    replicas.follow_update(None, there, there, update_layer_ids=[1])
    assert tables.fingerprints[1] == 0
    assert "sglang chooses the replicas of layer 1 from now on: logical expert 0" in caplog.text
    assert ExpertLocationMetadata.update.__wrapped__, "the hook is in place"
    assert RANK < RANKS
