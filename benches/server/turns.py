"""What rounds of every phase have in common: engines that are up, in an order that turns, and accounts of each round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server import accounts
from server.engines import Engines
from server.modes import Plan
from server.phase import Phase

SAYS_S = 15.0
"""Between tables of what was found so far."""


class Turns:
    """Measures one phase with engines that are up.

    Args:
        most: no more rounds of all engines than these, where there is time for more.
        save_results: called after each of them.
    """

    def __init__(
        self, phase: Phase, engines: Engines, most: int | None, save_results: Callable[[], None]
    ) -> None:
        self._phase, self._engines, self._most = phase, engines, most
        self._save = save_results

    def _there(self, group: Sequence[Plan]) -> list[Plan]:
        return [plan for plan in group if plan in self._engines]

    def _in_turn(self, group: Sequence[Plan], sweep: int) -> list[Plan]:
        """Those that are up: in each sweep another one begins."""
        plans = self._there(group)
        shift = sweep % max(1, len(plans))
        return plans[shift:] + plans[:shift]

    def _tell_mismatches(
        self, plan: Plan, number: int, ranks: Sequence[dict[str, Any]], *, calls: bool
    ) -> None:
        for rank, own in enumerate(ranks):
            told = accounts.mismatches(own, calls=calls)
            self._phase.tell_mismatches(
                plan.name, [f"round {number}, rank {rank}: {one}" for one in told]
            )
