"""A recording as it would be with another EP size, other redundant experts, or experts in other places."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from waterfill_rs.placement import place
from waterfill_rs.replay import dump_files, dumps, placements
from waterfill_rs.replay.dumps import Counts, Tokens

__all__ = ["Places", "logical_sums"]


class Places:
    """Where a recording's experts would stand, for any EP size. What ``placement`` names is read once.

    Args:
        dump: the recording; where its experts stood is forgotten.
        redundant: experts beyond one of each; None: as many as a map says, else 0.
        placement: ``trivial``; ``spread``, as a server without a placement starts; ``eplb``; ``place``, as ``waterfill-rs place`` does; a file with a
            ``physical_to_logical_map``; or a recording, for EPLB.

    Raises:
        ValueError: with the numbers, where a file does not fit the recording.
    """

    def __init__(self, dump: Tokens | Counts, redundant: int | None, placement: Path) -> None:
        self._dump = dump
        sums = logical_sums(dump)
        self._layers, self._logical = sums.shape
        self._redundant = redundant or 0
        self._map: Tensor | None = None
        self._counts: Tensor | None = None
        self._by_place = str(placement) == "place"
        self._is_spread = str(placement) == "spread"
        if str(placement) == "trivial":
            again = ", the first ones again at the end: sglang's default" if redundant else ""
            self._note = f"Experts stand in order{again}."
        elif self._is_spread:
            self._note = (
                "Experts stand as waterfill-rs spreads them in a server without a placement."
            )
        elif str(placement) == "eplb":
            self._counts = sums
            self._note = (
                "Experts stand as sglang's EPLB places them for this very recording: other traffic is less level. "
                "--placement OTHER_RECORDING tells how much."
            )
        elif self._by_place:
            self._counts = sums
            self._note = (
                "Experts stand as waterfill-rs place puts them for this very recording: other traffic is less level. "
                "waterfill-rs place OTHER_RECORDING -o FILE and --placement FILE tell how much."
            )
        else:
            self._read(placement, redundant)

    def _read(self, path: Path, redundant: int | None) -> None:
        """A map, or else another recording's counts."""
        self._name = dump_files.name_of(path)
        if self._name == str(path) and not os.path.exists(path):
            raise ValueError(
                f"--placement {path}: there is no such file or folder: give trivial, spread, eplb, place, a file with a "
                "physical_to_logical_map, or a recording"
            )
        given = dumps.read_map(path)
        if given is None:
            self._counts = logical_sums(
                dumps.read([path], None, self._dump.top_k, placed_anew=True)
            )
            layers, logical = self._counts.shape
            if (layers, logical) != (self._layers, self._logical):
                raise ValueError(
                    f"{self._name}: {logical} experts in {layers} layers, the recording has {self._logical} in "
                    f"{self._layers}: give one of the same model"
                )
            self._note = (
                f"Experts stand as sglang's EPLB places them for the counts of {self._name}."
            )
            return
        self._map = placements.checked(self._name, given, self._layers, self._logical)
        self._redundant = int(self._map.shape[1]) - self._logical
        if redundant not in (None, self._redundant):
            raise ValueError(
                f"{self._name}: has {self._redundant} redundant experts, --redundant is {redundant}"
            )
        self._note = f"Experts stand as {self._name} says."

    def check(self, ranks: int) -> None:
        """Do the experts divide over the ranks?

        Raises:
            DoesNotDivideError: with the numbers that would do.
            ValueError: if ``place`` has no place for so many redundant experts.
        """
        if self._map is None:
            placements.check_divides(self._logical, "logical", ranks, self._redundant)
            if self._by_place:
                place.check(self._logical, ranks, self._redundant, 1)
        elif self._map.shape[1] % ranks:
            raise placements.DoesNotDivideError(
                f"{self._name}: {self._map.shape[1]} physical experts do not divide over {ranks} ranks: "
                "give a map made for this --ep"
            )

    def over(self, ranks: int) -> Tokens | Counts:
        """The recording with its experts placed so. For another EP size its tokens are cut evenly, in the ranks' order.

        Raises:
            DoesNotDivideError: as ``check`` does.
            ValueError: where sglang's EPLB is needed and cannot be imported.
        """
        self.check(ranks)
        dump, mapping = self._dump, self._mapping(ranks)
        logical, experts = self._logical, int(mapping.shape[1])
        mappings: list[list[int]] | None = mapping.tolist() if experts > logical else None
        notes = [*dump.notes, self._note]
        if mappings:
            notes.append("The rows of an expert with replicas are split evenly over them.")
        common = (ranks, experts, dump.top_k, mappings, notes)
        if isinstance(dump, Tokens):
            passes = {
                i: _places_of(_cut(_logical_ids(dump, i), ranks), mapping, logical)
                for i in dump.passes
            }
            if ranks != dump.ranks:
                notes.append(
                    f"The tokens of {dump.ranks} ranks are cut evenly over {ranks}, in their order."
                )
            return Tokens(*common, passes, modes=dump.modes, places=mapping)
        sources = {i: _logical_counts(dump, i, logical) for i in dump.passes}
        if any(len(counts) != ranks for counts in sources.values()):
            notes.append("Tokens are taken to be spread evenly over the ranks.")
            sources = {i: counts.sum(0, keepdim=True) for i, counts in sources.items()}
        counted = {i: _rows_of(counts, mapping, logical) for i, counts in sources.items()}
        return Counts(*common, counted, modes=dump.modes, summed=dump.summed, places=mapping)

    def _mapping(self, ranks: int) -> Tensor:
        """``[L, P]``"""
        if self._map is not None:
            return self._map
        if self._by_place and self._counts is not None:
            return placements.placed(self._counts, self._redundant, ranks)
        if self._counts is not None:
            from waterfill_rs.sglang import eplb

            return eplb.by_eplb(self._counts, self._redundant, ranks)
        if self._is_spread:
            return placements.spread_out(self._layers, self._logical, self._redundant, ranks)
        return placements.trivial(self._layers, self._logical, self._redundant)


def _logical_of(dump: Tokens | Counts, layers: int) -> Tensor:
    """``[L, P]``: the logical expert of each physical one; counts of logical experts have no map."""
    if dump.places is None:
        return torch.arange(dump.experts).repeat(layers, 1)
    return dump.places.long()


def _layers(dump: Tokens | Counts) -> int:
    if isinstance(dump, Tokens):
        return next(iter(dump.passes.values()))[0].shape[0]
    return next(iter(dump.passes.values())).shape[1]


def logical_sums(dump: Tokens | Counts) -> Tensor:
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
