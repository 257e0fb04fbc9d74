"""A phase: what there is to be measured, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server import figures, modes, output_figures, rows
from server.figures import Mode
from server.mixed_figures import MixedRound, entries
from server.modes import Plan
from server.output_figures import Who
from server.recording import Placement, Recording
from server.redundant import Map, Place
from server.schedule import Cell

MOST_PRINTED = 10
"""Of what does not add up; the results have all of it."""
MODELLED_FORWARDS = {"prefill": 2, "decode": 8}


@dataclass
class Phase:
    """``recordings``, ``placements``: one of each for each table of the cells; a mixed cell has two, for prefill and decode.

    ``requests``: of a mixed round. ``first_table``: the place of the phase's tables among those that its engines read.
    ``maps``: by placement of engines whose experts are placed, the map. ``repaired``: that of engines where waterfill-rs chooses
    replicas, where it is another. ``profiled``: tokens of the forwards that are profiled, by default the most.
    ``outputs``: are answers compared? ``output_prompts``: of each rank, for that. ``answers``: by who gave them, see ``output_figures``.
    ``compares_layers``, ``layer_prompts``, ``layers_found``: the same of outputs of layers, see ``layer_outputs``. ``off_layers``: off's.
    """

    name: str
    plans: list[Plan]
    cells: list[Cell]
    recordings: list[Recording]
    placements: list[Placement]
    engine_arguments: dict[str, Any]
    layers: int
    requests: int = 0
    first_table: int = 0
    maps: dict[Place, Map] = field(default_factory=dict)
    repaired: dict[Place, Map] = field(default_factory=dict)
    profiled: int | None = None
    outputs: bool = False
    compares_layers: bool = False
    output_prompts: int = 0
    layer_prompts: int = 0
    found: dict[tuple[Cell, str], Mode] = field(default_factory=dict)
    mixed: dict[Cell, dict[str, list[MixedRound]]] = field(default_factory=dict)
    answers: dict[Who, list[Any]] = field(default_factory=dict)
    layers_found: dict[Who, dict[str, Any]] = field(default_factory=dict)
    off_layers: list[Any] = field(default_factory=list)
    modelled: dict[Cell, dict[str, float]] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return self.recordings[0].ranks

    @property
    def experts(self) -> int:
        """Physical ones, of the engine that has most."""
        return self.recordings[0].experts + max((n for _, n in self.maps), default=0)

    @property
    def tokens(self) -> list[int]:
        return sorted({cell.tokens for cell in self.cells})

    def tables(self) -> list[list[Any]]:
        """By table and rank physical ids ``[layers, tokens, K]``."""
        return [p.tables(r) for p, r in zip(self.placements, self.recordings, strict=True)]

    def mode(self, cell: Cell, name: str) -> Mode:
        return self.found.setdefault((cell, name), Mode())

    def model_rows(self) -> None:
        """What the package's models say of the forwards that the first sweep has; says how far it is."""
        if self.name == "mixed":
            return
        tables: dict[int, Any] = {}
        for cell in self.cells:
            i = cell.placement
            if i not in tables:
                tables[i] = self.placements[i].tables(self.recordings[i])
            print(f"rows by the models: {self.name}, {cell.name}, {cell.tokens} tokens", flush=True)
            places = range(min(cell.forwards, MODELLED_FORWARDS[self.name]))
            self.modelled[cell] = rows.modelled(
                tables[i], places, cell.tokens, self.recordings[i].experts
            )
            if cell.placed:
                mapping = self.maps[cell.name, cell.redundant]
                fused = self.name == "prefill"
                allowed = rows.placed(tables[i], places, cell.tokens, mapping, fused)
                self.modelled[cell] = {"routed": self.modelled[cell]["routed"], **allowed}

    def as_cells(self) -> list[dict[str, Any]]:
        """Entries of ``cells``, in the order of cells and modes, of what was measured until now."""
        found = []
        for cell in self.cells:
            of = {
                name: self.found[cell, name] for name in modes.MODES if (cell, name) in self.found
            }
            modelled = self.modelled.get(cell, {})
            found += [
                figures.cell(cell.fields, name, of, modelled, self.ranks)
                for name in of
                if of[name].ms
            ]
        return found

    def as_mixed(self) -> list[dict[str, Any]]:
        """Entries of ``mixed`` of what was measured until now."""
        return [entry for cell, of in self.mixed.items() for entry in entries(cell.fields, of)]

    def as_outputs(self) -> list[dict[str, Any]]:
        """Entries of ``outputs`` of what was answered until now."""
        return output_figures.entries(self.name, self.answers)

    def tell_mismatches(self, engine: str, told: Sequence[str]) -> None:
        """Keep what does not add up for the results, and print the first of it."""
        for one in told:
            text = f"{self.name}, engine {engine}: does not add up: {one}"
            self.mismatches.append(text)
            if len(self.mismatches) <= MOST_PRINTED:
                print(text, flush=True)
