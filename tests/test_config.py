"""What the operator may ask for, and what is refused."""

import pytest

from waterfill_rs.config import Config
from waterfill_rs.operate.checks import VARIABLES


def test_nothing_said_is_auto_everywhere():
    config = Config.from_environment({})
    assert (config.backend, config.exchange, config.required) == ("auto", "auto", False)
    assert (config.shared, config.replicas) == ("auto", "auto")
    assert (config.board.cap_us, config.board.pace) == (1_000_000, "auto")


def test_all_that_can_be_said():
    config = Config.from_environment(
        {
            "WATERFILL_RS": "rust",
            "WATERFILL_RS_EXCHANGE": "board",
            "WATERFILL_RS_TIMEOUT_US": "250",
            "WATERFILL_RS_PLANNER": "spin",
            "WATERFILL_RS_SHARED": "overlap",
            "WATERFILL_RS_REPLICAS": "Live ",
        }
    )
    assert (config.shared, config.replicas) == ("overlap", "live")
    assert config.required and config.enabled and config.exchange == "board"
    assert (config.board.cap_us, config.board.patience_us, config.board.pace) == (250, 219, "spin")


def test_an_empty_variable_is_as_none():
    """Deployments that pass ``NAME=${NAME:-}`` on, of a server that may not even use Waterfill."""
    for value in ("", " ", "\r"):
        empty = dict.fromkeys(VARIABLES, value)
        assert Config.from_environment(empty) == Config.from_environment({})


@pytest.mark.parametrize("text", ["off", "OFF", "false", "False", "0", "no", "n", " off ", "off\r"])
def test_whatever_a_manifest_makes_of_off_is_off(text):
    assert Config.from_environment({"WATERFILL_RS": text}).backend == "off"
    assert not Config.from_environment({"WATERFILL_RS_REQUIRE": text}).required


@pytest.mark.parametrize("text", ["on", "ON", "true", "True", "1", "yes", "y", " on\n"])
def test_whatever_a_manifest_makes_of_on_is_on(text):
    assert Config.from_environment({"WATERFILL_RS": text}).backend == "auto"
    assert Config.from_environment({"WATERFILL_RS_REQUIRE": text}).required


def test_neither_case_nor_blanks_matter():
    """A file of variables may have line ends of another system."""
    config = Config.from_environment(
        {
            "WATERFILL_RS": "Rust\r",
            "WATERFILL_RS_EXCHANGE": " Solo ",
            "WATERFILL_RS_SHARED": "FUSED",
            "WATERFILL_RS_PLANNER": "Spin:1 ",
            "WATERFILL_RS_TIMEOUT_US": " 250\r",
            "WATERFILL_RS_MACHINE": "/Here/h100.json\r",
        }
    )
    assert (config.backend, config.exchange, config.shared) == ("rust", "solo", "fused")
    assert (config.board.pace, config.board.core, config.board.cap_us) == ("spin", 1, 250)
    assert config.machine == "/Here/h100.json"


def test_a_spinning_planner_may_have_a_core():
    board = Config.from_environment({"WATERFILL_RS_PLANNER": "spin:3"}).board
    assert (board.pace, board.core) == ("spin", 3)


@pytest.mark.parametrize(
    "variable, value, text",
    [
        ("WATERFILL_RS", "none", "give one of auto, rust, upstream, off"),
        ("WATERFILL_RS", '"off"', "give one of auto, rust, upstream, off"),
        ("WATERFILL_RS_REQUIRE", "2", "give 0 or 1"),
        ("WATERFILL_RS_EXCHANGE", "shm", "give one of auto, solo, board, group"),
        ("WATERFILL_RS_SHARED", "beside", "give one of auto, overlap, fused"),
        ("WATERFILL_RS_REPLICAS", "on", "give one of auto, live, sglang"),
        ("WATERFILL_RS_PLANNER", "thread", "give one of auto, inline, park, spin"),
        ("WATERFILL_RS_PLANNER", "spin:x", "or spin:CORE to pin it"),
        ("WATERFILL_RS_PLANNER", "park:1", "or spin:CORE to pin it"),
        *(
            ("WATERFILL_RS_TIMEOUT_US", value, "give microseconds from 1 to 10000000")
            for value in ("0", "-1", "1e3", "1_0", "1s", "10000001", "½")
        ),
    ],
)
def test_other_values_are_refused_by_variable(variable, value, text):
    with pytest.raises(ValueError) as refused:
        Config.from_environment({variable: value})
    assert f"{variable}={value!r}" in str(refused.value) and text in str(refused.value)
