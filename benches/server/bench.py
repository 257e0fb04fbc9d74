"""Phases are measured: their engines are started, warmed, and take turns until the time is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server import model, modes, redundant, workspace
from server.engines import Engines
from server.forced import save
from server.mixed import MixedRounds
from server.modes import Plan
from server.phase import Phase
from server.schedule import Clock
from server.sweeps import Sweeps


class Bench:
    """Runs phases.

    Args:
        apart: one engine after the other, in place of all at once.
        most: no more sweeps or mixed rounds of a phase than these, where there is time for more.
        save_results: called after every one of them.
        logs: engines' logs go there.
        patience: see ``Engines``.
    """

    def __init__(
        self,
        space: workspace.Workspace,
        logs: Path,
        apart: bool,
        most: int | None,
        save_results: Callable[[], None],
        patience: float | None = None,
    ) -> None:
        self._space, self._apart, self._most = space, apart, most
        self._save = save_results
        self.engines = Engines(space, logs, patience)

    def run(self, phases: Sequence[Phase], clock: Clock, together: int) -> None:
        """Measure until the clock ends, with one start of the engines for these phases; what was found is in them.

        Args:
            together: how many engines fit on a GPU.
        """
        plans = modes.union([phase.plans for phase in phases])
        groups = [[plan] for plan in plans] if self._apart else modes.groups(plans, together)
        start = self._prepared(phases)
        sweeps = dict.fromkeys((phase.name for phase in phases), 0)
        try:
            for i, group in enumerate(groups):
                part = clock.part(1 / (len(groups) - i))
                self.engines.stop_all_but(group)
                self.engines.start(plans=group, seconds=part.left(), **start)
                for j, phase in enumerate(phases):
                    of = part.part(1 / (len(phases) - j))
                    first = 0 if self._apart else sweeps[phase.name]
                    sweeps[phase.name] = self._measure(phase, group, of, first)
        finally:
            self.engines.stop_all_but([])
        self._save()

    def _measure(self, phase: Phase, group: Sequence[Plan], clock: Clock, sweep: int) -> int:
        """Gives the number of the next sweep."""
        measures = MixedRounds if phase.name == "mixed" else Sweeps
        of_phase = [plan for plan in group if plan in phase.plans]
        return measures(phase, self.engines, self._most, self._save).measure(of_phase, clock, sweep)

    def _prepared(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """The model and the routing, on disk; what ``Engines.start`` is told of them."""
        name = "-".join(phase.name for phase in phases)
        first = phases[0].recordings[0]
        folder = self._space.write_model(
            f"model-{name}", model.config(first.experts, first.top_k, phases[0].layers)
        )
        tables = []
        for phase in phases:
            phase.first_table = len(tables)
            tables += phase.tables()
        routing = self._space.folder / f"routing-{name}.npz"
        save(routing, tables)
        needs = {phase.name: phase.tokens for phase in phases}
        for phase in phases:
            prompts = model.output_prompts(needs)
            phase.output_prompts = prompts if phase.outputs else 0
            phase.layer_prompts = prompts if phase.compares_layers else 0
        answered = [phase.output_prompts * model.OUTPUT_PROMPT for phase in phases]
        compared = [phase.layer_prompts * model.OUTPUT_PROMPT for phase in phases]
        return {
            "name": name,
            "needs": needs,
            "ranks": phases[0].ranks,
            "folder": folder,
            "routing": {
                "routing": str(routing),
                "placements": len(tables),
                "longest": max(model.longest(needs), *answered, *compared),
                "experts": first.experts,
                "layer_rows": max(compared),
            },
            "placements": self._placements(phases),
            "more": phases[0].engine_arguments,
            "meanwhile": lambda: _model_rows(phases),
        }

    def _placements(self, phases: Sequence[Phase]) -> dict[redundant.Place, redundant.Files]:
        """Files of where experts stand."""
        files = {}
        for phase in phases:
            for place, mapping in phase.maps.items():
                path = ours = self._space.folder / f"placement-{place[0]}-{place[1]}.json"
                redundant.write(path, mapping, phase.layers)
                if place in phase.repaired:
                    ours = path.with_suffix(".repaired.json")
                    redundant.write(ours, phase.repaired[place], phase.layers)
                files[place] = redundant.Files(ours, path)
        return files


def _model_rows(phases: Sequence[Phase]) -> None:
    """Once, while the first engines start."""
    for phase in phases:
        if not phase.modelled:
            phase.model_rows()
