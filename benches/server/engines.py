"""The engines that are up: started, asked for rounds, and stopped where they fail, so that the others go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server import model, redundant, workspace
from server.modes import Plan
from server.processes import Engine, Failed, stop_all, wait_all

START_S = 400.0


class Engines:
    """Those of one run, by name.

    Args:
        logs: their logs go there.
        patience: seconds; no engine is waited for longer, neither until it is up nor for a round.
    """

    def __init__(
        self, space: workspace.Workspace, logs: Path, patience: float | None = None
    ) -> None:
        self._space, self._logs = space, logs
        self._patience = START_S if patience is None else patience
        self._up: dict[str, Engine] = {}
        self._tried: set[tuple[str, str]] = set()
        self._number = 0
        self._start_name = ""
        self.sglang: str | None = None
        self.failures: list[str] = []
        """Why engines were stopped, a line each."""
        self.memory: dict[tuple[str, str], list[dict[str, Any]]] = {}
        """By phases and engine, for each rank: see ``rank.Rank.results``."""

    def __contains__(self, plan: Plan) -> bool:
        return plan.name in self._up

    def start(
        self,
        name: str,
        plans: Sequence[Plan],
        needs: Mapping[str, Sequence[int]],
        ranks: int,
        folder: Path,
        routing: Mapping[str, Any],
        placements: Mapping[redundant.Place, redundant.Files],
        more: Mapping[str, Any],
        seconds: float,
        meanwhile: Callable[[], None],
    ) -> None:
        """Start those that are not up, and wait for them; one that does not come up is told, and left out from then on.

        Args:
            name: the phases', for logs and results.
            needs: see ``model.arguments``.
            folder: the model's.
            routing: see ``Workspace.told``.
            placements: see ``redundant.arguments``.
            more: arguments over ours.
            seconds: the longest wait.
            meanwhile: called while they start.
        """
        self._start_name = name
        new = [plan for plan in plans if plan not in self and (name, plan.name) not in self._tried]
        self._tried |= {(name, plan.name) for plan in new}
        started: list[Engine] = []
        for plan, port in zip(new, workspace.ports(len(new)) if new else [], strict=True):
            arguments = model.arguments(needs, ranks, str(folder), plan.waterfill)
            arguments |= redundant.arguments(plan, placements)
            arguments |= {"port": port, "nccl_port": port + 20} | more
            locations = redundant.locations(plan, placements)
            told = self._space.told(f"{name}-{plan.name}", plan, arguments, routing, locations)
            most = max(model.graph_sizes(needs), default=0)
            environment = self._space.environment(plan, told, os.environ, most)
            log = self._logs / f"{name}-{plan.name}.log"
            started.append(Engine(plan.name, workspace.command(told), environment, log))
        if started:
            names = ", ".join(engine.name for engine in started)
            print(f"{name}: starting {names}; logs in {self._logs}", flush=True)
        try:
            meanwhile()
            running = wait_all(started, max(1.0, min(START_S, self._patience, seconds)))
        except BaseException:
            stop_all(started)
            raise
        for engine in running:
            self._up[engine.name] = engine
            self.sglang = self.sglang or engine.ready["sglang"]
        for engine in started:
            if engine not in running:
                self.failures.append(f"{name}, engine {engine.name}: did not come up")

    def stop(self, names: Sequence[str]) -> None:
        stop_all([self._up.pop(name) for name in names])

    def stop_all_but(self, plans: Sequence[Plan]) -> None:
        self.stop([name for name in self._up if name not in {plan.name for plan in plans}])

    def next_number(self) -> int:
        """Of a round: another one each time, from 1 on."""
        self._number += 1
        return self._number

    def round(self, plan: Plan, asked: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """One round of one engine; None of one that is not up, or fails now. That is told, and it is stopped."""
        if plan not in self:
            return None
        try:
            result = self._up[plan.name].round(asked, min(seconds, self._patience))
        except Failed as failure:
            print(failure, file=sys.stderr, flush=True)
            self.failures.append(f"{self._start_name}, {str(failure).splitlines()[0]}")
            self.stop([plan.name])
            return None
        self.memory[self._start_name, plan.name] = [rank["memory"] for rank in result["ranks"]]
        return result
