"""What the operator may ask for, and what is refused."""

import pytest

from waterfill_rs.config import (
    BACKEND_VARIABLE,
    EXCHANGE_VARIABLE,
    PLANNER_VARIABLE,
    REQUIRE_VARIABLE,
    SHARED_VARIABLE,
    TIMEOUT_VARIABLE,
    Config,
)


def test_nothing_said_is_auto_everywhere():
    config = Config.from_environment({})
    assert (config.backend, config.exchange, config.required) == ("auto", "auto", False)
    assert config.shared == "auto"
    assert (config.board.cap_us, config.board.pace) == (1_000_000, "auto")


def test_all_that_can_be_said():
    config = Config.from_environment(
        {
            "WATERFILL_RS": "rust",
            "WATERFILL_RS_EXCHANGE": "board",
            "WATERFILL_RS_TIMEOUT_US": "250",
            "WATERFILL_RS_PLANNER": "spin",
            "WATERFILL_RS_SHARED": "overlap",
        }
    )
    assert config.shared == "overlap"
    assert config.required and config.enabled and config.exchange == "board"
    assert (config.board.cap_us, config.board.patience_us, config.board.pace) == (250, 219, "spin")


def test_an_empty_variable_is_as_none():
    """Deployments that pass ``NAME=${NAME:-}`` on, of a server that may not even use Waterfill."""
    names = (BACKEND_VARIABLE, REQUIRE_VARIABLE, EXCHANGE_VARIABLE, TIMEOUT_VARIABLE)
    empty = dict.fromkeys((*names, PLANNER_VARIABLE, SHARED_VARIABLE), "")
    assert Config.from_environment(empty) == Config.from_environment({})


@pytest.mark.parametrize(
    "text, backend", [("false", "off"), ("False", "off"), ("true", "auto"), ("True", "auto")]
)
def test_what_yaml_makes_of_off_and_on(text, backend):
    assert Config.from_environment({"WATERFILL_RS": text}).backend == backend


def test_a_spinning_planner_may_have_a_core():
    board = Config.from_environment({"WATERFILL_RS_PLANNER": "spin:3"}).board
    assert (board.pace, board.core) == ("spin", 3)


@pytest.mark.parametrize(
    "variable, value, text",
    [
        ("WATERFILL_RS", "on", "give one of auto, rust, upstream, off"),
        ("WATERFILL_RS_REQUIRE", "yes", "give 0 or 1"),
        ("WATERFILL_RS_EXCHANGE", "shm", "give one of auto, solo, board, group"),
        ("WATERFILL_RS_SHARED", "beside", "give one of auto, overlap, fused"),
        ("WATERFILL_RS_PLANNER", "thread", "give one of auto, inline, park, spin"),
        ("WATERFILL_RS_PLANNER", "spin:x", "or spin:CORE to pin it"),
        ("WATERFILL_RS_PLANNER", "park:1", "or spin:CORE to pin it"),
        *(
            ("WATERFILL_RS_TIMEOUT_US", value, "give microseconds from 1 to 10000000")
            for value in ("0", "-1", "1e3", " ", "10000001", "½")
        ),
    ],
)
def test_other_values_are_refused_by_variable(variable, value, text):
    with pytest.raises(ValueError) as refused:
        Config.from_environment({variable: value})
    assert f"{variable}={value!r}" in str(refused.value) and text in str(refused.value)
