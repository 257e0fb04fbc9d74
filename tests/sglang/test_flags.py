"""Flags and variables in real processes of sglang: parsed, inherited by spawned children, sent to Ray's actors (without
Ray: ``test_ray.py`` has a real one), refused aloud."""

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
CONFIGURED = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt import server_args
server_args.ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
arguments = server_args.prepare_server_args(["--config", sys.argv[1]])
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
ACTORS_CAN_BE_MADE = """
import sys, types
class SchedulerActor:
    def __init__(self, server_args): pass
actors = types.ModuleType("sglang.srt.ray.scheduler_actor")
actors.SchedulerActor = SchedulerActor(None)
sys.modules[actors.__name__] = actors
"""
PICKLED = """
import json, pickle
print(json.dumps(pickle.dumps(arguments).hex()))
"""
ACTOR = """
import json, pickle, sys
arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
from inside import what_it_has
print(json.dumps(what_it_has(arguments)))
"""
OTHER_BALANCER = """
from sglang.srt.layers.moe import waterfill
class Other:
    def __init__(self, experts): pass
    def expand_topk(self, output): pass
waterfill.WaterfillBalancer = Other
"""
FLAGS = ["--enable-waterfill", "--waterfill-rs", "rust", "--waterfill-rs-timeout-us", "77"]


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


@pytest.mark.parametrize(
    "written, backend",
    [
        ("off", "off"),
        ("on", "auto"),
        ("'off'", "off"),
        ("rust", "rust"),
        ("No", "off"),
        ("0", "off"),
    ],
)
def test_a_config_file_says_off_and_on_as_yaml_does(tmp_path, written, backend):
    """sglang's parser gets an unquoted ``off`` as ``--waterfill-rs false``."""
    file = tmp_path / "server.yaml"
    file.write_text(
        f"model-path: dummy\ndevice: cpu\nwaterfill-rs: {written}\nwaterfill-rs-require: off\n"
    )
    done = forked.run(CONFIGURED + HERE, str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["variables"] == {"WATERFILL_RS": backend}


def test_off_wins_over_required_and_says_so():
    """A server of a manifest that requires us can be served without us."""
    child, done = parsed(SPAWNED, "--waterfill-rs", "OFF", WATERFILL_RS_REQUIRE="1")
    assert child["balancer"] == "sglang.srt.layers.moe.waterfill"
    assert "was required, and balances nothing with WATERFILL_RS=off" in done.stderr


def test_the_last_of_two_flags_is_taken():
    flags = ["--waterfill-rs-exchange", "board", "--waterfill-rs-exchange", "Solo"]
    here, _ = parsed(HERE, *flags)
    assert here["variables"] == {"WATERFILL_RS_EXCHANGE": "solo"}


def test_shared_experts_have_a_flag_with_its_choices():
    here, _ = parsed(HERE, "--waterfill-rs-shared", "fused", WATERFILL_RS_SHARED="overlap")
    assert here["variables"] == {"WATERFILL_RS_SHARED": "fused"}
    by_flag = forked.run(PARSE, "--waterfill-rs-shared", "beside")
    by_variable = forked.run(PARSE, WATERFILL_RS_SHARED="beside")
    assert by_flag.returncode == 2 and by_variable.returncode == 1
    for choice in ("auto", "overlap", "fused"):
        assert choice in by_flag.stderr.splitlines()[-1]
    assert "WATERFILL_RS_SHARED='beside': give one of auto, overlap, fused" in by_variable.stderr


def test_replicas_have_a_flag_with_its_choices():
    here, _ = parsed(HERE, "--waterfill-rs-replicas", "live", WATERFILL_RS_REPLICAS="sglang")
    assert here["variables"] == {"WATERFILL_RS_REPLICAS": "live"}
    by_flag = forked.run(PARSE, "--waterfill-rs-replicas", "on")
    by_variable = forked.run(PARSE, WATERFILL_RS_REPLICAS="on")
    assert by_flag.returncode == 2 and by_variable.returncode == 1
    assert "WATERFILL_RS_REPLICAS='on': give one of auto, live, sglang" in by_variable.stderr


def test_required_serves_where_it_can():
    here, _ = parsed(HERE, "--waterfill-rs-require")
    assert here["balancer"] == "waterfill_rs.sglang.balancer"
    assert here["variables"] == {"WATERFILL_RS_REQUIRE": "1"}


@pytest.mark.parametrize("variable", [{"WATERFILL_RS": "rust"}, {"WATERFILL_RS_REQUIRE": "1"}])
def test_required_serves_and_says_what_is_missing(variable):
    here, done = parsed(HERE, **variable)
    assert here["balancer"] == "waterfill_rs.sglang.balancer"
    assert "balances nothing without sglang's --enable-waterfill" in done.stderr


def test_required_ends_the_process_with_every_reason():
    code = (
        OTHER_BALANCER
        + "from sglang.srt.plugins import load_plugins; load_plugins(); print('served')"
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


def test_actors_load_us_with_the_settings_of_the_server():
    sent, _ = parsed(
        ACTORS_CAN_BE_MADE + PICKLED, "--use-ray", *FLAGS, SGLANG_PLUGINS="waterfill_rs"
    )
    node = {"WATERFILL_RS": "off", "WATERFILL_RS_PLANNER": "park", "SGLANG_PLUGINS": "none"}
    done = forked.run(ACTOR, sent, **node)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "model": "dummy",
        "balancer": "waterfill_rs.sglang.balancer",
        "variables": {"WATERFILL_RS": "rust", "WATERFILL_RS_TIMEOUT_US": "77"},
    }

    strict = forked.run(OTHER_BALANCER + ACTOR, sent)
    assert strict.returncode == 1
    assert "WaterfillBalancer takes ('experts',)" in strict.stderr
    no_plugin = "from sglang.srt import plugins; plugins.entry_points = lambda group: []\n"
    alone = forked.run(no_plugin + ACTOR, sent)
    assert alone.returncode == 1 and "install it here too" in alone.stderr


def test_pickles_are_sglangs_own_where_no_actor_needs_us():
    off = ACTORS_CAN_BE_MADE + "import os; os.environ['WATERFILL_RS'] = 'upstream'\n"
    without, _ = parsed(PICKLED, SGLANG_PLUGINS="none")
    _, done = parsed(PICKLED + off + PICKLED)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [without] * 2


def test_actors_that_cannot_load_us_are_told_at_start():
    strange = ACTORS_CAN_BE_MADE.replace("server_args", "bag")
    code = strange + PARSE + "print('served')"
    flags = ["--use-ray", "--enable-waterfill"]
    tolerant = forked.run(code, *flags)
    assert "served" in tolerant.stdout
    assert "SchedulerActor takes no server_args" in tolerant.stderr
    strict = forked.run(code, *flags, "--waterfill-rs-require")
    assert strict.returncode == 1 and "served" not in strict.stdout
    assert "SchedulerActor takes no server_args" in strict.stderr
