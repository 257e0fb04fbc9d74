"""R rank processes that route their own tokens and expand them live through a board, step by step.

What a model server does, less the model: each process is one expert-parallel rank, and a clock keeps the
steps together, as a model's collectives do. Ranks can be killed or stopped on the way, to see what happens.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from waterfill_rs import _native
from waterfill_rs.demo.workload import Router
from waterfill_rs.exchange.boards import board_name
from waterfill_rs.exchange.ends import BoardEnd
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.settings import BoardSettings

if TYPE_CHECKING:
    from waterfill_rs._native import PlannerSnapshot, RankSnapshot

__all__ = ["Outcome", "Setup", "run"]

Call = tuple[int, int]
"""A step and a layer."""


@dataclass(frozen=True)
class Setup:
    """``kill``, ``stall``: the steps at whose start a rank is sent SIGKILL, or SIGSTOP for ``stall_s``."""

    ranks: int
    experts: int
    top_k: int
    layers: int
    steps: int
    tokens: int
    step_s: float
    stall_s: float
    board: BoardSettings
    kill: Mapping[int, int] = field(default_factory=dict)
    stall: Mapping[int, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """``by_rank``: each rank's tally, as it stood on the board at the end; ``planner``: the planner's;
    ``quotas``: for each call those of the ranks that made it; ``lost``: exit codes of ranks that ended early.
    """

    by_rank: Sequence[RankSnapshot]
    planner: PlannerSnapshot
    quotas: dict[Call, dict[int, list[int]]]
    lost: dict[int, int]


def run(setup: Setup, streams: Sequence[Sequence[int]], progress: Callable[[int], None]) -> Outcome:
    """Run all steps; ``streams``: each rank's tokens, ``steps * tokens`` of them.

    Raises:
        OSError: no shared memory for the board.
        RuntimeError: ranks that neither ended nor died; they are killed first.
    """
    context = multiprocessing.get_context("spawn")
    run_token = secrets.randbits(128)
    board = _native.Board.create(board_name(), setup.ranks, setup.experts, run_token)
    processes, ends = [], []
    try:
        for rank, stream in enumerate(streams):
            ours, theirs = context.Pipe()
            arguments = (setup, rank, str(board.path.name), run_token, list(stream), theirs)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        watch = _Watch(setup, processes, ends, progress)
        watch.start(board.unlink)
        watch.until_all_ended()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
        board.unlink()
    lost = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
    snapshot = board.snapshot()
    return Outcome(snapshot["by_rank"], snapshot["planner"], watch.quotas, lost)


class _Watch:
    """The parent's side: gathers what ranks tell, and wakes the stopped ones."""

    def __init__(
        self,
        setup: Setup,
        processes: Sequence[Any],
        ends: Sequence[Connection],
        progress: Callable[[int], None],
    ) -> None:
        self._setup = setup
        self._processes = processes
        self._open = dict(enumerate(ends))
        self._progress = progress
        self._stopped: dict[int, float] = {}
        self.quotas: dict[Call, dict[int, list[int]]] = {}

    def start(self, when_attached: Callable[[], None]) -> None:
        """Once every rank is at the board, all begin together."""
        for rank, end in self._open.items():
            if not end.poll(60):
                raise RuntimeError(f"rank {rank} did not start within 60 s")
            try:
                end.recv()
            except EOFError as error:
                raise RuntimeError(f"rank {rank} ended before it began (see above)") from error
        when_attached()
        begin = time.monotonic() + 0.05
        for end in self._open.values():
            end.send(begin)

    def until_all_ended(self) -> None:
        setup = self._setup
        longest = 60 + 20 * setup.steps * (setup.step_s + setup.layers * setup.board.cap_us / 1e6)
        deadline = time.monotonic() + longest
        while self._open:
            for end in wait(list(self._open.values()), timeout=0.02):
                self._hear(next(rank for rank, one in self._open.items() if one is end))
            now = time.monotonic()
            # Again and again until it is heard of: it tells before it stops, and may not have stopped yet.
            for rank in [rank for rank, until in self._stopped.items() if until <= now]:
                os.kill(self._processes[rank].pid, signal.SIGCONT)
            if now > deadline:
                raise RuntimeError(
                    f"ranks {sorted(self._open)} neither ended nor died in {longest:.0f} s"
                )

    def _hear(self, rank: int) -> None:
        self._stopped.pop(rank, None)
        try:
            step, layers = self._open[rank].recv()
        except (EOFError, OSError):
            del self._open[rank]
            return
        if layers is None:
            self._stopped[rank] = time.monotonic() + self._setup.stall_s
            return
        for layer, quotas in enumerate(layers):
            self.quotas.setdefault((step, layer), {})[rank] = quotas
        if rank == min(self._open):
            self._progress(step + 1)


def _rank(
    setup: Setup, rank: int, name: str, run_token: int, stream: list[int], parent: Connection
) -> None:
    """A rank process."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent too, which ends all ranks.
    board = _native.Board.attach(name, setup.ranks, setup.experts, run_token)
    member = Member(setup.ranks, setup.experts, rank)
    end = BoardEnd.open(board, member, setup.board, "the demo's")
    routers = [Router(setup.experts, setup.top_k, layer) for layer in range(setup.layers)]
    for router in routers:
        router.route(stream)  # A model is loaded before it serves: the tables are filled.
    parent.send("attached")
    begin = parent.recv()
    for step in range(setup.steps):
        time.sleep(max(0.0, begin + step * setup.step_s - time.monotonic()))
        if setup.kill.get(rank) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if setup.stall.get(rank) == step:
            parent.send((step, None))
            os.kill(os.getpid(), signal.SIGSTOP)
        tokens = stream[step * setup.tokens : (step + 1) * setup.tokens]
        parent.send((step, [_expand(router, tokens, end, setup) for router in routers]))
    # Others may still be on their last steps, and the leader plans for them.
    if rank == 0:
        time.sleep(min(1.0, 4 * setup.step_s))
    end.close()
    parent.close()


def _expand(router: Router, tokens: Sequence[int], end: BoardEnd, setup: Setup) -> list[int]:
    """One layer of one step; gives the quotas, once the expanded ids are seen to meet them."""
    expanded = end.expand_array(router.route(tokens), setup.top_k)
    slots = setup.experts // setup.ranks + 1
    sent = [0] * setup.ranks
    for shared in expanded[setup.top_k :: setup.top_k + 1]:
        sent[shared // slots] += 1
    if sent != end.quotas:
        raise RuntimeError(
            f"rank {end.member.rank} sent {sent} shared rows, its quotas are {end.quotas}"
        )
    return sent
