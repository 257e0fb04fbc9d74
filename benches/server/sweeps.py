"""Full forwards of prefill or decode: warm-up, rows, sweeps over all cells and engines while there is time, profiles."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from server import figures, kernels, layer_outputs, outputs
from server.control import PROFILED, ROWS, TIMED
from server.modes import LIVE, Plan
from server.schedule import Cell, Clock, after_s, message, profiled_cell, profiles_s
from server.turns import SAYS_S, Turns

ROUND_S, PROFILE_ROUND_S = 240.0, 45.0
CHOOSING = ("overlap", *LIVE)
"""Modes of engines whose batches are kept."""


class Sweeps(Turns):
    """Measures prefill or decode."""

    def measure(self, group: Sequence[Plan], clock: Clock, sweep: int) -> int:
        """Warm-up, outputs, rows, sweeps, profiles. Gives the number of the next sweep."""
        phase = self._phase
        begin = time.monotonic()
        self._warm(group, clock)
        print(
            f"{phase.name}: warm after {time.monotonic() - begin:.0f} s, {clock.left():.0f} s left",
            flush=True,
        )
        outputs.ask(phase, self._engines, self._there(group), clock)
        layer_outputs.ask(phase, self._engines, self._there(group), clock)
        if phase.name == "prefill":
            self._count_rows(group, clock)
        sweep = self._timed(group, clock, sweep)
        if phase.name == "decode" and phase.maps:
            # Last, because a step without its graph is nothing that a server of the bench did before.
            self._count_rows(group, clock, profiles_s(len(group)))
        profiled = profiled_cell(phase.cells, phase.profiled)
        for plan in self._of(profiled, self._there(group)):
            if clock.left() > 2:
                self._round(plan, profiled, 0, PROFILED, clock, short=True)
        self._save()
        return sweep

    def _warm(self, group: Sequence[Plan], clock: Clock) -> None:
        """Each number of tokens that is new to an engine compiles kernels; once more, so that nothing of it is left.

        Another placement may need other kernels in prefill. In decode the graphs are there.
        """
        phase = self._phase
        seen: set[tuple[str, int]] = set()
        for i, cell in enumerate(phase.cells):
            for plan in self._of(cell, self._there(group)):
                new = (plan.name, cell.tokens) not in seen
                seen.add((plan.name, cell.tokens))
                again = not (plan.moves and phase.name == "decode")
                for _ in range(2 if new else int(again)):
                    self._round(plan, cell, i, TIMED, clock, short=True, keep=False)

    def _of(self, cell: Cell, plans: Sequence[Plan]) -> list[Plan]:
        return [plan for plan in plans if plan.serves(cell.name, cell.redundant)]

    def _count_rows(self, group: Sequence[Plan], clock: Clock, kept: float = 0.0) -> None:
        left_out = 0
        for cell in self._phase.cells:
            for plan in self._of(cell, self._there(group)):
                if not (plan.waterfill or cell.placed):
                    continue
                if clock.left() > kept:
                    self._round(plan, cell, 0, ROWS, clock, short=True)
                else:
                    left_out += 1
        if left_out:
            print(f"{self._phase.name}: no time to count the rows of {left_out} engines' cells")

    def _timed(self, group: Sequence[Plan], clock: Clock, sweep: int) -> int:
        phase = self._phase
        kept = after_s(group, phase.cells)
        took: dict[Cell, float] = {}
        first = sweep
        said = time.monotonic()
        while self._there(group):
            measured = False
            for cell in phase.cells:
                if clock.left() - kept < took.get(cell, 0.0):
                    continue
                cell_begin = time.monotonic()
                for plan in self._of(cell, self._in_turn(group, sweep)):
                    self._round(plan, cell, sweep, TIMED, clock)
                took[cell] = time.monotonic() - cell_begin
                measured = True
            sweep += 1
            self._save()
            if not measured or clock.left() < kept or sweep - first == self._most:
                break
            if time.monotonic() - said > SAYS_S:
                said = time.monotonic()
                self._say(sweep, clock)
        return sweep

    def _round(
        self,
        plan: Plan,
        cell: Cell,
        sweep: int,
        kind: int,
        clock: Clock,
        *,
        short: bool = False,
        keep: bool = True,
    ) -> None:
        """One round of one engine."""
        phase = self._phase
        number = self._engines.next_number()
        asked = message(cell, plan, phase.ranks, number, sweep, kind, short, phase.first_table)
        # Past the limit only what runs may end, in a few seconds.
        longest = PROFILE_ROUND_S if kind == PROFILED else ROUND_S
        result = self._engines.round(plan, asked, min(longest, max(10.0, clock.left() + 5)))
        if result is None:
            return
        ranks = result["ranks"]
        self._tell_mismatches(plan, number, ranks, calls=False)
        if kind == PROFILED:
            self._keep_profile(plan, cell, ranks)
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
            for name, sent in figures.layers_rows(ranks, cell.tokens, cell.lead):
                phase.mode(cell, name).rows.append(sent)
            return
        for _, name, place, ms, interval in found:
            mode = phase.mode(cell, name)
            mode.ms[sweep, place] = ms
            if interval is not None:
                mode.interval_ms.append(interval)
        self._keep_calls(plan, cell, ranks)

    def _keep_calls(self, plan: Plan, cell: Cell, ranks: Sequence[dict[str, Any]]) -> None:
        alone = sum(name in LIVE for name in plan.modes) == 1
        for name in plan.modes:
            mode = self._phase.mode(cell, name)
            for rank in ranks:
                if (
                    name in LIVE
                ):  # Only these ask for live plans. Two in one engine have its calls in common.
                    figures.add(mode.calls, rank["calls"])
                    figures.add(mode.planner, rank["planner"] if alone else None)
                if plan.modes == (name,) and name in CHOOSING:
                    figures.add(mode.batches, rank["batches"])

    def _keep_profile(self, plan: Plan, cell: Cell, ranks: Sequence[dict[str, Any]]) -> None:
        for name in plan.modes:
            of = [rank["profiles"][name] for rank in ranks if name in rank["profiles"]]
            if not of:
                continue
            mean = kernels.mean(profile["groups"] for profile in of)
            self._phase.mode(cell, name).breakdown = mean
            entry = {
                **cell.fields,
                "mode": name,
                "groups": mean,
                "longest_of_rank_0": of[0]["longest"],
            }
            self._phase.profiles.append(entry)

    def _say(self, sweep: int, clock: Clock) -> None:
        print(f"{self._phase.name}: {sweep} sweeps, {clock.left():.0f} s left", flush=True)
        for entry in self._phase.as_cells():
            off, home = (entry[f"ratio_{name}"] for name in ("off", "home"))
            print(
                f"    {entry['tokens']:>6} {entry['placement']:<9} {entry['mode']:<15} {entry['gpu_ms']:9.3f} ms"
                f"  /off {off or 0:.4f}  /home {home or 0:.4f}  n {entry['forwards']}",
                flush=True,
            )
