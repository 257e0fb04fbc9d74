"""sglang's expert-distribution recorder dumps, read and checked.

Modes per_token and per_pass write one ``torch.save`` file a rank: ``records`` and ``last_physical_to_logical_map``
``[L, P]``. A record is one forward pass of one rank: ``forward_pass_id``, ``rank``, and ``topk_ids_of_layer``
``[L, tokens, 8]`` int32, physical ids, -1 in unused columns, or ``global_physical_count`` ``[L, P]``. Modes stat
and stat_approx write one file: ``logical_count`` ``[steps, L, E]``, summed over ranks; what
``--init-expert-location`` reads may be ``[L, E]``, and JSON. No file holds the EP size: it is the number of
files, or has to be said; nor top-k: it is the columns in use, or has to be said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counts", "Dump", "Tokens", "read"]

_MOST_ROWS = 2**32 - 1
"""Of one layer, over all ranks: the core's counts are 32 bits wide."""


@dataclass(frozen=True)
class Dump:
    """What all kinds have. ``mappings``: for each layer, the logical expert of each physical one, or None
    where none has replicas. ``notes``: what had to be assumed, a sentence each."""

    ranks: int
    experts: int
    top_k: int
    mappings: list[list[int]] | None
    notes: list[str]


@dataclass(frozen=True)
class Tokens(Dump):
    """``passes``: forward pass id to one ``[L, tokens, 8]`` tensor of ids a rank, ranks in order."""

    passes: dict[int, list[Tensor]]


@dataclass(frozen=True)
class Counts(Dump):
    """``passes``: forward pass id to counts ``[R, L, P]``, or ``[1, L, P]`` where sources are not known."""

    passes: dict[int, Tensor]


def read(paths: Sequence[Path], ranks: int | None, top_k: int | None) -> Tokens | Counts:
    """Read the files, or folders of ``*.pt`` files, of one recording.

    Raises:
        ValueError: naming file, field and number, for anything that is not such a dump, or not whole.
    """
    files = _files(paths)
    contents = {file: _load(file) for file in files}
    if all(
        isinstance(content, dict) and "logical_count" in content for content in contents.values()
    ):
        if len(files) != 1:
            raise ValueError(f"{files[1]}: a second file with 'logical_count': give one at a time")
        return _logical_counts(files[0], contents[files[0]], ranks, top_k)
    read_ranks = [_read_rank(file, content) for file, content in contents.items()]
    return _join(read_ranks, len(files) if ranks is None else ranks, top_k)


@dataclass(frozen=True)
class _Rank:
    """One rank's file: ``passes`` are ids ``[L, tokens, 8]`` or counts ``[L, P]``, by ``field``."""

    file: Path
    rank: int
    field: str
    mapping: Tensor
    passes: dict[int, Tensor]


def _read_rank(file: Path, content: Any) -> _Rank:
    if not isinstance(content, dict) or "records" not in content:
        found = list(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{file}: found {found}, no 'records': give one dump of sglang's expert distribution recorder"
        )
    if not isinstance(content["records"], list) or not content["records"]:
        found = content["records"]
        raise ValueError(
            f"{file}: records is {type(found).__name__} {found!r:.40}: give a list of at least one record"
        )
    mapping = _tensor(file, content, "last_physical_to_logical_map", "[L, P]")
    fields, ranks, passes = set(), set(), {}
    for index, record in enumerate(content["records"]):
        where = f"{file}: record {index}"
        field = _field(where, record)
        if field == "topk_ids_of_layer":
            values = _ids(where, record, int(mapping.shape[1]))
        else:
            values = _counts(where, record, int(mapping.shape[1]))
        if record["forward_pass_id"] in passes:
            raise ValueError(f"{where}: forward_pass_id {record['forward_pass_id']} is there twice")
        fields.add(field)
        ranks.add(record["rank"])
        passes[record["forward_pass_id"]] = values
    if len(ranks) != 1 or len(fields) != 1:
        raise ValueError(
            f"{file}: records of ranks {sorted(ranks)} with {sorted(fields)}: "
            "one rank a file, and one mode, is what sglang writes"
        )
    return _Rank(file, ranks.pop(), fields.pop(), mapping, passes)


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


def _tensor(where: object, holder: dict[str, Any], field: str, shape: str) -> Tensor:
    """An integer tensor of as many dimensions as ``shape`` names, none but the middle one empty."""
    found = holder.get(field)
    if (
        not isinstance(found, Tensor)
        or found.layout != torch.strided
        or found.dtype not in (torch.int32, torch.int64)
        or found.dim() != shape.count(",") + 1
        or 0 in (found.shape[0], found.shape[-1])
    ):
        what = type(found).__name__
        if isinstance(found, Tensor):
            what = f"{found.dtype} {list(found.shape)}"
        raise ValueError(f"{where}: {field} must be a dense tensor of integers {shape}, is {what}")
    return found


def _ids(where: str, record: dict[str, Any], experts: int) -> Tensor:
    ids = _tensor(where, record, "topk_ids_of_layer", "[L, tokens, K]")
    if ids.dtype != torch.int32:
        raise ValueError(f"{where}: topk_ids_of_layer must be int32, is {ids.dtype}")
    if ids.numel() and int(ids.max()) >= experts:
        raise ValueError(f"{where}: topk_ids_of_layer has id {int(ids.max())} of {experts} experts")
    return ids


def _counts(where: str, record: dict[str, Any], experts: int) -> Tensor:
    counts = _tensor(where, record, "global_physical_count", "[L, P]")
    if counts.shape[1] != experts:
        raise ValueError(
            f"{where}: global_physical_count has {counts.shape[1]} experts, the map has {experts}"
        )
    _check_range(f"{where}: global_physical_count", counts)
    return counts


def _check_range(name: str, counts: Tensor) -> None:
    """No count below zero; none, and no layer's sum over experts, of 2^32 or more."""
    least, most = int(counts.min()), int(counts.max())
    if least >= 0 and most <= _MOST_ROWS:
        least, most = 0, int(counts.sum(dim=-1, dtype=torch.int64).max())
    if least < 0 or most > _MOST_ROWS:
        raise ValueError(
            f"{name} has {least if least < 0 else most} rows in a layer: 0 to {_MOST_ROWS} are supported"
        )


def _join(files: list[_Rank], ranks: int, top_k: int | None) -> Tokens | Counts:
    """All ranks' files as one dump: every rank there, every pass of every rank."""
    by_rank: dict[int, _Rank] = {}
    for file in files:
        if file.rank in by_rank:
            raise ValueError(
                f"{file.file}: rank {file.rank} is in another file too: give one dump at a time"
            )
        if file.mapping.shape != files[0].mapping.shape:
            raise ValueError(
                f"{file.file}: {file.mapping.shape[1]} physical experts in {file.mapping.shape[0]} layers, "
                f"other files have {files[0].mapping.shape[1]} in {files[0].mapping.shape[0]}"
            )
        if not torch.equal(file.mapping, files[0].mapping):
            raise ValueError(
                f"{file.file}: last_physical_to_logical_map is not that of {files[0].file}: "
                "give files of one dump"
            )
        if file.field != files[0].field:
            raise ValueError(f"{file.file}: has '{file.field}', other files '{files[0].field}'")
        by_rank[file.rank] = file
    missing = [rank for rank in range(ranks) if rank not in by_rank]
    if missing or len(by_rank) != ranks:
        named = f"{missing[:8]}{' and more' * (len(missing) > 8)}" if missing else "none"
        raise ValueError(
            f"ranks {sorted(by_rank)} of {ranks} are here, {named} missing: "
            "give every rank's file, or the right --ep"
        )
    experts = int(files[0].mapping.shape[1])
    _check_divides(experts, "physical", ranks)
    ordered = [by_rank[rank] for rank in range(ranks)]
    passes = dict(_passes(ordered))
    mappings = _replicated(files[0].file, files[0].mapping)
    if files[0].field == "topk_ids_of_layer":
        return Tokens(ranks, experts, _columns(passes, top_k), mappings, [], passes)
    for pass_id, parts in passes.items():
        _check_range(
            f"forward_pass_id {pass_id}: global_physical_count of all ranks",
            torch.stack(parts).sum(0, dtype=torch.int64),
        )
    if not any(int(own.max()) for parts in passes.values() for own in parts):
        raise ValueError(
            f"{files[0].file}: global_physical_count is zero everywhere: record while the server serves"
        )
    top_k = _given(top_k, experts)
    if _are_received(passes, experts // ranks):
        note = (
            "The counts are what each rank received: where they came from is not known, so tokens are "
            "taken to be spread evenly over the ranks."
        )
        totals = {i: torch.stack(own).sum(0, keepdim=True) for i, own in passes.items()}
        return Counts(ranks, experts, top_k, mappings, [note], totals)
    counts = {i: torch.stack(own) for i, own in passes.items()}
    return Counts(ranks, experts, top_k, mappings, [], counts)


def _passes(files: list[_Rank]) -> Iterator[tuple[int, list[Tensor]]]:
    """Passes in order, each with every rank's part."""
    columns = next(iter(files[0].passes.values())).shape[2:]
    for pass_id in sorted(set().union(*(file.passes for file in files))):
        missing = [file.rank for file in files if pass_id not in file.passes]
        if missing:
            raise ValueError(
                f"forward_pass_id {pass_id}: ranks {missing} have no record of it; "
                "dump all ranks at once"
            )
        parts = [file.passes[pass_id] for file in files]
        for file, part in zip(files, parts, strict=True):
            if part.shape[0] != file.mapping.shape[0]:
                raise ValueError(
                    f"{file.file}: forward_pass_id {pass_id} has {part.shape[0]} layers, "
                    f"the map has {file.mapping.shape[0]}"
                )
            if part.shape[2:] != columns:
                raise ValueError(
                    f"{file.file}: forward_pass_id {pass_id} has {part.shape[2]} columns of ids, "
                    f"the first pass of {files[0].file} has {columns[0]}"
                )
        yield pass_id, parts


def _are_received(passes: dict[int, list[Tensor]], experts_per_rank: int) -> bool:
    """Counts after the dispatch: no rank has any outside its own experts (low-latency gatherer)."""
    for parts in passes.values():
        for rank, counts in enumerate(parts):
            own = counts[:, rank * experts_per_rank : (rank + 1) * experts_per_rank]
            if int(counts.sum()) != int(own.sum()):
                return False
    return len(next(iter(passes.values()))) > 1


def _logical_counts(
    file: Path, content: dict[str, Any], ranks: int | None, top_k: int | None
) -> Counts:
    counts = content["logical_count"]
    if not isinstance(counts, Tensor):
        try:
            counts = torch.tensor(counts)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: logical_count is no array of integers ({error})") from error
    if (
        counts.layout != torch.strided
        or counts.dtype not in (torch.int32, torch.int64)
        or counts.dim() not in (2, 3)
        or not counts.numel()
    ):
        raise ValueError(
            f"{file}: logical_count is {counts.dtype} {list(counts.shape)}: "
            "integers [L, E] or [steps, L, E] are what sglang writes"
        )
    _check_range(f"{file}: logical_count", counts)
    if not int(counts.max()):
        raise ValueError(
            f"{file}: logical_count is zero everywhere: record while the server serves"
        )
    by_rank = content.get("logical_count_layout") == "rank_layer_expert"
    if by_rank and counts.dim() != 3:
        raise ValueError(
            f"{file}: logical_count is {list(counts.shape)}: rank_layer_expert is [R, L, E]"
        )
    if by_rank and ranks not in (None, counts.shape[0]):
        raise ValueError(f"{file}: logical_count is of {counts.shape[0]} ranks, --ep is {ranks}")
    if by_rank:
        ranks = int(counts.shape[0])
    if ranks is None:
        raise ValueError(f"{file}: logical_count does not tell the EP size: give --ep")
    experts = int(counts.shape[-1])
    _check_divides(experts, "logical", ranks)
    notes = [
        "The counts are of logical experts: these are taken to lie in order, without replicas."
    ]
    top_k = _given(top_k, experts)
    if by_rank:
        _check_range(f"{file}: logical_count of all ranks", counts.sum(0, dtype=torch.int64))
        return Counts(ranks, experts, top_k, None, notes, {0: counts})
    notes.append("Tokens are taken to be spread evenly over the ranks.")
    steps = counts if counts.dim() == 3 else counts[None]
    # A ring buffer: steps that were not used are zero.
    used = {step: one[None] for step, one in enumerate(steps) if int(one.sum())}
    return Counts(ranks, experts, top_k, None, notes, used)


def _check_divides(experts: int, kind: str, ranks: int) -> None:
    if ranks < 1 or experts % ranks:
        raise ValueError(
            f"{experts} {kind} experts do not divide over {ranks} ranks: give the right --ep"
        )


def _given(top_k: int | None, experts: int) -> int:
    if top_k is None:
        raise ValueError("counts do not tell how many experts a token has: give --top-k")
    if top_k > experts:
        raise ValueError(f"--top-k {top_k}: the dump has {experts} experts")
    return top_k


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        found = sorted(path.glob("*.pt")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no *.pt file in this folder")
        files += found
    return files


def _load(file: Path) -> Any:
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"{file}: the file is empty (0 bytes)")
    if file.suffix == ".json":
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not JSON ({error}), {size} bytes") from error
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        raise ValueError(
            f"{file}: not a whole torch file ({type(error).__name__}), {size} bytes"
        ) from error


def _replicated(file: Path, mapping: Tensor) -> list[list[int]] | None:
    """The map by layer, if any logical expert is there more than once."""
    mappings: list[list[int]] = mapping.tolist()
    replicated = False
    for layer, row in enumerate(mappings):
        named = set(row)
        replicated |= len(named) < len(row)
        if named != set(range(len(named))):
            odd = min(named ^ set(range(len(named))))
            raise ValueError(
                f"{file}: last_physical_to_logical_map of layer {layer}: {len(named)} logical experts "
                f"are not 0 to {len(named) - 1}; the first that does not fit is {odd}"
            )
    return mappings if replicated else None


def _columns(passes: dict[int, list[Tensor]], given: int | None) -> int:
    """Top-k: the columns in use anywhere."""
    top_k = 0
    for parts in passes.values():
        for ids in parts:
            used = (ids >= 0).flatten(0, 1).any(dim=0).nonzero()
            top_k = max(top_k, int(used.max()) + 1 if used.numel() else 0)
    if top_k == 0:
        raise ValueError("no record holds a single routed id: record while the server serves")
    if given not in (None, top_k):
        raise ValueError(f"--top-k {given}: the dump's tokens have {top_k} experts")
    return top_k
