"""Which forwards a round has, and which rounds there is time for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from server.control import ANSWERED, LAYERS, MIXED, TIMED
from server.model import DECODE_PROMPT, DECODE_STEPS, OUTPUT_NEW, OUTPUT_PROMPT
from server.modes import Plan
from server.traffic import Request

LONGEST_PROMPT, SHORTEST_PROMPT = 1024, 64
PREFILL_LEAD, DECODE_LEAD = 1, 8
"""Forwards at a round's begin that do not count: the device is empty before the first, and a prefill comes before decode."""
CYCLES = 4
"""Forwards of each mode in a round of prefill: small ones are bound by the host, and take about as long as large ones."""
SHORT_DECODE = 4
"""Steps that count in a round of decode that is not timed."""
ROWS_S = 2.0
"""About what it takes one engine to count the rows of one cell of decode."""
MOST_ROWS_S = 60.0
"""Where all take longer, rows of the first cells are counted, and of more if there is time."""
PROFILE_S = 4.0
"""About what a profile of one engine takes."""
STOPPING_S = 8.0


@dataclass(frozen=True)
class Cell:
    """``placement``: its index among the phase's tables; ``name``: its name in the results. ``tokens`` of a mixed one are
    those of a chunk. ``placed``: engines' experts are placed, ``redundant`` ones among them, but for those of ``off`` and other
    modes without."""

    phase: str
    tokens: int
    placement: int
    name: str
    redundant: int = 0
    placed: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Those of an entry of ``cells``."""
        return {
            "phase": self.phase,
            "tokens": self.tokens,
            "placement": self.name,
            "redundant": self.redundant,
            "placed": self.placed,
        }

    @property
    def lead(self) -> int:
        return {"prefill": PREFILL_LEAD, "decode": DECODE_LEAD, "mixed": 0}[self.phase]

    @property
    def forwards(self) -> int:
        """Of one mode and timed round, those that count."""
        if self.phase == "decode":
            # The prefill is the first, and gives the first token.
            return DECODE_STEPS - DECODE_LEAD
        return CYCLES


def prompt_length(tokens: int) -> int:
    """The longest prompts that fill ``tokens`` exactly.

    Raises:
        ValueError: there are none of a sensible length.
    """
    for length in range(min(tokens, LONGEST_PROMPT), SHORTEST_PROMPT - 1, -1):
        if tokens % length == 0:
            return length
    raise ValueError(
        f"prefill of {tokens} tokens: no prompt of {SHORTEST_PROMPT} to {LONGEST_PROMPT} tokens fills it: give a multiple of 64"
    )


def message(
    cell: Cell,
    plan: Plan,
    ranks: int,
    number: int,
    sweep: int,
    kind: int = TIMED,
    short: bool = False,
    first_table: int = 0,
) -> dict[str, Any]:
    """What an engine is asked for: see ``engine.Rounds`` and ``control``.

    Args:
        number: of the round, from 1 on; another one each time.
        sweep: engines have the same tokens in the same sweep.
        short: one forward of each mode, or a few steps.
        first_table: of the phase, among those of its engines.
    """
    cycle = plan.cycle(sweep)
    common = _common(cell, plan, number, sweep, first_table) | {
        "kind": kind,
        "base": sweep * cell.forwards,
    }
    if cell.phase == "decode":
        steps = cell.lead + SHORT_DECODE + 1 if short else DECODE_STEPS
        return common | {
            "requests": cell.tokens * ranks,
            "prompt": DECODE_PROMPT,
            "new": steps,
            "chunk": DECODE_PROMPT * cell.tokens,
        }
    prompt = prompt_length(cell.tokens)
    forwards = cell.lead + (1 if short else cell.forwards) * len(cycle)
    return common | {
        "requests": forwards * (cell.tokens // prompt) * ranks,
        "prompt": prompt,
        "new": 1,
        "chunk": cell.tokens,
    }


def mixed_message(
    cell: Cell,
    plan: Plan,
    asked: Sequence[Request],
    number: int,
    sweep: int,
    window: float,
    deadline: float,
    first_table: int = 0,
) -> dict[str, Any]:
    """What an engine is asked for in a mixed round: ``window`` and ``deadline`` in seconds, see ``traffic.Traffic.send``."""
    return _common(cell, plan, number, sweep, first_table) | {
        "kind": MIXED,
        "base": sweep,
        "chunk": cell.tokens,
        "traffic": [astuple(one) for one in asked],
        "window": window,
        "deadline": deadline,
    }


def answers_message(
    cell: Cell,
    plan: Plan,
    mode: str,
    prompts: int,
    ranks: int,
    number: int,
    first_table: int = 0,
    *,
    base: int = 0,
    layers: bool = False,
) -> dict[str, Any]:
    """What an engine is asked for where answers are compared, or the outputs of ``layers``.

    All prompts of a rank are one forward, and each step has one token of each of them. Every engine has the same routing in
    the same forward.

    Args:
        mode: of every forward.
        prompts: of each rank.
        base: another one forces other experts on the same prompts.
    """
    return _common(cell, plan, number, 0, first_table) | {
        "kind": LAYERS if layers else ANSWERED,
        "cycle": [mode],
        "tokens": prompts * OUTPUT_PROMPT,
        "chunk": prompts * OUTPUT_PROMPT,
        "lead": 0,
        "base": base,
        "requests": prompts * ranks,
        "prompt": OUTPUT_PROMPT,
        "new": OUTPUT_NEW,
    }


def _common(cell: Cell, plan: Plan, number: int, sweep: int, first_table: int) -> dict[str, Any]:
    return {
        "round": number,
        "tokens": cell.tokens,
        "lead": cell.lead,
        "placement": first_table + cell.placement,
        "location": plan.placed.names.index(cell.name) if plan.placed else 0,
        "cycle": list(plan.cycle(sweep)),
    }


class Clock:
    """What is left of a limit: ``now`` is a clock in seconds."""

    def __init__(self, now: Any, end: float) -> None:
        self._now, self.end = now, end

    def left(self) -> float:
        return self.end - self._now()

    def part(self, share: float) -> Clock:
        """A clock that ends after this share of what is left."""
        return Clock(self._now, self._now() + self.left() * share)


def after_s(plans: Sequence[Plan], cells: Sequence[Cell]) -> float:
    """What is kept for the end: a profile of each engine, and rows of decode, of all cells or of the first."""
    rows = sum(
        plan.serves(cell.name, cell.redundant)
        for cell in cells
        if cell.placed and cell.phase == "decode"
        for plan in plans
    )
    return profiles_s(len(plans)) + min(ROWS_S * rows, MOST_ROWS_S)


def profiles_s(engines: int) -> float:
    """What is kept for a profile of each engine."""
    return STOPPING_S + engines * PROFILE_S


def profiled_cell(cells: Sequence[Cell], tokens: int | None = None) -> Cell:
    """The largest number of tokens, or this one if it is among them, in its last placement."""
    of = [cell for cell in cells if cell.tokens == tokens] or cells
    return max(of, key=lambda cell: (cell.tokens, cell.placement))
