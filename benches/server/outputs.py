"""The same prompts to every engine, twice: what they answer is kept for comparison with Waterfill off.

Engines whose experts are placed are asked too: routing is forced on all of them by logical expert.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from server import accounts, output_figures
from server.engines import Engines
from server.modes import Plan
from server.output_figures import Who
from server.phase import Phase
from server.redundant import Place
from server.schedule import Cell, Clock, answers_message

ROUND_S = 240.0
"""The deadline of an answer: the first one may compile."""
OF_SWITCHED = ("overlap", "home")
"""Modes that an engine is asked in where several take turns."""
OTHER_BASE = 1
"""Of the answers with other experts: their routing is that of one forward later."""


def ask(phase: Phase, engines: Engines, plans: Sequence[Plan], clock: Clock) -> None:
    """Have each engine answer, and keep it in ``phase.answers``; nothing where outputs are not asked for.

    An engine that answered before is not asked again. One that fails is told, and left out. Of several recordings the first
    one's routing is forced, and engines placed for another are not asked.
    """
    if not phase.output_prompts:
        return
    begin = time.monotonic()
    for plan, cell, who in asked(phase, plans):
        if who not in phase.answers:
            # Off a third time with other experts: so far are answers by wrong ones.
            bases = [0, 0, OTHER_BASE] if who[0] == "off" else [0, 0]
            told = [_round(phase, engines, plan, who[0], cell, clock, base) for base in bases]
            if None not in told:
                phase.answers[who] = told
    names = ", ".join(output_figures.name(*who) for who in phase.answers)
    print(f"{phase.name}: outputs of {names} after {time.monotonic() - begin:.1f} s", flush=True)


def asked(phase: Phase, plans: Sequence[Plan]) -> Iterator[tuple[Plan, Cell, Who]]:
    """Who is asked, in a cell of each of the engine's placements, with the routing of the first."""
    for plan in plans:
        cells: dict[Place | None, Cell] = {}
        for cell in phase.cells:
            first = cell.placement == phase.cells[0].placement
            if first and plan.serves(cell.name, cell.redundant):
                cells.setdefault((cell.name, cell.redundant) if plan.placed else None, cell)
        for place, cell in cells.items():
            for mode in _modes(plan):
                yield plan, cell, (mode, place)


def _modes(plan: Plan) -> Sequence[str]:
    """All ways to choose replicas, but one or two of those that place shared rows."""
    if plan.placed:
        return plan.modes
    return [mode for mode in OF_SWITCHED if mode in plan.modes] or plan.modes[:1]


def _round(
    phase: Phase, engines: Engines, plan: Plan, mode: str, cell: Cell, clock: Clock, base: int
) -> Any:
    """The answers, or None where the engine is not up or fails."""
    number = engines.next_number()
    prompts = phase.output_prompts
    message = answers_message(
        cell, plan, mode, prompts, phase.ranks, number, phase.first_table, base=base
    )
    result = engines.round(plan, message, min(ROUND_S, max(10.0, clock.left() + 5)))
    if result is None:
        return None
    for rank, own in enumerate(result["ranks"]):
        told = accounts.mismatches(own, calls=False)
        phase.tell_mismatches(plan.name, [f"round {number}, rank {rank}: {one}" for one in told])
    return result["answers"]
