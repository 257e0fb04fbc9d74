"""Files that commands write: looked at before hours of work, and whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["check_outputs", "whole", "write_json"]


def check_outputs(*paths: Path | None) -> None:
    """Before hours of work: could these files be written? None: it was not asked for.

    Raises:
        ValueError: naming the file and what is in the way.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        if sum(path.absolute() == other.absolute() for other in given) > 1:
            raise ValueError(f"{path}: is given for two outputs: give each its own file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not path.name or path.is_dir():
            raise ValueError(f"{path}: cannot be written: give a file, not a folder")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: cannot be written: {folder} is no folder to write in")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it is written, and goes if it cannot be."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        if partial.is_file():
            partial.unlink()


def write_json(path: Path, **fields: object) -> None:
    """An object with these fields; the file is whole or not there.

    ``rows`` and ``compared``, a list of objects that have ``rows`` too, may be iterators. Each row is one line:
    a recording has hundreds of thousands, and json's encoder is slow where it indents.

    Raises:
        ValueError: naming a file that cannot be written.
    """
    check_outputs(path)
    with whole(path) as partial, partial.open("w", encoding="utf-8") as opened:
        opened.writelines(_object(fields))


def _object(fields: Mapping[str, Any]) -> Iterator[str]:
    for number, (name, value) in enumerate(fields.items()):
        yield f'{"," if number else "{"}\n"{name}": '
        if name == "compared":
            yield from _list(map(_object, value))
        elif name == "rows":
            yield from _list([json.dumps(row)] for row in value)
        else:
            yield json.dumps(value, indent=1)
    yield "\n}"


def _list(entries: Iterable[Iterable[str]]) -> Iterator[str]:
    yield "["
    for number, parts in enumerate(entries):
        yield ",\n" if number else "\n"
        yield from parts
    yield "\n]"
