"""sglang's expert-distribution recorder dumps, mode per_token: one file a rank, read and checked.

A file is ``torch.save`` of ``records`` and ``last_physical_to_logical_map`` ``[L, P]``. A record is one forward
pass of one rank: ``forward_pass_id``, ``rank`` and ``topk_ids_of_layer`` ``[L, tokens, 8]`` int32, physical
ids, -1 in unused columns. Neither EP size nor top-k is in it: one is the number of files, the other the
columns that are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Dump", "read"]


@dataclass(frozen=True)
class Dump:
    """All ranks' files. ``passes``: forward pass id to one ``[L, tokens, 8]`` tensor a rank, ranks in order."""

    ranks: int
    experts: int
    top_k: int
    passes: dict[int, list[Tensor]]


def read(paths: Sequence[Path], ranks: int | None) -> Dump:
    """Read files, or folders of ``*.pt`` files.

    Raises:
        ValueError: naming file, field and number, for anything that is not such a dump, or not whole.
    """
    files = _files(paths)
    ranks = len(files) if ranks is None else ranks
    by_rank: dict[int, dict[int, Tensor]] = {}
    experts = 0
    for file in files:
        rank, passes, experts_here = _read_file(file)
        if rank in by_rank:
            raise ValueError(f"{file}: rank {rank} is in another file too: give one dump at a time")
        if experts and experts_here != experts:
            raise ValueError(f"{file}: {experts_here} physical experts, other files have {experts}")
        experts, by_rank[rank] = experts_here, passes
    missing = [rank for rank in range(ranks) if rank not in by_rank]
    if missing or len(by_rank) != ranks:
        raise ValueError(
            f"ranks {sorted(by_rank)} of {ranks} are here, {missing or 'none'} missing: "
            "give every rank's file, or the right --ep"
        )
    if experts % ranks:
        raise ValueError(
            f"{experts} physical experts do not divide over {ranks} ranks: give the right --ep"
        )
    return Dump(ranks, experts, _top_k(by_rank), _join(by_rank))


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


def _read_file(file: Path) -> tuple[int, dict[int, Tensor], int]:
    content = _load(file)
    if not isinstance(content, dict) or "records" not in content:
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{file}: found {keys}, no 'records': give a dump of --expert-distribution-recorder-mode per_token"
        )
    experts = _map_shape(file, content)
    ranks, passes = set(), {}
    for index, record in enumerate(content["records"]):
        where = f"{file}: record {index}"
        for field in ("forward_pass_id", "rank", "topk_ids_of_layer"):
            if not isinstance(record, dict) or field not in record:
                raise ValueError(f"{where} has no '{field}': only per_token dumps hold tokens")
        ids = record["topk_ids_of_layer"]
        if not isinstance(ids, Tensor) or ids.dim() != 3 or ids.dtype != torch.int32:
            raise ValueError(f"{where}: topk_ids_of_layer must be an int32 tensor [L, tokens, K]")
        if ids.numel() and int(ids.max()) >= experts:
            raise ValueError(
                f"{where}: topk_ids_of_layer has id {int(ids.max())} of {experts} experts"
            )
        if record["forward_pass_id"] in passes:
            raise ValueError(f"{where}: forward_pass_id {record['forward_pass_id']} is there twice")
        ranks.add(record["rank"])
        passes[record["forward_pass_id"]] = ids
    if len(ranks) != 1:
        raise ValueError(
            f"{file}: records of ranks {sorted(ranks)}: one rank a file is what sglang writes"
        )
    return ranks.pop(), passes, experts


def _load(file: Path) -> Any:
    if file.stat().st_size == 0:
        raise ValueError(f"{file}: the file is empty (0 bytes)")
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        raise ValueError(
            f"{file}: not a whole torch file ({type(error).__name__}), {file.stat().st_size} bytes"
        ) from error


def _map_shape(file: Path, content: dict[str, Any]) -> int:
    mapping = content.get("last_physical_to_logical_map")
    if not isinstance(mapping, Tensor) or mapping.dim() != 2 or mapping.shape[1] == 0:
        raise ValueError(f"{file}: last_physical_to_logical_map must be a tensor [L, P], P above 0")
    return int(mapping.shape[1])


def _top_k(by_rank: dict[int, dict[int, Tensor]]) -> int:
    """Columns in use anywhere."""
    top_k = 0
    for passes in by_rank.values():
        for ids in passes.values():
            used = (ids >= 0).flatten(0, 1).any(dim=0).nonzero()
            top_k = max(top_k, int(used.max()) + 1 if used.numel() else 0)
    if top_k == 0:
        raise ValueError("no record holds a single routed id: record while the server serves")
    return top_k


def _join(by_rank: dict[int, dict[int, Tensor]]) -> dict[int, list[Tensor]]:
    """Passes that every rank has, in order."""
    passes = {}
    for pass_id in sorted(set().union(*by_rank.values())):
        missing = [rank for rank, own in sorted(by_rank.items()) if pass_id not in own]
        if missing:
            raise ValueError(
                f"forward_pass_id {pass_id}: ranks {missing} have no record of it; "
                "dump all ranks at once"
            )
        passes[pass_id] = [own[pass_id] for _, own in sorted(by_rank.items())]
    return passes
