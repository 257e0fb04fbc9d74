"""A phase: its engines are started, warmed, and measured in turn until the time is over."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import figures, kernels, model, modes, rows, workspace
from server.control import PROFILED, ROWS, TIMED
from server.figures import Mode
from server.forced import save
from server.modes import Plan
from server.processes import Engine, Failed, stop_all, wait_all
from server.recording import Placement, Recording
from server.schedule import Cell, Clock, message, profiled_cells, profiles_s

START_S, ROUND_S, PROFILE_ROUND_S = 400.0, 240.0, 45.0
SAYS_S = 15.0
"""Between tables of what was found so far."""
MODELLED_FORWARDS = {"prefill": 2, "decode": 8}


@dataclass
class Phase:
    """What there is to be measured, and what was found.

    ``recordings``, ``placements``: one of each for each placement of the cells.
    """

    name: str
    plans: list[Plan]
    cells: list[Cell]
    recordings: list[Recording]
    placements: list[Placement]
    engine_arguments: dict[str, Any]
    layers: int
    found: dict[tuple[Cell, str], Mode] = field(default_factory=dict)
    modelled: dict[Cell, dict[str, float]] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return self.recordings[0].ranks

    def mode(self, cell: Cell, name: str) -> Mode:
        return self.found.setdefault((cell, name), Mode())

    def model_rows(self) -> None:
        """What the package's models say of the forwards that the first sweep has; says how far it is."""
        tables: dict[int, Any] = {}
        for cell in self.cells:
            i = cell.placement
            if i not in tables:
                tables[i] = self.placements[i].tables(self.recordings[i])
            print(f"rows by the models: {self.name}, {cell.name}, {cell.tokens} tokens", flush=True)
            places = range(min(cell.forwards, MODELLED_FORWARDS[self.name]))
            self.modelled[cell] = rows.modelled(
                tables[i], places, cell.tokens, self.recordings[i].experts
            )

    def as_cells(self) -> list[dict[str, Any]]:
        """Entries of ``cells``, in the order of cells and modes, of what was measured until now."""
        entries = []
        for cell in self.cells:
            of = {
                name: self.found[cell, name] for name in modes.MODES if (cell, name) in self.found
            }
            modelled = self.modelled.get(cell, {})
            entries += [
                figures.cell(cell.fields, name, of, modelled, self.ranks)
                for name in of
                if of[name].ms
            ]
        return entries


class Bench:
    """Runs phases.

    Args:
        apart: one engine after the other, in place of all at once.
        together: how many fit.
        sweeps: no more than these, where there is time for more.
        save_results: called after every sweep.
        logs: engines' logs go there.
    """

    def __init__(
        self,
        space: workspace.Workspace,
        logs: Path,
        together: int,
        apart: bool,
        sweeps: int | None,
        save_results: Callable[[], None],
    ) -> None:
        self._space, self._logs, self._together, self._apart = space, logs, together, apart
        self._sweeps = sweeps
        self._save = save_results
        self._number = 0
        self.sglang: str | None = None

    def run(self, phase: Phase, clock: Clock) -> None:
        """Measure until the clock ends; what was found is in the phase."""
        arguments = self._prepare(phase)
        groups = (
            [[plan] for plan in phase.plans]
            if self._apart
            else modes.groups(phase.plans, self._together)
        )
        up: dict[str, Engine] = {}
        sweep = 0
        try:
            for i, group in enumerate(groups):
                part = clock.part(1 / (len(groups) - i))
                self._stop(up, [name for name in up if name not in {plan.name for plan in group}])
                self._start(
                    phase, [plan for plan in group if plan.name not in up], arguments, up, part
                )
                sweep = self._measure(phase, group, up, part, 0 if self._apart else sweep)
        finally:
            self._stop(up, list(up))
        self._save()

    def _prepare(self, phase: Phase) -> dict[str, Any]:
        """The model and the routing, on disk."""
        first = phase.recordings[0]
        tokens = sorted({cell.tokens for cell in phase.cells})
        folder = self._space.write_model(
            f"model-{phase.name}", model.config(first.experts, first.top_k, phase.layers)
        )
        routing = self._space.folder / f"routing-{phase.name}.npz"
        save(
            routing, [p.tables(r) for p, r in zip(phase.placements, phase.recordings, strict=True)]
        )
        longest = (
            max(tokens) if phase.name == "prefill" else max(64, model.DECODE_PROMPT * max(tokens))
        )
        return {
            "tokens": tokens,
            "model": str(folder),
            "routing": {
                "routing": str(routing),
                "placements": len(phase.placements),
                "longest": longest,
            },
        }

    def _start(
        self,
        phase: Phase,
        plans: Sequence[Plan],
        prepared: dict[str, Any],
        up: dict[str, Engine],
        clock: Clock,
    ) -> None:
        started = []
        for plan, port in zip(plans, workspace.ports(len(plans)), strict=True):
            arguments = model.arguments(
                phase.name, phase.ranks, prepared["tokens"], prepared["model"], plan.waterfill
            )
            arguments |= {"port": port, "nccl_port": port + 20} | phase.engine_arguments
            name = f"{phase.name}-{plan.name}"
            told = self._space.told(name, plan, arguments, prepared["routing"])
            most = max(prepared["tokens"]) if phase.name == "decode" else 0
            environment = self._space.environment(plan, told, os.environ, most)
            log = self._logs / f"{name}.log"
            started.append(Engine(plan.name, workspace.command(told), environment, log))
        print(
            f"{phase.name}: starting {', '.join(e.name for e in started)}; logs in {self._logs}",
            flush=True,
        )
        try:
            if not phase.modelled:
                phase.model_rows()
            running = wait_all(started, min(START_S, max(1.0, clock.left())))
        except BaseException:
            stop_all(started)
            raise
        for engine in running:
            up[engine.name] = engine
            self.sglang = self.sglang or engine.ready["sglang"]

    def _stop(self, up: dict[str, Engine], names: Sequence[str]) -> None:
        stop_all([up.pop(name) for name in names])

    def _measure(
        self, phase: Phase, group: Sequence[Plan], up: dict[str, Engine], clock: Clock, sweep: int
    ) -> int:
        """Warm-up, rows, sweeps, profiles. Gives the number of the next sweep."""

        def there() -> list[Plan]:
            return [plan for plan in group if plan.name in up]

        begin = time.monotonic()
        for i, cell in enumerate(phase.cells):
            for plan in there():
                # A number of tokens that is new compiles kernels; once more, so that nothing of it is left.
                for _ in range(2 if cell.placement == phase.cells[0].placement else 1):
                    self._round(phase, up, plan, cell, i, TIMED, clock, short=True, keep=False)
        print(
            f"{phase.name}: warm after {time.monotonic() - begin:.0f} s, {clock.left():.0f} s left",
            flush=True,
        )
        if phase.name == "prefill":
            for cell in phase.cells:
                for plan in there():
                    if plan.waterfill:
                        self._round(phase, up, plan, cell, 0, ROWS, clock, short=True)
        kept = profiles_s(len(group), phase.cells)
        took: dict[Cell, float] = {}
        first = sweep
        said = time.monotonic()
        while there():
            measured = False
            for cell in phase.cells:
                if clock.left() - kept < took.get(cell, 0.0):
                    continue
                cell_begin = time.monotonic()
                plans = there()
                shift = sweep % max(1, len(plans))
                for plan in plans[shift:] + plans[:shift]:
                    self._round(phase, up, plan, cell, sweep, TIMED, clock)
                took[cell] = time.monotonic() - cell_begin
                measured = True
            sweep += 1
            self._save()
            if not measured or clock.left() < kept or sweep - first == self._sweeps:
                break
            if time.monotonic() - said > SAYS_S:
                said = time.monotonic()
                self._say(phase, sweep, clock)
        for cell in profiled_cells(phase.cells):
            for plan in there():
                if clock.left() > 2:
                    self._round(phase, up, plan, cell, 0, PROFILED, clock, short=True)
        self._save()
        return sweep

    def _round(
        self,
        phase: Phase,
        up: dict[str, Engine],
        plan: Plan,
        cell: Cell,
        sweep: int,
        kind: int,
        clock: Clock,
        *,
        short: bool = False,
        keep: bool = True,
    ) -> None:
        """One round of one engine; an engine that fails is stopped, and the others go on."""
        if plan.name not in up:
            return
        self._number += 1
        asked = message(cell, plan, phase.ranks, self._number, sweep, kind, short)
        try:
            # Past the limit only what runs may end, in a few seconds.
            longest = PROFILE_ROUND_S if kind == PROFILED else ROUND_S
            result = up[plan.name].round(asked, min(longest, max(10.0, clock.left() + 5)))
        except Failed as failure:
            print(failure, file=sys.stderr, flush=True)
            self._stop(up, [plan.name])
            return
        ranks = result["ranks"]
        if kind == PROFILED:
            self._keep_profile(phase, plan, cell, ranks)
            return
        found = list(figures.full_forwards(ranks, cell.tokens, cell.lead))
        if not found:
            seen = [dict(Counter(forward[3] for forward in rank["forwards"])) for rank in ranks]
            print(
                f"engine {plan.name}: no forward of {cell.tokens} tokens on all ranks; tokens: forwards by rank: {seen}",
                flush=True,
            )
        if not keep:
            return
        if kind == ROWS:
            for name, ratio in figures.layers_rows(ranks, cell.tokens, cell.lead):
                phase.mode(cell, name).rows.append(ratio)
            return
        for _, name, place, ms, interval in found:
            mode = phase.mode(cell, name)
            mode.ms[sweep, place] = ms
            if interval is not None:
                mode.interval_ms.append(interval)
        self._keep_calls(phase, plan, cell, ranks)

    def _keep_calls(
        self, phase: Phase, plan: Plan, cell: Cell, ranks: Sequence[dict[str, Any]]
    ) -> None:
        live = [name for name in plan.modes if name in ("live", "auto")]
        for name in live:  # One at most: only these ask for live plans.
            mode = phase.mode(cell, name)
            for rank in ranks:
                figures.add(mode.calls, rank["calls"])
                figures.add(mode.planner, rank["planner"])

    def _keep_profile(
        self, phase: Phase, plan: Plan, cell: Cell, ranks: Sequence[dict[str, Any]]
    ) -> None:
        for name in plan.modes:
            of = [rank["profiles"][name] for rank in ranks if name in rank["profiles"]]
            if not of:
                continue
            mean = kernels.mean(profile["groups"] for profile in of)
            phase.mode(cell, name).breakdown = mean
            entry = {
                **cell.fields,
                "mode": name,
                "groups": mean,
                "longest_of_rank_0": of[0]["longest"],
            }
            phase.profiles.append(entry)

    def _say(self, phase: Phase, sweep: int, clock: Clock) -> None:
        print(f"{phase.name}: {sweep} sweeps, {clock.left():.0f} s left", flush=True)
        for entry in phase.as_cells():
            off, home = (entry[f"ratio_{name}"] for name in ("off", "home"))
            print(
                f"    {entry['tokens']:>6} {entry['placement']:<9} {entry['mode']:<15} {entry['gpu_ms']:9.3f} ms"
                f"  /off {off or 0:.4f}  /home {home or 0:.4f}  n {entry['forwards']}",
                flush=True,
            )
