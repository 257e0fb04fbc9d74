"""What the operator asked for: environment variables, read once and checked. Flags set the same variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from waterfill_rs.exchange.settings import CHOICES, BoardSettings, Choice, Pace

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "EXCHANGE_VARIABLE",
    "MACHINE_VARIABLE",
    "PACES",
    "PLANNER_VARIABLE",
    "REPLICAS",
    "REPLICAS_VARIABLE",
    "REQUIRE_VARIABLE",
    "SHARED",
    "SHARED_VARIABLE",
    "TIMEOUT_VARIABLE",
    "Config",
    "backend_named",
    "named",
]

BACKEND_VARIABLE = "WATERFILL_RS"
REQUIRE_VARIABLE = "WATERFILL_RS_REQUIRE"
EXCHANGE_VARIABLE = "WATERFILL_RS_EXCHANGE"
TIMEOUT_VARIABLE = "WATERFILL_RS_TIMEOUT_US"
PLANNER_VARIABLE = "WATERFILL_RS_PLANNER"
SHARED_VARIABLE = "WATERFILL_RS_SHARED"
MACHINE_VARIABLE = "WATERFILL_RS_MACHINE"
REPLICAS_VARIABLE = "WATERFILL_RS_REPLICAS"
BACKENDS = ("auto", "rust", "upstream", "off")
SHARED = ("auto", "overlap", "fused")
REPLICAS = ("auto", "live", "sglang")
PACES: tuple[Pace, ...] = ("auto", "inline", "park", "spin")
LONGEST_TIMEOUT_US = 10_000_000
"""Below the time after which DeepEP's own dispatch gives up, 100 s."""
_BOOLEANS = dict.fromkeys(("0", "false", "no", "n", "off"), False) | dict.fromkeys(
    ("1", "true", "yes", "y", "on"), True
)
"""sglang's own, and what YAML takes for one."""


@dataclass(frozen=True)
class Config:
    """``backend``: auto and rust use this package where sglang's Waterfill is on; upstream and off leave
    sglang as it is. ``required``: stop the server, with every reason, if this package cannot serve; rust
    asks for this package by name, so it always is. ``exchange``: how ranks learn each other's counts.
    ``board``: how, where that is a board. ``shared``: whether shared experts run beside dispatch: where that is
    faster, in every batch (and the server stops where it cannot be), or in none. ``machine``: path of
    what ``waterfill-rs calibrate`` wrote here. ``replicas``: who chooses those of redundant experts: live plans in
    prefill and the map alone in decode where there are some, live plans in every batch or the server stops, or sglang."""

    backend: str = "auto"
    required: bool = False
    exchange: Choice = "auto"
    board: BoardSettings = field(default_factory=BoardSettings)
    shared: str = "auto"
    machine: str | None = None
    replicas: str = "auto"

    @property
    def enabled(self) -> bool:
        return self.backend in ("auto", "rust")

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Config:
        """Read the variables. One that is empty or blank is as none; neither case nor blanks around a value matter.

        Raises:
            ValueError: naming the variable, its value and the values allowed.
        """
        required = named(environment.get(REQUIRE_VARIABLE, "")) or "0"
        if required not in _BOOLEANS:
            value = environment[REQUIRE_VARIABLE]
            raise ValueError(f"{REQUIRE_VARIABLE}={value!r}: give 0 or 1")
        backend = _one_of(environment, BACKEND_VARIABLE, BACKENDS, "auto", backend_named)
        default = BoardSettings()
        return Config(
            backend=backend,
            required=backend == "rust" or _BOOLEANS[required],
            exchange=cast(Choice, _one_of(environment, EXCHANGE_VARIABLE, CHOICES, "auto")),
            board=BoardSettings(_microseconds(environment, default.cap_us), *_planner(environment)),
            shared=_one_of(environment, SHARED_VARIABLE, SHARED, "auto"),
            machine=environment.get(MACHINE_VARIABLE, "").strip() or None,
            replicas=_one_of(environment, REPLICAS_VARIABLE, REPLICAS, "auto"),
        )


def named(text: str) -> str:
    """What a flag or a variable names, not yet checked: files of variables bring blanks and line ends of other systems."""
    return text.strip().lower()


def backend_named(text: str) -> str:
    """The backend that a flag or a variable names, not yet checked.

    A boolean says off, or what there is without a word. YAML makes them of an unquoted ``off`` and ``on``, and sglang's
    ``--config`` and manifests pass those on.
    """
    chosen = named(text)
    return ("off", "auto")[_BOOLEANS[chosen]] if chosen in _BOOLEANS else chosen


def _one_of(
    environment: Mapping[str, str],
    variable: str,
    allowed: Sequence[Any],
    default: str,
    read: Callable[[str], str] = named,
) -> str:
    value = read(environment.get(variable, "")) or default
    if value not in allowed:
        raise ValueError(f"{variable}={environment[variable]!r}: give one of {', '.join(allowed)}")
    return value


def _planner(environment: Mapping[str, str]) -> tuple[Pace, int | None]:
    """The pace, and the core of ``spin:CORE``."""
    pace, colon, core = (named(environment.get(PLANNER_VARIABLE, "")) or "auto").partition(":")
    if pace in PACES and not colon:
        return pace, None
    if pace == "spin" and core.isascii() and core.isdigit():
        return "spin", int(core)
    raise ValueError(
        f"{PLANNER_VARIABLE}={environment[PLANNER_VARIABLE]!r}: give one of {', '.join(PACES)}, or spin:CORE to pin it "
        "to a core"
    )


def _microseconds(environment: Mapping[str, str], default: int) -> int:
    text = environment.get(TIMEOUT_VARIABLE, "").strip() or str(default)
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= LONGEST_TIMEOUT_US:
        raise ValueError(
            f"{TIMEOUT_VARIABLE}={environment[TIMEOUT_VARIABLE]!r}: give microseconds from 1 to {LONGEST_TIMEOUT_US}"
        )
    return value
