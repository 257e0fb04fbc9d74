"""What an engine's driver tells its ranks: words in a file that all map. They change only while no round runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MOST_RANKS = MOST_MODES = 8
CLOSED = 2**62
"""In ``gate``: no turn of the scheduler comes to it."""

TIMED, ROWS, PROFILED, MIXED, ANSWERED, LAYERS = range(6)
"""Kinds of a round: forwards are timed, rows are counted, forwards are profiled, requests come over time, answers are
compared, outputs of layers are compared."""
OPEN = 0
"""In ``gate``: every turn of the scheduler has come to it."""

_SCALARS = (
    "round",
    "kind",
    "tokens",  # a rank and forward that counts
    "requests",  # of the round, over all ranks
    "chunk",  # the scheduler's chunked_prefill_size
    "lead",  # forwards at the begin that do not count
    "base",  # the place of the first that does, in forwards of the recording
    "placement",  # its table; in a mixed round that of prefill, and the next one is that of decode
    "location",  # of experts, among those that the engine was told
    "length",  # of the cycle of modes
    "gate",  # the scheduler's turn from which requests are let in
    "asked",  # the round whose results are to be written
)
_LISTS = {"cycle": MOST_MODES, "queued": MOST_RANKS, "written": MOST_RANKS}
_PLACES = {name: i for i, name in enumerate(_SCALARS)}
_STARTS = {name: len(_SCALARS) + sum(list(_LISTS.values())[:i]) for i, name in enumerate(_LISTS)}
WORDS = len(_SCALARS) + sum(_LISTS.values())


class Control:
    """The words of one engine, 64 bits each, which are written and read whole."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(8 * WORDS))
        self._words = np.memmap(path, dtype=np.int64, mode="r+", shape=(WORDS,))
        if create:
            self.set(gate=CLOSED)

    def get(self, name: str) -> int:
        return int(self._words[_PLACES[name]])

    def set(self, **values: int) -> None:
        """In the order given."""
        for name, value in values.items():
            self._words[_PLACES[name]] = value

    def list(self, name: str) -> np.ndarray:
        """``cycle``, or ``queued`` and ``written`` with a word a rank: a view."""
        return self._words[_STARTS[name] : _STARTS[name] + _LISTS[name]]
