"""A recording as it would be with another EP size, other redundant experts, or experts in other places."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from waterfill_rs import dumps, placements
from waterfill_rs.dumps import Counts, Tokens

__all__ = ["place"]


def place(
    dump: Tokens | Counts, ranks: int, redundant: int | None, placement: str
) -> Tokens | Counts:
    """The same routing with its experts placed anew.

    Args:
        dump: the recording; where its experts stood is forgotten.
        ranks: EP size. If it is not the recording's, tokens are cut evenly over the ranks, in their order.
        redundant: experts beyond one of each; None: as many as a map says, else 0.
        placement: ``trivial``; ``eplb``; a file with a ``physical_to_logical_map``; or a recording, for EPLB.

    Raises:
        ValueError: with the numbers, where experts do not divide over the ranks, or a file does not fit.
    """
    sums = _logical_sums(dump)
    mapping, note = _mapping(dump, sums, ranks, redundant, placement)
    logical, experts = int(sums.shape[1]), int(mapping.shape[1])
    mappings: list[list[int]] | None = mapping.tolist() if experts > logical else None
    notes = [note]
    if mappings:
        notes.append("The rows of an expert with replicas are split evenly over them.")
    common = (ranks, experts, dump.top_k, mappings, notes)
    if isinstance(dump, Tokens):
        passes = {
            i: _places_of(_cut(_logical_ids(dump, i), ranks), mapping, logical) for i in dump.passes
        }
        if ranks != dump.ranks:
            notes.append(
                f"The tokens of {dump.ranks} ranks are cut evenly over {ranks}, in their order."
            )
        return Tokens(*common, passes, modes=dump.modes)
    sources = {i: _logical_counts(dump, i, logical) for i in dump.passes}
    if any(len(counts) != ranks for counts in sources.values()):
        notes.append("Tokens are taken to be spread evenly over the ranks.")
        sources = {i: counts.sum(0, keepdim=True) for i, counts in sources.items()}
    counted = {i: _rows_of(counts, mapping, logical) for i, counts in sources.items()}
    return Counts(*common, counted, modes=dump.modes, summed=dump.summed)


def _mapping(
    dump: Tokens | Counts, sums: Tensor, ranks: int, redundant: int | None, placement: str
) -> tuple[Tensor, str]:
    """``[L, P]``, and a sentence on where it is from."""
    layers, logical = sums.shape
    path = Path(placement)
    given = None if placement in ("trivial", "eplb") else dumps.read_map(path)
    if given is not None:
        mapping = placements.checked(path, given, layers, logical)
        extra = int(mapping.shape[1]) - logical
        if redundant not in (None, extra):
            raise ValueError(f"{path}: has {extra} redundant experts, --redundant is {redundant}")
        if (logical + extra) % ranks:
            raise ValueError(
                f"{path}: {logical + extra} physical experts do not divide over {ranks} ranks: "
                "give a map made for this --ep"
            )
        return mapping, f"Experts stand as {path} says."
    extra = redundant or 0
    placements.check_divides(logical, "logical", ranks, extra)
    if placement == "trivial":
        note = "Experts stand in order" + (
            ", the first ones again at the end: sglang's default." if extra else "."
        )
        return placements.trivial(layers, logical, extra), note
    if placement == "eplb":
        note = (
            "Experts stand as sglang's EPLB places them for this very recording: other traffic is less level. "
            "--placement OTHER_RECORDING tells how much."
        )
        return placements.by_eplb(sums, extra, ranks), note
    other = _logical_sums(dumps.read([path], None, dump.top_k, placed_anew=True))
    if other.shape != sums.shape:
        raise ValueError(
            f"{path}: {other.shape[1]} experts in {other.shape[0]} layers, "
            f"the recording has {logical} in {layers}: give one of the same model"
        )
    note = f"Experts stand as sglang's EPLB places them for the counts of {path}."
    return placements.by_eplb(other, extra, ranks), note


def _logical_of(dump: Tokens | Counts, layers: int) -> Tensor:
    """``[L, P]``: the logical expert of each physical one; counts of logical experts have no map."""
    if dump.places is None:
        return torch.arange(dump.experts).repeat(layers, 1)
    return dump.places.long()


def _layers(dump: Tokens | Counts) -> int:
    if isinstance(dump, Tokens):
        return next(iter(dump.passes.values()))[0].shape[0]
    return next(iter(dump.passes.values())).shape[1]


def _logical_sums(dump: Tokens | Counts) -> Tensor:
    """``[L, E]`` int64, over all passes and ranks."""
    mapping = _logical_of(dump, _layers(dump))
    sums = torch.zeros(mapping.shape[0], int(mapping.max()) + 1, dtype=torch.int64)
    for pass_id in dump.passes:
        if isinstance(dump, Tokens):
            for ids in _logical_ids(dump, pass_id):
                flat = ids.flatten(1)
                sums.scatter_add_(1, flat.clamp(min=0), (flat >= 0).long())
        else:
            sums += _logical_counts(dump, pass_id, int(sums.shape[1])).sum(0)
    return sums


def _logical_ids(dump: Tokens, pass_id: int) -> list[Tensor]:
    """Each rank's ids of logical experts, int64 ``[L, tokens, K]``, -1 for none."""
    parts = []
    for ids in dump.passes[pass_id]:
        own = ids[:, :, : dump.top_k].long()
        mapping = _logical_of(dump, own.shape[0])
        named = mapping.gather(1, own.flatten(1).clamp(min=0)).view(own.shape)
        parts.append(torch.where(own < 0, -1, named))
    return parts


def _logical_counts(dump: Counts, pass_id: int, logical: int) -> Tensor:
    """``[sources, L, E]`` int64."""
    counts = dump.passes[pass_id].long()
    mapping = _logical_of(dump, counts.shape[1]).expand(counts.shape)
    return counts.new_zeros(*counts.shape[:2], logical).scatter_add_(2, mapping, counts)


def _cut(parts: list[Tensor], ranks: int) -> list[Tensor]:
    """Each rank's tokens; for another number of ranks even runs of all tokens, rows of padding left out."""
    if len(parts) == ranks:
        return parts
    ids = torch.cat(parts, dim=1)
    ids = ids[:, (ids >= 0).any(dim=2).any(dim=0)]
    return list(ids.tensor_split(ranks, dim=1))


def _replicas(mapping: Tensor, logical: int) -> tuple[Tensor, Tensor]:
    """``[L, P]``: which of its expert's replicas each physical expert is; ``[L, E]``: how many there are."""
    turns, copies = _turns(mapping), torch.zeros(mapping.shape[0], logical, dtype=torch.int64)
    return turns, copies.scatter_add_(1, mapping, torch.ones_like(mapping))


def _turns(values: Tensor) -> Tensor:
    """``[L, N]``: how often each entry's value was in its row before."""
    order = values.argsort(dim=1, stable=True)
    ordered = values.gather(1, order)
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter_(1, order, torch.arange(values.shape[1]) - first)


def _places_of(parts: list[Tensor], mapping: Tensor, logical: int) -> list[Tensor]:
    """Logical ids to physical ones, int32: an expert's rows take its replicas in turn, from one of the rank's own."""
    turns, copies = _replicas(mapping, logical)
    where = torch.zeros(*copies.shape, int(copies.max()), dtype=torch.int64)
    layers = torch.arange(mapping.shape[0])[:, None].expand(mapping.shape)
    where[layers, mapping, turns] = torch.arange(mapping.shape[1]).expand(mapping.shape)
    placed = []
    for rank, ids in enumerate(parts):
        flat = ids.flatten(1)
        known = flat.clamp(min=0)
        turn = (_turns(flat) + rank) % copies.gather(1, known)
        physical = where[torch.arange(len(flat))[:, None], known, turn]
        placed.append(torch.where(flat < 0, -1, physical).view(ids.shape).int())
    return placed


def _rows_of(counts: Tensor, mapping: Tensor, logical: int) -> Tensor:
    """Logical counts ``[S, L, E]`` to physical ones ``[S, L, P]``, split as ``_places_of`` splits a rank's rows."""
    turns, copies = _replicas(mapping, logical)
    shape = (counts.shape[0], *mapping.shape)
    rows, parts = counts.gather(2, mapping.expand(shape)), copies.gather(1, mapping)
    sources = torch.arange(counts.shape[0])[:, None, None]
    return rows // parts + ((turns - sources) % parts < rows % parts)
