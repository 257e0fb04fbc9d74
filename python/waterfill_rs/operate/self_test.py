"""Two processes that exchange over a board for about a second: does it work here, and how long does it take?"""

from __future__ import annotations

import multiprocessing
import secrets
import time
from array import array
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from waterfill_rs import _native
from waterfill_rs.exchange.boards import board_name
from waterfill_rs.exchange.ends import BoardEnd
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.settings import BoardSettings

__all__ = ["Calls", "run"]

RANKS, EXPERTS, TOP_K, TOKENS = 2, 256, 8, 32
BURSTS, CALLS = 250, 16
"""A rank that loses its core falls behind, and the other goes on without it. As the layers of a pass do, each burst
has as many calls on both, and the next one finds them together again."""
START_S = 30.0


@dataclass(frozen=True)
class Calls:
    """Of the rank with fewer live ones; waits in microseconds."""

    calls: int
    live: int
    median_us: float
    longest_us: float


def run(settings: BoardSettings, seconds: float = 1.0) -> Calls:
    """
    Raises:
        OSError: no shared memory for the board.
        RuntimeError: a process that did not start or ended, or what it could not have.
    """
    context = multiprocessing.get_context("spawn")
    token = secrets.randbits(128)
    board = _native.Board.create(board_name(), RANKS, EXPERTS, token)
    ends, processes = [], []
    try:
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            arguments = (rank, board.path.name, token, settings, seconds, theirs)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(ours)
        for end in ends:
            _heard(end)
        begin = time.monotonic() + 0.02
        for end in ends:
            end.send(begin)
        return min((Calls(*_heard(end)) for end in ends), key=lambda calls: calls.live)
    finally:
        board.unlink()
        for process in processes:
            process.kill()
            process.join()


def _heard(end: Connection) -> tuple[Any, ...]:
    """What a process tells, which is nothing once it is attached."""
    if not end.poll(START_S):
        raise RuntimeError(f"a process of the self-test was silent for {START_S:.0f} s")
    try:
        heard: tuple[Any, ...] | str = end.recv()
    except EOFError as error:
        raise RuntimeError("a process of the self-test ended (see above)") from error
    if isinstance(heard, str):
        raise RuntimeError(heard)
    return heard


def _rank(
    rank: int,
    name: str,
    token: int,
    settings: BoardSettings,
    seconds: float,
    parent: Connection,
) -> None:
    try:
        board = _native.Board.attach(name, RANKS, EXPERTS, token)
        end = BoardEnd.open(board, Member(RANKS, EXPERTS, rank), settings, "the self-test's")
    except (OSError, RuntimeError, ValueError) as error:
        parent.send(str(error))
        return
    ids = array("i", [(7 * i + rank) % EXPERTS for i in range(TOKENS * TOP_K)])
    parent.send(())
    begin = parent.recv()
    for burst in range(BURSTS):
        time.sleep(max(0.0, begin + burst * seconds / BURSTS - time.monotonic()))
        for _ in range(CALLS):
            end.expand_array(ids, TOP_K)
    tally = end.tally()
    parent.send((tally["calls"], tally["live"], *(tally["wait_us"][n] for n in ("p50", "max"))))
    parent.recv()  # The planner stays until it is ended with the others.
