"""Flags and variables in real processes of sglang: parsed, inherited by spawned children, refused aloud."""

import json

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked

PARSE = """
import argparse, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
parsed = parser.parse_args(["--model-path", "dummy", "--device", "cpu", *sys.argv[1:]])
ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
arguments = ServerArgs.from_cli_args(parsed)
"""
HERE = """
import json
from inside import server_child
print(json.dumps(server_child(arguments)))
"""
SPAWNED = """
import json, multiprocessing
from inside import server_child
with multiprocessing.get_context("spawn").Pool(1) as pool:
    print(json.dumps(pool.apply(server_child, [arguments])))
"""


def parsed(where, *flags, **environment):
    """What a process of the server has once these flags are parsed, and the finished process."""
    done = forked.run(PARSE + where, *flags, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done


def test_flags_reach_a_spawned_child():
    flags = ["--waterfill-rs", "rust", "--waterfill-rs-timeout-us", "77", "--enable-waterfill"]
    child, _ = parsed(SPAWNED, *flags, "--waterfill-rs-planner", "spin:1")
    assert child["model"] == "dummy"
    assert child["balancer"] == "waterfill_rs.sglang.balancer"
    assert child["variables"] == {
        "WATERFILL_RS": "rust",
        "WATERFILL_RS_TIMEOUT_US": "77",
        "WATERFILL_RS_PLANNER": "spin:1",
    }


def test_flags_come_before_variables():
    here, _ = parsed(HERE, "--waterfill-rs", "upstream", WATERFILL_RS="rust")
    assert here["variables"] == {"WATERFILL_RS": "upstream"}


def test_required_serves_where_it_can():
    here, _ = parsed(HERE, "--waterfill-rs-require")
    assert here["balancer"] == "waterfill_rs.sglang.balancer"
    assert here["variables"] == {"WATERFILL_RS_REQUIRE": "1"}


@pytest.mark.parametrize("variable", [{"WATERFILL_RS": "rust"}, {"WATERFILL_RS_REQUIRE": "1"}])
def test_required_serves_and_says_what_is_missing(variable):
    here, done = parsed(HERE, **variable)
    assert here["balancer"] == "waterfill_rs.sglang.balancer"
    assert "balances nothing without sglang's --enable-waterfill" in done.stderr


def test_ray_actors_which_load_no_plugins_are_told():
    _, done = parsed(HERE, "--enable-waterfill", "--use-ray")
    assert "waterfill-rs is off, sglang's own Waterfill stays: --use-ray" in done.stderr
    flags = ["--enable-waterfill", "--use-ray", "--waterfill-rs-require"]
    required = forked.run(PARSE + HERE, *flags)
    assert required.returncode == 1 and "- --use-ray: sglang's Ray actors" in required.stderr
    _, done = parsed(HERE, "--use-ray")
    assert "waterfill-rs is off" not in done.stderr


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
        variables = {"WATERFILL_RS_REQUIRE": required, "WATERFILL_RS": backend}
        found[required, backend] = forked.run(code, **variables)
    tolerant = found.pop(("0", "auto"))
    assert tolerant.returncode == 0 and "served" in tolerant.stdout
    assert "waterfill" not in tolerant.stderr.lower(), "nobody asked for Waterfill yet"
    for strict in found.values():
        assert strict.returncode == 1 and "served" not in strict.stdout
        assert "WaterfillBalancer takes ('experts',)" in strict.stderr
        assert "WaterfillBalancer.expand_topk takes ('output',)" in strict.stderr
