"""What one rank of an engine keeps of a round: forwards and their times, rows, how calls ended, memory, a profile."""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from server import kernels
from server.choice import Choice
from server.control import LAYERS, MIXED, PROFILED, ROWS, Control
from server.forced import Forced
from server.layers import Layers
from server.modes import MODES

PROFILE_STARTS_S, PROFILES_S = 3.0, 0.5
"""Every rank's profiler is up after it, the first time and later: they begin the profiled forward together, as they would
without."""
LONGEST_KERNELS = 14
GRAPHS = ("decode_cuda_graph_runner", "graph_runner")
"""Attribute of sglang's runner that holds the graphs of decode: from 0.5.14 on, and before."""


def _event() -> Any:
    import torch

    return torch.cuda.Event(enable_timing=True)


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def _memory() -> dict[str, int]:
    """Bytes: of this process by torch's allocator, and of the whole GPU, other engines' included."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.memory_allocated(), "free": free, "total": total}


def profiler() -> Any:
    import torch

    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def kernel_times(profile: Any) -> dict[str, tuple[float, int]]:
    """Microseconds and count by kernel."""
    return {
        event.key: (float(event.device_time_total), int(event.count))
        for event in profile.key_averages()
        if event.device_time_total
    }


class Rank:
    """One process's part.

    Args:
        folder: where results of rounds are written.
        experts: physical ones over all ranks, and ``ranks``: what is counted where no balancer is.
        event, synchronize, memory: torch's for CUDA, but for tests.
        move: moves the runner's experts to another of the engine's locations; all ranks call it in step.
    """

    def __init__(
        self,
        control: Control,
        folder: Path,
        experts: int = 0,
        ranks: int = 1,
        *,
        event: Callable[[], Any] = _event,
        synchronize: Callable[[], None] = _synchronize,
        memory: Callable[[], dict[str, int]] = _memory,
        move: Callable[[Any, int], None] = lambda runner, location: None,
    ) -> None:
        self.control, self.folder = control, folder
        self._experts, self._ranks = experts, ranks
        self.number = -1
        self.forced: Forced | None = None
        self.layers: Layers | None = None
        self.rebalances = 0
        """Changes of the map of experts so far."""
        self.balancers: list[Any] = []
        self.mode = "home"
        """Of the forward that runs, and before the first of one that captures a graph."""
        self.switches = False
        """Are its modes switched, so that each forward is told whether it overlaps?"""
        self._choice = Choice(lambda: self.balancers)
        self._event, self._synchronize, self._memory = event, synchronize, memory
        self._move, self._location = move, 0
        self._prepared: dict[str, int] | None = None
        self._round, self._index, self._written = 0, 0, 0
        self._ready = False
        """Was the next forward's mode set?"""
        self._wrapped: list[tuple[Any, Any]] | None = None
        self._counts = False
        """Are the rows of this forward counted?"""
        self._profiled_before = False
        self._frozen = False
        self._begin()

    def _begin(self) -> None:
        self._forwards: list[tuple[int, str, int, int, Any, Any]] = []
        self._rows: list[tuple[int, int, Any, Any]] = []
        self._profiles: dict[str, Any] = {}
        self._modes: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._before: tuple[dict[str, Any], ...] | None = None
        self._layer_outputs: dict[str, Any] = {}
        self._rebalances_before = self.rebalances

    def prepared(self) -> None:
        """The model's layers are: before any cache, graph or forward. A graph that is captured next has this mode."""
        self._prepared = self._memory()
        self._choice.watch()
        if self.switches:
            self._choice.force(self.mode)

    def before_forward(self, *_: Any, **__: Any) -> None:
        """Before the scheduler runs a batch: the mode of its forward is set, and forced where modes are switched.

        Others' hooks of the forward may be around ours, and the package may choose in one of them.
        """
        control = self.control
        if control.get("round") != self._round:
            self._round, self._index, self._ready = control.get("round"), 0, False
            self._begin()
            self._freeze_garbage()
        if self._ready:
            return
        self._ready = True
        lead = control.get("lead")
        if length := control.get("length"):
            cycle = control.list("cycle")
            self.mode = MODES[int(cycle[max(0, self._index - lead) % length])]
        if self._index == lead:
            if control.get("kind") == MIXED:
                # Every call of this round is accounted for, so none of the round before may still be to end.
                self._synchronize()
            self._before = self._tally()
        if self.switches:
            self._choice.force(self.mode)

    def forward(self, original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``ModelRunner.forward``: all ranks call it in step, one without tokens too."""
        result = self._forward(original, runner, *args, **kwargs)
        self._choice.count()
        return result

    def _forward(self, original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        self.before_forward()
        self._ready = False
        control = self.control
        if (location := control.get("location")) != self._location:
            self._move(runner, location)
            self._location = location
        lead, length = control.get("lead"), max(1, control.get("length"))
        index, self._index = self._index, self._index + 1
        place = control.get("base") + max(0, index - lead) // length
        kind = control.get("kind")
        batch = args[0] if args else kwargs["forward_batch"]
        sort = _sort(batch) if kind == MIXED else ""
        if self.forced is not None:
            table = control.get("placement") + (sort == "decode")
            self.forced.move(table, place * control.get("tokens"))
        if index >= lead:
            self._modes[self.mode] += 1
        if kind == MIXED:
            self._kinds[sort] += 1
            self._kinds["beside a prefill"] += sort != "prefill" and getattr(
                batch, "is_extend_in_batch", False
            )
            return original(runner, *args, **kwargs)
        self._count_rows(kind == ROWS)
        ids = getattr(batch, "input_ids", None)
        tokens = 0 if ids is None else int(ids.shape[0])
        # One more before those that count: the profiler itself is new to it.
        profiles = kind == PROFILED and lead - 1 <= index < lead + length
        if profiles and tokens == control.get("tokens"):
            return self._profiled(lambda: original(runner, *args, **kwargs))
        if kind == LAYERS and self.layers is not None:
            return self._keep_layers(self.layers, tokens, lambda: original(runner, *args, **kwargs))
        begin, end = self._event(), self._event()
        begin.record()
        if kind == ROWS and index >= lead:
            result = _without_graphs(runner, lambda: original(runner, *args, **kwargs))
        else:
            result = original(runner, *args, **kwargs)
        end.record()
        self._forwards.append((index, self.mode, place, tokens, begin, end))
        return result

    def _keep_layers(self, layers: Layers, rows: int, call: Callable[[], Any]) -> Any:
        layers.force(True)
        result = call()
        layers.force(False)
        self._layer_outputs[str(self._index - 1)] = layers.take(rows)
        return result

    def count_rebalance(self, *_: Any, **__: Any) -> None:
        """After a change of sglang's map of experts."""
        self.rebalances += 1

    def _freeze_garbage(self) -> None:
        """A collection over all that was loaded takes tens of milliseconds of one rank, and the others wait: as sglang's
        own ``/freeze_gc`` for operators, once everything is warm."""
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True

    def _profiled(self, call: Callable[[], Any]) -> Any:
        """Run it under a profiler; where there can be none, run it all the same."""
        ready = time.monotonic() + (PROFILES_S if self._profiled_before else PROFILE_STARTS_S)
        self._profiled_before = True
        self._synchronize()
        try:
            profile = profiler()
            profile.start()
        except Exception as error:
            print(f"server bench: no profile: {error!r}", flush=True)
            return call()
        time.sleep(max(0.0, ready - time.monotonic()))
        result = call()
        self._synchronize()
        profile.stop()
        times = kernel_times(profile)
        self._profiles[self.mode] = {
            "groups": kernels.breakdown(times),
            "longest": kernels.longest(times, LONGEST_KERNELS),
        }
        return result

    def _count_rows(self, on: bool) -> None:
        """Wrap the balancers for rounds that count, and only for these: nothing is in the way of those that are timed."""
        self._counts = on
        if on and self._wrapped is None:
            self._wrapped = [(b, b.__dict__.get("expand_topk")) for b in self.balancers]
            for balancer in self.balancers:
                balancer.expand_topk = self._counting_call(balancer, balancer.expand_topk)
        elif not on and self._wrapped is not None:
            for balancer, before in self._wrapped:
                if before is None:
                    del balancer.expand_topk
                else:
                    balancer.expand_topk = before
            self._wrapped = None

    def _counting_call(self, balancer: Any, expand: Callable[..., Any]) -> Callable[..., Any]:
        """``expand`` that also counts the rows of the grouped GEMM that its ids ``[N, K or K + 1]`` make.

        Those of an overlapped batch are routed rows alone, K columns moved up past the shared slots: each token's shared
        row is at home, in a dense MLP beside dispatch, so it is no row of the grouped GEMM and is not counted.
        """

        def call(topk_output: Any, num_tokens: int, **options: Any) -> Any:
            expanded = expand(topk_output, num_tokens, **options)
            # Each rank's experts are followed by its shared slot.
            slots = balancer.num_routed_experts // balancer.world_size + 1
            counts = _by_slot(expanded.topk_ids, balancer.world_size, slots)
            routed, shared = counts[:, :-1], counts[:, -1]
            self._rows.append((self._index - 1, balancer.layer_id or 0, routed, shared))
            return expanded

        return call

    def count_chosen(self, layer: int, ids: Any) -> None:
        """Count rows by physical expert where no balancer does, if they are counted. ``ids``: physical ones, ``[N, K]``."""
        if self._counts and not self.balancers and self._experts:
            counts = _by_slot(ids, self._ranks, self._experts // self._ranks)
            self._rows.append((self._index - 1, layer, counts, counts.new_zeros(self._ranks)))

    def _tally(self) -> tuple[dict[str, Any], ...]:
        """So far: how this rank's calls ended, the planner's sums on the rank that tells them, and batches by choice."""
        batches = self._choice.tally()
        # sglang's own balancers exchange in another way, or not.
        exchange = getattr(self.balancers[0], "exchange", None) if self.balancers else None
        if exchange is None:
            return {}, {}, batches
        board = getattr(exchange, "board", None)
        planner = (
            dict(board.snapshot()["planner"]) if board is not None and self.number == 0 else {}
        )
        return dict(exchange.tally()), planner, batches

    def write_if_asked(self) -> None:
        """Write the round's results, once, when the engine asks for them; between rounds, so nothing waits for it."""
        asked = self.control.get("asked")
        if asked == self._written or self.number < 0:
            return
        self._written = asked
        self._synchronize()
        self._count_rows(False)
        path = self.folder / f"round-{asked}-{self.number}.json"
        path.write_text(json.dumps(self.results() | self._layers_file(asked)))
        self.control.list("written")[self.number] = asked

    def _layers_file(self, asked: int) -> dict[str, str]:
        """Where outputs of layers are, by forward, if this round has any."""
        if not self._layer_outputs:
            return {}
        path = self.folder / f"layers-{asked}-{self.number}.npz"
        np.savez(path, **self._layer_outputs)
        return {"layers_file": str(path)}

    def results(self) -> dict[str, Any]:
        """Of the round so far.

        ``forwards``: index, mode, place, tokens, GPU ms, and ms from this one's begin to the next's or None.
        ``rows``: index, layer, and the rows that this rank sends: to the routed experts of each rank ``[R, P / R]``, and to its
        shared one ``[R]``. ``modes``: forwards that counted, by mode.
        ``kinds``: forwards of a mixed round, by kind. ``calls``, ``planner``, ``batches``: what was added since the lead.
        ``layers``, ``staying``: those that are balanced, and those of them that are fused in every batch.
        ``memory``: bytes when the model was ``prepared``, and ``now``. ``rebalances``: of this round.
        """
        now = self._tally()
        calls, planner, batches = map(_since, self._before or now, now)
        forwards = []
        for at, (index, mode, place, tokens, begin, end) in enumerate(self._forwards):
            following = self._forwards[at + 1][4] if at + 1 < len(self._forwards) else None
            interval = None if following is None else round(begin.elapsed_time(following), 5)
            ms = round(begin.elapsed_time(end), 5)
            forwards.append((index, mode, place, tokens, ms, interval))
        return {
            "forwards": forwards,
            "rows": [
                (at, layer, own.tolist(), shared.tolist()) for at, layer, own, shared in self._rows
            ],
            "calls": calls,
            "planner": planner,
            "batches": batches,
            "modes": dict(self._modes),
            "kinds": dict(self._kinds),
            "layers": len(self.balancers),
            "staying": self._choice.staying,
            "memory": {"prepared": self._prepared, "now": self._memory()},
            "profiles": self._profiles,
            "rebalances": self.rebalances - self._rebalances_before,
        }


def _by_slot(ids: Any, ranks: int, slots: int) -> Any:
    """Rows of each rank's slots ``[ranks, slots]``; negative ids are padding."""
    import torch

    return torch.bincount(ids[ids >= 0].long(), minlength=ranks * slots).view(ranks, slots)


def _without_graphs(runner: Any, call: Callable[[], Any]) -> Any:
    """What is counted in Python is counted where Python runs: a step that would replay a graph does not."""
    held = {name: value for name in GRAPHS if (value := getattr(runner, name, None)) is not None}
    for name in held:
        setattr(runner, name, None)
    try:
        return call()
    finally:
        for name, value in held.items():
            setattr(runner, name, value)


def _sort(batch: Any) -> str:
    """What this rank does in a forward."""
    mode = batch.forward_mode
    if mode.is_decode():
        return "decode"
    return "idle" if mode.is_idle() else "prefill"


def _since(before: dict[str, Any], now: dict[str, Any]) -> dict[str, float]:
    """What was added, of all that are numbers."""
    return {
        name: value - before.get(name, 0)
        for name, value in now.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
