"""Maps of experts in which each rank's primary replicas come first, so that decode can leave the other groups out.

sglang makes each map by ``ExpertLocationMetadata._init_raw``, of a file or by EPLB, before it loads or moves weights. Their
order within a rank is free, and changes here.

Which experts a rank holds changes in EPLB's maps alone, where no order will do: by a few swaps (``placement/repair.py``), from
the counts that EPLB makes the map of. A map of a file stays as somebody placed it.
"""

from __future__ import annotations

import inspect
import logging
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

import waterfill_rs
from waterfill_rs import _native, sglang_flags
from waterfill_rs.config import REPLICAS_VARIABLE, Config
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.placement.repair import repaired
from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.sglang import compat, loaded_hooks
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang.peers import peers_of_maps
from waterfill_rs.sglang_versions import Seams

__all__ = [
    "PrimariesFirst",
    "against",
    "against_arguments",
    "against_hook",
    "all_agree",
    "arranged",
    "keep",
    "ordered",
    "swapped",
    "with_twins",
]

logger = logging.getLogger(__name__)

_MAP, _OF_LOGICAL = "physical_to_logical_map", "logical_to_all_physical_map"
_COUNTS = "logical_count"
_HOW = "it makes other maps of experts, {:08x}: install the same waterfill-rs on all ranks"
"""What another rank says of one that makes other maps."""

_BY_NAME = (None, "flattened_bucket")
"""Formats in which sglang is sent weights by their names in a checkpoint."""

_agreed: list[list[str]] = []
"""What all ranks agreed on, once they have."""
_kept: list[tuple[Any, ReplicaTables, int]] = []
"""sglang's metadata in force, the tables made of it, and the EP rank: layers of ``kept_first`` keep that many. One at most."""


def ordered(row: Sequence[int], ranks: int) -> list[int]:
    """``[P]`` logical experts with each rank's primary replicas first, where all ranks have as many; else as they are.

    The order of the others, and of the primary ones among themselves, stays. So does a map whose first experts are primary,
    and the trivial one: ``trivial_places`` knows it by its order, and so does sglang where it loads some scales of FP4.
    """
    return [row[physical] for physical in _order(row, ranks)]


def _order(row: Sequence[int], ranks: int) -> list[int]:
    """``[P]`` which physical expert of ``row`` comes where."""
    own = list(range(len(row)))
    table = _table(row, ranks)
    if table is None or table.first_primaries is not None or is_trivial([row]):
        return own
    is_primary = [primary == physical for physical, primary in enumerate(table.primaries)]
    each = len(row) // ranks
    of_ranks = [own[first : first + each] for first in range(0, len(row), each)]
    if len({sum(is_primary[physical] for physical in rank) for rank in of_ranks}) > 1:
        return own
    return [p for rank in of_ranks for p in sorted(rank, key=lambda p: not is_primary[p])]


def _table(row: Sequence[int], ranks: int) -> _native.ReplicaTable | None:
    """None for what is no map: ``Replicas`` says so."""
    try:
        return _native.ReplicaTable(ranks, row)
    except (OverflowError, ValueError):
        return None


def arranged(mapping: Tensor, of_logical: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Both of sglang's maps in the order of ``ordered``, layer by layer.

    Args:
        mapping: ``[layers, P]`` the logical expert of each physical one.
        of_logical: ``[layers, L, X]`` physical experts of each logical one, padded with -1.
    """
    orders = torch.tensor([_order(row, ranks) for row in mapping.tolist()])
    physical = mapping.shape[1]
    if torch.equal(orders, torch.arange(physical).expand_as(orders)):
        return mapping, of_logical
    # Where each physical expert goes; the one past the last stands for padding.
    places = torch.nn.functional.pad(orders.argsort(dim=1), (0, 1), value=-1).to(of_logical)
    old = of_logical.flatten(1).long()
    moved = places.gather(1, torch.where(old < 0, physical, old)).reshape(of_logical.shape)
    return mapping.gather(1, orders.to(mapping.device)), moved


def swapped(
    mapping: Tensor,
    of_logical: Tensor,
    counts: Tensor,
    layers: Collection[int],
    ranks: int,
    ranks_per_host: int,
) -> tuple[Tensor, Tensor]:
    """Both of sglang's maps once swaps have made it possible to order these layers. Where they cannot, a layer stays.

    Args:
        mapping: ``[all layers, P]`` the logical expert of each physical one.
        of_logical: ``[all layers, L, X]`` all physical experts of each logical one, padded with -1.
        counts: rows ``[all layers, L]``.
    """
    before, rows = mapping.tolist(), counts.tolist()
    after = {layer: repaired(before[layer], rows[layer], ranks, ranks_per_host) for layer in layers}
    changed = [layer for layer in layers if after[layer] != before[layer]]
    if not changed:
        return mapping, of_logical
    mapping = mapping.clone()
    mapping[changed] = torch.tensor([after[layer] for layer in changed]).to(mapping)
    listed = [_listed(after[layer], of_logical.shape[1]) for layer in changed]
    return mapping, _with_rows(of_logical, changed, torch.tensor(_padded(listed)))


def _listed(row: Sequence[int], experts: int) -> list[list[int]]:
    """Of each logical expert all physical ones."""
    listed: list[list[int]] = [[] for _ in range(experts)]
    for physical, logical in enumerate(row):
        listed[logical].append(physical)
    return listed


def _padded(listed: Sequence[Sequence[list[int]]]) -> list[list[list[int]]]:
    """All as long as the longest, with -1."""
    width = max(len(of) for one in listed for of in one)
    return [[of + [-1] * (width - len(of)) for of in one] for one in listed]


def with_twins(mapping: Tensor, of_logical: Tensor, ranks: int) -> Tensor:
    """``of_logical`` with all replicas of an expert on a rank, where one is listed.

    Of several on its own rank sglang lists one, and loads weights into listed ones alone. Plans take all of them.
    """
    each = mapping.shape[1] // ranks
    longer: dict[tuple[int, int], list[int]] = {}
    for layer, row in enumerate(mapping.tolist()):
        slots: dict[tuple[int, int], list[int]] = {}
        for physical, logical in enumerate(row):
            slots.setdefault((logical, physical // each), []).append(physical)
        for (logical, _), twins in slots.items():
            if len(twins) > 1:
                listed = longer.get((layer, logical)) or of_logical[layer, logical].tolist()
                listed = [physical for physical in listed if physical >= 0]
                if set(twins) & set(listed):
                    longer[layer, logical] = sorted({*listed, *twins})
    if not longer:
        return of_logical
    width = max(of_logical.shape[2], *map(len, longer.values()))
    of_logical = torch.nn.functional.pad(
        of_logical, (0, width - of_logical.shape[2]), value=-1
    ).clone()
    for (layer, logical), listed in longer.items():
        of_logical[layer, logical] = -1
        of_logical[layer, logical, : len(listed)] = torch.tensor(listed).to(of_logical)
    return of_logical


def against(seams: Seams) -> list[str]:
    """Why sglang's order stays, as far as this rank knows."""
    try:
        arguments = resolve(seams.arguments)()
    except Exception as error:  # Nobody serves: sglang's tools make maps too.
        return [f"no server's arguments are in force: {error!r}"]
    return against_arguments(arguments, seams)


def against_arguments(arguments: Any, seams: Seams) -> list[str]:
    """The same, of these arguments or parsed flags."""
    if not getattr(arguments, seams.switch, False):
        return [f"{seams.flag} was not given"]
    if not seams.redundant:
        return ["this sglang's Waterfill takes no redundant experts"]
    if Config.from_environment(os.environ).replicas == "sglang":
        return [f"{REPLICAS_VARIABLE}=sglang"]
    return sglang_flags.against_order(
        lambda name: getattr(arguments, name, None)
    ) or compat.against_order(seams)


def against_hook(seams: Seams) -> list[str]:
    """Why sglang's order stays, as all ranks agreed when the first map was made."""
    return _missing(seams) or (_agreed[0] if _agreed else ["no map was made since"])


def _missing(seams: Seams) -> list[str]:
    """The first of the hooks that must all be there, if one is not."""
    there = loaded_hooks.found()
    ours = (seams.location_init, seams.location_by_eplb, *seams.slots_out, seams.slots_in)
    gone = (name for name in ours if not there.get(name))
    return [f"{name} is not waterfill-rs's after registration" for name in gone][:1]


def _agree(seams: Seams) -> list[str]:
    """Why sglang's order stays on all ranks, if it does: asked at the first map, and the same at every later one.

    Each rank makes its maps by itself. One that has no hook, or is told otherwise, must not have another order.
    """
    if not _agreed:
        reasons = against(seams) or _missing(seams)
        _agreed.append(all_agree(seams, reasons, "order"))
    return _agreed[0]


def all_agree(
    seams: Seams, reasons: list[str], question: str, row: Sequence[int] = ()
) -> list[str]:
    """As ``Peers.agree``, of those who make the same maps: by the same rules, which are this version's, and of this ``row``."""
    peers = peers_of_maps(seams)
    answer = _HOW.format(zlib.crc32(f"{waterfill_rs.__version__} {list(row)}".encode()))
    # Without peers it is a tool's process, or a test's: there is nobody else.
    return peers.agree(reasons, question, answer) if peers else reasons


def _ranks_per_host(seams: Seams, ranks: int) -> int:
    """As sglang counts them for its choice of replicas; all, where ranks do not divide over hosts."""
    hosts = int(getattr(resolve(seams.arguments)(), "nnodes", 1))
    return ranks // hosts if hosts > 0 and ranks % hosts == 0 else ranks


def keep(metadata: Any, tables: ReplicaTables, rank: int) -> None:
    """From now on a layer of ``tables.kept_first`` gets no map that cannot have so many primary replicas first.

    Args:
        metadata: sglang's, in force.
        rank: in EP.
    """
    _kept[:] = [(metadata, tables, rank)]


class PrimariesFirst:
    """The hooks around ``_init_raw``, and around ``init_by_eplb``, which calls it."""

    def __init__(self, seams: Seams) -> None:
        self._seams = seams
        self.has_own_order = False
        """Was a map in another order than sglang's, or in other places?"""
        self.ranks = 0
        """EP size of the last map. sglang 0.5.13's metadata do not have it."""
        self._counts: Any = None
        """What EPLB makes a map of, while it does."""

    @panics_are_errors
    def refuse_slots(self, *_: Any, **__: Any) -> None:
        """Before sglang gives a rank's slots away as they stand: to files, or to another server.

        Raises:
            RuntimeError: they stand in our order, which whoever loads them does not know.
        """
        if self.has_own_order:
            raise RuntimeError(
                "the experts of each rank stand in the order of waterfill-rs, and a server that loads these slots would take "
                "them for others: start this server with --waterfill-rs-replicas sglang, or with a placement by waterfill-rs "
                "place, and try again"
            )

    @panics_are_errors
    def refuse_tensors_of_slots(
        self, update: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[bool, str]:
        """What ``update_weights_from_tensor`` answers: whether it is done, and why not.

        Tensors that come by names of the checkpoint go by the map. Those of any other format may be copied as they are.
        """
        load_format = inspect.signature(update).bind(*args, **kwargs).arguments.get("load_format")
        if self.has_own_order and load_format not in _BY_NAME:
            return False, (
                "the experts of each rank stand in the order of waterfill-rs, and these tensors would be copied to slots as "
                "somebody else orders them: send weights by their names in the checkpoint, or start this server with "
                "--waterfill-rs-replicas sglang"
            )
        result: tuple[bool, str] = update(*args, **kwargs)
        return result

    @panics_are_errors
    def with_counts(self, init_by_eplb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """sglang's metadata by EPLB. Within it ``hook`` knows the counts ``[layers, L]`` or ``[steps, layers, L]``."""
        given = inspect.signature(init_by_eplb).bind(*args, **kwargs).arguments
        self._counts = given.get(_COUNTS)
        try:
            return init_by_eplb(*args, **kwargs)
        finally:
            self._counts = None

    @panics_are_errors
    def hook(self, init_raw: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """sglang's metadata, of maps in our order. All ranks agreed on it, and come to the same one of the same maps.

        At a rebalance a layer whose captured graphs need primary replicas first, and whose new map cannot have them there,
        gets the map that it has. So sglang moves nothing of it.
        """
        call = inspect.signature(init_raw).bind(*args, **kwargs)
        given = call.arguments
        self.ranks = given["ep_size"]
        redundant = given[_MAP].shape[1] - given[_OF_LOGICAL].shape[1]
        if redundant > 0 and not _agree(self._seams):
            mapping, of_logical = self._swapped(given[_MAP], given[_OF_LOGICAL], self.ranks)
            mapping, of_logical = arranged(mapping, of_logical, self.ranks)
            self.has_own_order |= mapping is not given[_MAP]
            of_logical = with_twins(mapping, of_logical, self.ranks)
            given[_MAP], given[_OF_LOGICAL] = self._with_kept(mapping, of_logical)
        return init_raw(*call.args, **call.kwargs)

    def _swapped(self, mapping: Tensor, of_logical: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """At start all layers are repaired, because any may leave groups out, and later those that do.

        All ranks have the same counts: sglang adds up the recorder's over all of them, and at start each reads the file.
        """
        if self._counts is None:
            return mapping, of_logical
        counts = torch.as_tensor(self._counts)
        counts = counts.sum(dim=0) if counts.dim() == 3 else counts
        if counts.shape != of_logical.shape[:2]:
            return mapping, of_logical
        there = self._in_force()
        layers: Collection[int] = range(len(mapping)) if there is None else ()
        for metadata, tables, _ in _kept:
            if metadata is there:
                layers = tables.kept_first
        per_host = _ranks_per_host(self._seams, ranks)
        return swapped(mapping, of_logical, counts, layers, ranks, per_host)

    def _in_force(self) -> Any:
        return resolve(f"{self._seams.expert_location}.get_global_expert_location_metadata")()

    def _with_kept(self, mapping: Tensor, of_logical: Tensor) -> tuple[Tensor, Tensor]:
        there = self._in_force()
        for metadata, tables, rank in _kept:
            if metadata is there and (stay := _unlike(mapping, tables)):
                logger.log(
                    logging.INFO if rank == 0 else logging.DEBUG,
                    "waterfill-rs: %d of %d layers keep their map of experts in this rebalance: captured decode graphs run the "
                    "first experts of each rank alone, and the new maps have other primary replicas",
                    len(stay),
                    len(tables.kept_first),
                )
                mapping = mapping.clone()
                mapping[stay] = getattr(there, _MAP)[stay].to(mapping)
                return mapping, _with_rows(of_logical, stay, getattr(there, _OF_LOGICAL)[stay])
        return mapping, of_logical


def _unlike(mapping: Tensor, tables: ReplicaTables) -> list[int]:
    """Layers that would not have as many primary replicas first as they must."""
    rows = mapping.tolist()
    made = {layer: _table(rows[layer], tables.ranks) for layer in tables.kept_first}
    return [
        layer
        for layer, table in made.items()
        if table is None or table.first_primaries != tables.kept_first[layer]
    ]


def _with_rows(of_logical: Tensor, layers: list[int], listed: Tensor) -> Tensor:
    """``of_logical`` with these rows for those layers. They may be longer, and are padded with -1."""
    # sglang's are padded to P, and may be taken to pieces one by one.
    used = int((listed >= 0).sum(dim=2).max())
    more = max(used - of_logical.shape[2], 0)
    of_logical = torch.nn.functional.pad(of_logical, (0, more), value=-1).clone()
    width = min(listed.shape[2], of_logical.shape[2])
    of_logical[layers] = -1
    of_logical[layers, :, :width] = listed[:, :, :width].to(of_logical)
    return of_logical
