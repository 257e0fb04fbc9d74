"""The same prompts to every engine, twice: what they answer is kept for comparison with Waterfill off."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from server import accounts
from server.engines import Engines
from server.modes import Plan
from server.phase import Phase
from server.schedule import Clock, answers_message

ROUND_S = 240.0
"""The deadline of an answer: the first one may compile."""
OF_SWITCHED = ("overlap", "home")
"""Modes that an engine is asked in where several take turns."""


def ask(phase: Phase, engines: Engines, plans: Sequence[Plan], clock: Clock) -> None:
    """Have each engine answer, and keep it in ``phase.answers``; nothing where outputs are not asked for.

    An engine that answered before is not asked again. One that fails is told, and left out.
    """
    if not phase.output_prompts:
        return
    begin = time.monotonic()
    for plan in plans:
        for mode in _modes(plan):
            if mode not in phase.answers:
                told = [_round(phase, engines, plan, mode, clock) for _ in range(2)]
                if None not in told:
                    phase.answers[mode] = told
    print(
        f"{phase.name}: outputs of {', '.join(phase.answers)} after {time.monotonic() - begin:.1f} s",
        flush=True,
    )


def _modes(plan: Plan) -> Sequence[str]:
    return [mode for mode in OF_SWITCHED if mode in plan.modes] or plan.modes[:1]


def _round(phase: Phase, engines: Engines, plan: Plan, mode: str, clock: Clock) -> Any:
    """The answers, or None where the engine is not up or fails."""
    number = engines.next_number()
    prompts = phase.output_prompts
    asked = answers_message(
        phase.cells[0], plan, mode, prompts, phase.ranks, number, phase.first_table
    )
    result = engines.round(plan, asked, min(ROUND_S, max(10.0, clock.left() + 5)))
    if result is None:
        return None
    for rank, own in enumerate(result["ranks"]):
        told = accounts.mismatches(own, calls=False)
        phase.tell_mismatches(plan.name, [f"round {number}, rank {rank}: {one}" for one in told])
    return result["answers"]
