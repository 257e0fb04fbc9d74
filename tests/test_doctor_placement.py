"""What the doctor says of a server's redundant experts: from a command that it is given, or of a server that runs here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from waterfill_rs.cli import main
from waterfill_rs.operate import server_commands
from waterfill_rs.operate.server_commands import placement, redundant_experts, running, value_of

LAUNCH = ["python", "-m", "sglang.launch_server", "--enable-waterfill"]
PLACED = {"physical_to_logical_map": [[0, 1, 2, 3, 3, 2]]}
TRIVIAL = {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1]] * 2}


def found(*words):
    return placement({"the given command": [*LAUNCH, *words]})


APART = ["--speculative-algorithm", "EAGLE"]
"""Beside it nothing is spread."""


def test_redundant_experts_in_trivial_places_are_warned_of():
    for words in (
        ["--ep-num-redundant-experts", "32"],
        ["--ep-num-redundant-experts=32"],
        ["--ep-num-redundant-experts", "16", "--ep-num-redundant-experts", "32"],
        ["--ep-num-redundant-experts", "32", "--init-expert-location", "trivial"],
    ):
        warned = found(*words, *APART)
        assert (warned.check, warned.severity) == ("placement", "warn"), words
        assert "32 redundant experts stand in trivial places, because --spec" in warned.text
        assert (
            "--redundant 32 -o placed.json, and --init-expert-location placed.json" in warned.advice
        )
        fine = found(*words)
        assert fine.severity == "ok" and not fine.advice
        assert "32 redundant experts, which waterfill-rs spreads over the ranks" in fine.text
    words = ["--ep-num-redundant-experts", "32", "--enable-eplb", *APART]
    assert "trivial places until EPLB rebalances, because" in found(*words).text


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--enable-lora"], "--enable-lora:"),
        (["--kt-weight-path", "x"], "--kt-weight-path:"),
        (["--ep-dispatch-algorithm", "fake"], "--ep-dispatch-algorithm fake is none of"),
        (["--ep-dispatch-algorithm", "static"], None),
        (["--moe-a2a-backend", "megamoe"], "--moe-a2a-backend megamoe:"),
        (["--moe-a2a-backend", "deepep", "--quantization", "fp8"], None),
        (["--quantization=modelopt_fp4"], "weights quantized as modelopt_fp4"),
        (["--load-format", "sharded_state"], "--load-format sharded_state brings"),
        (
            ["--waterfill-rs-replicas", "sglang"],
            "WATERFILL_RS_REPLICAS or --waterfill-rs-replicas is sglang",
        ),
        (["--waterfill-rs", "off"], "WATERFILL_RS or --waterfill-rs leaves all to sglang"),
    ],
)
def test_what_keeps_them_from_being_spread_is_named(words, reason):
    told = found("--ep-num-redundant-experts", "8", *words)
    assert told.severity == ("warn" if reason else "ok")
    assert reason is None or f"because {reason}" in told.text


@pytest.mark.parametrize(
    "words",
    [
        ["--load-format", "fastsafetensors"],
        ["--waterfill-rs", "on"],
        ["--waterfill-rs-replicas", " LIVE"],
        ["--weight-cache-mode", "off"],
    ],
)
def test_what_lets_them_be_spread(words):
    assert found("--ep-num-redundant-experts", "8", *words).severity == "ok"


@pytest.mark.parametrize(
    "variable, value", [("WATERFILL_RS", "off"), ("WATERFILL_RS_REPLICAS", "sglang")]
)
def test_the_environment_counts_unless_a_flag_sets_it(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    words = ["--ep-num-redundant-experts", "8"]
    assert found(*words).severity == "warn"
    flag = "--" + variable.lower().replace("_", "-")
    assert found(*words, flag, "auto").severity == "ok"
    seed = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
    assert f"read this one's slots ({seed})" in found(*words, flag, "auto", seed).text


def test_without_waterfill_nothing_is_spread():
    for switch, severity in (([], "warn"), (["--enable-deepep-waterfill"], "ok")):
        words = ["sglang.launch_server", *switch, "--ep-num-redundant-experts", "8"]
        told = placement({"it": words})
        assert told.severity == severity
    assert (
        "because --enable-waterfill was not given" in placement({"it": words[:1] + words[2:]}).text
    )


def test_none_and_placed_ones_are_fine(tmp_path):
    assert found().severity == found("--ep-num-redundant-experts", "0").severity == "ok"
    assert "no redundant experts" in found().text
    redundant = ["--ep-num-redundant-experts", "2", "--init-expert-location"]
    path = tmp_path / "placed.json"
    path.write_text(json.dumps(PLACED))
    fine = found(*redundant, str(path))
    assert fine.severity == "ok" and f"placed by {path}" in fine.text and not fine.advice
    for location in ("/counts.pt", json.dumps(PLACED), json.dumps({"logical_count": [[1, 2]]})):
        assert found(*redundant, location).severity == "ok", location
    long = json.dumps({"physical_to_logical_map": [[*range(64), 5, 6]]})
    assert "placed by a map" in found(*redundant, long).text


@pytest.mark.parametrize("as_text", [True, False])
def test_a_map_that_is_the_trivial_one_is_no_placement(as_text, tmp_path):
    path = tmp_path / "placed.json"
    path.write_text(json.dumps(TRIVIAL))
    location = json.dumps(TRIVIAL) if as_text else str(path)
    words = ["--ep-num-redundant-experts", "2", "--init-expert-location", location]
    told = found(*words)
    assert told.severity == "warn" and "because this placement is the trivial one" in told.text


def test_a_file_that_is_none_is_the_servers_to_refuse(tmp_path):
    broken = tmp_path / "broken.json"
    for text in (
        "{",
        "[]",
        "{}",
        '{"physical_to_logical_map": 5}',
        '{"physical_to_logical_map": [5]}',
    ):
        broken.write_text(text)
        words = ["--ep-num-redundant-experts", "2", "--init-expert-location", str(broken)]
        assert found(*words).severity == "ok", text
    assert found(*words[:-1], str(tmp_path / "nowhere.json")).severity == "ok"


def test_values_of_flags():
    assert value_of(["--a", "1", "--b"], "--a") == "1"
    assert value_of(["--a", "--b"], "--a") == value_of(["--b", "--a"], "--a") == ""
    assert value_of(["--ab", "1"], "--a") is None


def put(proc, pid, *words):
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes("\0".join([*words, ""]).encode())


def test_servers_among_processes(tmp_path):
    put(tmp_path, 7, *LAUNCH, "--ep-num-redundant-experts", "32", *APART)
    put(tmp_path, 8, "/usr/bin/sglang", "serve", "--model-path", "x")
    put(tmp_path, 9, "sglang::scheduler_DP0_TP0")
    put(tmp_path, 10, "grep", "launch_server")
    put(tmp_path, 11)
    (tmp_path / "12").mkdir()
    (tmp_path / "self").mkdir()
    commands = running(tmp_path)
    assert list(commands) == ["server 7", "server 8"]
    assert commands["server 7"] == [*LAUNCH, "--ep-num-redundant-experts", "32", *APART]
    told = placement(commands)
    assert told.severity == "warn" and told.text.startswith("server 7: 32 redundant")
    del commands["server 7"]
    assert placement(commands).text == "server 8: no redundant experts"
    assert "waterfill-rs doctor -- COMMAND" in placement({}).text


def test_a_process_that_runs_here_is_seen():
    words = ["sglang.launch_server", "--ep-num-redundant-experts", "32"]
    code = "import sys, time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            assert running(Path("/proc"))[f"server {process.pid}"][-3:] == words
        finally:
            process.kill()


def test_the_command_takes_a_servers_words(capsys, monkeypatch):
    monkeypatch.setattr(server_commands, "running", lambda proc: {"server 1": LAUNCH})

    def told(*words):
        main(["doctor", "--json", *words])
        checks = json.loads(capsys.readouterr().out)["checks"]
        return {one["check"]: one for one in checks}

    given = told("--", *LAUNCH, "--ep-num-redundant-experts", "8", *APART)
    warned = given["placement"]
    assert warned["level"] == "warn" and "the given command: 8 redundant" in warned["text"]
    assert "264 experts, 8 of them redundant, take" in given["shm"]["text"]
    running_here = told()
    assert running_here["placement"]["text"] == "server 1: no redundant experts"
    assert "256 experts take" in running_here["shm"]["text"]


def test_the_server_with_most_redundant_experts_counts():
    def most(*numbers):
        flag = "--ep-num-redundant-experts"
        return redundant_experts({f"server {n}": [*LAUNCH, flag, n] for n in numbers})

    assert most("8", "32", "x", "-4") == 32
    assert redundant_experts({"server 1": LAUNCH}) == most() == most("-4") == 0
