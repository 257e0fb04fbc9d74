"""What sglang's expert distribution recorder writes in modes per_token and per_pass.

Each rank writes one ``torch.save`` file: ``records`` and ``last_physical_to_logical_map`` ``[L, P]``. A record is one
forward pass of one rank: ``forward_pass_id``, ``rank``, and ``topk_ids_of_layer`` ``[L, tokens, 8]`` int32, physical
ids, -1 in unused columns, or ``global_physical_count`` ``[L, P]``.

``rank`` is the rank among the experts' ranks (EP), so files share it where there are pipeline stages, which route
different layers, and where ranks split each expert (TP), which route the same tokens. A draft model (MTP, EAGLE)
numbers its passes by itself and routes nothing here: its records are empty, under numbers that the target has too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from waterfill_rs.replay import whole_numbers

__all__ = ["RankFile", "read", "routed"]

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)


@dataclass(frozen=True)
class RankFile:
    """One rank's file: ``passes`` are ids ``[L, tokens, 8]`` or counts ``[L, P]``, by ``field``.

    ``modes``: forward pass id to ``forward_mode``, of the passes that routed anything, where it is recorded.
    ``records``: how many there were, empty ones too. ``dispatched``: to how many ranks its dispatch went, where it tells.
    """

    file: str
    rank: int
    field: str
    mapping: Tensor
    passes: dict[int, Tensor]
    modes: dict[int, int]
    records: int
    dispatched: int | None


def routed(values: Tensor) -> Tensor:
    """Whether anything was routed, for each layer of ids ``[L, tokens, 8]`` or counts ``[L, P]``: bool ``[L]``."""
    used = values >= 0 if values.dim() == 3 else values > 0
    return used.flatten(1).any(dim=1)


def read(file: str, content: Any) -> RankFile:
    """Check one rank's file.

    Raises:
        ValueError: naming file, record, field and number.
    """
    if not isinstance(content, dict) or "records" not in content:
        raise ValueError(
            f"{file}: found {_kind(content)}, no 'records': give one dump of sglang's expert distribution recorder"
        )
    if not isinstance(content["records"], list) or not content["records"]:
        found = content["records"]
        raise ValueError(
            f"{file}: records is {type(found).__name__} {found!r:.40}: give a list of at least one record"
        )
    mapping = _array(file, content, "last_physical_to_logical_map", "[L, P]")
    fields, ranks, sizes = set(), set(), set()
    passes: dict[int, Tensor] = {}
    modes: dict[int, int] = {}
    for index, record in enumerate(content["records"]):
        where = f"{file}: record {index}"
        field = _field(where, record)
        values = (_ids if field == "topk_ids_of_layer" else _counts)(where, record, mapping)
        _add(where, passes, record["forward_pass_id"], values)
        fields.add(field)
        ranks.add(record["rank"])
        sizes |= _dispatched(record)
        # An empty record may be a draft model's, which decodes beside a prefill of the target.
        if type(record.get("forward_mode")) is int and routed(values).any():
            modes[record["forward_pass_id"]] = record["forward_mode"]
    if len(ranks) != 1 or len(fields) != 1:
        raise ValueError(
            f"{file}: records of ranks {sorted(ranks)} with {sorted(fields)}: "
            "one rank a file, and one mode, is what sglang writes"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{file}: its dispatches went to {' and '.join(map(str, sorted(sizes)))} ranks: "
            "give a recording of one EP size"
        )
    dispatched = sizes.pop() if sizes else None
    records = len(content["records"])
    return RankFile(file, ranks.pop(), fields.pop(), mapping, passes, modes, records, dispatched)


def _kind(content: Any) -> str:
    """What a foreign file holds: a dict's keys, or a type."""
    if not isinstance(content, dict):
        return type(content).__name__
    keys = ", ".join(f"{key!r:.40}" for key in list(content)[:8])
    return f"the keys {keys}" + f" and {len(content) - 8} more" * (len(content) > 8)


def _add(where: str, passes: dict[int, Tensor], pass_id: int, values: Tensor) -> None:
    """Of several records of one pass number, the one that routed something: the others are a draft model's."""
    known = passes.get(pass_id)
    if known is None or not routed(known).any():
        passes[pass_id] = values
    elif routed(values).any():
        raise ValueError(
            f"{where}: forward_pass_id {pass_id} is there twice, and both routed rows: give one recording at a time"
        )


def _dispatched(record: dict[str, Any]) -> set[int]:
    """To how many ranks DeepEP's dispatch went. per_token has it in mode normal."""
    misc = record.get("misc_objects")
    layers = misc if isinstance(misc, list) else []
    found = [layer.get("num_tokens_per_rank") for layer in layers if isinstance(layer, dict)]
    return {len(tokens) for tokens in found if isinstance(tokens, (list, tuple, Tensor))}


def _field(where: str, record: Any) -> str:
    """What the record holds, once it is known whose it is."""
    for needed in ("forward_pass_id", "rank"):
        if not isinstance(record, dict) or needed not in record:
            raise ValueError(f"{where} has no '{needed}'")
        value = record[needed]
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}: {needed} is {value!r:.40}: give an integer from 0 on")
    for field in ("topk_ids_of_layer", "global_physical_count"):
        if field in record:
            return field
    raise ValueError(
        f"{where} has no 'topk_ids_of_layer' (per_token) and no 'global_physical_count' (per_pass)"
    )


def _array(where: str, holder: dict[str, Any], field: str, shape: str) -> Tensor:
    """Whole numbers ``shape``, int64; but int32 as they are, for their size."""
    if field not in holder:
        raise ValueError(f"{where} has no '{field}'")
    found = holder[field]
    empty = field == "topk_ids_of_layer"
    values = whole_numbers.read(
        f"{where}: {field}", found, (shape.count(",") + 1,), shape, may_be_empty=empty
    )
    return found if isinstance(found, Tensor) and found.dtype == torch.int32 else values


def _ids(where: str, record: dict[str, Any], mapping: Tensor) -> Tensor:
    experts = int(mapping.shape[1])
    ids = _array(where, record, "topk_ids_of_layer", "[L, tokens, K]")
    most = int(ids.max()) if ids.numel() else -1
    dtype = getattr(record["topk_ids_of_layer"], "dtype", torch.int64)
    if dtype in _UNSIGNED and most == torch.iinfo(dtype).max:
        raise ValueError(
            f"{where}: topk_ids_of_layer is {dtype} and holds {most}, which may be a -1 of columns that are "
            "not in use: save it as int32"
        )
    if most >= experts:
        raise ValueError(
            f"{where}: topk_ids_of_layer has id {most} of {experts} experts: if that is a fused shared expert's, "
            "record with --disable-shared-experts-fusion"
        )
    _check_layers(where, ids, mapping)
    return ids if ids.dtype == torch.int32 else ids.clamp(min=-1).to(torch.int32)


def _counts(where: str, record: dict[str, Any], mapping: Tensor) -> Tensor:
    experts = int(mapping.shape[1])
    counts = _array(where, record, "global_physical_count", "[L, P]")
    if counts.shape[1] != experts:
        raise ValueError(
            f"{where}: global_physical_count has {counts.shape[1]} experts, the map has {experts}"
        )
    whole_numbers.check_range(f"{where}: global_physical_count", counts)
    _check_layers(where, counts, mapping)
    return counts


def _check_layers(where: str, values: Tensor, mapping: Tensor) -> None:
    if values.shape[0] != mapping.shape[0]:
        raise ValueError(f"{where} has {values.shape[0]} layers, the map has {mapping.shape[0]}")
