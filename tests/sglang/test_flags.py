"""Flags and variables in real processes of sglang: parsed, inherited by spawned children, refused aloud."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

PROGRAM = """
import multiprocessing, os, pickle, sys


def child(queue, pickled):
    from sglang.srt.plugins import load_plugins
    load_plugins()
    arguments = pickle.loads(pickled)
    from sglang.srt.layers.moe import waterfill
    queue.put((arguments.model_path, waterfill.WaterfillBalancer.__module__))


if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins
    load_plugins()
    import argparse
    from sglang.srt.server_args import ServerArgs
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args(["--model-path", "dummy", "--device", "cpu", *sys.argv[1:]])
    ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
    arguments = ServerArgs.from_cli_args(parsed)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, pickle.dumps(arguments)))
    process.start()
    print(*queue.get(timeout=180), os.environ.get("WATERFILL_RS"), os.environ.get("WATERFILL_RS_REQUIRE"))
    process.join()
"""


def run(tmp_path, *flags, **environment):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {k: v for k, v in os.environ.items() if not k.startswith("WATERFILL")} | environment
    return subprocess.run(
        [sys.executable, program, *flags], capture_output=True, text=True, env=env, timeout=300
    )


def test_flags_reach_a_spawned_child_and_come_before_variables(tmp_path):
    done = run(tmp_path, "--waterfill-rs", "upstream", WATERFILL_RS="rust")
    assert done.stdout.split() == [
        "dummy",
        "sglang.srt.layers.moe.waterfill",
        "upstream",
        "None",
    ], done.stderr[-2000:]


def test_required_serves_where_it_can(tmp_path):
    done = run(tmp_path, "--waterfill-rs-require")
    assert done.stdout.split() == [
        "dummy",
        "waterfill_rs.sglang.balancer",
        "None",
        "1",
    ], done.stderr[-2000:]


def test_rust_by_name_serves_and_says_what_is_missing(tmp_path):
    done = run(tmp_path, "--waterfill-rs", "rust")
    assert "waterfill_rs.sglang.balancer rust" in done.stdout, done.stderr[-2000:]
    assert "balances nothing without sglang's --enable-waterfill" in done.stderr


def test_required_ends_the_process_with_every_reason():
    code = (
        "from sglang.srt.layers.moe import waterfill\n"
        "class Other:\n"
        "    def __init__(self, experts): pass\n"
        "    def expand_topk(self, output): pass\n"
        "waterfill.WaterfillBalancer = Other\n"
        "from sglang.srt.plugins import load_plugins; load_plugins(); print('served')"
    )
    found = {}
    for required, backend in (("0", "auto"), ("1", "auto"), ("0", "rust")):
        env = {**os.environ, "WATERFILL_RS_REQUIRE": required, "WATERFILL_RS": backend}
        found[required, backend] = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env
        )
    tolerant = found.pop(("0", "auto"))
    assert tolerant.returncode == 0 and "served" in tolerant.stdout
    assert "waterfill" not in tolerant.stderr.lower(), "nobody asked for Waterfill yet"
    for strict in found.values():
        assert strict.returncode == 1 and "served" not in strict.stdout
        assert "WaterfillBalancer takes ('experts',)" in strict.stderr
        assert "WaterfillBalancer.expand_topk takes ('output',)" in strict.stderr
