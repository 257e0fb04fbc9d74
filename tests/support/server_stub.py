"""Stands in for ``sglang`` in an engine's process: ranks are turns of one thread, and a forward takes what its mode says.

The test copies it to a folder as ``sglang/__init__.py``; the bench's own gate and ranks run in it.
"""

import asyncio
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
    "overlap": 6.5,
    "fused": 7.5,
    "auto": 7.0,
    "off-static": 11.0,
    "off-dynamic": 11.5,
    "sglang-replicas": 9.5,
    "live-replicas": 6.0,
    "auto-replicas": 6.0,
}
SLOWEST = 1.25
"""Times that, on the last rank."""
WALL = 2e-4
"""Seconds that a mixed forward takes by the wall, for each of these ms."""
MIB = {"off": 1000, "sglang": 1000}
"""That torch has allocated; any other engine has more."""
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


class Choice:
    """The package's: ``auto`` overlaps what is no prefill anywhere."""

    def __init__(self):
        self.forced = None
        self.tally = {"overlapped": 0, "fused": 0}
        self.configured = os.environ.get("WATERFILL_RS_SHARED", "auto")

    def overlaps(self, prefill):
        wanted = self.forced or self.configured
        overlaps = wanted == "overlap" or (wanted == "auto" and not prefill)
        self.tally["overlapped" if overlaps else "fused"] += 1
        return overlaps


class Stub:
    """One rank: its scheduler, with a queue of [prompt tokens, new tokens left]."""

    def __init__(self, told, number):
        self.clock = Clock()
        control = Control(Path(told["control"]))
        self.engine = told["mode"]
        mib = MIB.get(self.engine, 1016)
        self.rank = Rank(
            control,
            Path(told["folder"]),
            told["experts"],
            told["ranks"],
            event=self.clock.event,
            synchronize=lambda: None,
            memory=lambda: {"allocated": mib * 2**20, "free": 1, "total": 2},
            move=lambda runner, location: print(f"moved to {location}", flush=True),
        )
        self.rank.number, self.rank.mode = number, told["mode"]
        self.rank.switches = told["switches"]
        self.gate = Gate(control, lambda: number, told["ranks"])
        self.waiting_queue, self.running = [], []
        self.chunked_prefill_size = None
        self.calls = {"calls": 0, "live": 0, "none": 0, "timed_out": 0}
        self.choice = Choice()
        exchange = SimpleNamespace(board=self, tally=lambda: dict(self.calls))
        if told["arguments"]["enable_waterfill"]:
            ours = {"exchange": exchange, "overlap": SimpleNamespace(choice=self.choice)}
            self.rank.balancers = [
                SimpleNamespace(
                    **({} if told["upstream"] else ours),
                    expand_topk=self.expand,
                    num_routed_experts=4,
                    world_size=2,
                    layer_id=layer,
                )
                for layer in (1, 2)
            ]
        self.rank.prepared()

    def snapshot(self):
        return {"planner": {"planned_max": 3 * self.calls["live"], "mean": 2 * self.calls["live"]}}

    def expand(self, topk_output, num_tokens):
        # Two experts and a shared slot a rank: two rows for rank 0, one for rank 1, of which a shared one for rank 1.
        overlaps = self.choice.forced == "overlap"
        return SimpleNamespace(topk_ids=torch.tensor([[0, 2] if overlaps else [0, 2, 5]]))

    def batch(self):
        """The original of the gate's hook: tokens of the next prefill."""
        taken, left = 0, self.chunked_prefill_size
        while self.waiting_queue and left:
            request = self.waiting_queue[0]
            part = min(left, request[0])
            request[0] -= part
            taken, left = taken + part, left - part
            if request[0]:
                break
            self.running.append(self.waiting_queue.pop(0))
        return taken

    def forward(self, tokens, prefills):
        own = "prefill" if self.prefilled else "decode" if tokens else "idle"
        mode = SimpleNamespace(is_decode=lambda: own == "decode", is_idle=lambda: own == "idle")

        def run(runner, batch):
            mode = self.rank.mode
            for balancer in self.rank.balancers:
                balancer.expand_topk(None, tokens)
            # Without a balancer all rows go to two experts of rank 0.
            self.rank.count_chosen(1, torch.tensor([[0, 1]]))
            overlaps = self.choice.overlaps(prefills)
            self.clock.ms += MS[mode] * (SLOWEST if self.rank.number == self.gate._ranks - 1 else 1)
            if mode.startswith(("live", "fused", "auto")) and not overlaps:
                if os.environ.get("STUB_LOSES") != self.engine:
                    self.calls["calls"] += len(self.rank.balancers)
                self.calls["live"] += len(self.rank.balancers)

        batch = SimpleNamespace(
            input_ids=torch.zeros(tokens), forward_mode=mode, is_extend_in_batch=prefills
        )
        self.rank.forward(run, None, batch)


class Engine:
    def __init__(self, **arguments):
        told = json.loads(Path(os.environ[VARIABLE]).read_text())
        if "own" in told["mode"] and os.environ.get("STUB_FAILS"):
            raise RuntimeError("the stub was told to fail")
        self.mode = told["mode"]
        print(
            {name: value for name, value in arguments.items() if "expert" in name or "ep_" in name}
        )
        self.ranks = [Stub(told, number) for number in range(told["ranks"])]
        self.loop = asyncio.new_event_loop()
        self.ended = False
        self.sent = self.asked = 0
        threading.Thread(target=self.turns, daemon=True).start()

    def turns(self):
        while not self.ended:
            tokens = []
            for stub in self.ranks:
                stub.rank.write_if_asked()
                tokens.append(stub.gate.hook(lambda own: own.batch(), stub))
            prefills = any(tokens)
            for stub, own in zip(self.ranks, tokens, strict=True):
                stub.prefilled = own > 0
                if own:  # The first new token.
                    stub.fresh = [request for request in stub.running if not request[2]]
                else:
                    stub.fresh = list(stub.running)
            counts = [
                own or len(stub.running) for stub, own in zip(self.ranks, tokens, strict=True)
            ]
            if not any(counts):
                time.sleep(0.0005)
                continue
            for stub, own in zip(self.ranks, counts, strict=True):
                stub.forward(own, prefills)
            if self.ranks[0].rank.control.get("kind") == rank_module.MIXED:
                time.sleep(MS[self.mode] * WALL)
            for stub in self.ranks:
                for request in stub.fresh:
                    request[1], request[2] = request[1] - 1, True
                stub.running = [request for request in stub.running if request[1]]

    def generate(self, input_ids, sampling_params):
        for i, prompt in enumerate(input_ids):
            queue = self.ranks[i % len(self.ranks)].waiting_queue
            queue.append([len(prompt), sampling_params["max_new_tokens"], False])
        while any(stub.waiting_queue or stub.running for stub in self.ranks):
            time.sleep(0.002)

    async def async_generate(
        self, input_ids, sampling_params, routed_dp_rank, return_logprob=False
    ):
        if return_logprob:
            return await self.answers(input_ids, sampling_params, routed_dp_rank)
        self.sent += 1
        new = sampling_params["max_new_tokens"]
        if os.environ.get("STUB_HANGS") == self.mode and self.sent > 2 * 16:
            await asyncio.sleep(3600)
        request = [len(input_ids), new, False]
        self.ranks[routed_dp_rank].waiting_queue.append(request)
        while request[1]:
            await asyncio.sleep(0.002)
        return {"meta_info": {"completion_tokens": new}}

    async def answers(self, prompts, sampling_params, rank):
        """Tokens by the prompt; ``STUB_ANSWERS``, JSON, says of modes what is wrong with theirs."""
        requests = [[len(prompt), sampling_params["max_new_tokens"], False] for prompt in prompts]
        self.ranks[rank].waiting_queue += requests
        while any(request[1] for request in requests):
            await asyncio.sleep(0.002)
        mode, self.asked = self.ranks[0].rank.mode, self.asked + (rank == 0)
        wrong = json.loads(os.environ.get("STUB_ANSWERS", "{}")).get(mode)
        if self.ranks[0].rank.control.get("base"):
            prompts = [prompt[::-1] for prompt in prompts]  # Other experts answer otherwise.
        return [
            self.answer(prompt, sampling_params["max_new_tokens"], wrong, i == rank == 0)
            for i, prompt in enumerate(prompts)
        ]

    def answer(self, prompt, new, wrong, first):
        told = [[-1 / (3 + prompt[i]), prompt[i], None] for i in range(new)]
        if first and (wrong == "token" or (wrong == "varies" and self.asked % 2 == 0)):
            told[7][1] += 1
        if first and wrong == "token":
            told[6][0] -= 0.25
        if wrong == "nan":
            told[0][0] = float("nan")
        return {"meta_info": {"output_token_logprobs": told}}

    def shutdown(self):
        self.ended = True
