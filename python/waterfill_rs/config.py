"""What the operator asked for: environment variables, read once and checked. Flags set the same variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BACKENDS", "BACKEND_VARIABLE", "REQUIRE_VARIABLE", "Config"]

BACKEND_VARIABLE = "WATERFILL_RS"
REQUIRE_VARIABLE = "WATERFILL_RS_REQUIRE"
BACKENDS = ("auto", "rust", "upstream", "off")
_BOOLEANS = {"": False, "0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True)
class Config:
    """``backend``: auto and rust use this package where sglang's Waterfill is on; upstream and off leave
    sglang as it is. ``required``: stop the server, with every reason, if this package cannot serve; rust
    asks for this package by name, so it always is."""

    backend: str = "auto"
    required: bool = False

    @property
    def enabled(self) -> bool:
        return self.backend in ("auto", "rust")

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Config:
        """Read the two variables.

        Raises:
            ValueError: naming the variable, its value and the values allowed.
        """
        backend = environment.get(BACKEND_VARIABLE, "auto")
        if backend not in BACKENDS:
            raise ValueError(f"{BACKEND_VARIABLE}={backend!r}: give one of {', '.join(BACKENDS)}")
        required = environment.get(REQUIRE_VARIABLE, "").lower()
        if required not in _BOOLEANS:
            raise ValueError(f"{REQUIRE_VARIABLE}={required!r}: give 0 or 1")
        return Config(backend, backend == "rust" or _BOOLEANS[required])
