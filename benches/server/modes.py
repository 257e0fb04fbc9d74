"""What is compared: who decides where shared experts run, and which engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODES = (
    "off",
    "home",
    "sglang",
    "sglang-dynamic",
    "own",
    "live",
    "overlap",
    "fused",
    "auto",
    "off-static",
    "off-dynamic",
    "sglang-replicas",
    "live-replicas",
    "auto-replicas",
)
"""In the order of tables. ``off``: no Waterfill, the shared expert is on a stream of its own beside dispatch. ``home``:
fused, each shared row where its token is. ``sglang``, ``sglang-dynamic``: its own placements. ``own``, ``live``: ours from
own and from all ranks' counts, fused. ``overlap``: ours, the shared expert unfused beside dispatch in every forward.
``fused``: ``auto`` but for one setting, fused in every forward. ``auto``: the package with no setting at all, in an engine
where nothing is switched. The last five are those of ``WITH_REDUNDANT``; the others have no redundant experts."""

WITH_REDUNDANT = MODES[-5:]
"""``off-static``, ``off-dynamic``: no Waterfill, and sglang chooses replicas by that ``ep_dispatch_algorithm``.
``sglang-replicas``: the package, and replicas as sglang chose them. ``live-replicas``: the package chooses them by live plans in
every batch. ``auto-replicas``: as it does with no setting, by live plans in prefill and primary ones in decode."""

SWITCHED = ("home", "sglang", "sglang-dynamic", "own", "live", "overlap")
"""What one engine with Waterfill can change between from forward to forward."""

BY_DEFAULT = {
    "prefill": tuple(mode for mode in MODES if mode not in ("fused", *WITH_REDUNDANT)),
    "decode": ("off", "home", "sglang", "own", "overlap", "auto"),
    "mixed": ("off", "sglang", "fused", "auto"),
}
"""sglang's dynamic mode reads counts on the host, which no CUDA graph can hold. ``fused`` is ``live`` in an engine of its
own, for graphs and for mixed traffic."""

REFERENCES = ("off", "home")
"""What ratios are to."""
VERDICT_AMONG = ("off", "home", "own", "live")
"""Of these, the fastest is what ``auto`` is held to."""
LIVE = ("live", "fused", "auto", "sglang-replicas", "live-replicas", "auto-replicas")
"""Those that ask for live plans. An engine has one of them, or several of the last three."""
CHOOSE = ("auto", "sglang-replicas", "live-replicas", "auto-replicas")
"""Where nothing is switched, the package chooses for each batch whether it overlaps."""

BACKEND_VARIABLE, SHARED_VARIABLE = "WATERFILL_RS", "WATERFILL_RS_SHARED"
REPLICAS_VARIABLE = "WATERFILL_RS_REPLICAS"


@dataclass(frozen=True)
class Placed:
    """Where an engine's experts stand: placements' names in cells, redundant experts, sglang's ``dispatch`` algorithm.

    ``names``: the engine starts with the first, and its experts move before the first forward of a round in another.
    ``rebalance``: its EPLB places them anew after so many forwards, or 0.
    """

    names: tuple[str, ...]
    redundant: int
    dispatch: str
    rebalance: int = 0


@dataclass(frozen=True)
class Plan:
    """One engine: its name, and the modes that its forwards have in turn.

    ``switches``: are its balancers replaced? Those of the others are as an operator has them.
    """

    name: str
    modes: tuple[str, ...]
    switches: bool = False
    placed: Placed | None = None

    @property
    def waterfill(self) -> bool:
        return not self.modes[0].startswith("off")

    @property
    def moves(self) -> bool:
        """Do its experts move from round to round?"""
        return self.placed is not None and len(self.placed.names) > 1

    def serves(self, placement: str, redundant: int) -> bool:
        """Is this engine measured in the cells of that placement? One whose experts are not placed is in all."""
        placed = self.placed
        return placed is None or (placement in placed.names and redundant == placed.redundant)

    @property
    def upstream(self) -> bool:
        """Is it sglang's own Waterfill, without any of ours? It is where nothing else is asked of the engine."""
        return self.modes == ("sglang",)

    @property
    def as_shipped(self) -> bool:
        """Is it without the caller's variables of the package?"""
        return self.waterfill and not self.switches

    @property
    def settings(self) -> dict[str, str]:
        """The package's variables that this engine has."""
        if self.upstream:
            return {BACKEND_VARIABLE: "upstream"}
        if self.switches:
            # With overlap among its modes, each forward is told; without, no forward may overlap.
            shared = {} if "overlap" in self.modes else {SHARED_VARIABLE: "fused"}
            return shared | ({REPLICAS_VARIABLE: "live"} if "live-replicas" in self.modes else {})
        if self.modes[0] in ("overlap", "fused"):
            return {SHARED_VARIABLE: self.modes[0]}
        who, _, of = self.modes[0].partition("-")
        return {REPLICAS_VARIABLE: who} if of == "replicas" else {}

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
        if mode in WITH_REDUNDANT:
            raise ValueError(f"mode {mode!r} needs redundant experts: give --redundant instead")
    asked = [mode for mode in MODES if mode in modes]
    if phase != "prefill":
        if "sglang-dynamic" in modes:
            raise ValueError(f"sglang-dynamic cannot be in a CUDA graph: leave it out for {phase}")
        return [Plan(mode, (mode,), mode in ("home", "own", "live")) for mode in asked]
    switched = tuple(mode for mode in asked if mode in SWITCHED)
    plans = [_alone(mode) for mode in asked if mode == "off"]
    if switched:
        plans.append(
            _alone("sglang") if switched == ("sglang",) else Plan("switched", switched, True)
        )
    return plans + [_alone(mode) for mode in asked if mode in ("fused", "auto")]


def with_redundant(
    phase: str,
    placements: Sequence[str],
    redundant: int,
    dispatch: Sequence[str],
    replicas: Sequence[str],
    rebalance: int = 0,
) -> list[Plan]:
    """The engines whose experts are placed so: one without Waterfill for each of ``dispatch``, and those with it.

    In prefill one engine takes turns with ``replicas``, forward by forward. A graph holds one choice, so there it is an
    engine each. Without redundant experts there is no choice. Each engine moves between several ``placements``.
    """
    moves = len(placements) > 1

    def plan(name: str, modes: tuple[str, ...], algorithm: str, switches: bool = False) -> Plan:
        names = tuple(placements)
        if moves and modes == ("auto-replicas",):
            # It leaves groups out in decode from the start, and trivial places do not have primary replicas first.
            names = tuple(one for one in names if not one.endswith("trivial"))
        placed = Placed(names, redundant, algorithm, rebalance)
        where = "moved" if moves else placements[0]
        return Plan(f"{name}-{where}-{redundant}", modes, switches, placed)

    found = [plan(f"off-{one}", (f"off-{one}",), one) for one in dispatch]
    asked = tuple(f"{who}-replicas" for who in replicas) if redundant else ()
    if phase == "prefill" and len(asked) > 1:
        return [*found, plan("replicas", asked, dispatch[0], True)]
    return found + [plan(mode, (mode,), dispatch[0]) for mode in asked]


def _alone(mode: str) -> Plan:
    return Plan(mode, (mode,))


def union(plans: Sequence[Sequence[Plan]]) -> list[Plan]:
    """All engines that any of several phases needs, each once, the references' first."""
    found = dict.fromkeys(plan for of in plans for plan in of)
    return sorted(found, key=lambda plan: plan.name != "off")


def groups(plans: Sequence[Plan], together: int) -> list[list[Plan]]:
    """Engines that are up at the same time. Where not all fit, those of the references stay and the others take turns.

    Raises:
        ValueError: ``together`` does not leave a place beside the references.
    """
    if len(plans) <= together:
        return [list(plans)]
    stay = [plan for plan in plans if set(plan.modes) & set(REFERENCES)]
    guests = [plan for plan in plans if plan not in stay]
    # What matters most is first.
    guests.sort(key=lambda plan: not {"auto", "auto-replicas", "live-replicas"} & set(plan.modes))
    places = together - len(stay)
    if places < 1:
        raise ValueError(
            f"{together} engines fit on a GPU, and {len(stay)} references need a place beside them: "
            "give --together more, fewer --layers, or --apart"
        )
    return [stay + guests[i : i + places] for i in range(0, len(guests), places)]
