"""Two rank processes on the GPU over one board: a peer that is killed or stopped in the middle of a layer.

Without MPS, which a killed client may take down with all others: processes take turns on the GPU, so caps are long.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from waterfill_rs import CostModel, _native
from waterfill_rs.cuda import Expander

EXPERTS, TOP_K, RANKS, ROWS = 48, 6, 2, 100
CAP_US, PATIENCE_US = 2_000_000, 100_000


class Rank:
    """A rank in a process of its own, that makes a call when told to."""

    def __init__(self, rank: int, name: str, run: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(rank), name, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self):
        return json.loads(self.process.stdout.readline())

    def tell(self, command: str) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[dict[str, int], float]:
        """How its calls ended so far, and the seconds that the last one took."""
        tally, seconds = self._answer()
        return tally, seconds

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def rank_process(rank: int, name: str, run: int) -> None:
    board = _native.Board.attach(name, RANKS, RANKS, run)
    _end = _native.DeviceEnd(board, rank, False)
    expander = Expander(
        "cuda", physical_experts=EXPERTS, ranks=RANKS, rank=rank, top_k=TOP_K, board=board
    )
    random = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, EXPERTS, (ROWS, TOP_K), generator=random).int().cuda()
    weights = torch.ones((ROWS, TOP_K), device="cuda")
    expander(ids, weights, 0.4)
    torch.cuda.synchronize()
    print(json.dumps("ready"), flush=True)
    for command in sys.stdin:
        begun = time.perf_counter()
        out, _ = expander(ids, weights, 0.4, cap_us=CAP_US)
        if command.strip() == "launch":
            print(json.dumps("launched"), flush=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        assert bool((out[:, -1] % (EXPERTS // RANKS + 1) == EXPERTS // RANKS).all())
        print(json.dumps([expander.tally(), seconds]), flush=True)


@pytest.fixture
def node():
    """Two ranks and the planner's thread."""
    name, run = f"waterfill-test-{os.getpid()}-{secrets.token_hex(4)}", secrets.randbits(120)
    board = _native.Board.create(name, RANKS, RANKS, run)
    ranks = [Rank(rank, name, run) for rank in range(RANKS)]
    planner = _native.PlannerThread(board, CostModel.rows(), patience_us=PATIENCE_US, pace="spin")
    yield ranks, planner
    for rank in ranks:
        rank.kill()
    planner.stop()
    board.unlink()


def together(ranks: list[Rank], calls: int) -> list[dict[str, int]]:
    for _ in range(calls):
        for rank in ranks:
            rank.tell("call")
        tallies = [rank.ended()[0] for rank in ranks]
    return tallies


def alone(rank: Rank, calls: int) -> tuple[dict[str, int], list[float]]:
    taken = []
    for _ in range(calls):
        rank.tell("call")
        tally, seconds = rank.ended()
        taken.append(seconds)
    return tally, taken


def shares_gpu_by_mps() -> bool:
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return (Path(folder) / "control").exists()


@pytest.mark.skipif(shares_gpu_by_mps(), reason="MPS runs: it ends all that share a killed one's")
@pytest.mark.parametrize("launched", [False, True])
def test_a_peer_is_killed(node, launched):
    (first, second), planner = node
    assert [tally["live"] for tally in together([first, second], 10)] == [10, 10]
    if launched:
        # Its kernel has posted, and waits for a plan that cannot come: the other's counts are missing, and it lives.
        second.tell("launch")
        assert second._answer() == "launched"
        time.sleep(0.02)
    second.kill()
    # Past the planner's patience with this rank that call has no plan, for either.
    time.sleep(2 * PATIENCE_US / 1e6)
    missed = 1 if launched else 0
    tally, seconds = alone(first, 20)
    assert tally == {"live": 30 - missed, "none": missed, "timed_out": 0, "broken": 0, "torn": 0}
    assert max(seconds) < PATIENCE_US / 1e6, f"a killed peer is not waited for: {seconds}"
    planner.stop()
    time.sleep(0.1)  # The watch looks every few milliseconds.
    tally, seconds = alone(first, 20)
    expected = {"live": 30 - missed, "none": missed, "timed_out": 0, "broken": 20, "torn": 0}
    assert tally == expected and max(seconds) < 0.05, seconds


def test_a_peer_is_stopped_and_goes_on(node):
    (first, second), _ = node
    together([first, second], 10)
    second.process.send_signal(signal.SIGSTOP)
    second.tell("call")
    tally, (seconds,) = alone(first, 1)
    assert tally["none"] == 1 and PATIENCE_US / 2e6 < seconds < CAP_US / 1e6
    second.process.send_signal(signal.SIGCONT)
    tally, seconds = second.ended()
    assert (tally["live"], tally["none"]) == (10, 1) and seconds < CAP_US / 1e6
    before = [tally["live"] for tally in together([first, second], 1)]
    after = [tally["live"] for tally in together([first, second], 20)]
    assert [late - early for late, early in zip(after, before, strict=True)] == [20, 20]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    rank_process(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
