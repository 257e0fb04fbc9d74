"""Recorded routing in place of a router's: the ids of a forward's tokens, layer by layer. The router still runs; its weights stay.

Ids are logical wherever sglang has a map of experts: it names a physical expert for each of them afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


class Forced:
    """One rank's tables on its device.

    Which tokens come next is an index on the device, written before each forward: a captured graph reads it too.
    """

    def __init__(self, tables: list[np.ndarray], longest: int, device: Any) -> None:
        """
        Args:
            tables: for each placement ids ``[layers, tokens, K]``, all of one shape.
            longest: the most tokens of a forward, padding included.
        """
        self.tokens = tables[0].shape[1]
        joined = np.concatenate(tables, axis=1)
        self._table = torch.from_numpy(joined).to(device=device, dtype=torch.int32)
        self._range = torch.arange(longest, dtype=torch.int64, device=device)
        self._index = self._range % self.tokens

    @staticmethod
    def load(path: Path, rank: int, placements: int, longest: int, device: Any) -> Forced:
        with np.load(path) as content:
            tables = [content[key(placement, rank)] for placement in range(placements)]
        return Forced(tables, longest, device)

    def move(self, placement: int, start: int) -> None:
        """The next forward has the tokens from ``start`` on, round and round; does not wait for the device."""
        torch.add(self._range, start % self.tokens, out=self._index)
        self._index.remainder_(self.tokens).add_(placement * self.tokens)

    def into(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        """``ids`` ``[N, K or more]`` with the first K columns as recorded, in a tensor of its own.

        Raises:
            ValueError: more tokens than ``longest``.
        """
        tokens = ids.shape[0]
        if tokens > len(self._index):
            raise ValueError(
                f"a forward of {tokens} tokens, and routing is there for {len(self._index)}"
            )
        recorded = self._table[layer % len(self._table)].index_select(0, self._index[:tokens])
        recorded = recorded.to(ids.dtype)
        if ids.shape[1] == recorded.shape[1]:
            return recorded
        return torch.cat([recorded, ids[:, recorded.shape[1] :]], dim=1)


def key(placement: int, rank: int) -> str:
    """Of a table in the file."""
    return f"{placement}/{rank}"


def save(path: Path, tables: list[list[np.ndarray]]) -> None:
    """``tables``: by placement, by rank."""
    np.savez(path, **{key(p, r): own for p, of in enumerate(tables) for r, own in enumerate(of)})
