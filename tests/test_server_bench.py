"""The parts of ``benches/server`` that need neither GPU nor sglang: recordings, dials, figures, the plan of rounds, messages."""

import json
import os

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


from server import (
    cli,
    dial,
    figures,
    kernels,
    memory,
    model,
    modes,
    recording,
    results,
    rows,
    schedule,
    table,
    traffic,
)
from server.figures import Mode, Sent
from server.protocol import Closed, Late, Reader, send
from server.recording import Recording


def array(path, topk, offsets):
    np.savez(path, topk=np.asarray(topk), offsets=np.asarray(offsets))
    return path


def test_whole_prompts_go_to_ranks(tmp_path):
    # Prompt i has tokens whose first expert is i, 40 each.
    topk = np.repeat(np.arange(4, dtype=np.uint8), 40)[:, None, None] + np.array([0, 4], np.uint8)
    read = recording.read(array(tmp_path / "a.npz", topk, [0, 40, 80, 120, 160]), ranks=2)
    assert (read.ranks, read.layers, read.top_k, read.tokens, read.experts) == (2, 1, 2, 80, 8)
    firsts = [own[::40, 0, 0].tolist() for own in read.streams]
    assert sorted(firsts[0] + firsts[1]) == [0, 1, 2, 3]
    assert all((own[i : i + 40] == own[i]).all() for own in read.streams for i in (0, 40))


def test_wrong_arrays_are_told(tmp_path):
    good = np.zeros((200, 2, 2), dtype=np.uint8)
    for topk, offsets, text in (
        (good.astype(float), [0, 200], "topk is float64"),
        (good, [0, 100], "there are 200 tokens"),
        (good, [0, 150, 100, 200], "rising offsets"),
        (good[:100], [0, 100], "50 for each of 2 ranks"),
        (good - np.int16(1), [0, 200], "topk has -1"),
    ):
        with pytest.raises(ValueError, match=text):
            recording.read(array(tmp_path / "b.npz", topk, offsets), 2)
    with pytest.raises(ValueError, match="has expert 9, and there are 8"):
        recording.read(array(tmp_path / "b.npz", good + np.uint8(9), [0, 200]), 2, experts=8)


def test_dumps_become_logical_experts_without_padding(tmp_path):
    # Three layers, the first dense; physical expert p is logical p % 3, so all have a replica.
    mapping = torch.tensor([[0, 1, 2, 0, 1, 2]] * 3, dtype=torch.int32)
    for rank in range(2):
        ids = torch.full((3, 70, 8), -1, dtype=torch.int32)
        # A column that is the same in all rows would be padding.
        ids[1:, :65, 0], ids[1:, :65, 1] = 4 + rank, torch.arange(65) % 2 * 3
        record = {"forward_pass_id": 1, "rank": rank, "topk_ids_of_layer": ids}
        content = {"records": [record], "last_physical_to_logical_map": mapping}
        torch.save(content, tmp_path / f"dump_{rank}.pt")
    read = recording.read(tmp_path, ranks=2)
    assert (read.experts, read.layers, read.top_k, read.tokens) == (3, 2, 2, 65)
    assert [own[0, 0].tolist() for own in read.streams] == [[1, 0], [2, 0]]


def test_packing_puts_the_busiest_where_least_is():
    # 10 to rank 0, 9 to 1, 5 to 1 (9 < 10), which is full; 1 to 0.
    assert recording.pack(np.array([1, 9, 10, 5]), 2).tolist() == [1, 2, 0, 3]
    own = np.array([[[2]], [[2]], [[1]]], dtype=np.int16)
    one = Recording("r", 4, [own, own])
    packed = recording.place("packed", one)
    assert [t.tolist() for t in packed.tables(one)] == [[[[0], [0], [2]]]] * 2
    assert recording.place("trivial", one).tables(one)[0].tolist() == [[[2], [2], [1]]]
    with pytest.raises(ValueError, match="give packed or trivial"):
        recording.place("stale", one)
    with pytest.raises(ValueError, match="4 experts do not divide over 3 ranks"):
        recording.place("trivial", Recording("r", 4, [own] * 3))


def test_decode_has_the_same_tokens_in_one_other_order():
    own = np.arange(500, dtype=np.int16)[:, None, None]
    one = Recording("r", 512, [own, own + 1])
    other = recording.for_decode(one)
    assert sorted(other.streams[0].ravel()) == list(range(500))
    assert (other.streams[1] == other.streams[0] + 1).all()
    assert (other.streams[0] != own).any()
    assert recording.for_decode(one).streams[0].tolist() == other.streams[0].tolist()


@pytest.mark.parametrize("ratio", [1.0, 1.2, 1.5])
def test_a_dial_has_its_ratio_in_every_window(ratio):
    streams = dial.streams(ratio, 4, 64, 6, 2, 1024, seed=1)
    assert [own.shape for own in streams] == [(1024, 2, 6)] * 4
    for layer in range(2):
        for begin in range(0, 1024, dial.WINDOW):
            ids = np.concatenate([own[begin : begin + dial.WINDOW, layer] for own in streams])
            assert all(len(set(token)) == 6 for token in ids.tolist())
            counts = np.bincount(ids.ravel() // 16, minlength=4)
            # 1536 rows: within two of 384 times the ratio.
            assert abs(counts[layer] - 384 * ratio) < 2 and counts.max() < 384 * ratio + 2
    # A prompt's popular experts are not all ranks': own counts mislead.
    own = np.bincount(streams[0][:512, 0].ravel(), minlength=64)
    other = np.bincount(streams[1][:512, 0].ravel(), minlength=64)
    assert np.abs(own - other).sum() > 0.2 * own.sum()


def test_a_dial_is_the_same_for_a_seed_and_refuses_what_it_cannot_have():
    one, same, other = (dial.streams(1.1, 2, 16, 2, 1, 128, seed=s) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match=r"dial 1\.6"):
        dial.streams(1.6, 4, 64, 6, 1, 64, 1)
    with pytest.raises(ValueError, match="with 8 experts on 4 ranks"):
        dial.streams(1.2, 4, 8, 6, 1, 64, 1)


def test_models_of_rows_by_hand():
    # Two ranks of two experts, top 1. Forward 0: all 4 tokens to rank 0; 1 (read round): two each.
    tables = [np.array([[[0], [1], [0], [3]]]), np.array([[[0], [1], [2], [1]]])]
    first = rows.modelled(tables, [0], 2, 4)
    # Shared at home: 4 + 2 and 2 rows; best: all shared rows on rank 1, 4 and 4.
    assert (
        first["routed"] == 2.0 and first["home"] == 1.5 and first["optimum"] == first["live"] == 1.0
    )
    assert first["sglang"] == 1.5  # Below 64 tokens it stays at home.
    both = rows.modelled(tables, [0, 1], 2, 4)
    assert both["routed"] == pytest.approx((2.0 + 1.0) / 2)
    assert rows.modelled(tables, [2], 2, 4) == first


def forwards(*rows_of_ranks):
    return [{"forwards": list(own), "rows": []} for own in rows_of_ranks]


def test_only_full_forwards_count_and_the_slowest_rank():
    ranks = forwards(
        [
            (0, "home", 0, 8, 1.0, 2.0),
            (1, "home", 0, 8, 5.0, 6.0),
            (2, "own", 0, 8, 3.0, None),
            (3, "own", 1, 8, 1.0, 1.0),
        ],
        [
            (0, "home", 0, 8, 1.0, 2.0),
            (1, "home", 0, 8, 4.0, 7.0),
            (2, "own", 0, 8, 3.5, 4.0),
            (3, "own", 1, 7, 1.0, 1.0),
        ],
    )
    # Index 0 is the lead, 3 is not full on rank 1; the interval of 2 is not known on rank 0.
    assert list(figures.full_forwards(ranks, 8, 1)) == [
        (1, "home", 0, 5.0, 7.0),
        (2, "own", 0, 3.5, None),
    ]
    ranks[1]["forwards"].pop(1)
    assert [found[0] for found in figures.full_forwards(ranks, 8, 1)] == [2]
    routed, nothing = [[1, 2], [0, 1]], [0, 0]
    ranks[0]["rows"] = [
        (2, 1, routed, [0, 0]),
        (2, 2, [nothing] * 2, nothing),
        (3, 1, routed, [9, 0]),
    ]
    ranks[1]["rows"] = [
        (2, 1, routed, [2, 6]),
        (2, 2, [[1, 0], [3, 0]], nothing),
        (3, 1, routed, [9, 0]),
    ]
    # Layer 1: routed rows 6 and 2, with shared ones 8 and 8; layer 2: 1 and 3. Forward 3 does not count.
    assert list(figures.layers_rows(ranks, 8, 1)) == [
        ("own", Sent(1.0, 1.5, 2)),
        ("own", Sent(1.5, 1.5, 1)),
    ]


def test_a_cells_figures_by_hand():
    off = Mode({(0, i): 10.0 for i in range(5)})
    home = Mode(
        {(0, 0): 9.0, (0, 1): 8.0, (0, 2): 10.0, (0, 3): 11.0, (7, 7): 1.0}, [12.5, 12.5, 40.0]
    )
    live = Mode(
        {(0, 0): 9.0},
        calls={"calls": 8, "live": 6, "timed_out": 2},
        planner={"planned_max": 6, "mean": 4},
    )
    place = {"phase": "prefill", "tokens": 5, "placement": "trivial", "redundant": 0}
    modelled = {"routed": 1.25, "home": 1.2, "optimum": 1.0}
    of = {"off": off, "home": home, "live": live}
    cell = figures.cell(place, "home", of, modelled, ranks=2)
    # Paired: 0.9, 0.8, 1.0, 1.1; inclusive quartiles 0.875 and 1.025.
    assert (cell["ratio_off"], cell["quartiles"], cell["pairs"]["off"]) == (0.95, [0.875, 1.025], 4)
    assert (cell["gpu_ms"], cell["forwards"], cell["tokens_per_s"]) == (9.0, 5, 800)
    assert (cell["rows_max_mean"], cell["rows_from"], cell["live_share"]) == (1.2, "model", None)
    assert figures.cell(place, "off", of, modelled, 2)["rows_max_mean"] == 1.25
    cell = figures.cell(place, "live", of, modelled, 2)
    assert (cell["live_share"], cell["rows_max_mean"], cell["ratio_home"]) == (0.75, 1.5, 1.0)
    assert cell["quartiles"] is None and cell["tokens_per_s"] is None
    assert "(timed_out 2)" in table._row(cell)
    live.rows = [Sent(1.0, 1.2, 3), Sent(1.1, 1.2, 4)]
    assert figures.cell(place, "live", of, modelled, 2)["rows_max_mean"] == 1.05
    json.dumps(cell, allow_nan=False)


def test_results_are_checked_and_written_whole(tmp_path):
    place = {"phase": "decode", "tokens": 8, "placement": "trivial", "redundant": 0}
    cell = figures.cell(place, "off", {"off": Mode({(0, 0): 1.0})}, {}, 2)
    document = dict(
        machine="m", date="d", commit="c", sglang="s", ranks=2, settings={}, cells=[cell]
    )
    path = tmp_path / "new" / "server-x.json"
    results.write(path, document)
    assert results.read(path) == json.loads(json.dumps(document))
    assert "| decode | 8 | trivial | off | 1.000 | 1.0000 |" in table.markdown([document])
    wrong = {
        "mode": "on", "tokens": -1, "forwards": 1.5, "ratio_off": float("inf"), "live_share": 1.5,
        "gpu_ms": True, "quartiles": [2, 1],
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"cell 0: .*{name}"):
            results.write(path, {**document, "cells": [{**cell, name: value}]})
    for name in results.FIELDS:
        with pytest.raises(ValueError, match=f"no field {name}"):
            results.check({k: v for k, v in document.items() if k != name})
    assert results.read(path)["cells"][0]["mode"] == "off"


def test_rounds_have_the_requests_that_fill_their_forwards():
    assert [schedule.prompt_length(n) for n in (8192, 1024, 512, 1536, 96)] == [
        1024,
        1024,
        512,
        768,
        96,
    ]
    with pytest.raises(ValueError, match="prefill of 1031 tokens"):
        schedule.prompt_length(1031)
    off, switched, _ = modes.engines("prefill", modes.BY_DEFAULT["prefill"])
    cell = schedule.Cell("prefill", 8192, 1, "trivial")
    asked = schedule.message(cell, switched, ranks=4, number=9, sweep=2)
    # A lead and four of each of six modes; eight prompts of 1024 tokens each and rank.
    assert asked["requests"] == 25 * 8 * 4 and asked["chunk"] == 8192 and asked["base"] == 8
    assert asked["cycle"] == ["sglang-dynamic", "own", "live", "overlap", "home", "sglang"]
    assert schedule.message(cell, switched, 4, 9, 2, first_table=3)["placement"] == 4
    assert schedule.message(cell, off, 4, 9, 2)["requests"] == 5 * 8 * 4
    decode = schedule.message(
        schedule.Cell("decode", 64, 0, "trivial"), modes.Plan("home", ("home",)), 4, 1, 1
    )
    assert (decode["requests"], decode["new"], decode["chunk"], decode["base"]) == (
        256,
        96,
        1024,
        88,
    )
    clock = schedule.Clock(lambda: 40.0, 100.0)
    assert clock.left() == 60 and clock.part(0.25).left() == 15


def test_engines_that_do_not_fit_take_turns():
    plans = modes.engines("decode", modes.BY_DEFAULT["decode"])
    names = lambda groups: [[plan.name for plan in group] for group in groups]  # noqa: E731
    assert names(modes.groups(plans, 6)) == [["off", "home", "sglang", "own", "overlap", "auto"]]
    assert names(modes.groups(plans, 4)) == [
        ["off", "home", "auto", "sglang"],
        ["off", "home", "own", "overlap"],
    ]
    with pytest.raises(ValueError, match="2 engines fit"):
        modes.groups(plans, 2)
    with pytest.raises(ValueError, match="mode 'on'"):
        modes.engines("prefill", ["on"])
    with pytest.raises(ValueError, match="sglang-dynamic cannot be in a CUDA graph"):
        modes.engines("decode", ["off", "sglang-dynamic"])
    assert model.config(64, 6, 26)["num_hidden_layers"] == 27
    # 442 experts of 24 MiB.
    assert model.gib_an_engine(26, 64, 4, False) == pytest.approx(442 * 24 / 1024 + 7.5)
    # 95% of 80 GiB are two of 858 experts, and three of 693.
    assert [model.engines_that_fit(80, layers, 64, 2, False) for layers in (26, 21)] == [2, 3]
    assert model.engines_that_fit(1, 26, 64, 2, False) == 1
    # With graphs an engine of 22 layers held 26.4 GiB, and three of them did not fit on an H100 of 79.6.
    assert 26.4 < model.gib_an_engine(22, 64, 2, True) < 28
    assert model.engines_that_fit(79.6, 22, 64, 2, True) == 2


def test_each_engine_has_the_settings_that_make_its_mode():
    plans = {
        (phase, plan.name): plan
        for phase in ("prefill", "decode", "mixed")
        for plan in modes.engines(phase, [m for m in modes.MODES[:9] if m != "sglang-dynamic"])
    }
    names = [name for phase, name in plans if phase == "decode"]
    assert names == ["off", "home", "sglang", "own", "live", "overlap", "fused", "auto"]
    assert plans["prefill", "switched"].modes == ("home", "sglang", "own", "live", "overlap")
    shared = {name: {"WATERFILL_RS_SHARED": name} for name in ("overlap", "fused")}
    expected = {
        "off": {}, "auto": {}, "sglang": {"WATERFILL_RS": "upstream"}, **shared,
        "home": shared["fused"], "own": shared["fused"], "live": shared["fused"],
    }  # fmt: skip
    for name, settings in expected.items():
        plan = plans["decode", name]
        assert plan.settings == settings and plan == plans["mixed", name]
        assert plan.switches == (name in ("home", "own", "live"))
    # One that is told before each forward has none, and one that may never overlap has.
    assert plans["prefill", "switched"].settings == {}
    (home,) = modes.engines("prefill", ["home", "own"])
    assert home.switches and home.settings == shared["fused"]
    # sglang's own Waterfill is without ours wherever nothing else is asked of its engine.
    (alone,) = modes.engines("prefill", ["sglang"])
    assert alone == plans["decode", "sglang"] and alone.upstream and not alone.switches
    off, *_ = modes.union([modes.engines("prefill", ["auto"]), modes.engines("decode", ["off"])])
    assert off.name == "off"


def test_engines_have_what_all_their_phases_need():
    alone = model.arguments({"prefill": [1024, 8192]}, 2, "m", True)
    assert (alone["deepep_mode"], alone["disable_cuda_graph"]) == ("normal", True)
    assert (alone["chunked_prefill_size"], alone["max_total_tokens"]) == (16384, 40960)
    decode = model.arguments({"decode": [128, 8]}, 4, "m", False)
    assert (decode["cuda_graph_bs_decode"], decode["max_running_requests"]) == ([8, 128], 512)
    assert decode["deepep_mode"] == "auto" and not decode["enable_waterfill"]
    mixed = model.arguments({"mixed": [2048]}, 2, "m", True)
    assert mixed["cuda_graph_bs_decode"] == list(model.MIXED_GRAPHS)
    # Chunks are shorter than the longest prompts, and those fit.
    assert mixed["chunked_prefill_size"] == 2 * 2048 < 2 * traffic.LONGEST_PROMPT
    assert mixed["context_length"] > traffic.LONGEST_PROMPT + traffic.MOST_NEW
    assert mixed["max_running_requests"] == 2 * max(model.MIXED_GRAPHS)
    needs = {"prefill": [1024, 8192], "decode": [8, 128], "mixed": [2048]}
    every = model.arguments(needs, 2, "m", True)
    assert every["deepep_mode"] == "auto" and "disable_cuda_graph" not in every
    assert every["cuda_graph_bs_decode"] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 128]
    assert every["max_running_requests"] == 256 and every["chunked_prefill_size"] == 16384
    assert every["max_total_tokens"] == 65536 and model.longest(needs) == 8192
    assert (model.longest({"decode": [8, 128]}), model.longest({"mixed": [2048]})) == (2048, 4096)


def test_auto_is_held_to_the_best_of_the_others():
    of = {
        "off": Mode({(0, i): 10.0 for i in range(4)}),
        "home": Mode({(0, i): 9.0 for i in range(4)}),
        "own": Mode({(0, i): 8.0 for i in range(4)}),
        "sglang": Mode({(0, i): 1.0 for i in range(4)}),  # Not among them.
        "auto": Mode(
            {(0, 0): 8.0, (0, 1): 8.08, (0, 2): 8.16},
            batches={"overlapped": 3, "fused": 1},
        ),
    }
    place = {"phase": "decode", "tokens": 5, "placement": "trivial", "redundant": 0}
    modelled = {"routed": 1.25, "live": 1.0, "optimum": 1.0}
    cell = figures.cell(place, "auto", of, modelled, 2)
    assert cell["verdict"] == {
        "best": "own", "ratio_best": 1.01, "quartiles_best": [1.005, 1.015], "pairs": 3,
    }  # fmt: skip
    assert table._verdict(cell) == (
        "| decode | 5 | trivial | 0.8080 (0.8040, 0.8120) | own | 1.0100 (1.0050, 1.0150) | **above 1.005** |"
    )
    # Most of its batches were overlapped: routed rows alone.
    assert cell["overlapped_share"] == 0.75 and cell["rows_max_mean"] == 1.25
    assert "| 75.00% | 3 |" in table._row(cell)
    of["auto"] = Mode({(0, 0): 8.0}, batches={"overlapped": 1, "fused": 1})
    cell = figures.cell(place, "auto", of, modelled, 2)
    assert "above" not in table._verdict(cell) and cell["rows_max_mean"] == 1.0
    assert figures.cell(place, "own", of, modelled, 2)["verdict"] is None
    assert figures.verdict({"auto": of["auto"]}) is None
    document = dict(
        machine="m", date="d", commit="c", sglang="s", ranks=2, settings={}, cells=[cell]
    )
    assert "Verdict:" in table.markdown([document])
    wrong = {**cell, "verdict": {**cell["verdict"], "ratio_best": -1}}
    with pytest.raises(ValueError, match="cell 0, verdict: ratio_best is -1"):
        results.check({**document, "cells": [wrong]})


def test_memory_is_told_beside_off_and_sglangs():
    def rank(prepared, now):
        return {
            "prepared": {"allocated": prepared << 20, "free": 5, "total": 9},
            "now": {"allocated": now << 20, "free": 3, "total": 9},
        }

    entries = [
        memory.entry("mixed", "off", [rank(1024, 2000), rank(1000, 2048)]),
        memory.entry("mixed", "sglang", [rank(1024, 2048)]),
        memory.entry("mixed", "auto", [rank(1025, 2048), rank(900, 2150)]),
        memory.entry("decode", "auto", [{"prepared": None, "now": {"allocated": 1 << 30}}]),
    ]
    assert entries[0]["ranks"][1]["ended"] == {"allocated": 2048 << 20, "free": 3, "total": 9}
    mixed, decode = memory.lines(entries)
    assert "off 1.000 / 2.000, sglang 1.000 / 2.000, auto 1.001 / 2.100" in mixed
    assert "auto to off: equal / +102.0 MiB (+4.98%)" in mixed and "auto to sglang: equal" in mixed
    assert "auto ? / 1.000." in decode


def test_messages_come_whole_late_or_not():
    read, written = os.pipe()
    reader = Reader(read)
    with pytest.raises(Late):
        reader.next(0.01)
    send(written, {"a": "x" * 5})
    os.write(written, b'{"b": ')
    assert reader.next(1) == {"a": "xxxxx"}
    with pytest.raises(Late):
        reader.next(0.01)
    os.write(written, b"2}\n[3]\n")
    assert reader.next(1) == {"b": 2}
    with pytest.raises(ValueError, match="not b'\\[3\\]'"):
        reader.next(1)
    os.close(written)
    with pytest.raises(Closed):
        reader.next(1)
    os.close(read)
    read, written = os.pipe()
    os.close(read)
    with pytest.raises(Closed):
        send(written, {})


def test_kernels_are_of_one_group_each():
    of = {
        "waterfill_expand_topk_8": "Waterfill call",
        "void deep_ep::intranode::notify_dispatch<4>(int)": "dispatch",
        "void deep_ep::intranode::dispatch<4, 768, 8192>(int4*)": "dispatch",
        "void deep_ep::internode_ll::combine<true>(void*)": "combine",
        "deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 17u, (deep_gemm::GemmType)1>": "grouped GEMM",
        "deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 1u, (deep_gemm::GemmType)0>": "dense GEMM",
        "nvjet_tst_128x64": "dense GEMM",
        "_fwd_kernel": "attention",
        "act_and_mul_kernel": "other",
    }
    assert {name: kernels.group(name) for name in of} == of
    times = {name: (1000.0, 2) for name in of}
    assert (
        kernels.breakdown(times)["dispatch"] == 2.0
        and sum(kernels.breakdown(times).values()) == 9.0
    )
    assert kernels.longest({"a": (1.0, 1), "b": (3000.0, 2)}, 1) == [("b", 3.0, 2)]
    assert kernels.mean([{"a": 1.0}, {"a": 3.0}]) == {"a": 2.0} and kernels.mean([]) is None


def test_a_picture_has_every_panel(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    cells = [
        figures.cell(
            {"phase": "prefill", "tokens": tokens, "placement": name, "redundant": 0},
            "home",
            {
                "off": Mode({(0, i): 2.0 for i in range(3)}),
                "home": Mode({(0, i): 2.0 + i for i in range(3)}),
            },
            {},
            2,
        )
        for tokens in (64, 128)
        for name in ("packed", "trivial")
    ]
    document = dict(
        machine="m", date="d", commit="c", sglang="s", ranks=2, settings={}, cells=cells
    )
    assert table.picture(document, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert not table.picture({**document, "cells": []}, tmp_path / "b.png")
    # More panels than a row has, and a legend of every mode, one that the first panel lacks too.
    names = [f"p{i}" for i in range(6)]
    many = [{**cells[0], "placement": name} for name in names]
    many.append({**cells[0], "placement": "p5", "mode": "own"})
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    assert table.picture({**document, "cells": many}, tmp_path / "c.png")
    (figure,) = shown
    titled = [axis.get_title() for axis in figure.axes if axis.axison]
    assert titled == [f"prefill, {name}" for name in names] and len(figure.axes) == 8
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["home", "own"]


def test_a_picture_that_cannot_be_drawn_fails_no_run(tmp_path, monkeypatch, capsys):
    def fails(document, path):
        raise AttributeError("module 'IPython' has no attribute 'version_info'")

    monkeypatch.setattr(table, "picture", fails)
    assert not cli._draw({}, tmp_path / "a.png")
    assert "no picture: AttributeError(" in capsys.readouterr().err
