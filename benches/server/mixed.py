"""Rounds of mixed traffic: each engine has the same requests, they take turns, and calls are accounted for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from server import mixed_figures, outputs
from server.modes import Plan
from server.schedule import STOPPING_S, Cell, Clock, mixed_message
from server.traffic import requests
from server.turns import SAYS_S, Turns

WARM_ROUNDS = 2
WARM_S = 150.0
"""The deadline of a round that may compile."""
WINDOW = 0.9
"""Of the time that the first engine takes for requests that are all there. The rank that a part's requests all go to then
has some that wait all along, so that the wall clock measures the engine, and not the traffic. The others run dry."""
SLOWEST, SHORTEST_S = 6.0, 20.0
"""A round that takes this many times what the first engine's took, and this many seconds, is late."""
REPLY_S = 10.0
"""After the deadline: the engine tells what was not answered."""


class MixedRounds(Turns):
    """Measures the mixed phase."""

    def measure(self, group: Sequence[Plan], clock: Clock, sweep: int) -> int:
        """Warm-up, outputs, then rounds until the clock ends. Gives the number of the next round."""
        begin = time.monotonic()
        alone: dict[str, float] = {}
        for i in range(WARM_ROUNDS):
            for plan in self._there(group):
                for cell in self._phase.cells[: 1 if i else None]:
                    seconds = self._round(plan, cell, i, 0.0, WARM_S, clock, keep=False)
                    if seconds is not None:
                        alone[plan.name] = seconds
        if not self._there(group):
            return sweep
        usual = alone[self._there(group)[0].name]
        window, deadline = WINDOW * usual, max(SHORTEST_S, SLOWEST * usual)
        print(
            f"mixed: warm after {time.monotonic() - begin:.0f} s, {clock.left():.0f} s left; {self._phase.requests} requests a round "
            f"over {window:.1f} s, at most {deadline:.0f} s",
            flush=True,
        )
        outputs.ask(self._phase, self._engines, self._there(group), clock)
        expected = 1.5 * usual * len(self._there(group))
        return self._timed(group, clock, sweep, window, deadline, expected)

    def _timed(
        self,
        group: Sequence[Plan],
        clock: Clock,
        sweep: int,
        window: float,
        deadline: float,
        longest: float,
    ) -> int:
        first, said = sweep, time.monotonic()
        while self._there(group) and clock.left() > STOPPING_S + longest:
            begin = time.monotonic()
            cell = self._phase.cells[sweep % len(self._phase.cells)]
            for plan in self._in_turn(group, sweep):
                self._round(plan, cell, sweep, window, deadline, clock)
            longest = max(longest, time.monotonic() - begin)
            sweep += 1
            self._save()
            if sweep - first == self._most:
                break
            if time.monotonic() - said > SAYS_S:
                said = time.monotonic()
                self._say(sweep - first, clock)
        return sweep

    def _round(
        self,
        plan: Plan,
        cell: Cell,
        sweep: int,
        window: float,
        deadline: float,
        clock: Clock,
        *,
        keep: bool = True,
    ) -> float | None:
        """One round of one engine: its seconds, or None where it failed or was late."""
        phase = self._phase
        number = self._engines.next_number()
        deadline = min(deadline, max(10.0, clock.left()))
        sent = requests(phase.requests, phase.ranks, sweep)
        asked = mixed_message(cell, plan, sent, number, sweep, window, deadline, phase.first_table)
        result = self._engines.round(plan, asked, deadline + REPLY_S)
        if result is None:
            return None
        self._tell_mismatches(plan, number, result["ranks"], calls=True)
        if keep:
            rounds = phase.mixed.setdefault(cell, {}).setdefault(plan.modes[0], [])
            rounds.append(mixed_figures.of_result(sweep, result))
        return float(result["seconds"])

    def _say(self, rounds: int, clock: Clock) -> None:
        print(f"mixed: {rounds} rounds, {clock.left():.0f} s left", flush=True)
        for entry in self._phase.as_mixed():
            print(
                f"    {entry['placement']:<9} {entry['mode']:<8} {entry['seconds']:7.2f} s  {entry['new_tokens_per_s']:8.0f} new tokens/s"
                f"  /off {entry['ratio_off'] or 0:.4f}  n {entry['rounds']}",
                flush=True,
            )
