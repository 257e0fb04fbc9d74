"""Routing to look at without a model: real text through a hash router, as DeepSeek V4's first layers do.

There a token's experts come from a table by token id, not from its context. So the routing of real text
through such a layer is real but for the table, which is drawn at random here.
"""

from __future__ import annotations

import random
import re
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

from waterfill_rs._native import MAX_EXPERTS

__all__ = ["Router", "documents", "tokenize"]

VOCABULARY = 129_280  # DeepSeek V3's and V4's
_WORD = re.compile(r"[A-Za-z]+|[0-9]+|\n *| +|[^\w\s]|\w")


def tokenize(text: str) -> list[int]:
    """Words, numbers, indents and signs as token ids: a stable hash of each into the vocabulary."""
    return [
        crc32(word.encode("utf-8", "surrogatepass")) % VOCABULARY for word in _WORD.findall(text)
    ]


def documents(paths: Sequence[str]) -> Iterator[list[int]]:
    """The tokens of each file, folders searched for ``*.py``; the standard library's if no path is given.

    Raises:
        OSError: a path that cannot be read.
    """
    for path in paths or [sysconfig.get_path("stdlib")]:
        root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        files = sorted(root.glob("*.py")) if root.is_dir() else [root]
        for file in files:
            tokens = tokenize(file.read_text(encoding="utf-8", errors="replace"))
            if tokens:
                yield tokens


class Router:
    """A layer's table of token id to ``top_k`` different experts of ``experts``; fixed by ``layer``."""

    def __init__(self, experts: int, top_k: int, layer: int) -> None:
        if not 1 <= top_k <= experts:
            raise ValueError(f"top-k {top_k}: give 1 to {experts}, the number of experts")
        if experts > MAX_EXPERTS:
            raise ValueError(f"{experts} experts: at most {MAX_EXPERTS} are supported")
        self.experts, self.top_k, self.layer = experts, top_k, layer
        self._rows: dict[int, list[int]] = {}

    def route(self, tokens: Sequence[int]) -> array[int]:
        """Expert ids ``[N, top_k]``, row-major int32."""
        ids = array("i")
        for token in tokens:
            row = self._rows.get(token)
            if row is None:
                rng = random.Random(self.layer * VOCABULARY + token)
                row = self._rows[token] = rng.sample(range(self.experts), self.top_k)
            ids.extend(row)
        return ids
