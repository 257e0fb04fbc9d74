"""``benches/server`` as a whole, with a stand-in for sglang in the engines' processes: no GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]

from server import modes, results, workspace
from server.processes import Engine, Failed, stop_all, wait_all


@pytest.fixture
def stub(tmp_path):
    """The environment in which engines find the stand-in, and a recording."""
    package = tmp_path / "stub" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        (ROOT / "tests" / "support" / "server_stub.py").read_text()
    )
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (2048, 2, 1)), axis=2)[:, :, :2]
    np.savez(tmp_path / "ids.npz", topk=ids.astype(np.uint8), offsets=np.array([0, 1000, 2048]))
    path = os.pathsep.join([str(tmp_path / "stub"), str(ROOT / "python")])
    return {**os.environ, "PYTHONPATH": path, "WATERFILL_RS_TIMEOUT_US": "7"}


def run(stub, tmp_path, *options):
    command = [
        sys.executable,
        str(ROOT / "benches" / "server"),
        "--recording",
        str(tmp_path / "ids.npz"),
    ]
    shape = ["--ranks", "2", "--layers", "2", "--commit", "c", "--logs", str(tmp_path / "logs")]
    return subprocess.run(
        [*command, *shape, "--out", str(tmp_path / "out.json"), *options],
        env=stub,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_prefill_pairs_forwards_of_three_engines(stub, tmp_path):
    done = run(stub, tmp_path, "--prefill", "256", "--placements", "trivial", "--sweeps", "2")
    assert done.returncode == 0, done.stderr
    document = results.read(tmp_path / "out.json")
    cells = {cell["mode"]: cell for cell in document["cells"]}
    assert tuple(cells) == modes.BY_DEFAULT["prefill"]
    # The slowest rank takes 1.25 times what the mode takes.
    assert cells["off"]["gpu_ms"] == pytest.approx(12.5)
    assert cells["live"]["gpu_ms"] == pytest.approx(7.5 * 1.25)
    assert cells["home"]["ratio_off"] == pytest.approx(0.9)
    assert cells["sglang-dynamic"]["ratio_home"] == pytest.approx(12 / 9, abs=1e-5)
    assert cells["auto"]["quartiles"] == pytest.approx([0.7, 0.7])
    assert cells["auto"]["pairs"]["off"] == cells["auto"]["forwards"] > 0
    # Two ranks with 256 tokens each in 8.75 ms.
    assert cells["auto"]["tokens_per_s"] == round(512 / 8.75e-3)
    assert cells["overlap"]["ratio_off"] == pytest.approx(0.65)
    # Each rank sends two rows to rank 0 and one to rank 1; overlapped, two to rank 0 and none to rank 1.
    assert cells["overlap"]["rows_max_mean"] == 2.0 and cells["overlap"]["rows_from"] == "counted"
    assert cells["live"]["rows_max_mean"] == pytest.approx(4 / 3, abs=1e-5)
    assert cells["live"]["rows_from"] == "counted" and cells["off"]["rows_from"] == "model"
    assert cells["live"]["live_share"] == 1.0 and cells["own"]["live_share"] is None
    assert cells["live"]["calls"]["calls"] >= 2 * cells["live"]["forwards"]
    assert cells["home"]["breakdown"]["attention"] == 2.5
    assert document["settings"]["environment"]["WATERFILL_RS_TIMEOUT_US"] == "7"
    assert (tmp_path / "out.png").exists()
    assert "| prefill | 256 | trivial | auto | 8.750 |" in done.stdout
    # 7 beside 10, and beside 7.5 of the fastest among those that it is held to.
    assert cells["auto"]["verdict"]["best"] == "live"
    assert "| prefill | 256 | trivial | 0.7000 (0.7000, 0.7000) | live | 0.9333" in done.stdout
    assert cells["auto"]["overlapped_share"] == 0.0
    assert document["mismatches"] == [] and "add up in every round" in done.stdout
    assert {entry["engine"] for entry in document["memory"]} == {"off", "switched", "auto"}
    assert "auto to off: +16.0 MiB (+1.60%) / +16.0 MiB (+1.60%)" in done.stdout
    assert "no forward of" not in done.stdout


def test_a_decode_goes_on_without_an_engine_that_fails(stub, tmp_path):
    stub["STUB_FAILS"] = "1"
    done = run(stub, tmp_path, "--decode", "4,8", "--sweeps", "1")
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: the stub was told to fail" in done.stderr
    cells = results.read(tmp_path / "out.json")["cells"]
    assert {(cell["tokens"], cell["mode"]) for cell in cells} == {
        (tokens, mode) for tokens in (4, 8) for mode in ("off", "home", "sglang", "overlap", "auto")
    }
    auto = next(cell for cell in cells if cell["mode"] == "auto")
    off = next(cell for cell in cells if cell["mode"] == "off")
    assert auto["ratio_off"] == pytest.approx(0.7) and auto["live_share"] is None
    # 88 steps a sweep, all of them paired. They were overlapped: routed rows alone.
    assert auto["forwards"] == auto["pairs"]["home"] == 88
    assert auto["batches"] == {"overlapped": 2 * 88, "fused": 0}
    assert (auto["rows_max_mean"], auto["rows_from"]) == (off["rows_max_mean"], "model")
    failures = results.read(tmp_path / "out.json")["failures"]
    assert failures == ["decode, engine own: did not come up"]


def test_guests_take_turns_beside_the_references(stub, tmp_path):
    shown = "off,home,sglang,fused,auto"
    options = ("--decode", "4", "--sweeps", "1", "--together", "3", "--modes", shown)
    done = run(stub, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    cells = {cell["mode"]: cell for cell in results.read(tmp_path / "out.json")["cells"]}
    guests = [cells[mode] for mode in ("sglang", "fused", "auto")]
    assert cells["fused"]["live_share"] == 1.0
    # By the planner's sums: 3 over 2.
    assert (cells["fused"]["rows_max_mean"], cells["fused"]["rows_from"]) == (1.5, "planner")
    assert all(cell["pairs"]["off"] == cell["forwards"] > 0 for cell in guests)
    assert cells["off"]["forwards"] == sum(cell["forwards"] for cell in guests)


def test_one_after_the_other_pairs_the_same_tokens(stub, tmp_path):
    done = run(stub, tmp_path, "--decode", "4", "--sweeps", "1", "--apart", "--modes", "off,auto")
    assert done.returncode == 0, done.stderr
    cells = {cell["mode"]: cell for cell in results.read(tmp_path / "out.json")["cells"]}
    assert cells["auto"]["ratio_off"] == pytest.approx(0.7)
    assert cells["auto"]["pairs"]["off"] == 88


ECHO = """
import json, os, sys
commands, replies = map(int, sys.argv[1:])
print("a line of its log", flush=True)
def say(message): os.write(replies, json.dumps(message).encode() + b"\\n")
if {starts}: say({{"ready": 1.0, "sglang": "x"}})
for line in os.fdopen(commands):
    asked = json.loads(line)
    if asked["round"] == 1: say({{"round": 1}})
    if asked["round"] == 2: say({{"failed": "round 2"}})
    if asked["round"] == 3: raise SystemExit
"""


def engine(tmp_path, name, starts=True):
    command = [sys.executable, "-c", ECHO.format(starts=starts)]
    return Engine(name, command, os.environ, tmp_path / f"{name}.log")


def test_an_engine_answers_fails_and_ends(tmp_path, capsys):
    one, other = engine(tmp_path, "one"), engine(tmp_path, "other", starts=False)
    try:
        assert wait_all([one, other], 2) == [one]
        assert "engine other: it was not up within" in (told := capsys.readouterr().err)
        assert "a line of its log" in told
        assert one.round({"round": 1}, 5) == {"round": 1}
        with pytest.raises(Failed, match="engine one: round 2"):
            one.round({"round": 2}, 5)
        with pytest.raises(Failed, match="no results of round 7 within 0 s"):
            one.round({"round": 7}, 0.2)
        with pytest.raises(Failed, match="its process ended"):
            one.round({"round": 3}, 5)
        with pytest.raises(Failed, match="engine one: it"):
            one.round({"round": 1}, 5)
    finally:
        stop_all([one, other])
        stop_all([one])


def test_processes_find_the_plugin_and_auto_has_no_settings(tmp_path):
    space = workspace.Workspace(tmp_path)
    (distribution,) = distributions(path=[str(tmp_path / "site")])
    found = distribution.entry_points
    assert [(e.name, e.value) for e in found] == [("server_bench", "server.plugin:register")]
    given = {
        "WATERFILL_RS_TIMEOUT_US": "7",
        "SGLANG_PLUGINS": "waterfill_rs",
        "PYTHONPATH": "relative",
    }
    (auto,) = modes.engines("prefill", ["auto"])
    (switched,) = modes.engines("prefill", ["live", "home"])
    of = space.environment(auto, tmp_path / "told", given, 0)
    assert (
        "WATERFILL_RS_TIMEOUT_US" not in of and of["SGLANG_PLUGINS"] == "waterfill_rs,server_bench"
    )
    assert of["PYTHONPATH"].split(os.pathsep) == [
        str(tmp_path / "site"),
        os.path.abspath("relative"),
    ]
    (fused,) = modes.engines("decode", ["fused"])
    (upstream,) = modes.engines("decode", ["sglang"])
    for plan, ours in (
        (fused, {"WATERFILL_RS_SHARED": "fused"}),
        (upstream, {"WATERFILL_RS": "upstream"}),
        (auto, {}),
    ):
        of = space.environment(plan, tmp_path / "told", given, 0)
        assert {k: v for k, v in of.items() if k.startswith("WATERFILL_RS")} == ours
    kept = space.environment(switched, tmp_path / "told", given, 128)
    assert kept["WATERFILL_RS_SHARED"] == "fused"
    assert kept["WATERFILL_RS_TIMEOUT_US"] == "7"
    assert kept["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "128"
    routing = {"routing": "r", "placements": 1, "longest": 8, "experts": 8}
    told = space.told("e", switched, {"tp_size": 2}, routing)
    assert json.loads(told.read_text())["mode"] == "home"


def test_wrong_options_are_told(tmp_path, capsys):
    from server.cli import main

    wrong = {
        ("--dial", "1.7", "--ranks", "2"): "dial 1.7: give 1.0 to 1.5",
        ("--dial", "x", "--ranks", "2"): "--dial 'x': give numbers",
        ("--recording", "none.npz", "--ranks", "2"): "none.npz: there is no such file",
        ("--dial", "1.0", "--ranks", "9"): "9 GPUs: 1 to 8 are needed",
        ("--dial", "1.0", "--ranks", "2", "--prefill", "100,x"): "--prefill '100,x': give numbers",
        ("--dial", "1.0", "--ranks", "2", "--mixed", "7"): "7 requests for 2 ranks: give 8 or more",
        (
            "--dial",
            "1.0",
            "--ranks",
            "2",
            "--modes",
            "off,home@night",
        ): "'home@night': after @ give",
        ("--dial", "1.0", "--ranks", "2", "--modes", "off@mixed"): "there is none for prefill",
        ("--dial", "1.0", "--ranks", "2", "--modes", "auto", "--outputs"): "give it among --modes",
        ("table",): "give at least one file",
        ("table", str(tmp_path / "none.json")): "none.json: cannot be read as JSON",
    }
    for options, text in wrong.items():
        assert main(options) == 2
        assert text in capsys.readouterr().err
