"""What the doctor sees of a server: the arguments it is started with, given or of processes here."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waterfill_rs import sglang_flags
from waterfill_rs.config import BACKEND_VARIABLE, REPLICAS_VARIABLE, backend_named, named
from waterfill_rs.operate.checks import Finding
from waterfill_rs.placement.trivial import TRIVIAL, is_trivial
from waterfill_rs.sglang_versions import ROWS

__all__ = ["placement", "redundant_experts", "running", "value_of"]

REDUNDANT, LOCATION, EPLB = (
    "--ep-num-redundant-experts",
    "--init-expert-location",
    "--enable-eplb",
)
_DISPATCH = "--ep-dispatch-algorithm"
_BACKEND, _REPLICAS = "--waterfill-rs", "--waterfill-rs-replicas"
_LAUNCHERS = ("sglang.launch_server", "sglang/launch_server.py")


def running(proc: Path) -> dict[str, list[str]]:
    """Commands of sglang's servers among the processes of ``proc``, by name: ``server 123``. Their ranks rename themselves."""
    found = {}
    for file in sorted(proc.glob("[0-9]*/cmdline")):
        try:
            words = file.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:  # Ended meanwhile, or another user's.
            continue
        if _is_server(words):
            found[f"server {file.parent.name}"] = words
    return found


def _is_server(words: Sequence[str]) -> bool:
    if any(word.endswith(_LAUNCHERS) for word in words[:8]):
        return True
    pairs = itertools.pairwise(words[:8])
    return any(Path(one).name == "sglang" and other == "serve" for one, other in pairs)


def value_of(words: Sequence[str], flag: str) -> str | None:
    """What a command gives a flag, the last time; empty for a flag alone; None without it."""
    value = None
    for i, word in enumerate(words):
        if word.startswith(f"{flag}="):
            value = word[len(flag) + 1 :]
        elif word == flag:
            after = words[i + 1] if i + 1 < len(words) else "--"
            value = "" if after.startswith("--") else after
    return value


def redundant_experts(commands: Mapping[str, Sequence[str]]) -> int:
    """How many redundant experts the server has that has most of these; 0 for what is no number."""
    asked = (value_of(words, REDUNDANT) or "" for words in commands.values())
    return max((int(text) for text in asked if text.isdecimal()), default=0)


def placement(commands: Mapping[str, Sequence[str]]) -> Finding:
    """Are the redundant experts of each command placed by more than sglang's default? ``commands``: words, by name."""
    if not commands:
        text = "no server's command is seen: waterfill-rs doctor -- COMMAND looks at its redundant experts"
        return Finding("placement", "ok", text)
    found = [_placement(name, words) for name, words in commands.items()]
    return next((one for one in found if one.severity != "ok"), found[0])


def _placement(name: str, words: Sequence[str]) -> Finding:
    redundant = value_of(words, REDUNDANT) or "0"
    if redundant == "0":
        return Finding("placement", "ok", f"{name}: no redundant experts")
    location = value_of(words, LOCATION) or TRIVIAL
    if location != TRIVIAL and not _is_trivial_file(location):
        shown = location if len(location) < 200 else "a map"
        return Finding(
            "placement", "ok", f"{name}: {redundant} redundant experts, placed by {shown}"
        )
    reason = _against_spread(words) if location == TRIVIAL else "this placement is the trivial one"
    if reason is None:
        text = f"{name}: {redundant} redundant experts, which waterfill-rs spreads over the ranks at start, if its model allows it"
        return Finding("placement", "ok", text)
    until = " until EPLB rebalances" if value_of(words, EPLB) is not None else ""
    text = (
        f"{name}: {redundant} redundant experts stand in trivial places{until}, because {reason}: the first experts twice, "
        "whichever are hot. Balance is often worse than without them, and no choice of replicas mends it"
    )
    advice = (
        f"waterfill-rs place RECORDING... --ep R --redundant {redundant} -o placed.json, and {LOCATION} placed.json; "
        "waterfill-rs replay RECORDING tells by how much"
    )
    return Finding("placement", "warn", text, advice)


def _against_spread(words: Sequence[str]) -> str | None:
    """Why waterfill-rs would leave experts in trivial places, as far as a command and this environment tell."""
    switches = [row.flag for row in ROWS]
    if all(value_of(words, switch) is None for switch in switches):
        return f"{switches[0]} was not given"
    if backend_named(_own(words, _BACKEND, BACKEND_VARIABLE)) in ("off", "upstream"):
        return f"{BACKEND_VARIABLE} or {_BACKEND} leaves all to sglang"
    if named(_own(words, _REPLICAS, REPLICAS_VARIABLE)) == "sglang":
        return f"{REPLICAS_VARIABLE} or {_REPLICAS} is sglang"

    def value(name: str) -> str | None:
        return value_of(words, f"--{name.replace('_', '-')}")

    reasons = sglang_flags.against_order(value) or sglang_flags.against_spread(value)
    if not reasons and (algorithm := value_of(words, _DISPATCH)) is not None:
        reasons = sglang_flags.against_unmapped(algorithm)
    return reasons[0] if reasons else None


def _own(words: Sequence[str], flag: str, variable: str) -> str:
    """A flag sets the variable."""
    return value_of(words, flag) or os.environ.get(variable, "")


def _is_trivial_file(location: str) -> bool:
    """Of what ``--init-expert-location`` takes: a file in JSON, or its text. Others are taken for placements."""
    try:
        text = Path(location).read_text() if location.endswith(".json") else location
        content: Any = json.loads(text)
        return is_trivial(content["physical_to_logical_map"])
    except (OSError, ValueError, TypeError, KeyError):
        return False
