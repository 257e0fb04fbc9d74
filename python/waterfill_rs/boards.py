"""The boards of this host, found and read from outside.

A board's name is gone once its ranks are attached, but each of them keeps it open: so it is found under
``/proc``, at any process of this user that has one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill_rs import _native

__all__ = ["Board", "find", "is_alive"]

_NAME = re.compile(r"/dev/shm/(waterfill-rs-\S+)")


@dataclass(frozen=True)
class Board:
    """``name``: as its creator called it. ``observer``: looks at it, read only."""

    name: str
    observer: _native.Observer

    def snapshot(self) -> dict[str, Any]:
        """See ``Observer.snapshot`` in ``_native.pyi``; with ``name``, and whether each process is ``alive``."""
        snapshot = {"name": self.name, **self.observer.snapshot()}
        for each in (*snapshot["by_rank"], snapshot["planner"]):
            each["alive"] = is_alive(each["process"])
        return snapshot


def find() -> list[Board]:
    """Every board that a process of this user has open, by name."""
    found: dict[tuple[int, int], Board] = {}
    for name, path in _open_segments():
        try:
            state = path.stat()
            identity = (state.st_dev, state.st_ino)
            if identity not in found:
                found[identity] = Board(name, _native.Observer(path))
        except (OSError, ValueError):
            continue  # Gone meanwhile, or of another version: not ours to read.
    return sorted(found.values(), key=lambda board: board.name)


def _open_segments() -> Iterator[tuple[str, Path]]:
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            entries = list(folder.iterdir())
        except OSError:
            continue  # Another user's, or ended.
        for entry in entries:
            try:
                name = _NAME.match(os.readlink(entry))
            except OSError:
                continue
            if name:
                yield name[1], entry


def is_alive(process: int) -> bool:
    """Whether a process of that id runs; one that ended and was not waited for yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text("ascii", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in "ZX"
