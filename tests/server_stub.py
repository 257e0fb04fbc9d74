"""Stands in for ``sglang`` in an engine's process: ranks are turns of one thread, and a forward takes what its mode says.

The test copies it to a folder as ``sglang/__init__.py``; the bench's own gate and ranks run in it.
"""

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import server.rank as rank_module
import torch
from server.control import Control
from server.gate import Gate
from server.plugin import VARIABLE
from server.rank import Rank

__version__ = "0.0.stub"
MS = {
    "off": 10.0,
    "home": 9.0,
    "sglang": 8.5,
    "sglang-dynamic": 12.0,
    "own": 8.0,
    "live": 7.5,
    "auto": 7.0,
}
SLOWEST = 1.25
"""Times that, on the last rank."""
rank_module.PROFILE_STARTS_S = rank_module.PROFILES_S = 0.0
rank_module.profiler = lambda: SimpleNamespace(
    start=lambda: None,
    stop=lambda: None,
    key_averages=lambda: [SimpleNamespace(key="_fwd_kernel", device_time_total=2500.0, count=3)],
)


class Clock:
    """What an event records: one rank's device time."""

    def __init__(self):
        self.ms = 0.0

    def event(self):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.ms)
        event.elapsed_time = lambda later: later.at - event.at
        return event


class Stub:
    """One rank: its scheduler, with a queue of [prompt tokens, new tokens left]."""

    def __init__(self, told, number):
        self.clock = Clock()
        control = Control(Path(told["control"]))
        self.rank = Rank(
            control, Path(told["folder"]), event=self.clock.event, synchronize=lambda: None
        )
        self.rank.number, self.rank.mode = number, told["mode"]
        self.gate = Gate(control, lambda: number, told["ranks"])
        self.waiting_queue, self.running = [], []
        self.chunked_prefill_size = None
        self.calls = {"calls": 0, "live": 0, "timed_out": 0}
        exchange = SimpleNamespace(board=self, tally=lambda: dict(self.calls))
        if told["arguments"]["enable_waterfill"]:
            self.rank.balancers = [
                SimpleNamespace(
                    exchange=exchange,
                    expand_topk=self.expand,
                    num_routed_experts=4,
                    world_size=2,
                    layer_id=1,
                )
            ]

    def snapshot(self):
        return {"planner": {"planned_max": 3 * self.calls["live"], "mean": 2 * self.calls["live"]}}

    def expand(self, topk_output, num_tokens):
        # Two experts and a shared slot a rank: two rows for rank 0, one for rank 1.
        return SimpleNamespace(topk_ids=torch.tensor([[0, 2, 5]]))

    def batch(self):
        """The original of the gate's hook: tokens of the next prefill."""
        taken, left = [], self.chunked_prefill_size
        while self.waiting_queue and self.waiting_queue[0][0] <= left:
            taken.append(self.waiting_queue.pop(0))
            left -= taken[-1][0]
        self.running += [request for request in taken if request[1] > 1]
        return sum(request[0] for request in taken)

    def forward(self, tokens):
        def run(runner, batch):
            for balancer in self.rank.balancers:
                balancer.expand_topk(None, tokens)
            self.clock.ms += MS[self.rank.mode] * (
                SLOWEST if self.rank.number == self.gate._ranks - 1 else 1
            )
            if self.rank.mode in ("live", "auto"):
                self.calls["calls"] += 1
                self.calls["live"] += 1

        self.rank.forward(run, None, SimpleNamespace(input_ids=torch.zeros(tokens)))


class Engine:
    def __init__(self, **arguments):
        told = json.loads(Path(os.environ[VARIABLE]).read_text())
        if "own" in told["mode"] and os.environ.get("STUB_FAILS"):
            raise RuntimeError("the stub was told to fail")
        self.ranks = [Stub(told, number) for number in range(told["ranks"])]
        self.ended = False
        threading.Thread(target=self.loop, daemon=True).start()

    def loop(self):
        while not self.ended:
            tokens = []
            for stub in self.ranks:
                stub.rank.write_if_asked()
                tokens.append(stub.gate.hook(lambda own: own.batch(), stub))
            if not any(tokens):
                for stub in self.ranks:
                    stub.running = [[n, left - 1] for n, left in stub.running if left > 1]
                tokens = [len(stub.running) for stub in self.ranks]
            if any(tokens):
                for stub, own in zip(self.ranks, tokens, strict=True):
                    stub.forward(own)

    def generate(self, input_ids, sampling_params):
        for i, prompt in enumerate(input_ids):
            queue = self.ranks[i % len(self.ranks)].waiting_queue
            queue.append([len(prompt), sampling_params["max_new_tokens"]])
        while any(stub.waiting_queue or stub.running for stub in self.ranks):
            time.sleep(0.002)

    def shutdown(self):
        self.ended = True
