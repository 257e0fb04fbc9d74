"""Two processes that exchange over a board for about a second: does it work here, and how long does it take?"""

from __future__ import annotations

import multiprocessing
import secrets
import time
from array import array
from dataclasses import dataclass
from multiprocessing.connection import Connection

from waterfill_rs import CostModel, _native
from waterfill_rs.rendezvous import BoardSettings, board_name

__all__ = ["Rounds", "run"]

RANKS, EXPERTS, TOP_K, TOKENS = 2, 256, 8, 32
TAIL_S = 0.05
"""Both go on for so long after they counted, so that neither counts calls that the other does not make."""
PAUSE_S = 0.001
START_S = 30.0


@dataclass(frozen=True)
class Rounds:
    """Of the rank that waited longer; waits in microseconds."""

    calls: int
    live: int
    median_us: float
    longest_us: float


def run(settings: BoardSettings, seconds: float = 1.0) -> Rounds:
    """
    Raises:
        OSError: no shared memory for the board.
        RuntimeError: a process that did not start or ended.
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
            _hear(end)
        begin = time.monotonic() + 0.02
        for end in ends:
            end.send(begin)
        return max((_hear(end) for end in ends), key=lambda rounds: rounds.median_us)
    finally:
        board.unlink()
        for process in processes:
            process.kill()
            process.join()


def _hear(end: Connection) -> Rounds:
    if not end.poll(START_S):
        raise RuntimeError(f"a process of the self-test was silent for {START_S:.0f} s")
    try:
        heard: Rounds = end.recv()
    except EOFError as error:
        raise RuntimeError("a process of the self-test ended (see above)") from error
    return heard


def _rank(
    rank: int,
    name: str,
    token: int,
    settings: BoardSettings,
    seconds: float,
    parent: Connection,
) -> None:
    board = _native.Board.attach(name, RANKS, EXPERTS, token)
    # As a BoardExchange, but for being told how each round ended.
    inline = settings.pace in ("auto", "inline")
    patience_us = settings.patience_us
    port = _native.Port(
        board,
        rank,
        CostModel.rows(),
        plans_patience_us=patience_us if rank == 0 and inline else None,
    )
    planner: _native.PlannerThread | None = None
    if rank == 0 and not inline:
        planner = _native.PlannerThread(
            board, CostModel.rows(), patience_us=patience_us, pace=settings.pace
        )
    ids = array("i", [(7 * i + rank) % EXPERTS for i in range(TOKENS * TOP_K)])
    view = (ids.buffer_info()[0], TOKENS, TOP_K, 32)

    def rounds_until(end: float) -> None:
        while time.monotonic() < end:
            ended, _ = port.unsafe_quotas_ptr(view, settings.cap_us)
            if ended != "live":  # The rest of a layer would bring the ranks together again.
                time.sleep(PAUSE_S)

    parent.send("attached")
    begin = parent.recv()
    time.sleep(max(0.0, begin - time.monotonic()))
    rounds_until(begin + seconds)
    tally = port.tally()
    rounds_until(begin + seconds + TAIL_S)
    waits = tally["wait_us"]
    parent.send(Rounds(tally["calls"], tally["live"], waits["p50"], waits["max"]))
    if planner is not None:
        planner.stop()
