"""Holds a round's requests back until all ranks have theirs, so that each forward is full on every rank from the first on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from server.control import CLOSED, Control

TURNS_AHEAD = 3
"""The scheduler's loops of all ranks go in step, by a collective each turn: a turn that is this far off is the same for all."""
NAP_S = 0.001
"""Each turn between rounds: an engine that waits must not take cores from the one that runs."""


class Gate:
    """Around ``Scheduler.get_new_batch_prefill``, which is called once a turn."""

    def __init__(self, control: Control, rank: Callable[[], int], ranks: int) -> None:
        self._control, self._rank, self._ranks = control, rank, ranks
        self._turn = 0

    def hook(self, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """While the gate is closed the scheduler sees an empty queue."""
        self._turn += 1
        if chunk := self._control.get("chunk"):
            scheduler.chunked_prefill_size = chunk
        if self._open(len(scheduler.waiting_queue)):
            return original(scheduler, *args, **kwargs)
        held, scheduler.waiting_queue = scheduler.waiting_queue, []
        try:
            return original(scheduler, *args, **kwargs)
        finally:
            scheduler.waiting_queue = held
            time.sleep(NAP_S)

    def _open(self, queued: int) -> bool:
        control, rank = self._control, self._rank()
        if control.get("gate") <= self._turn:
            return True
        control.list("queued")[rank] = queued
        waiting = control.get("gate") == CLOSED and control.get("requests") > 0
        if rank == 0 and waiting:
            all_queued = int(control.list("queued")[: self._ranks].sum())
            if all_queued >= control.get("requests"):
                control.set(gate=self._turn + TURNS_AHEAD)
        return False
