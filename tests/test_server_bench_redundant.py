"""``benches/server`` with redundant experts: placements from other traffic, engines, switching, figures; no GPU."""

import json
from types import SimpleNamespace

import pytest
from test_server_bench_run import run, stub  # noqa: F401

np = pytest.importorskip("numpy")
pytest.importorskip("torch")

from server import (
    accounts,
    engines,
    figures,
    modes,
    outputs,
    recording,
    redundant,
    results,
    rows,
    schedule,
    table,
)
from server.figures import Mode, Sent
from server.modes import Placed
from server.schedule import Cell
from server.switch import Switch

from waterfill_rs.placement import place, repair

EXPERTS, RANKS = 8, 2


@pytest.fixture
def shifted(tmp_path):
    """A file whose first half of prompts asks for experts 0 and 1 above all, and whose second half for 6 and 7."""
    ids = np.zeros((400, 2, 2), dtype=np.uint8)
    ids[:200] = [0, 1]
    ids[200:] = [6, 7]
    ids[::4] = [2, 5]
    np.savez(tmp_path / "ids.npz", topk=ids, offsets=np.arange(0, 401, 50))
    return tmp_path / "ids.npz"


def test_what_places_experts_is_not_what_is_measured(shifted):
    one = recording.read(shifted, RANKS, EXPERTS, hold_out=True)
    measured = np.concatenate(one.streams)
    assert len(measured) == 200 and set(np.unique(measured)) == {2, 5, 6, 7}
    assert one.other.tolist() == [[150, 150, 50, 0, 0, 50, 0, 0]] * 2
    assert recording.for_decode(one).other is one.other
    # Without redundant experts all of it is measured, and nothing is held out.
    whole = recording.read(shifted, RANKS, EXPERTS)
    assert whole.tokens * RANKS == 400 and not whole.other.any()
    mapping = redundant.mapping("place", one, 2)
    assert mapping == [place.place([one.other[0].tolist()], ranks=RANKS, redundant=2)] * 2
    # Replicas are of the experts that the other traffic asks for.
    assert {expert for expert in mapping[0] if mapping[0].count(expert) > 1} == {0, 1}
    assert redundant.mapping("trivial", one, 2) == [[*range(8), 0, 1]] * 2
    assert redundant.mapping("spread", one, 2) == [[0, 2, 4, 6, 1, 1, 3, 5, 7, 0]] * 2


def test_a_dials_other_traffic_has_other_prompts_and_the_same_hot_ranks():
    shape = (1.3, 4, 64, 6, 2, 2048)
    one = recording.synthetic(*shape, hold_out=True)
    same = recording.synthetic(*shape)
    assert all((a == b).all() for a, b in zip(one.streams, same.streams, strict=True))
    measured = recording.counts(one.streams, 64)
    assert one.other.shape == measured.shape and (one.other != measured).mean() > 0.9
    hot = [counts.reshape(2, 4, 16).sum(2).argmax(1).tolist() for counts in (one.other, measured)]
    assert hot == [[0, 1], [0, 1]]


def test_sglangs_own_eplb_places_by_the_other_traffic(shifted):
    pytest.importorskip("sglang.srt.eplb.eplb_algorithms")
    one = recording.read(shifted, RANKS, EXPERTS, hold_out=True)
    mapping = redundant.mapping("eplb", one, 2)
    assert {expert for expert in mapping[0] if mapping[0].count(expert) > 1} <= {0, 1}
    assert [len(of) for of in mapping] == [10, 10] and set(mapping[1]) == set(range(8))


def test_sglang_is_told_where_experts_stand(tmp_path):
    path = tmp_path / "placement.json"
    redundant.write(path, [[1, 0, 1], [0, 1, 0]], 3)
    content = json.loads(path.read_text())
    # A dense layer, then the recording's two layers round and round.
    assert content == {"physical_to_logical_map": [[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]]}
    both = redundant.Files(path, path)
    files = {(name, 1): both for name in ("place", "spread", "packed-spread", "trivial")}

    def given(name, mode="off-static", algorithm="dynamic", rebalance=0):
        placed = Placed((name,), 1, algorithm, rebalance)
        return redundant.arguments(modes.Plan("it", (mode,), placed=placed), files)

    assert given("place") == {
        "ep_num_redundant_experts": 1,
        "init_expert_location": str(path),
        "ep_dispatch_algorithm": "dynamic",
    }
    rebalanced = given("place", rebalance=12)
    assert rebalanced["enable_eplb"] and rebalanced["eplb_rebalance_num_iterations"] == 12
    # Where an engine has such places by itself it is given none, and the others are given the same map.
    by_itself = {("trivial", mode) for mode in ("off-static", "off-dynamic", "sglang-replicas")}
    by_itself |= {
        (name, f"{who}-replicas")
        for name in ("spread", "packed-spread")
        for who in ("auto", "live")
    }
    for name in ("trivial", "spread", "packed-spread"):
        for mode in (
            "off-static",
            "off-dynamic",
            "auto-replicas",
            "live-replicas",
            "sglang-replicas",
        ):
            expected = "trivial" if (name, mode) in by_itself else str(path)
            assert given(name, mode)["init_expert_location"] == expected, (name, mode)
    assert redundant.arguments(modes.Plan("off", ("off",)), files) == {}


def test_engines_of_a_placement():
    both = (["static", "dynamic"], ["live", "sglang"])
    decode = modes.with_redundant("decode", ["place"], 16, *both)
    assert [plan.modes for plan in decode] == [
        ("off-static",), ("off-dynamic",), ("live-replicas",), ("sglang-replicas",),
    ]  # fmt: skip
    assert [plan.waterfill for plan in decode] == [False, False, True, True]
    assert [plan.placed.dispatch for plan in decode] == ["static", "dynamic", "static", "static"]
    assert [plan.settings for plan in decode] == [
        {}, {}, {"WATERFILL_RS_REPLICAS": "live"}, {"WATERFILL_RS_REPLICAS": "sglang"},
    ]  # fmt: skip
    assert all(plan.as_shipped == plan.waterfill for plan in decode)
    # In prefill one engine takes turns with both.
    *_, switched = modes.with_redundant("prefill", ["place"], 16, *both)
    assert switched.modes == ("live-replicas", "sglang-replicas") and switched.switches
    expected = {"WATERFILL_RS_SHARED": "fused", "WATERFILL_RS_REPLICAS": "live"}
    assert switched.settings == expected
    # As an operator has it, by itself and beside the others.
    _, auto = modes.with_redundant("decode", ["place"], 16, ["static"], ["auto"])
    assert auto.modes == ("auto-replicas",) and auto.settings == {"WATERFILL_RS_REPLICAS": "auto"}
    assert auto.waterfill and auto.as_shipped
    *_, all_three = modes.with_redundant(
        "prefill", ["place"], 16, *both[:1], ["auto", "live", "sglang"]
    )
    assert all_three.modes == ("auto-replicas", "live-replicas", "sglang-replicas")
    assert all_three.settings == expected
    # Without redundant experts nobody chooses.
    (alone,) = modes.with_redundant("prefill", ["place"], 0, ["static"], ["live"])
    assert alone.modes == ("off-static",)
    (off,) = modes.engines("decode", ["off"])
    assert off.serves("place", 16) and off.serves("eplb", 0)
    assert alone.serves("place", 0) and not alone.serves("place", 16)
    assert len({plan.name for plan in (*decode, switched, alone, off)}) == 7
    with pytest.raises(ValueError, match="give --redundant instead"):
        modes.engines("decode", ["live-replicas"])


def test_one_engine_has_several_placements_in_turn(tmp_path):
    names = ["spread", "place", "eplb", "trivial"]
    static, auto = modes.with_redundant("decode", names, 16, ["static"], ["auto"])
    assert (static.name, auto.name) == ("off-static-moved-16", "auto-replicas-moved-16")
    assert static.moves and static.placed.names == tuple(names)
    # Its graphs leave groups out, which trivial places do not allow.
    assert auto.placed.names == ("spread", "place", "eplb") and not auto.serves("trivial", 16)
    assert auto.serves("eplb", 16) and not auto.serves("eplb", 32)
    files = {
        (name, 16): redundant.Files(tmp_path / f"our-{name}", tmp_path / name) for name in names
    }
    paths = [str(tmp_path / name) for name in names]
    assert redundant.locations(static, files) == [*paths[:3], "trivial"]
    ours = [str(tmp_path / f"our-{name}") for name in names]
    assert redundant.locations(auto, files) == ["trivial", *ours[1:3]]
    assert redundant.arguments(auto, files)["init_expert_location"] == "trivial"
    *_, live, sglang = modes.with_redundant("decode", names, 16, ["static"], ["live", "sglang"])
    assert redundant.locations(live, files) == ["trivial", *ours[1:]]
    assert redundant.locations(sglang, files) == [*paths[:3], "trivial"]
    (off,) = modes.engines("decode", ["off"])
    assert redundant.locations(off, files) == [] and not off.moves
    # Without redundant experts spread places are those of off, and nothing is left to move to.
    none = redundant.Asked([0, 16], ["spread"], ["static"], ["auto"], moved=True)
    assert {plan.placed.redundant for plan in none.plans("decode", [""])} == {16}


def test_eplbs_map_is_repaired_for_engines_that_need_primaries_first(shifted):
    one = recording.read(shifted, RANKS, EXPERTS, hold_out=True)
    # Rank 0 has five experts of its own alone, and rank 1 three with two replicas of two of them.
    uneven = [[0, 1, 2, 3, 4, 5, 6, 7, 5, 6]] * 2
    counts = one.other[0].tolist()
    assert redundant.repaired(uneven, one) == [repair.repaired(uneven[0], counts, 2, 2)] * 2
    assert redundant.repaired(uneven, one) != uneven


def test_each_placement_of_an_engine_is_asked_for_its_outputs():
    names = ["spread", "place"]
    (off,) = modes.engines("decode", ["off"])
    plans = [off, *modes.with_redundant("decode", names, 2, ["static"], ["auto"])]
    cells = [
        Cell("decode", tokens, table, name, 2, placed=True)
        for table in (0, 1)
        for name in names
        for tokens in (4, 8)
    ]
    found = list(outputs.asked(SimpleNamespace(cells=cells), plans))
    # Once each, in the routing of the first table, and off wherever it is.
    assert [(plan.name, cell, who) for plan, cell, who in found] == [
        ("off", cells[0], ("off", None)),
        ("off-static-moved-2", cells[0], ("off-static", ("spread", 2))),
        ("off-static-moved-2", cells[2], ("off-static", ("place", 2))),
        ("auto-replicas-moved-2", cells[0], ("auto-replicas", ("spread", 2))),
        ("auto-replicas-moved-2", cells[2], ("auto-replicas", ("place", 2))),
    ]
    # Of rows only what serves a cell is counted, and no more than a minute is kept for them.
    profiles = schedule.profiles_s(3)
    assert schedule.after_s(plans, cells[:1]) == profiles + 3 * schedule.ROWS_S
    assert schedule.after_s(plans, cells * 9) == profiles + schedule.MOST_ROWS_S


def test_experts_move_between_rounds(stub, tmp_path):  # noqa: F811
    options = ("--redundant", "2,4", "--placement", "spread,place,trivial", "--moved")
    more = ("--decode", "4,8", "--sweeps", "2", "--profiled", "4")
    done = run(stub, tmp_path, *options, *more)
    assert done.returncode == 0, done.stderr
    document = results.read(tmp_path / "out.json")
    found = {(c["placement"], c["redundant"], c["tokens"], c["mode"]) for c in document["cells"]}
    assert found == {
        (name, number, tokens, mode)
        for number in (2, 4)
        for tokens in (4, 8)
        for name in ("spread", "place", "trivial")
        for mode in ("off", "off-static", "auto-replicas")
        if (name, mode) != ("trivial", "auto-replicas")
    }
    assert document["failures"] == document["mismatches"] == []
    assert {profile["tokens"] for profile in document["profiles"]} == {4}
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == [
        "decode-auto-replicas-moved-2.log", "decode-auto-replicas-moved-4.log",
        "decode-off-static-moved-2.log", "decode-off-static-moved-4.log", "decode-off.log",
    ]  # fmt: skip
    log = (tmp_path / "logs" / "decode-auto-replicas-moved-2.log").read_text()
    moves = [line for line in log.splitlines() if line.startswith("moved")]
    # Two ranks in step, and no move where the experts stand there already.
    assert moves[:4] == ["moved to 1", "moved to 1", "moved to 0", "moved to 0"], moves
    assert all(a == b for a, b in zip(moves[::2], moves[1::2], strict=True))
    assert "moved" not in (tmp_path / "logs" / "decode-off.log").read_text()


def test_a_switched_layer_keeps_sglangs_replicas_in_a_call_of_all_ranks():
    calls = []

    class Exchange:
        board = "board"

        def expand(self, ids, weights, shared_weight, *, layer=None):
            calls.append(("expand", ids, weights, shared_weight, layer))

        def move_up(self, ids, *, layer=None, live=True):
            calls.append(("move_up", ids, layer, live))

    class Theirs:
        def __init__(self, **_):
            pass

    class Ours:
        num_routed_experts, world_size, rank, layer_id, shared_weight = 8, 2, 1, 3, 0.4
        exchange = Exchange()

        def expand_topk(self, topk_output, num_tokens, **options):
            assert self.exchange.board == "board"
            self.exchange.expand("ids", "weights", 0.4, layer=2)
            self.exchange.move_up("ids", layer=2)
            self.exchange.move_up("ids", layer=2, live=False)

    ours, mode = Ours(), ["live-replicas"]
    exchange = ours.exchange
    switch = Switch(ours, Theirs, "shared_weight", lambda: mode[0], lambda balancer: None)
    for mode[0] in ("live-replicas", "auto-replicas", "sglang-replicas"):
        switch(None, 5)
        assert ours.exchange is exchange
    assert calls == [
        call
        for layer in (2, 2, None)
        for call in (
            ("expand", "ids", "weights", 0.4, layer),
            ("move_up", "ids", layer, True),
            ("move_up", "ids", layer, False),
        )
    ]


def test_what_a_placement_allows_by_hand():
    # Two ranks of two experts and one replica each, [0, 1, 2] and [3, 0, 1]; top 1, 4 tokens a rank.
    mapping = [[0, 1, 2, 3, 0, 1]]
    tables = [np.array([[[0], [0], [0], [2]]]), np.array([[[0], [2], [2], [3]]])]
    found = rows.placed(tables, [0], 4, mapping, fused=False)
    # Expert 0 has 4 rows, 2 has 3, 3 has 1: split 1 and 3, both ranks have 4; evenly, 5 and 3.
    assert found["optimum"] == found["routed_optimum"] == 1.0 and found["even"] == 1.25
    assert found["least_active"] == 2.0
    without = rows.placed(tables, [0], 4, [[0, 1, 2, 3]], fused=True)
    # 4 and 4 routed rows, and as many shared ones.
    assert without["optimum"] == 1.0 and without["even"] == 1.0


def test_a_placed_cells_figures_and_its_table(tmp_path):
    times = {
        "off": 10.0, "off-static": 11.0, "off-dynamic": 12.0, "live-replicas": 9.0,
    }  # fmt: skip
    of = {name: Mode({(0, i): ms for i in range(3)}) for name, ms in times.items()}
    live = of["live-replicas"]
    live.rows = [Sent(1.0, 1.02, 16), Sent(1.0, 1.04, 17)]
    place = {"phase": "decode", "tokens": 8, "placement": "place", "redundant": 16, "placed": True}
    modelled = {"optimum": 1.0, "routed_optimum": 1.01, "even": 1.2, "least_active": 15.5}
    cells = [figures.cell(place, name, of, modelled, 4) for name in of]
    cell = cells[-1]
    assert (cell["ratio_off"], cell["ratio_static"], cell["ratio_dynamic"]) == (0.9, 0.81818, 0.75)
    assert (cell["routed_max_mean"], cell["active_experts"]) == (1.03, 16.5)
    assert (cell["routed_optimum"], cell["even"], cell["least_active"]) == (1.01, 1.2, 15.5)
    assert cells[0]["routed_max_mean"] is None and cells[0]["quartiles_static"] == [0.90909] * 2
    document = {
        "machine": "m", "date": "d", "commit": "c", "sglang": "s", "ranks": 4, "settings": {}, "cells": cells,
    }  # fmt: skip
    results.write(tmp_path / "r.json", document)
    told = table.markdown([results.read(tmp_path / "r.json")])
    assert (
        "| decode | 8 | place + 16 | live-replicas | 9.000 | 0.9000 (0.9000, 0.9000) | 0.8182"
        in told
    )
    assert table.HEAD not in told and "Verdict" not in told
    with pytest.raises(ValueError, match="cell 3: active_experts is -1"):
        results.check({**document, "cells": [*cells[:3], {**cell, "active_experts": -1}]})


def test_a_shipped_engine_with_redundant_experts_chooses_by_batch():
    rank = {"modes": {"live-replicas": 10}, "batches": {"overlapped": 10, "fused": 0}, "calls": {}}
    assert accounts.mismatches({**rank, "layers": 2, "staying": 0}, calls=False) == []


def test_a_decode_beside_sglangs_choice(stub, tmp_path):  # noqa: F811
    options = ("--redundant", "2", "--dispatch", "static,dynamic", "--decode", "4", "--sweeps", "1")
    done = run(stub, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    document = results.read(tmp_path / "out.json")
    cells = {cell["mode"]: cell for cell in document["cells"]}
    assert list(cells) == ["off", "off-static", "off-dynamic", "auto-replicas"]
    live = cells["auto-replicas"]
    assert live["ratio_off"] == pytest.approx(0.6)
    assert live["ratio_static"] == pytest.approx(6 / 11, abs=1e-5)
    assert live["ratio_dynamic"] == pytest.approx(6 / 11.5, abs=1e-5)
    assert (live["placement"], live["redundant"], live["placed"]) == ("place", 2, True)
    # Both rows of each layer go to rank 0 of two: without a balancer to two experts, overlapped to one expert twice
    assert cells["off"]["routed_max_mean"] == cells["off-static"]["routed_max_mean"] == 2.0
    assert cells["off"]["active_experts"] == 2.0 and live["rows_from"] == "counted"
    assert document["settings"]["placements_from"] == "the recording's first half"
    assert document["mismatches"] == [] and document["failures"] == []
    assert "| decode | 4 | place + 2 | auto-replicas | 7.500 |" in done.stdout
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    placed = logs["decode-auto-replicas-place-2.log"]
    assert (
        "'ep_num_redundant_experts': 2" in placed and "'ep_dispatch_algorithm': 'static'" in placed
    )
    assert "placement-place-2.json" in placed
    assert "'ep_dispatch_algorithm': 'dynamic'" in logs["decode-off-dynamic-place-2.log"]
    assert "redundant" not in logs["decode-off.log"]


def test_a_prefill_of_two_placements_in_turns(stub, tmp_path):  # noqa: F811
    options = ("--redundant", "0,2", "--placement", "place,trivial", "--replicas", "live,sglang")
    done = run(stub, tmp_path, *options, "--prefill", "256", "--sweeps", "2")
    assert done.returncode == 0, done.stderr
    cells = results.read(tmp_path / "out.json")["cells"]
    found = [(cell["placement"], cell["redundant"], cell["mode"]) for cell in cells]
    ours = ("off", "off-static", "sglang-replicas", "live-replicas")
    assert found == [
        *[("place", 0, mode) for mode in ours[:2]],
        *[(name, 2, mode) for name in ("place", "trivial") for mode in ours],
    ]
    for cell in cells:
        if cell["mode"] == "live-replicas":
            assert cell["ratio_static"] == pytest.approx(6 / 11, abs=1e-5)
            # Two rows for rank 0 and one for rank 1, of which the latter is shared.
            assert cell["rows_max_mean"] == pytest.approx(4 / 3, abs=1e-5)
            assert cell["routed_max_mean"] == 2.0 and cell["rows_from"] == "counted"


def test_no_engine_is_waited_for_longer_than_patience(tmp_path, monkeypatch):
    waited = []

    class Engine:
        def __init__(self, name, command, environment, log):
            self.name, self.ready = name, {"sglang": "s"}

        def round(self, asked, seconds):
            waited.append(seconds)
            return {"ranks": []}

    def wait_all(started, seconds):
        waited.append(seconds)
        return started

    monkeypatch.setattr(engines, "Engine", Engine)
    monkeypatch.setattr(engines, "wait_all", wait_all)
    (plan,) = modes.engines("decode", ["off"])
    routing = {"routing": "r", "placements": 1, "longest": 8, "experts": 8}
    for patience, expected in ((12.0, [12.0, 12.0]), (None, [300.0, 99.0])):
        folder = tmp_path / str(patience)
        folder.mkdir()
        space = engines.workspace.Workspace(folder)
        of = engines.Engines(space, folder, patience)
        needs = {"decode": [8]}
        of.start("n", [plan], needs, 2, folder, routing, {}, {}, 300.0, lambda: None)
        assert of.round(plan, {}, 99.0) == {"ranks": []}
        assert waited == expected
        waited.clear()


def test_wrong_redundant_options_are_told(capsys):
    from server.cli import main

    base = ("--dial", "1.3", "--ranks", "4")
    wrong = {
        ("--redundant", "x"): "--redundant 'x': give numbers",
        ("--redundant", "6"): "64 logical experts and 6 redundant ones do not divide over 4 ranks",
        ("--redundant", "16", "--placement", "best"): "--placement 'best': give some of place, eplb, spread, trivial",
        ("--redundant", "16", "--dispatch", "lp"): "--dispatch 'lp': give some of static, dynamic",
        ("--redundant", "16", "--replicas", "all"): "--replicas 'all': give some of auto, live, sglang",
        ("--redundant", "16", "--mixed"): "--mixed has no redundant experts",
        ("--redundant", "16", "--moved", "--rebalance", "9"): "--moved: give another --placement",
        ("--redundant", "16", "--moved", "--placement", "trivial"): "--moved: give another --placement",
        ("--redundant", "16", "--outputs", "--modes", "auto"): "--outputs compares engines with off",
        ("--modes", "off-static"): "give --redundant instead",
        ("--decode", "8", "--profiled", "9"): "--profiled 9: give a number of tokens that is measured",
    }  # fmt: skip
    for options, text in wrong.items():
        assert main([*base, *options]) == 2
        assert text in capsys.readouterr().err


def test_a_dials_placement_is_named_after_it():
    asked = redundant.of_options(
        SimpleNamespace(redundant="16", mixed=None, rebalance=0, placement="place",
                        dispatch="static", replicas="live", moved=False)
    )  # fmt: skip
    assert asked.places("dial-1.30-") == [("dial-1.30-place", "place", 16)]
    names = [plan.name for plan in asked.plans("decode", ["dial-1.00-", "dial-1.30-"])]
    assert names == [
        "off-static-dial-1.00-place-16", "live-replicas-dial-1.00-place-16",
        "off-static-dial-1.30-place-16", "live-replicas-dial-1.30-place-16",
    ]  # fmt: skip
