"""All-gathers of a rank's words, round by round, over gloo connections that may be late, break, and come back.

The connections are made beside the model's own process group: a collective that is given up breaks its group for good.
A round that does not come in time is left to come later, so ranks stay in step. When one fails, or too many are to
come, all ranks leave the connections, make new ones through the store on a thread, and go on at a call that they agree on.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["Limits", "Link"]

logger = logging.getLogger(__name__)
_distributed: Any = torch.distributed

BREAK_AFTER = 2
"""After so many late rounds in a row a rank waits for another if those before it have come, or now and then."""
TRY_EVERY = 64
"""Then: in one call of so many, which all ranks count alike. A rank that is calls ahead lets the others catch up there."""
MOST_PENDING = 256
"""Rounds that may be to come."""
LEAST_AHEAD = 64
"""Calls that ranks make at least between agreeing on where they go on and going on there."""
_LOOK_S, _LONGEST_LOOK_S = 0.05, 2.0


@dataclass(frozen=True)
class Limits:
    """Seconds. ``wait``: a call's longest. ``lost``: a round that takes longer fails, and its connections with it."""

    wait: float = 1.0
    lost: float = 10.0


class Link:
    """One rank's end. All ranks make it, and gather in the same order; its keys in ``store`` begin with ``link/``.

    Raises:
        RuntimeError: a rank did not come within ``limits.lost``, or cannot be reached; no gloo in this torch.
    """

    def __init__(self, store: Any, rank: int, ranks: int, limits: Limits | None = None) -> None:
        if not _distributed.is_gloo_available():
            raise RuntimeError("this torch has no gloo, by which ranks on the CPU exchange counts")
        self.tally = {"live": 0, "timed_out": 0, "broken": 0}
        self._store, self._rank, self._ranks = store, rank, ranks
        self._limits = limits or Limits()
        self._calls = 0
        self._late = 0  # Rounds in a row.
        self._pending: deque[Any] = deque()  # Rounds to come, which hold their tensors.
        self._attempt = 0
        self._joined: tuple[Any, int] | None = None  # Of the thread, for `gather`.
        self._closed = threading.Event()
        self._joining: list[threading.Thread] = []
        self._group: Any = self._connect(store)
        # A thread that frees connections when the interpreter has ended aborts the process, so it is ended before.
        most = self._limits.lost + _LONGEST_LOOK_S
        self._end = weakref.finalize(self, _end, self._closed, self._joining, most)

    def gather(self, own: Tensor) -> Tensor | None:
        """All ranks' words, int32 ``[ranks, words]``; None if they did not come in time. Waits ``limits.wait`` at most.

        Args:
            own: this rank's, int32 ``[words]`` on the CPU. Not to be written to afterwards: it may still be sent.
        """
        self._calls += 1
        self._go_on_with_new_connections()
        result, gathered = "broken", None
        if self._group is not None:
            try:
                result, gathered = self._round(own)
            except RuntimeError as error:
                self._lose(str(error))
        self.tally[result] += 1
        self._tell_changes(result == "live")
        return gathered

    def close(self) -> None:
        """Make no new connections from now on. Waits for the thread that did, about as long as a lost round at most."""
        self._end()

    def _round(self, own: Tensor) -> tuple[str, Tensor | None]:
        """How it ended, and what it brought."""
        gathered = own.new_empty((self._ranks, len(own)))
        work = self._group.allgather([list(gathered.unbind())], [own])
        self._pending.append(work)
        while self._pending[0] is not work and self._pending[0].is_completed():
            self._pending.popleft().wait()  # It failed if that raises.
        caught_up = self._pending[0] is work
        waits = self._late < BREAK_AFTER or caught_up or self._calls % TRY_EVERY == 0
        if self._has_come(work, self._limits.wait if waits else 0):
            return "live", gathered
        if len(self._pending) > MOST_PENDING:
            raise RuntimeError(f"{len(self._pending)} rounds did not come")
        return "timed_out" if waits else "broken", None

    def _has_come(self, work: Any, seconds: float) -> bool:
        if seconds == 0 and not work.is_completed():
            return False
        try:
            work.wait(timedelta(seconds=seconds or 1))
        except RuntimeError:
            if work.is_completed():  # It failed; else it is late.
                raise
            return False
        return True

    def _tell_changes(self, live: bool) -> None:
        if live and self._late >= BREAK_AFTER:
            logger.info(
                "waterfill-rs: exchange group: live again, after %d calls from own counts",
                self._late,
            )
        self._late = 0 if live else self._late + 1
        if self._late == BREAK_AFTER and self._group is not None:
            logger.warning(
                "waterfill-rs: exchange group: %d rounds in a row took over %g s: plans are from own counts until "
                "rounds come in time again",
                BREAK_AFTER,
                self._limits.wait,
            )

    def _lose(self, reason: str) -> None:
        """Leave these connections for new ones."""
        logger.warning(
            "waterfill-rs: exchange group: connections to the other ranks are lost (%s): plans are from own counts "
            "until all ranks are joined again",
            reason,
        )
        lost = self._group, self._pending
        self._group, self._pending, self._late = None, deque(), max(self._late, BREAK_AFTER)
        thread = threading.Thread(
            target=self._join_again, args=lost, name="waterfill-link", daemon=True
        )
        thread.start()
        self._joining[:] = [*filter(threading.Thread.is_alive, self._joining), thread]

    def _go_on_with_new_connections(self) -> None:
        if self._group is None and self._joined is not None:
            group, first = self._joined
            if self._calls < first:
                return
            self._joined, self._group = None, group
            if self._calls > first:  # The others wait there: they will lose it too.
                self._lose(f"call {self._calls} came before call {first} was agreed on")

    # On the thread.

    def _join_again(self, lost: Any, pending: deque[Any]) -> None:
        self._make_new_connections()
        # Freed with work to do, a group waits for it, and everybody with it: so this thread keeps the lost one.
        while not all(work.is_completed() for work in pending):
            time.sleep(_LOOK_S)

    def _make_new_connections(self) -> None:
        looks, level = _LOOK_S, logging.INFO
        while not self._closed.is_set():
            try:
                # A connection of its own: a request without an answer holds the others on its connection.
                store = self._store.clone() if hasattr(self._store, "clone") else self._store
                self._meet(store)
                if not self._closed.is_set():
                    self._joined = self._agree(self._connect(store))
                return
            except RuntimeError as error:
                # The first tells; a store that is gone would fill the log.
                logger.log(level, "waterfill-rs: exchange group: not joined yet: %s", error)
                level = logging.DEBUG
                self._closed.wait(looks)
                looks = min(2 * looks, _LONGEST_LOOK_S)

    def _meet(self, store: Any) -> None:
        """Wait until all ranks want this attempt."""
        store.set(f"link/{self._attempt}/here/{self._rank}", "")
        keys = [f"link/{self._attempt}/here/{rank}" for rank in range(self._ranks)]
        looks = _LOOK_S
        while not self._closed.is_set() and not store.check(keys):
            self._closed.wait(looks)
            looks = min(1.5 * looks, _LONGEST_LOOK_S)

    def _connect(self, store: Any) -> Any:
        """Each attempt has keys of its own: what a failed one left there would lead astray."""
        prefix, self._attempt = f"link/{self._attempt}/gloo", self._attempt + 1
        return _distributed.ProcessGroupGloo(
            _distributed.PrefixStore(prefix, store),
            self._rank,
            self._ranks,
            timeout=timedelta(seconds=self._limits.lost),
        )

    def _agree(self, group: Any) -> tuple[Any, int]:
        """The call at which all go on: one that none of them makes in the second from here on, as calls now come."""
        before, begun = self._calls, time.monotonic()
        self._closed.wait(0.1)
        a_second = (self._calls - before) / (time.monotonic() - begun)
        first = torch.tensor([self._calls + LEAST_AHEAD + int(a_second)])
        group.allreduce([first], _distributed.ReduceOp.MAX).wait()
        return group, int(first)


def _end(closed: threading.Event, joining: list[threading.Thread], seconds: float) -> None:
    closed.set()
    for thread in joining:
        if thread is not threading.current_thread():
            thread.join(seconds)
