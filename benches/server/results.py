"""The file of results: written whole each time, checked, and read again."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.modes import MODES

FIELDS = ("machine", "date", "commit", "sglang", "ranks", "settings", "cells")
NUMBERS_OR_NONE = (
    "gpu_ms",
    "ratio_off",
    "ratio_home",
    "tokens_per_s",
    "rows_max_mean",
    "optimum",
    "live_share",
)
OF_PLACED = (
    "ratio_static",
    "ratio_dynamic",
    "routed_max_mean",
    "active_experts",
    "routed_optimum",
    "even",
    "least_active",
)
"""Of a cell whose engines place experts."""
COUNTS = ("tokens", "redundant", "forwards")
MIXED_NUMBERS = ("seconds", "new_tokens_per_s", "prompt_tokens_per_s", "ratio_off")
MIXED = (
    "placement",
    "redundant",
    "mode",
    "rounds",
    "quartiles",
    "batches",
    "calls",
    *MIXED_NUMBERS,
)
OUTPUT = ("phase", "mode", "prompts", "tokens", "different", "repeated", "to_off")
COMPARISON = (
    "equal",
    "equal_tokens",
    "equal_logprobs",
    "first_difference",
    "logprob_difference",
    "finite",
)
LISTS = ("mixed", "outputs", "layers", "memory", "mismatches", "failures")
"""Fields that a document may have beside ``FIELDS``."""
CELL = ("phase", "placement", "mode", "quartiles", *NUMBERS_OR_NONE, *COUNTS)
VERDICT = ("best", "ratio_best", "quartiles_best", "pairs")
SETTING_PREFIXES = ("WATERFILL_RS", "SGLANG_", "NVSHMEM_", "NCCL_")
"""Variables of the environment that change what is measured."""


def write(path: Path, document: dict[str, Any]) -> None:
    """In place of what is there, never half: a run that is killed leaves the last whole file."""
    check(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: naming the file, and what in it is no such document.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        check(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return document


def check(document: Any) -> None:
    """
    Raises:
        ValueError: naming the field, and what is wrong with it.
    """
    if not isinstance(document, dict):
        raise ValueError(f"an object is needed, and this is a {type(document).__name__}")
    missing = [name for name in FIELDS if name not in document]
    if missing:
        raise ValueError(f"no field {', '.join(missing)}")
    if type(document["ranks"]) is not int or document["ranks"] < 1:
        raise ValueError(f"ranks is {document['ranks']!r}: a number from 1 on is needed")
    if not isinstance(document["settings"], dict) or not isinstance(document["cells"], list):
        raise ValueError("settings must be an object, and cells a list")
    for name in LISTS:
        if not isinstance(document.get(name, []), list):
            raise ValueError(f"{name} must be a list")
    for i, cell in enumerate(document["cells"]):
        _check_cell(f"cell {i}", cell)
    for i, entry in enumerate(document.get("mixed", [])):
        _check_mixed(f"mixed {i}", entry)
    for i, entry in enumerate(document.get("outputs", [])):
        _check_output(f"outputs {i}", entry)


def _check_mixed(where: str, entry: Any) -> None:
    _check_there(where, entry, MIXED)
    if entry["mode"] not in MODES:
        raise ValueError(f"{where}: mode {entry['mode']!r} is unknown")
    _check_counts(where, entry, ("redundant", "rounds"))
    _check_numbers(where, entry, MIXED_NUMBERS)
    _check_quartiles(where, entry["quartiles"])


def _check_output(where: str, entry: Any) -> None:
    _check_there(where, entry, OUTPUT)
    if entry["mode"] not in MODES:
        raise ValueError(f"{where}: mode {entry['mode']!r} is unknown")
    # Results of before engines with redundant experts answered have no placement and no more comparisons.
    _check_counts(where, {"redundant": 0, **entry}, ("prompts", "tokens", "different", "redundant"))
    for name in ("repeated", "to_off", "to_static", "other_experts"):
        comparison = entry.get(name)
        if comparison is None and name != "repeated":
            continue
        _check_there(f"{where}, {name}", comparison, COMPARISON)
        _check_counts(f"{where}, {name}", comparison, ("equal_tokens", "equal_logprobs"))
        _check_numbers(f"{where}, {name}", comparison, ("first_difference", "logprob_difference"))


def _check_cell(where: str, cell: Any) -> None:
    _check_there(where, cell, CELL)
    if cell["phase"] not in ("prefill", "decode") or cell["mode"] not in MODES:
        raise ValueError(f"{where}: phase {cell['phase']!r} or mode {cell['mode']!r} is unknown")
    _check_counts(where, cell, COUNTS)
    _check_numbers(where, cell, NUMBERS_OR_NONE)
    if cell.get("placed"):
        _check_there(where, cell, OF_PLACED)
        _check_numbers(where, cell, OF_PLACED)
    for name in ("live_share", "overlapped_share"):
        share = cell.get(name)
        if share is not None and share > 1:
            raise ValueError(f"{where}: {name} is {share}: it cannot be above 1")
    _check_quartiles(where, cell["quartiles"])
    if verdict := cell.get("verdict"):
        _check_there(f"{where}, verdict", verdict, VERDICT)
        _check_numbers(f"{where}, verdict", verdict, ("ratio_best",))
        _check_quartiles(f"{where}, verdict", verdict["quartiles_best"])


def _check_there(where: str, entry: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in entry]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}")


def _check_counts(where: str, entry: Any, names: Sequence[str]) -> None:
    for name in names:
        if type(entry[name]) is not int or entry[name] < 0:
            raise ValueError(f"{where}: {name} is {entry[name]!r}: a number from 0 on is needed")


def _check_numbers(where: str, entry: Any, names: Sequence[str]) -> None:
    for name in names:
        value = entry[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{where}: {name} is {value!r}: a number or null is needed")
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where}: {name} is {value}: it cannot be below 0 or endless")


def _check_quartiles(where: str, between: Any) -> None:
    if between is not None and not (len(between) == 2 and between[0] <= between[1]):
        raise ValueError(f"{where}: quartiles is {between!r}: the first and the third are needed")


def gpus() -> list[tuple[str, int]]:
    """Name and MiB of each GPU, by nvidia-smi; none where it isn't."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in told.splitlines() if "," in line]
    return [(name.strip(), int(mib)) for name, _, mib in rows if mib.strip().isdigit()]


def machine(ranks: int) -> str:
    names = [name for name, _ in gpus()[:ranks]]
    return f"{ranks} x {names[0]}" if names else f"{ranks} ranks, unknown GPUs"


def commit() -> str:
    """Of the repository that this file is in, or that it is not known."""
    folder = Path(__file__).resolve().parent
    ask = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, str]:
    """The variables that change what is measured."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTING_PREFIXES)}
