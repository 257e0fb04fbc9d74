"""The demo, as a command and as numbers."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from waterfill_rs.cli import main
from waterfill_rs.demo import rank_processes
from waterfill_rs.demo.workload import Router, documents, tokenize
from waterfill_rs.exchange.settings import BoardSettings


def test_tokens_and_routes_are_the_same_every_time():
    text = "def f(x):\n    return x + 1\n"
    assert tokenize(text) == tokenize(text)
    assert len(set(tokenize("x x"))) == 2  # a word and a space
    tokens = next(documents([]))[:100]
    ids = Router(64, 6, layer=1).route(tokens)
    assert ids == Router(64, 6, layer=1).route(tokens)
    assert ids != Router(64, 6, layer=2).route(tokens)
    rows = [ids[i : i + 6] for i in range(0, len(ids), 6)]
    assert all(len(set(row)) == 6 and 0 <= min(row) <= max(row) < 64 for row in rows)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    file = tmp_path_factory.mktemp("demo") / "new folder" / "demo.json"
    command = ["demo", "--ranks", "4", "--experts", "32", "--top-k", "3", "--tokens", "64"]
    assert main([*command, "--layers", "2", "--steps", "3", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_json_has_every_layer_step_and_policy(comparison):
    assert (comparison["ranks"], comparison["experts"], comparison["top_k"]) == (4, 32, 3)
    found = {(row["layer"], row["pass"], row["policy"]) for row in comparison["rows"]}
    wanted = {(i, j, p) for i in range(2) for j in range(3) for p in ("home", "own-counts", "live")}
    assert found == wanted and len(comparison["rows"]) == len(wanted)


def test_rows_add_up_and_live_is_the_optimum(comparison):
    for row in comparison["rows"]:
        # 64 tokens x 4 ranks, 3 routed rows and a shared one each, over 4 ranks.
        assert row["tokens"] == 256 and row["mean"] == 256.0
        assert row["max"] >= row["optimum"] >= max(row["routed_max"], row["mean"])
        assert row["policy"] != "live" or row["max"] == row["optimum"]
        assert row["policy"] != "home" or row["extra_copies"] == 0


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--ranks", "7"], "256 physical experts over 7 ranks leave 4"),
        (["--top-k", "300"], "top-k 300: give 1 to 256"),
        (["no such folder"], "no such folder: there is no such file"),
        (["--ranks", "1024", "--experts", "1024", "--tokens", "9999"], "the text ends at"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(arguments, text, capsys, tmp_path):
    file = tmp_path / "demo.json"
    assert main(["demo", *arguments, "--json", str(file)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def run_live(tmp_path, *arguments):
    file = tmp_path / "live.json"
    command = ["demo", "--ranks", "3", "--experts", "24", "--top-k", "3", "--tokens", "32"]
    small = ["--layers", "2", "--steps", "30", "--step-ms", "4", "--stall-ms", "40"]
    assert main([*command, *small, *arguments, "--json", str(file)]) == 0
    return {rank["rank"]: rank for rank in json.loads(file.read_text())["by_rank"]}


@pytest.mark.parametrize("planner", ["inline", "park", "spin"])
def test_a_killed_rank_costs_the_others_nothing_but_its_share(planner, tmp_path, capsys):
    ranks = run_live(tmp_path, "--planner", planner, "--kill", "1@10")
    assert [ranks[rank]["steps"] for rank in range(3)] == [30, 10, 30]
    for rank in (0, 2):
        assert ranks[rank]["exchanges"] == 60 == ranks[rank]["live"] + ranks[rank]["fallbacks"]
        assert ranks[rank]["timeouts"] <= 2
        assert ranks[rank]["wait_us"]["p50"] <= ranks[rank]["wait_us"]["max"]
    assert "killed at step 10" in capsys.readouterr().out


def test_a_killed_planner_leaves_own_counts_without_a_wait(tmp_path):
    ranks = run_live(tmp_path, "--kill", "0@10", "--cap-us", "5000000")
    assert [ranks[rank]["steps"] for rank in range(3)] == [10, 30, 30]
    for rank in (1, 2):
        assert ranks[rank]["timeouts"] == 0
        assert ranks[rank]["fallbacks"] == 40
        assert ranks[rank]["wait_us"]["max"] < 2_000_000, "its death was seen before the cap"


def test_a_stopped_rank_makes_up_for_its_steps(tmp_path, capsys):
    ranks = run_live(tmp_path, "--stall", "2@10", "--stall-ms", "200", "--cap-us", "20000")
    assert [ranks[rank]["steps"] for rank in range(3)] == [30, 30, 30]
    # Where one rank has no plan, no rank has. On a busy machine one may reach its cap before the planner tells it so, and one
    # that did so twice waits for no plan for a while.
    fallbacks = [ranks[rank]["fallbacks_by_reason"] for rank in range(3)]
    assert len({(ranks[rank]["live"], ranks[rank]["fallbacks"]) for rank in range(3)}) == 1
    assert fallbacks[2]["none"] > 0
    assert all(by["torn"] == 0 and (not by["broken"] or by["timed_out"]) for by in fallbacks)
    assert "stopped at step 10" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["3@1", "1@30", "1", "a@1", "1@-1"])
def test_a_moment_outside_the_run_is_refused(moment, capsys):
    assert main(["demo", "--ranks", "3", "--experts", "24", "--steps", "30", "--kill", moment]) == 2
    assert f"--kill {moment}: give RANK@STEP, a rank below 3" in capsys.readouterr().err


def stops_late(end):
    end.send((0, None))
    time.sleep(0.2)  # As if another had the core.
    os.kill(os.getpid(), signal.SIGSTOP)
    end.send((0, []))


def test_a_rank_that_stops_after_it_was_to_go_on_does_go_on():
    setup = rank_processes.Setup(1, 1, 1, 1, 1, 1, 0.01, 0.001, BoardSettings())
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=stops_late, args=(theirs,))
    process.start()
    theirs.close()
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    rank_processes._Watch(setup, [process], [ours], lambda step: None).until_all_ended()
    watchdog.cancel()
    process.join()
    assert process.exitcode == 0


def test_ctrl_c_ends_the_demo_without_a_traceback():
    # Whoever runs the tests in the background may have SIGINT ignored, and children have it so too.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = heeding + "import sys; from waterfill_rs.cli import main; sys.exit(main())"
    demo = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--ranks", "2", "--steps", "2000", "--tokens", "8"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert demo.stderr.readline().startswith("step ")
    os.killpg(demo.pid, signal.SIGINT)
    _, error = demo.communicate(timeout=60)
    assert demo.returncode == 130 and "Traceback" not in error
