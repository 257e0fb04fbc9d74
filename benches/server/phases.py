"""Options made into phases: which cells, from which recording, with which engines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from server import model, modes, recording, redundant, results, traffic
from server.modes import Plan
from server.phase import Phase
from server.schedule import Cell, prompt_length

NAMES = ("prefill", "decode", "mixed")
TOKENS = {"prefill": "1024,4096,8192", "decode": "8,64,128"}
PLACEMENTS = {"prefill": "packed,trivial", "decode": "trivial", "mixed": "trivial"}
REQUESTS = 64
"""Of a mixed round."""
EXPERTS, DIAL_TOKENS = 64, 16384
LAYERS, FEWEST_LAYERS = 26, 8
TURNS = 4
"""Engines at once where not all can be: two references, and two that take turns with the others."""


def of_options(options: argparse.Namespace) -> list[Phase]:
    """What is to be measured, with its recordings read and checked.

    Raises:
        ValueError: naming the option, and what to give.
    """
    ranks = options.ranks or len(results.gpus())
    if not 1 <= ranks <= 8:
        raise ValueError(f"{ranks} GPUs: 1 to 8 are needed, or --ranks")
    tokens = _tokens(options, ranks)
    if options.profiled and not any(options.profiled in of for of in tokens.values()):
        raise ValueError(f"--profiled {options.profiled}: give a number of tokens that is measured")
    asked = redundant.of_options(options)
    plans = {name: _plans(options, name, list(tokens)) for name in tokens}
    if asked:
        names = [f"{recording.name_of_dial(ratio)}-" for ratio in _ratios(options)] or [""]
        plans = {name: of + asked.plans(name, names) for name, of in plans.items()}
    for asked_for, name in (
        (options.outputs, "--outputs"),
        (options.layer_outputs, "--layer-outputs"),
    ):
        if asked_for and not any(map(_has_off, plans.values())):
            raise ValueError(f"{name} compares engines with off: give it among --modes")
    hold_out = asked is not None
    read = None
    if options.recording:
        read = recording.read(options.recording, ranks, options.experts, hold_out=hold_out)
    experts = read.experts if read else options.experts or EXPERTS
    if asked:
        redundant.check(asked, experts, ranks)
    most = experts + max(asked.numbers if asked else [0])
    layers = options.layers or _layers(options, plans, most, ranks)
    recordings = [read] if read else _dials(options, ranks, experts, layers, hold_out)
    if asked:
        return _placed(options, asked, tokens, recordings, plans, layers)
    return [_phase(options, name, tokens[name], recordings, plans[name], layers) for name in tokens]


def _has_off(plans: Sequence[Plan]) -> bool:
    return any(plan.name == "off" for plan in plans)


def together(options: argparse.Namespace, phases: Sequence[Phase]) -> int:
    """Engines for these phases that fit on a GPU; where its memory is not known, all."""
    if options.together:
        return int(options.together)
    memory = [mib for _, mib in results.gpus()]
    if not memory:
        return len(modes.MODES)
    first = phases[0]
    graphs = model.has_graphs(phase.name for phase in phases)
    return model.engines_that_fit(
        min(memory) / 1024, first.layers, first.experts, first.ranks, graphs
    )


def starts(options: argparse.Namespace, phases: Sequence[Phase]) -> list[list[Phase]]:
    """Phases that have their engines started once."""
    return [list(phases)] if options.one_start else [[phase] for phase in phases]


def _tokens(options: argparse.Namespace, ranks: int) -> dict[str, list[int]]:
    """By phase that was asked for, those of a forward and rank."""
    asked = {"prefill": options.prefill, "decode": options.decode}
    if all(text is None for text in asked.values()) and options.mixed is None:
        asked = dict(TOKENS)
    found = {name: _numbers(name, text) for name, text in asked.items() if text}
    if options.mixed is not None:
        traffic.requests(options.mixed, ranks, 0)  # Too few are told now.
        found["mixed"] = [model.MIXED_CHUNK]
    if not found:
        raise ValueError("nothing to measure: give --prefill, --decode or --mixed")
    for count in found.get("prefill", ()):
        prompt_length(count)
    return found


def _numbers(name: str, text: str) -> list[int]:
    """
    Raises:
        ValueError: what is not a number from 1 on.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--{name} {text!r}: give numbers from 1 on, with commas between")
    return sorted({int(part) for part in parts})


def _plans(options: argparse.Namespace, name: str, phases: Sequence[str]) -> list[Plan]:
    if not options.modes:
        asked_for = modes.BY_DEFAULT[name] if options.redundant is None else ("off",)
        return modes.engines(name, asked_for)
    asked = []
    for part in options.modes.split(","):
        mode, at, phase = part.strip().partition("@")
        if at and phase not in NAMES:
            raise ValueError(f"--modes {part.strip()!r}: after @ give one of {', '.join(NAMES)}")
        if phase in ("", name):
            asked.append((mode, bool(at)))
    # Given for all phases: what only prefill can have is left out of the others.
    kept = [
        mode
        for mode, alone in asked
        if alone or "prefill" not in phases or name == "prefill" or mode != "sglang-dynamic"
    ]
    plans = modes.engines(name, kept)
    if not plans:
        raise ValueError(f"--modes {options.modes!r}: there is none for {name}")
    return plans


def _layers(
    options: argparse.Namespace, plans: Mapping[str, list[Plan]], experts: int, ranks: int
) -> int:
    """``LAYERS``, or as many as let all engines of each start be up at once, or ``TURNS`` of them where that are too few
    layers; told where it is fewer. ``plans``: by phase."""
    memory = [mib / 1024 for _, mib in results.gpus()]
    if not memory:
        return LAYERS
    fewest = LAYERS
    for names in [list(plans)] if options.one_start else [[name] for name in plans]:
        engines = len(modes.union([plans[name] for name in names]))
        engines = 1 if options.apart else min(engines, options.together or engines)
        shape = (experts, ranks, model.has_graphs(names))
        layers, together = _most_layers(min(memory), engines, shape)
        if layers < LAYERS:
            print(
                f"{'-'.join(names)}: {layers} MoE layers let {together} engines be on {min(memory):.0f} GiB"
            )
        fewest = min(fewest, layers)
    return fewest


def _most_layers(gib: float, engines: int, shape: tuple[int, int, bool]) -> tuple[int, int]:
    """Layers, and how many of the engines are up at once with them. ``shape``: experts, ranks, whether there are graphs."""
    for together in (engines, min(engines, TURNS)):
        for layers in range(LAYERS, FEWEST_LAYERS - 1, -1):
            if model.engines_that_fit(gib, layers, *shape) >= together:
                return layers, together
    return LAYERS, 1


def _ratios(options: argparse.Namespace) -> list[float]:
    """Of dials; none where there is a recording."""
    try:
        return [float(part) for part in options.dial.split(",")] if options.dial else []
    except ValueError:
        raise ValueError(f"--dial {options.dial!r}: give numbers from 1.0 to 1.5") from None


def _dials(
    options: argparse.Namespace, ranks: int, experts: int, layers: int, hold_out: bool
) -> list[recording.Recording]:
    shape = (ranks, experts, options.top_k, layers, DIAL_TOKENS)
    return [recording.synthetic(ratio, *shape, hold_out=hold_out) for ratio in _ratios(options)]


def _places(text: str) -> tuple[list[str], dict[str, list[int]]]:
    """Names of placements, and the numbers of tokens of those that are for some alone."""
    names, only = [], {}
    for part in text.split(","):
        name, at, count = part.strip().partition("@")
        if at:
            only.setdefault(name, []).extend(_numbers("placements", count))
        if name not in names:
            names.append(name)
    return names, only


def _phase(
    options: argparse.Namespace,
    name: str,
    tokens: list[int],
    recordings: list[recording.Recording],
    plans: list[Plan],
    layers: int,
) -> Phase:
    only: dict[str, list[int]] = {}
    if recordings[0].placed:
        places = [(one, recording.place("", one)) for one in recordings]
    else:
        names, only = _places(options.placements or PLACEMENTS[name])
        places = [(recordings[0], recording.place(one, recordings[0])) for one in names]
    orders = {
        "prefill": lambda one: [one],
        "decode": lambda one: [recording.for_decode(one)],
        "mixed": lambda one: [one, recording.for_decode(one)],
    }[name]
    tables = [(order, place) for one, place in places for order in orders(one)]
    a_place = len(tables) // len(places)
    cells = [
        Cell(name, count, i * a_place, placement.name)
        for count in tokens
        for i, (_, placement) in enumerate(places)
        if count in only.get(placement.name, tokens) or name == "mixed"
    ]
    return Phase(
        name,
        plans,
        cells,
        [one for one, _ in tables],
        [placement for _, placement in tables],
        options.engine,
        layers,
        requests=options.mixed or 0,
        profiled=options.profiled,
        outputs=options.outputs and _has_off(plans),
        compares_layers=options.layer_outputs and _has_off(plans),
    )


def _placed(
    options: argparse.Namespace,
    asked: redundant.Asked,
    tokens: Mapping[str, list[int]],
    recordings: list[recording.Recording],
    plans: Mapping[str, list[Plan]],
    layers: int,
) -> list[Phase]:
    """Phases whose engines place experts: ids stay logical, and a recording has one table for all placements."""
    maps: dict[redundant.Place, redundant.Map] = {}
    repaired: dict[redundant.Place, redundant.Map] = {}
    places: list[tuple[int, str, int]] = []
    for i, one in enumerate(recordings):
        for cell_name, made_by, number in asked.places(f"{one.name}-" if one.placed else ""):
            maps[cell_name, number] = redundant.mapping(made_by, one, number)
            if made_by == "eplb":
                repaired[cell_name, number] = redundant.repaired(maps[cell_name, number], one)
            places.append((i, cell_name, number))
    found = []
    for name, of in tokens.items():
        order = recording.for_decode if name == "decode" else lambda one: one
        cells = [
            Cell(name, count, i, cell_name, number, placed=True)
            for count in of
            for i, cell_name, number in places
        ]
        if asked.moved:  # Experts move from cell to cell: as seldom as can be.
            cells.sort(key=lambda cell: (cell.redundant, cell.placement, cell.name))
        tables = [order(one) for one in recordings]
        logical = [recording.place("trivial", one) for one in tables]
        has_off = _has_off(plans[name])
        of_phase = Phase(
            name,
            plans[name],
            cells,
            tables,
            logical,
            options.engine,
            layers,
            maps=maps,
            repaired=repaired,
            profiled=options.profiled,
            outputs=options.outputs and has_off,
            compares_layers=options.layer_outputs and has_off,
        )
        found.append(of_phase)
    return found
