"""Recordings of expert routing, read and checked: what sglang's recorder writes and ``--init-expert-location`` reads.

``recordings`` has modes per_token and per_pass, ``logical_counts`` what holds ``logical_count``. No file holds the
EP size: it is the number of ranks that recorded, or has to be said; nor top-k: it is the columns in use, or has to be said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waterfill_rs.replay import dump_files, logical_counts, recordings
from waterfill_rs.replay.recorded import ANY_TOP_K, Counts, Dump, Tokens

__all__ = ["ANY_TOP_K", "Counts", "Dump", "Tokens", "read", "read_map"]


def read(
    paths: Sequence[Path], ranks: int | None, top_k: int | None, *, placed_anew: bool = False
) -> Tokens | Counts:
    """Read one recording.

    Args:
        paths: its files, or their folder, or JSON text; beside ``logical_count`` one file with
            ``physical_to_logical_map``.
        ranks: EP size; None for the number of ranks that recorded.
        top_k: routed experts a token; None where the tokens tell; ANY_TOP_K where rows alone matter.
        placed_anew: its experts will be placed for other ranks, so counts over all ranks are read as of one.

    Raises:
        ValueError: naming file, field and number, for anything that is not such a recording, or not whole.
    """
    contents, notes = dump_files.load_all(paths)
    counts = [(file, content) for file, content in contents if _has(content, "logical_count")]
    maps = [
        (file, content)
        for file, content in contents
        if _has(content, logical_counts.MAP) and not _has(content, "logical_count")
    ]
    others = [(file, content) for file, content in contents if not _is_counts_or_map(content)]
    if maps:
        _check_maps(maps, counts, others)
    if counts and others:
        raise ValueError(
            f"{others[0][0]}: has no 'logical_count', {counts[0][0]} has: give files of one recording"
        )
    if counts:
        placed = maps[0] if maps else None
        dump: Tokens | Counts = logical_counts.read(
            counts, placed, ranks, top_k, placed_anew=placed_anew
        )
    else:
        dump = recordings.read(others, ranks, top_k)
    dump.notes.extend(notes)
    return dump


def read_map(file: Path) -> Any:
    """What a file (or JSON text) with a ``physical_to_logical_map`` holds; None for any other, and for a folder."""
    if os.path.isdir(file):
        return None
    ((_, content),) = dump_files.load_all([file])[0]
    return content if _has(content, logical_counts.MAP) else None


def _has(content: Any, field: str) -> bool:
    return isinstance(content, dict) and field in content


def _is_counts_or_map(content: Any) -> bool:
    return _has(content, "logical_count") or _has(content, logical_counts.MAP)


def _check_maps(
    maps: list[tuple[str, Any]], counts: list[tuple[str, Any]], others: list[tuple[str, Any]]
) -> None:
    if others:
        raise ValueError(
            f"{maps[0][0]}: a physical_to_logical_map beside {others[0][0]}: a recording has its own map, "
            "so give it alone"
        )
    if len(maps) > 1:
        raise ValueError(f"{maps[1][0]}: a second physical_to_logical_map: give one at a time")
    if not counts:
        raise ValueError(
            f"{maps[0][0]}: physical_to_logical_map tells where experts lie and not what was routed: "
            "give a file with 'logical_count' beside it"
        )
