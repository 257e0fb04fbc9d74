"""Which experts of a model have which replicas, layer by layer: what calls choose replicas by.

A rank's calls and the planner go by the same tables, and each knows a table by its fingerprint. So a table that differs
is seen at the next call, which then keeps the replicas that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from waterfill_rs import _native

__all__ = ["ReplicaTables"]

Learn = Callable[[int, _native.ReplicaTable], None]
"""What a planner learns a layer's table by."""


class ReplicaTables:
    """The tables of one model's layers, for one rank's calls.

    Args:
        ranks: EP size.
        redundant: physical experts beyond the logical ones, the same in all layers.
        physical_to_logical: ``[layers, P]`` on the CPU, whole numbers: the logical expert that each physical one computes.
        logical: the same on the layers' CUDA device, int64, contiguous. The kernel reads it at every call, to take no
            replica of another expert. It stays whoever's it is, who changes it in place.
    """

    def __init__(
        self,
        ranks: int,
        redundant: int,
        physical_to_logical: Tensor,
        logical: Tensor | None = None,
    ) -> None:
        self.layers, self.experts = physical_to_logical.shape
        self.ranks, self.redundant = ranks, redundant
        self.refused: dict[int, str] = {}
        """Layers whose map cannot be used, and why: their calls keep the replicas that they are given."""
        self.kept_first: dict[int, int] = {}
        """Layers where so many first experts of each rank have to stay its primary ones."""
        self._tables: list[_native.ReplicaTable | None] = [None] * self.layers
        self._learn: Learn | None = None
        self._device: _DeviceTables | None = None
        self.renew(range(self.layers), physical_to_logical)
        if logical is not None:
            self._device = _DeviceTables(self._words(), self._primaries(), logical)

    @property
    def fingerprints(self) -> list[int]:
        """``[layers]``; 0 where a layer has no table."""
        return [0 if table is None else table.fingerprint for table in self._tables]

    @property
    def replicated(self) -> list[int]:
        """``[layers]`` logical experts with more than one replica."""
        return [0 if table is None else table.jobs for table in self._tables]

    def of(self, layer: int | None) -> _native.ReplicaTable | None:
        """The table of a layer; None without one, and for a layer that the map does not have."""
        if layer is None or not 0 <= layer < self.layers:
            return None
        return self._tables[layer]

    def on_device(self, layer: int | None) -> tuple[Tensor, Tensor | None]:
        """The same as int32 ``[words]``, and the layer's int64 ``[P]`` of ``logical``. Both stay where they are.

        Without a table the words say so, and there is no map.

        Raises:
            RuntimeError: there was no ``logical``.
        """
        if self._device is None:
            raise RuntimeError("these tables are not on a device: give ReplicaTables the map there")
        if layer is None or not 0 <= layer < self.layers:
            return self._device.without
        return self._device.of_layer[layer]

    def primaries(self, layer: int | None) -> list[int] | None:
        """``[P]`` the primary replica of each physical expert's logical one; None for a layer without a table."""
        table = self.of(layer)
        return None if table is None else table.primaries

    def primaries_on_device(self, layer: int | None) -> tuple[Tensor | None, Tensor | None]:
        """The same as int32 ``[P]``, and the layer's int64 ``[P]`` of ``logical``. Both stay where they are.

        Raises:
            RuntimeError: there was no ``logical``.
        """
        if self._device is None:
            raise RuntimeError("these tables are not on a device: give ReplicaTables the map there")
        if layer is None or not 0 <= layer < self.layers:
            return None, None
        return self._device.primaries[layer]

    def first_primaries(self, layer: int | None) -> int | None:
        """How many of a rank's experts are primary, if they are its first ones, as many on each rank; else None."""
        table = self.of(layer)
        return None if table is None else table.first_primaries

    def keep_first_primaries(self, layer: int | None) -> int | None:
        """The same, and whatever map the layer has later, it must be as many: captured graphs leave the others out."""
        first = self.first_primaries(layer)
        if layer is not None and first is not None:
            self.kept_first[layer] = first
        return first

    def teach(self, learn: Learn) -> None:
        """Have a planner of this process know all tables, now and whenever they are renewed."""
        self._learn = learn
        self._teach(range(self.layers))

    def renew(self, layers: Sequence[int], physical_to_logical: Tensor) -> None:
        """Take these layers' maps from ``[layers, P]`` on the CPU, which holds all layers.

        The planner learns them first. The device's follow on torch's current stream, in place, so graphs find them.

        Raises:
            RuntimeError: a layer's first experts were to stay its primary ones, and are not any more. Nothing is changed.
        """
        tables, refused = self._made(layers, physical_to_logical)
        self._check_first_primaries(tables)
        for layer, table in tables.items():
            self._tables[layer] = table
            self.refused.pop(layer, None)
        self.refused.update(refused)
        self._teach(layers)
        if self._device is not None:
            self._device.renew(self._words(), self._primaries())

    def _made(
        self, layers: Sequence[int], physical_to_logical: Tensor
    ) -> tuple[dict[int, _native.ReplicaTable | None], dict[int, str]]:
        """These layers' tables, and why some have none."""
        tables: dict[int, _native.ReplicaTable | None] = {}
        refused: dict[int, str] = {}
        for layer in layers:
            try:
                tables[layer] = self._table(physical_to_logical[layer])
            except ValueError as error:
                tables[layer], refused[layer] = None, str(error)
        return tables, refused

    def _check_first_primaries(self, tables: Mapping[int, _native.ReplicaTable | None]) -> None:
        for layer, table in tables.items():
            first = self.kept_first.get(layer)
            if first is not None and (table is None or table.first_primaries != first):
                raise RuntimeError(
                    f"the map of layer {layer} changed, and the first {first} experts of each rank are not each logical expert "
                    "once any more: captured decode graphs run those alone. Start the server with --waterfill-rs-replicas "
                    "live if its experts are to move"
                )

    def _table(self, physical_to_logical: Tensor) -> _native.ReplicaTable:
        table = _native.ReplicaTable(self.ranks, physical_to_logical.tolist())
        if table.redundant != self.redundant:
            raise ValueError(
                f"the map has {table.redundant} redundant experts, and the board was made for {self.redundant}"
            )
        return table

    def _teach(self, layers: Sequence[int]) -> None:
        for layer in layers:
            table = self._tables[layer]
            if self._learn is not None and table is not None:
                self._learn(layer, table)

    def _words(self) -> Tensor:
        """int32 ``[layers + 1, words]``, the last without replicas."""
        empty = _native.ReplicaTable.words_without(self.experts, self.redundant)
        rows = (empty if table is None else table.words for table in self._tables)
        return torch.tensor([*rows, empty], dtype=torch.int32)

    def _primaries(self) -> Tensor:
        """int32 ``[layers, P]``; each its own where a layer has no table."""
        own = range(self.experts)
        rows = (own if table is None else table.primaries for table in self._tables)
        return torch.tensor([*map(list, rows)], dtype=torch.int32).reshape(-1, self.experts)


class _DeviceTables:
    """The tables' words on a device, and the map that stands there, at addresses that stay."""

    def __init__(self, words: Tensor, primaries: Tensor, logical: Tensor) -> None:
        self._primaries = primaries.to(logical.device)
        self.primaries: list[tuple[Tensor | None, Tensor | None]] = list(
            zip(self._primaries, logical, strict=False)
        )
        self._words = words.to(logical.device)
        rows = list(self._words)
        self.of_layer: list[tuple[Tensor, Tensor | None]] = list(zip(rows, logical, strict=False))
        self.without: tuple[Tensor, Tensor | None] = (rows[-1], None)

    def renew(self, words: Tensor, primaries: Tensor) -> None:
        self._words.copy_(words, non_blocking=True)
        self._primaries.copy_(primaries, non_blocking=True)
