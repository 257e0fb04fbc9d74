"""The boards of this host: what they are called, and how they are found and read from outside.

A board's name is gone once its ranks are attached, but each of them keeps it open: so it is found under
``/proc``, at any process of this user that has one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from waterfill_rs import _native

if TYPE_CHECKING:
    from waterfill_rs._native import Snapshot

    class NamedSnapshot(Snapshot):
        """With the board's name."""

        name: str


__all__ = ["SHARED_MEMORY", "Board", "board_name", "find", "is_board_name", "is_left_behind"]

SHARED_MEMORY = Path(_native.SHARED_MEMORY)
"""Where Linux keeps POSIX shared memory, and a board its name until all ranks are attached."""
_PREFIX = "waterfill-rs-"
_OPEN = re.compile(rf"{SHARED_MEMORY}/({_PREFIX}\S+)")


def board_name() -> str:
    """Of a new board: this process's, and unlike any other."""
    return f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def is_board_name(name: str) -> bool:
    """Whether ``board_name`` gives such names."""
    return re.fullmatch(rf"{_PREFIX}\d+-[0-9a-f]+", name) is not None


@dataclass(frozen=True)
class Board:
    """``name``: as its creator called it. ``observer``: looks at it, read only."""

    name: str
    observer: _native.Observer

    def snapshot(self) -> NamedSnapshot:
        """What ranks and planner counted until now: ``Snapshot`` of ``_native.pyi``, with ``name``."""
        return {"name": self.name, **self.observer.snapshot()}


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
                name = _OPEN.match(os.readlink(entry))
            except OSError:
                continue
            if name:
                yield name[1], entry


def is_left_behind(path: Path) -> bool:
    """Whether the creator of the board at ``path``, a name in /dev/shm, is gone: the kernel has freed its lock."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # Gone meanwhile, or another user's.
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
