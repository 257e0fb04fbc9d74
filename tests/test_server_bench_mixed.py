"""Mixed traffic in ``benches/server``: requests, accounts of calls, figures, and whole runs with a stand-in for sglang; no GPU."""

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]

from server import accounts, cli, mixed, mixed_figures, results, table, traffic
from server.mixed_figures import MixedRound
from server.traffic import Request, Traffic, Unanswered
from test_server_bench_run import run, stub  # noqa: F401


def test_requests_are_uneven_and_the_same_for_all_engines():
    one, same, other = (traffic.requests(200, 2, number) for number in (0, 0, 1))
    assert one == same != other
    lengths = sorted((request.prompt, request.new) for request in one)
    # No round has a length that none before it had.
    assert lengths == sorted((request.prompt, request.new) for request in other)
    prompts, new = ([length[i] for length in lengths] for i in (0, 1))
    assert 64 <= min(prompts) < 100 and 2500 < max(prompts) <= 3000
    assert 16 <= min(new) < 20 and 180 < max(new) <= 200
    assert [request.at for request in one] == sorted(request.at for request in one)
    for number, sent in ((0, one), (1, other)):
        by_part = {
            name: [request for request in sent if begin <= request.at <= end]
            for name, begin, end, _ in traffic.PARTS
        }
        assert [len(by_part[name]) for name in by_part] == [90, 50, 60]
        assert {request.rank for request in by_part["one rank"]} == {number}
        assert {request.rank for request in by_part["even"]} == {0, 1}
        assert Counter(request.rank for request in by_part["burst"])[1 - number] > 36
        # For a while nobody sends anything.
        assert not [request for request in sent if 0.7 < request.at < 0.85]
    assert {request.rank for request in traffic.requests(640, 8, 3)} == set(range(8))
    with pytest.raises(ValueError, match="15 requests for 4 ranks: give 16 or more"):
        traffic.requests(15, 4, 0)


class AnEngine:
    def __init__(self, tokens=0, hangs=-1):
        self.loop, self.sent = asyncio.new_event_loop(), []
        self.tokens, self.hangs = tokens, hangs

    async def async_generate(self, input_ids, sampling_params, routed_dp_rank=None):
        self.sent.append((self.loop.time(), len(input_ids), routed_dp_rank))
        if routed_dp_rank == self.hangs:
            await asyncio.sleep(60)
        new = sampling_params["max_new_tokens"] + self.tokens
        return {"meta_info": {"completion_tokens": new}}


def test_requests_are_sent_at_their_times_to_their_ranks():
    asked = [Request(0.0, 1, 70, 20), Request(0.5, 0, 64, 16), Request(1.0, 1, 90, 30)]
    engine = AnEngine()
    seconds, prompt, new = Traffic(engine, 100).send(asked, window=0.2, deadline=10)
    assert [(length, rank) for _, length, rank in engine.sent] == [(70, 1), (64, 0), (90, 1)]
    begin = engine.sent[0][0]
    assert engine.sent[1][0] - begin >= 0.09 and engine.sent[2][0] - begin >= 0.19
    assert 0.2 <= seconds < 5 and (prompt, new) == (224, 66)
    late = AnEngine(hangs=1)
    with pytest.raises(
        Unanswered, match=r"2 of 3 requests had no answer in 0 s; by rank: \{1: 2\}"
    ):
        Traffic(late, 100).send(asked, 0.01, 0.3)
    with pytest.raises(RuntimeError, match="an answer has 21 tokens, and 20 were asked for"):
        Traffic(AnEngine(tokens=1), 100).send(asked, 0.0, 10)

    class Before:
        async def async_generate(self, input_ids, sampling_params, data_parallel_rank=None): ...

    assert Traffic(Before(), 100)._rank == "data_parallel_rank"


def rank_result(modes, batches, calls, layers=3, staying=0):
    return {
        "modes": modes,
        "batches": batches,
        "calls": calls,
        "layers": layers,
        "staying": staying,
    }


def test_batches_and_calls_add_up_or_are_told():
    def told(*result, calls=True, **more):
        return accounts.mismatches(rank_result(*result, **more), calls=calls)

    both = {"overlapped": 6, "fused": 4}
    ends = {"calls": 12, "live": 9, "none": 2, "timed_out": 1, "broken": 0, "torn": 0}
    assert told({"auto": 10}, both, ends) == []
    # A layer that cannot overlap is called in each batch: 6 more.
    assert told({"auto": 10}, both, ends | {"calls": 18, "live": 15}, staying=1) == []
    assert told({"auto": 11}, both, ends) == ["11 forwards, and 6 overlapped + 4 fused batches"]
    (lost,) = told({"auto": 10}, both, ends | {"torn": 1, "calls": 13})
    assert lost == (
        "4 fused batches of 3 layers are 12 calls, and 13 ended: live 9, none 2, timed_out 1, broken 0, torn 1"
    )
    (lost,) = told({"auto": 10}, both, ends | {"calls": 11})
    assert lost.startswith("11 calls, and 12 ended: live 9")
    assert told({"auto": 10}, both, ends | {"calls": 11}, calls=False) == []
    # A forced mode does what it says, and a switched engine's other modes make no calls.
    assert told({"fused": 4}, {"overlapped": 0, "fused": 4}, ends) == []
    assert told({"overlap": 6, "own": 4}, both, ends | dict.fromkeys(ends, 0)) == []
    assert told({"fused": 10}, both, {}) == ["0 forwards were to overlap, and 6 did"]
    # A package without a choice fuses all; one that cannot overlap must not be taken for one that did.
    assert told({"auto": 4}, {}, ends) == []
    assert told({"overlap": 4}, {}, {}) == [
        "4 forwards were to overlap, and nothing tells that they did"
    ]
    # Neither off nor sglang's own has a board.
    assert told({"off": 9}, {}, {}, layers=0) == told({"sglang": 9}, {}, {}) == []


def test_figures_of_mixed_rounds_by_hand(tmp_path):
    def rounds(seconds, **more):
        shape = {"batches": {}, "calls": {}, "kinds": {"decode": 2}} | more
        return [MixedRound(i, s, 1000, 100, **shape) for i, s in enumerate(seconds)]

    auto = rounds(
        [2.0, 1.0, 4.2],
        batches={"overlapped": 6, "fused": 4},
        calls={"calls": 12, "live": 9, "none": 3, "timed_out": 0},
    )
    place = {"phase": "mixed", "tokens": 2048, "placement": "trivial", "redundant": 0}
    of = {"auto": auto, "off": rounds([2.0, 2.0, 4.0, 8.0])}
    off, ours = mixed_figures.entries(place, of)
    assert (off["mode"], off["ratio_off"], off["seconds"], off["calls"]) == ("off", 1.0, 3.0, None)
    # Paired by round: 1, 0.5, 1.05.
    assert (ours["ratio_off"], ours["quartiles"], ours["pairs"]) == (1.0, [0.75, 1.025], 3)
    assert (ours["new_tokens_per_s"], ours["prompt_tokens_per_s"]) == (50.0, 500.0)
    assert ours["batches"] == {"overlapped": 18, "fused": 12} and ours["forwards"] == {"decode": 6}
    assert ours["calls"] == {"live": 27, "none": 9, "timed_out": 0}
    document = dict(machine="m", date="d", commit="c", sglang="s", ranks=2, settings={}, cells=[])
    document |= {"mixed": [off, ours], "mismatches": ["one"] * 9, "failures": ["mixed, engine x"]}
    results.write(tmp_path / "a.json", document)
    text = table.markdown([results.read(tmp_path / "a.json")])
    assert (
        "| trivial | auto | 2.000 | 50 | 500 | 1.0000 (0.7500, 1.0250) | 18 of 30 | 36: live 27, none 9 | 3 |"
        in text
    )
    assert "do not add up (9): one; one; one; one; one; one, and 3 more." in text
    assert "Engines that failed or were late: mixed, engine x." in text
    assert "**above 1.005**" in table._mixed({**ours, "ratio_off": 1.006})
    assert "above" not in table._mixed({**off, "ratio_off": 1.006})
    for name, value in {"mode": "on", "rounds": -1, "seconds": -0.1, "quartiles": [2, 1]}.items():
        with pytest.raises(ValueError, match=f"mixed 0: .*{name}"):
            results.check({**document, "mixed": [{**off, name: value}]})
    with pytest.raises(ValueError, match="memory must be a list"):
        results.check({**document, "memory": {}})


def test_mixed_rounds_of_four_engines(stub, tmp_path):  # noqa: F811
    done = run(stub, tmp_path, "--mixed", "16", "--sweeps", "3")
    assert done.returncode == 0, done.stderr
    document = results.read(tmp_path / "out.json")
    found = {entry["mode"]: entry for entry in document["mixed"]}
    assert tuple(found) == ("off", "sglang", "fused", "auto")
    sent = traffic.requests(16, 2, 0)
    for entry in found.values():
        assert entry["rounds"] == entry["pairs"] == 3
        for one in entry["by_round"]:
            assert one["prompt_tokens"] == sum(request.prompt for request in sent)
            assert one["new_tokens"] == sum(request.new for request in sent)
        kinds = entry["forwards"]
        # Every forward is one on both ranks; a rank without any was idle or decoded beside a prefill.
        assert kinds["prefill"] and kinds["decode"] and kinds["idle"] and kinds["beside a prefill"]
    assert found["auto"]["ratio_off"] < 1
    assert document["mismatches"] == [] and document["failures"] == []
    assert found["off"]["batches"] is None and found["sglang"]["calls"] is None
    auto, fused = found["auto"], found["fused"]
    forwards = sum(n for kind, n in auto["forwards"].items() if kind != "beside a prefill")
    assert auto["batches"]["overlapped"] and auto["batches"]["fused"]
    assert sum(auto["batches"].values()) == forwards
    assert auto["calls"]["live"] == 2 * auto["batches"]["fused"]
    assert fused["batches"]["overlapped"] == 0
    assert "| trivial | auto |" in done.stdout and "add up in every round" in done.stdout
    assert {entry["engine"] for entry in document["memory"]} == set(found)


def test_a_late_engine_is_named_and_lost_calls_are_told(stub, tmp_path, monkeypatch, capsys):  # noqa: F811
    for name, value in {**stub, "STUB_HANGS": "fused", "STUB_LOSES": "auto"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mixed, "SHORTEST_S", 3.0)
    monkeypatch.setattr(mixed, "SLOWEST", 1.0)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "late.json"
    options = ["--recording", "ids.npz", "--ranks", "2", "--layers", "2", "--logs", "logs"]
    assert cli.main([*options, "--mixed", "16", "--sweeps", "2", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "engine fused: round" in told.err and "requests had no answer in" in told.err
    document = results.read(out)
    (failure,) = document["failures"]
    assert failure.startswith("mixed, engine fused: round ") and "; by rank: {" in failure
    found = {entry["mode"]: entry["rounds"] for entry in document["mixed"]}
    assert found == {"off": 2, "sglang": 2, "auto": 2}
    assert document["mismatches"] and "engine auto: does not add up: round" in told.out
    assert "calls, and" in document["mismatches"][0]
    assert "Engines that failed or were late: mixed, engine fused" in told.out


def test_three_phases_with_one_start(stub, tmp_path):  # noqa: F811
    options = ["--prefill", "256", "--decode", "4", "--mixed", "16", "--one-start", "--sweeps", "1"]
    done = run(stub, tmp_path, *options, "--modes", "off,sglang,auto,home@decode,fused@mixed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting off, sglang, auto, home, fused") == 1
    document = results.read(tmp_path / "out.json")
    cells = {(cell["phase"], cell["mode"]): cell for cell in document["cells"]}
    placements = {cell["placement"] for cell in document["cells"]}
    assert placements == {"packed", "trivial"}
    assert set(cells) == {
        *(("prefill", mode) for mode in ("off", "sglang", "auto")),
        *(("decode", mode) for mode in ("off", "home", "sglang", "auto")),
    }
    assert cells["decode", "auto"]["ratio_home"] == pytest.approx(7 / 9, abs=1e-5)
    assert cells["prefill", "auto"]["live_share"] == 1.0
    # sglang's own balancers are counted too.
    assert cells["prefill", "sglang"]["rows_from"] == "counted"
    assert [entry["mode"] for entry in document["mixed"]] == ["off", "sglang", "fused", "auto"]
    assert document["mismatches"] == [] and document["settings"]["one_start"] is True
    assert {one["phases"] for one in document["memory"]} == {"prefill-decode-mixed"}


def test_a_dry_run_tells_engines_and_traffic(stub, tmp_path):  # noqa: F811
    options = ["--prefill", "256", "--decode", "4", "--mixed", "16", "--one-start", "--dry-run"]
    done = run(stub, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert (
        "prefill-decode-mixed: engines off (off), switched (home, sglang, sglang-dynamic, own, live, overlap), auto (auto)"
        in done.stdout
    )
    assert "overlap (overlap, WATERFILL_RS_SHARED=overlap)" in done.stdout
    assert "16 requests a round" in done.stdout and "chunks of 2048" in done.stdout
    assert not (tmp_path / "out.json").exists()


def test_layers_are_as_many_as_let_all_engines_be_up(monkeypatch, capsys):
    from server import phases

    shape = {
        "modes": None, "layers": None, "experts": None, "together": None, "apart": False, "top_k": 6,
        "one_start": False, "mixed": None, "prefill": "1024", "decode": None, "recording": None,
        "dial": "1.0", "ranks": 2, "placements": None, "engine": {}, "outputs": False, "layer_outputs": False, "redundant": None, "profiled": None,
    }  # fmt: skip
    monkeypatch.setattr(results, "gpus", lambda: [("H100", 81559)] * 2)

    def found(**more):
        (phase,) = phases.of_options(SimpleNamespace(**{**shape, **more}))
        return phase

    three = found()
    assert three.layers == 22 == three.recordings[0].layers and len(three.plans) == 3
    assert "prefill: 22 MoE layers let 3 engines be on 80 GiB" in capsys.readouterr().out
    assert phases.together(SimpleNamespace(**shape), [three]) == 3
    # Six would have fewer than eight layers: four at once then, and two starts.
    six = found(prefill=None, decode="8")
    assert len(six.plans) == 6 and six.layers == 11
    assert phases.together(SimpleNamespace(**shape), [six]) == 4
    three = found(prefill=None, decode="8", modes="off,overlap,auto")
    assert three.layers == 19 and phases.together(SimpleNamespace(**shape), [three]) == 3
    assert found(layers=26).layers == 26 and found(apart=True).layers == 26
    assert found(ranks=1, modes="off,auto", apart=True).layers == 26
