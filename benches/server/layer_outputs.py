"""Outputs of MoE layers, which every engine makes of the same inputs by the same experts: how far they are from those of off.

A row's difference is the norm of what differs over the norm of what off made. Rounding, of FP8 too, makes it small. One wrong
expert among a token's makes it large, and off with other experts shows how large.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server import output_figures
from server.engines import Engines
from server.modes import MODES, Plan
from server.output_figures import Who
from server.outputs import OTHER_BASE, ROUND_S, asked
from server.phase import Phase
from server.schedule import Cell, Clock, answers_message

Outputs = list[list[np.ndarray]]
"""By rank and forward, float32 ``[layers, rows, hidden]``. The first forward is a prefill, and the others decode."""
KINDS = ("prefill", "decode")
HEAD = (
    "| phase | mode | placement | forwards | rows | changes of the map | to off: median, largest | equal bit for bit "
    "| to itself: median, largest | with other experts: smallest |"
)


def ask(phase: Phase, engines: Engines, plans: Sequence[Plan], clock: Clock) -> None:
    """Have each engine run the same inputs twice, and keep what was found in ``phase.layers_found``.

    Nothing where it is not asked for. Off is the first, and without it there is nothing to compare with.
    """
    if not phase.layer_prompts:
        return
    begin = time.monotonic()
    for plan, cell, who in asked(phase, plans):
        if who not in phase.layers_found and (who[0] == "off" or phase.off_layers):
            _ask_one(phase, engines, plan, who, cell, clock)
    names = ", ".join(output_figures.name(*who) for who in phase.layers_found)
    print(f"{phase.name}: outputs of layers of {names} after {time.monotonic() - begin:.1f} s")


def _ask_one(
    phase: Phase, engines: Engines, plan: Plan, who: Who, cell: Cell, clock: Clock
) -> None:
    def round_of(base: int) -> tuple[Outputs, int] | None:
        return _round(phase, engines, plan, who[0], cell, clock, base)

    first, second = round_of(0), round_of(0)
    if first is None or second is None:
        return
    other = round_of(OTHER_BASE) if who[0] == "off" else None
    found = [phase.off_layers or first[0], first[0], second[0], *([other[0]] if other else [])]
    if any(_shapes(one) != _shapes(found[0]) for one in found):
        print(
            f"engine {plan.name}: its forwards are others than off's, so its layers are not compared"
        )
        return
    entry: dict[str, Any] = {"rebalances": first[1] + second[1]}
    if who[0] == "off":
        phase.off_layers = first[0]
        entry["other_experts"] = compared(first[0], other[0]) if other else None
    else:
        entry["to_off"] = compared(phase.off_layers, first[0])
        entry["second_to_off"] = compared(phase.off_layers, second[0])
    entry["repeated"] = compared(first[0], second[0])
    phase.layers_found[who] = entry


def _round(
    phase: Phase, engines: Engines, plan: Plan, mode: str, cell: Cell, clock: Clock, base: int
) -> tuple[Outputs, int] | None:
    """Outputs and rebalances; None where the engine is not up or fails."""
    message = answers_message(
        cell,
        plan,
        mode,
        phase.layer_prompts,
        phase.ranks,
        engines.next_number(),
        phase.first_table,
        base=base,
        layers=True,
    )
    result = engines.round(plan, message, min(ROUND_S, max(10.0, clock.left() + 5)))
    if result is None:
        return None
    ranks = result["ranks"]
    if any("layers_file" not in own for own in ranks):
        print(f"engine {plan.name}: a rank ran no forward, so its layers are not compared")
        return None
    return [_read(Path(own["layers_file"])) for own in ranks], ranks[0]["rebalances"]


def _read(path: Path) -> list[np.ndarray]:
    """A rank's, and the file goes."""
    with np.load(path) as content:
        found = [content[name] for name in sorted(content.files, key=int)]
    path.unlink()
    return found


def _shapes(outputs: Outputs) -> list[list[tuple[int, ...]]]:
    return [[forward.shape for forward in own] for own in outputs]


def compared(reference: Outputs, other: Outputs) -> dict[str, dict[str, Any]]:
    """By ``KINDS``: ``rows`` of all ranks, forwards and layers, how many are ``equal`` to the bit, and the ``smallest``,
    ``median`` and ``largest`` difference of a row.

    Raises:
        ValueError: other forwards.
    """
    found = {}
    for kind in KINDS:
        pairs = list(_pairs(reference, other, kind))
        if not pairs:
            continue
        differences = np.concatenate([_differences(a, b) for a, b in pairs])
        found[kind] = {
            "rows": len(differences),
            "equal": int((differences == 0).sum()),
            "smallest": float(differences.min()),
            "median": float(np.median(differences)),
            "largest": float(differences.max()),
        }
    return found


def _pairs(
    reference: Outputs, other: Outputs, kind: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for of_reference, of_other in zip(reference, other, strict=True):
        shapes = _shapes([of_reference, of_other])
        if shapes[0] != shapes[1]:
            raise ValueError(f"forwards of shapes {shapes[0]} and {shapes[1]} cannot be compared")
        split = slice(0, 1) if kind == "prefill" else slice(1, None)
        yield from zip(of_reference[split], of_other[split], strict=True)


def _differences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``[layers * rows]``; infinite where a number is none."""
    by = np.linalg.norm(other - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    return np.where(np.isfinite(by), by, np.inf).ravel()


def entries(phase: str, found: Mapping[Who, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of the results' ``layers``, in the order of modes; numbers that are infinite become None."""
    return [
        {"phase": phase, "mode": mode, "placement": (place or (None, 0))[0]}
        | {"redundant": (place or (None, 0))[1]}
        | _finite(found[mode, place])
        for mode, place in sorted(found, key=lambda who: MODES.index(who[0]))
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(of) for name, of in value.items()}
    return None if value == float("inf") else value


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table, or nothing."""
    if not found:
        return []
    rows = [row for entry in found for row in _rows(entry)]
    about = "Outputs of MoE layers of the same inputs, twice; of a row, what differs over off's:"
    return [f"{about}\n\n" + "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *rows])]


def _rows(entry: Mapping[str, Any]) -> Iterator[str]:
    where = f"{entry['placement']} + {entry['redundant']}" if entry["placement"] else ""
    for kind, repeated in entry["repeated"].items():
        of = [entry[name][kind] for name in ("to_off", "second_to_off") if entry.get(name)]
        other = (entry.get("other_experts") or {}).get(kind)
        fields = [
            entry["phase"],
            entry["mode"],
            where,
            kind,
            str(repeated["rows"]),
            str(entry["rebalances"]),
            "; ".join(map(_words, of)),
            "; ".join(str(one["equal"]) for one in of),
            _words(repeated),
            _number(other["smallest"]) if other else "",
        ]
        yield "| " + " | ".join(fields) + " |"


def _words(of: Mapping[str, Any]) -> str:
    return f"{_number(of['median'])}, {_number(of['largest'])}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"
