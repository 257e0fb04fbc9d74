"""What is compared: who decides where shared experts run, and which engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("off", "home", "sglang", "sglang-dynamic", "own", "live", "auto")
"""In the order of tables. ``off``: no Waterfill, the shared expert is on a stream of its own beside dispatch. ``home``:
fused, each shared row where its token is. ``sglang``, ``sglang-dynamic``: its own placements. ``own``, ``live``: ours from
own and from all ranks' counts. ``auto``: the package with no setting at all, in an engine where nothing is switched."""

SWITCHED = ("home", "sglang", "sglang-dynamic", "own", "live")
"""What one engine with Waterfill can change between from forward to forward."""

BY_DEFAULT = {"prefill": MODES, "decode": ("off", "home", "sglang", "own", "auto")}
"""sglang's dynamic mode reads counts on the host, which no CUDA graph can hold; ``live`` in a graph is ``auto``."""

REFERENCES = ("off", "home")
"""What ratios are to."""


@dataclass(frozen=True)
class Plan:
    """One engine: its name, and the modes that its forwards have in turn."""

    name: str
    modes: tuple[str, ...]

    @property
    def waterfill(self) -> bool:
        return self.modes != ("off",)

    @property
    def switches(self) -> bool:
        """Are its balancers replaced? Those of ``auto`` are as an operator has them."""
        return self.modes[0] in SWITCHED

    def cycle(self, round_number: int) -> tuple[str, ...]:
        """Another mode is first in each round: none always comes after the same pause."""
        shift = round_number % len(self.modes)
        return self.modes[shift:] + self.modes[:shift]


def engines(phase: str, modes: Sequence[str]) -> list[Plan]:
    """The engines that a phase needs for these modes, the references' first.

    Raises:
        ValueError: a mode that there isn't, or that cannot be in this phase.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: give some of {', '.join(MODES)}")
    if phase == "decode":
        if "sglang-dynamic" in modes:
            raise ValueError("sglang-dynamic cannot be in a CUDA graph: leave it out for decode")
        return [Plan(mode, (mode,)) for mode in MODES if mode in modes]
    switched = tuple(mode for mode in SWITCHED if mode in modes)
    plans = [Plan("off", ("off",))] if "off" in modes else []
    plans += [Plan("switched", switched)] if switched else []
    return plans + ([Plan("auto", ("auto",))] if "auto" in modes else [])


def groups(plans: Sequence[Plan], together: int) -> list[list[Plan]]:
    """Engines that are up at the same time. Where not all fit, those of the references stay and the others take turns.

    Raises:
        ValueError: ``together`` does not leave a place beside the references.
    """
    if len(plans) <= together:
        return [list(plans)]
    stay = [plan for plan in plans if set(plan.modes) & set(REFERENCES)]
    guests = [plan for plan in plans if plan not in stay]
    guests.sort(key=lambda plan: plan.name != "auto")  # What matters most is first.
    places = together - len(stay)
    if places < 1:
        raise ValueError(
            f"{together} engines fit on a GPU, and {len(stay)} references need a place beside them: "
            "give --together more, fewer --layers, or --apart"
        )
    return [stay + guests[i : i + places] for i in range(0, len(guests), places)]
