"""Engines with redundant experts: what is asked for, where experts stand, and sglang's arguments for it.

A placement is made from other traffic than is measured: see ``recording.Recording.other``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from server import model
from server.modes import REPLICAS_VARIABLE, Plan, with_redundant
from server.recording import Recording

PLACEMENTS = ("place", "eplb", "spread", "trivial")
"""``place``: ``waterfill-rs place``. ``eplb``: sglang's own EPLB. Two know no traffic: ``spread``, what a server has with
waterfill-rs and without a placement, and ``trivial``, sglang's default. Each is the same map in all of its engines, but for
``eplb``: where waterfill-rs chooses replicas it is repaired, as the package repairs what sglang makes of counts."""
_BY_THEMSELVES = ("spread", "trivial")
CHOICES = {
    "placement": PLACEMENTS,
    "dispatch": ("static", "dynamic"),
    "replicas": ("auto", "live", "sglang"),
}
Map = list[list[int]]
"""``[L, P]``, the logical expert of each physical one."""
Place = tuple[str, int]
"""A cell's placement: its name and the number of redundant experts."""


class Files(NamedTuple):
    """Of a placement: for engines where waterfill-rs chooses replicas, and for the others. Most often they are one."""

    ours: Path
    theirs: Path


@dataclass(frozen=True)
class Asked:
    """``numbers`` of redundant experts. ``dispatch``: sglang's ``ep_dispatch_algorithm`` of engines without Waterfill; those
    with it have the first. ``replicas``: who chooses them where Waterfill is on. ``rebalance``: forwards between rebalances, or 0.
    ``moved``: one engine has all placements of a number in turn, and not an engine each."""

    numbers: list[int]
    placement: list[str]
    dispatch: list[str]
    replicas: list[str]
    rebalance: int = 0
    moved: bool = False

    def places(self, recorded: str) -> list[tuple[str, str, int]]:
        """For one recording: a cell's name of the placement, ``PLACEMENTS``'s, and the number of redundant experts.

        Without redundant experts spread and trivial places are those of ``off``.
        """
        return [
            (recorded + name, name, number)
            for number in self.numbers
            for name in self.placement
            if number or name not in _BY_THEMSELVES
        ]

    def plans(self, phase: str, recorded: Sequence[str]) -> list[Plan]:
        return [
            plan
            for names, number in self._together(recorded)
            for plan in with_redundant(
                phase, names, number, self.dispatch, self.replicas, self.rebalance
            )
        ]

    def _together(self, recorded: Sequence[str]) -> list[tuple[list[str], int]]:
        """Placements that an engine has in turn, or the one that it has, and the number of redundant experts."""
        places = [(name, n) for before in recorded for name, _, n in self.places(before)]
        if not self.moved:
            return [([name], number) for name, number in places]
        by_number = {n: [name for name, of in places if of == n] for n in self.numbers}
        return [(names, number) for number, names in by_number.items() if names]


def of_options(options: argparse.Namespace) -> Asked | None:
    """None without ``--redundant``.

    Raises:
        ValueError: naming the option, and what to give.
    """
    if options.redundant is None:
        return None
    if options.mixed is not None:
        raise ValueError("--mixed has no redundant experts: leave it or --redundant out")
    parts = options.redundant.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--redundant {options.redundant!r}: give numbers, with commas between")
    chosen = {name: _some_of(name, getattr(options, name)) for name in CHOICES}
    if options.rebalance < 0:
        raise ValueError(f"--rebalance {options.rebalance}: give a number of forwards from 1 on")
    if options.moved and (options.rebalance or chosen["placement"] == ["trivial"]):
        raise ValueError(
            "--moved: give another --placement than trivial, and no --rebalance, whose maps would be in the way"
        )
    numbers = sorted({int(part) for part in parts})
    return Asked(numbers, **chosen, rebalance=options.rebalance, moved=options.moved)


def _some_of(option: str, text: str) -> list[str]:
    asked = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(asked) <= set(CHOICES[option]):
        raise ValueError(f"--{option} {text!r}: give some of {', '.join(CHOICES[option])}")
    return asked


def check(asked: Asked, experts: int, ranks: int) -> None:
    """
    Raises:
        ValueError: experts that do not divide over the ranks, naming what would.
    """
    from waterfill_rs.placement import place
    from waterfill_rs.replay import placements

    for number in asked.numbers:
        placements.check_divides(experts, "logical", ranks, number)
        place.check(experts, ranks, number, 1)


def mapping(name: str, recording: Recording, redundant: int) -> Map:
    """Where experts stand in each layer of the recording, by its other traffic; says how far it is.

    Raises:
        ValueError: sglang's EPLB cannot be imported.
    """
    import torch

    from waterfill_rs.placement import place
    from waterfill_rs.replay import placements

    other = recording.other
    if name == "trivial":
        return cast(Map, placements.trivial(len(other), recording.experts, redundant).tolist())
    if name == "spread":
        spread = placements.spread_out(len(other), recording.experts, redundant, recording.ranks)
        return cast(Map, spread.tolist())
    if name == "eplb":
        from waterfill_rs.sglang.eplb import by_eplb

        return by_eplb(torch.tensor(other), redundant, recording.ranks).tolist()
    made: dict[tuple[int, ...], list[int]] = {}  # A dial repeats its layers.
    said = time.monotonic()
    for layer, rows in enumerate(map(tuple, other.tolist())):
        if rows not in made:
            made[rows] = place.place([rows], ranks=recording.ranks, redundant=redundant)
        if time.monotonic() - said > 1:
            said = time.monotonic()
            print(f"place: layer {layer + 1} of {len(other)}", file=sys.stderr)
    return [made[rows] for rows in map(tuple, other.tolist())]


def repaired(of_eplb: Map, recording: Recording) -> Map:
    """With as many primary replicas on each rank, where swaps make it so; all ranks are on one host."""
    from waterfill_rs.placement import repair

    ranks = recording.ranks
    return [
        repair.repaired(row, rows, ranks, ranks)
        for row, rows in zip(of_eplb, recording.other.tolist(), strict=True)
    ]


def write(path: Path, of_recording: Map, layers: int) -> None:
    """For sglang's ``init_expert_location``: dense layers first, in trivial places, then as many MoE layers as the model has.

    A recording with fewer layers is read round and round, as its ids are.
    """
    experts = max(of_recording[0]) + 1
    dense = [place % experts for place in range(len(of_recording[0]))]
    moe = [of_recording[layer % len(of_recording)] for layer in range(layers)]
    path.write_text(json.dumps({"physical_to_logical_map": [dense] * model.DENSE_LAYERS + moe}))


def arguments(plan: Plan, files: Mapping[Place, Files]) -> dict[str, Any]:
    """sglang's, for an engine whose experts stand so; none for one without. ``files``: what ``write`` wrote."""
    placed = plan.placed
    if placed is None:
        return {}
    return {
        "ep_num_redundant_experts": placed.redundant,
        "init_expert_location": locations(plan, files)[0],
        # Without one sglang leaves trivial places as they are, and no replica gets a row.
        "ep_dispatch_algorithm": placed.dispatch,
        **_rebalances(placed.rebalance),
    }


def locations(plan: Plan, files: Mapping[Place, Files]) -> list[str]:
    """sglang's ``init_expert_location`` for each of the engine's placements.

    An engine gets no file for the places that it has by itself: spread ones where waterfill-rs chooses replicas, and trivial
    ones elsewhere.
    """
    placed = plan.placed
    if placed is None:
        return []
    ours = plan.waterfill and plan.settings.get(REPLICAS_VARIABLE) != "sglang"
    own = "spread" if ours else "trivial"
    found = []
    for name in placed.names:
        of = files[name, placed.redundant]
        found.append("trivial" if name.endswith(own) else str(of.ours if ours else of.theirs))
    return found


def _rebalances(every: int) -> dict[str, Any]:
    """sglang's EPLB after so many forwards; it keeps as many."""
    if not every:
        return {}
    return {
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": every,
        "expert_distribution_recorder_buffer_size": every,
    }
