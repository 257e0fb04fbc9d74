"""The files of a recording: which ones a folder holds, and what is in each, by its bytes and not by its name.

torch files are read with ``weights_only=True``, which runs no code. What is neither a torch file nor JSON is
refused by what it is.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["is_read", "load_all", "name_of"]

_FOREIGN = {
    b"\x93NUMPY": "a numpy array",
    b"PAR1": "a parquet table",
    b"\x89HDF": "an HDF5 file",
    b"\x28\xb5\x2f\xfd": "a zstd archive, which has to be unpacked",
    b"\xfd7zXZ": "an xz archive, which has to be unpacked",
    b"BZh": "a bzip2 archive, which has to be unpacked",
    b"version https://git-lfs": "a pointer of Git LFS, whose file `git lfs pull` brings",
    b"<": "an HTML or XML page",
}
"""By the bytes at their start."""

_SUFFIXES = (".pt", ".pth", ".json")

_TEXT = "the JSON text"

_NEEDED = "give sglang's torch file, or JSON with 'logical_count'"


def name_of(path: Path) -> str:
    """What to call it: JSON text has no name."""
    return _TEXT if _is_text(path) else str(path)


def is_read(file: Path, paths: Sequence[Path]) -> bool:
    """Is ``file`` one of those that ``load_all`` reads?"""
    there = [path for path in paths if os.path.exists(path)]
    files = [one for path in there for one in (_of_folder(path)[0] if path.is_dir() else [path])]
    return any(file.resolve() == one.resolve() for one in files)


def load_all(paths: Sequence[Path]) -> tuple[list[tuple[str, Any]], list[str]]:
    """What the files, folders and JSON texts hold: a name and a content each, and notes on what was left out.

    Raises:
        ValueError: naming the file, for what is not there or cannot be read.
    """
    contents: list[tuple[str, Any]] = []
    notes: list[str] = []
    seen: set[Path] = set()
    again = 0
    for path in paths:
        if _is_text(path):
            contents.append((_TEXT, _json(_TEXT, str(path))))
            continue
        if not os.path.exists(path):  # which takes a name that is too long, too
            raise ValueError(f"{path}: there is no such file or folder")
        files, left_out = _of_folder(path) if path.is_dir() else ([path], [])
        new = [file for file in files if file.resolve() not in seen]
        again += len(files) - len(new)
        seen.update(file.resolve() for file in new)
        contents += [(str(file), _load(file)) for file in new]
        if left_out:
            names = ", ".join(file.name for file in left_out[:4]) + ", ..." * (len(left_out) > 4)
            notes.append(f"Of {path}, {len(left_out)} files were not read: {names}.")
    if again:
        notes.append(f"Files that were given twice were read once: {again}.")
    return contents, notes


def _is_text(path: Path) -> bool:
    """JSON in place of a path, as ``--init-expert-location`` takes it."""
    return str(path).lstrip()[:1] in ("{", "[") and not os.path.exists(path)


def _of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The recorder's files by their names; else all torch files; else all JSON. And the other torch and JSON files."""
    # Hidden ones are of the system: macOS writes ._NAME beside NAME.
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    torches = [file for file in files if _suffix(file) in (".pt", ".pth")]
    recorders = [f for f in torches if f.name.startswith("expert_distribution_recorder_")]
    jsons = [file for file in files if _suffix(file) == ".json"]
    chosen = recorders or torches or jsons
    if not chosen:
        below = sorted({one.parent.name for one in folder.glob("*/*") if _suffix(one) in _SUFFIXES})
        but = f", but in its folders {', '.join(below[:8])}: give these" if below else ""
        raise ValueError(f"{folder}: no *.pt and no *.json file in this folder{but}")
    return chosen, [file for file in torches if file not in chosen]


def _suffix(file: Path) -> str:
    """In lower case, without gzip's."""
    name = file.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _load(file: Path) -> Any:
    if file.is_fifo():  # a shell's <(command), which has no size and goes one way
        content = file.read_bytes()
        return _opened(file, io.BytesIO(content), len(content))
    with file.open("rb") as opened:
        return _opened(file, opened, file.stat().st_size)


def _opened(file: Path, opened: BinaryIO, size: int) -> Any:
    if size == 0:
        raise ValueError(f"{file}: the file is empty (0 bytes)")
    if opened.read(2) != b"\x1f\x8b":
        return _read(str(file), opened, size)
    opened.seek(0)
    try:
        unpacked = gzip.GzipFile(fileobj=opened).read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error}), {size} bytes") from error
    if not unpacked:
        raise ValueError(f"{file}: a gzip file of nothing (0 bytes)")
    return _read(f"{file} (unpacked)", io.BytesIO(unpacked), len(unpacked))


def _read(name: str, stream: BinaryIO, size: int) -> Any:
    stream.seek(0)
    head = stream.read(512)
    stream.seek(0)
    if head.startswith(b"PK"):
        return _zip(name, stream, size)
    if head.startswith(b"\x80"):
        return _torch(name, stream, size)
    foreign = _foreign(head, size)
    if foreign:
        raise ValueError(f"{name}: {foreign}: {_NEEDED}")
    try:
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = stream.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: neither a torch file nor JSON (it begins with {head[:8]!r}), {size} bytes: {_NEEDED}"
        ) from error
    return _json(name, text)


def _foreign(head: bytes, size: int) -> str | None:
    """What the file is, if it is of a known kind that holds no recording."""
    for start, kind in _FOREIGN.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive, which has to be unpacked"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file"
    return None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        columns = _columns_of_csv(text)
        if columns:
            raise ValueError(
                f"{name}: a CSV with the columns {', '.join(columns)}, as old recorders wrote: "
                'record anew, or give its counts as JSON, {"logical_count": [[...], ...]}, layers by experts'
            ) from error
        raise ValueError(f"{name}: not JSON ({error}), {len(text)} bytes: {_NEEDED}") from error


def _columns_of_csv(text: str) -> list[str]:
    """Its first line's fields, if its lines have equally many, two or more."""
    lines = text.splitlines()[:3]
    if not lines or text.lstrip()[:1] in ("{", "["):
        return []
    for separator in (",", "\t", ";"):
        fields = [line.split(separator) for line in lines]
        if len(fields[0]) > 1 and all(len(line) == len(fields[0]) for line in fields):
            return [field.strip() for field in fields[0][:8]]
    return []


def _zip(name: str, stream: BinaryIO, size: int) -> Any:
    """A torch file, if it is one: other zip archives are named by what they hold."""
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{name}: not a whole torch file ({error}), {size} bytes") from error
    if not any(member.endswith("/data.pkl") for member in members):
        held = ", ".join(members[:4]) + ", ..." * (len(members) > 4)
        raise ValueError(f"{name}: a zip archive of {held or 'nothing'}: {_NEEDED}")
    if any(member.endswith("/constants.pkl") for member in members):
        raise ValueError(f"{name}: a TorchScript program: {_NEEDED}")
    stream.seek(0)
    return _torch(name, stream, size)


def _torch(name: str, stream: BinaryIO, size: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on files that are refused next
            return torch.load(stream, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise ValueError(
                f"{name}: holds {found[1]}, a class or function: only tensors, numbers, texts, lists and "
                "dicts are read, as reading anything else runs code of the file: save it without that"
            ) from error
        whole = _is_whole(stream)
        kind = "a pickle that is no file of torch.save" if whole else "not a whole torch file"
        raise ValueError(f"{name}: {kind} ({type(error).__name__}), {size} bytes") from error


def _is_whole(stream: BinaryIO) -> bool:
    """Does the archive have all its bytes, or the pickle its last one (STOP)?"""
    stream.seek(0)
    if stream.read(2) == b"PK":
        try:
            with zipfile.ZipFile(stream) as archive:
                return archive.testzip() is None
        except (zipfile.BadZipFile, ValueError, OSError):
            return False
    stream.seek(-1, io.SEEK_END)
    return stream.read() == b"."
