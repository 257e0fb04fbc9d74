"""The ranks' files of modes per_token and per_pass as one recording: every rank, every pass, every pipeline stage."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from waterfill_rs.replay import rank_files, whole_numbers
from waterfill_rs.replay.rank_files import RankFile, routed
from waterfill_rs.replay.recorded import (
    ANY_TOP_K,
    Counts,
    Tokens,
    given_top_k,
    replicated,
    top_k_doubts,
)

__all__ = ["read"]

_RECORD_AGAIN = (
    "nothing was dispatched and nothing can be levelled. Record with --moe-a2a-backend deepep, "
    "which spreads the experts over all ranks (EP)"
)

_ENOUGH_ROWS = 256
"""To tell a column that is always the same from chance."""

_MOST_APART = 8
"""Passes that ranks may be apart when recording starts or ends: they run in step, one or two apart."""


def read(contents: list[tuple[str, Any]], ranks: int | None, top_k: int | None) -> Tokens | Counts:
    """Join the files of all ranks.

    Raises:
        ValueError: naming file, field and number, if they are not the whole of one recording.
    """
    files, empty = _with_records(contents)
    _check_alike(files)
    kept = _without_copies(files)
    stages = _stages(kept)
    size = _size(files, kept, ranks)
    ordered = [_ordered(stage, size, ranks is not None, len(stages) > 1) for stage in stages]
    experts = int(files[0].mapping.shape[1])
    if experts % size:
        raise ValueError(
            f"{files[0].file}: the files of {size} ranks are here, and {experts} physical experts do not divide over "
            f"{size} ranks: give every rank's file (each host writes those of its own ranks)"
        )
    read_stages = [_passes(stage) for stage in ordered]
    by_stage = [whole for whole, _ in read_stages]
    passes = _joined(by_stage) if len(stages) > 1 else by_stage[0]
    notes = _notes(files, kept, len(stages))
    if empty:
        notes.append(
            f"{empty} files hold no record, as dumps without traffic do, and were left out."
        )
    joined = [file for stage in stages for file in stage]
    if len(joined) < len(kept):
        notes.append(f"{len(kept) - len(joined)} files routed nothing, and were left out.")
    notes += _notes_on_passes(joined, by_stage, sum(left_out for _, left_out in read_stages))
    modes = {i: [file.modes[i] for file in joined if i in file.modes] for i in passes}
    places = files[0].mapping
    mappings = replicated(f"{files[0].file}: last_physical_to_logical_map", files[0].mapping)
    if files[0].field == "topk_ids_of_layer":
        columns = _columns(passes, top_k)
        if not any(file.dispatched for file in files):
            _check_sources_differ(passes, len(files))
            notes += _assumed(size, ranks)
        if columns > experts:
            raise ValueError(
                f"{files[0].file}: tokens have {columns} experts of {experts}: columns that are not in use must be -1"
            )
        return Tokens(size, experts, columns, mappings, notes, passes, modes=modes, places=places)
    counts = _counts(files[0].file, passes, size, experts, top_k, mappings, notes)
    if len(next(iter(counts.passes.values()))) == size:  # else what each rank received has told
        counts.notes.extend(_assumed(size, ranks))
    return replace(counts, modes=modes, places=places)


def _with_records(contents: list[tuple[str, Any]]) -> tuple[list[RankFile], int]:
    """The files with records, checked; and how many have none, as dumps without traffic do."""
    empty = [file for file, content in contents if _has_no_record(content)]
    files = [rank_files.read(*one) for one in contents if one[0] not in empty]
    if not files:
        raise ValueError(
            f"{empty[0]}: holds no record, nor does any other file: record while the server serves"
        )
    ranks = {file.rank for file in files}
    for file in empty:
        named = re.search(r"_(\d+)\.pt[^/]*$", file, re.IGNORECASE)
        if named and int(named[1]) not in ranks:
            raise ValueError(
                f"{file}: holds no record, and by its name is rank {named[1]}'s, of which there is no other file: "
                "give one dump of all ranks, made while the server serves"
            )
    return files, len(empty)


def _has_no_record(content: Any) -> bool:
    records = content.get("records") if isinstance(content, dict) else None
    return isinstance(records, list) and not records


def _assumed(size: int, given: int | None) -> list[str]:
    """A sentence where the number of files alone says what the EP size is."""
    if given is not None or size == 1:
        return []
    return [
        f"The EP size is taken to be {size}: the files of {size} ranks are here, and nothing in them tells of more."
    ]


def _counts(
    file: str,
    passes: dict[int, list[Tensor]],
    ranks: int,
    experts: int,
    top_k: int | None,
    mappings: list[list[int]] | None,
    notes: list[str],
) -> Counts:
    for pass_id, parts in passes.items():
        whole_numbers.check_range(
            f"forward_pass_id {pass_id}: global_physical_count of all ranks",
            torch.stack(parts).sum(0, dtype=torch.int64),
        )
    if not passes:
        raise ValueError(
            f"{file}: global_physical_count is zero everywhere: record while the server serves"
        )
    top_k = given_top_k(top_k, experts)
    if _are_received(passes, ranks, experts):
        notes.append(
            "The counts are what each rank received: where they came from is not known, so tokens are "
            "taken to be spread evenly over the ranks."
        )
        totals = {i: torch.stack(own).sum(0, keepdim=True) for i, own in passes.items()}
        notes += top_k_doubts([one.sum(-1) for one in totals.values()], top_k)
        return Counts(ranks, experts, top_k, mappings, notes, totals)
    _check_sources_differ(passes, ranks)
    counts = {i: torch.stack(own) for i, own in passes.items()}
    notes += top_k_doubts([one.sum(-1) for one in counts.values()], top_k)
    return Counts(ranks, experts, top_k, mappings, notes, counts)


def _check_alike(files: list[RankFile]) -> None:
    """One mode, one map, one number of columns."""
    first = files[0]
    columns = next(iter(first.passes.values())).shape[2:]
    for file in files:
        if file.mapping.shape != first.mapping.shape:
            raise ValueError(
                f"{file.file}: {file.mapping.shape[1]} physical experts in {file.mapping.shape[0]} layers, "
                f"other files have {first.mapping.shape[1]} in {first.mapping.shape[0]}: give files of one server"
            )
        if not torch.equal(file.mapping.long(), first.mapping.long()):
            raise ValueError(
                f"{file.file}: last_physical_to_logical_map is not that of {first.file}: "
                "give files of one dump"
            )
        if file.field != first.field:
            raise ValueError(f"{file.file}: has '{file.field}', other files '{first.field}'")
        for pass_id, part in file.passes.items():
            if part.shape[2:] != columns:
                raise ValueError(
                    f"{file.file}: forward_pass_id {pass_id} has {part.shape[2]} columns of ids, "
                    f"the first pass of {first.file} has {columns[0]}"
                )


def _without_copies(files: list[RankFile]) -> list[RankFile]:
    """Ranks that split each expert (TP) recorded the same under one EP rank: one of them is enough.

    Files that routed nothing stay: an idle rank has one of each pipeline stage.
    """
    kept: list[RankFile] = []
    for file in files:
        same = (own for own in kept if own.rank == file.rank)
        if not _layers(file).any() or not any(_equal(file.passes, own.passes) for own in same):
            kept.append(file)
    return kept


def _equal(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[i], other[i]) for i in one)


def _layers(file: RankFile) -> Tensor:
    """In which layers it routed anything, in any pass: bool ``[L]``."""
    return torch.stack([routed(values) for values in file.passes.values()]).any(dim=0)


def _stages(files: list[RankFile]) -> list[list[RankFile]]:
    """The files by pipeline stage: files of one stage have layers in common, and each rank one file there.

    Files that routed nothing fill the stages that lack their rank. What is left of them belongs to no stage.
    """
    if len({file.rank for file in files}) == len(files):
        return [files]
    stages: list[tuple[Tensor, list[RankFile]]] = []
    idle = []
    for file in files:
        layers = _layers(file)
        if not layers.any():
            idle.append(file)
            continue
        own = [file]
        apart = []
        for known, others in stages:
            if (known & layers).any():
                layers, own = known | layers, others + own
            else:
                apart.append((known, others))
        stages = [*apart, (layers, own)]
    if not stages:
        raise ValueError(
            f"{files[0].file}: {files[0].field} has no routed row, nor has any other file: "
            "record while the server serves"
        )
    for _, own in stages:
        own += _idle_of(own, idle)
    for _, own in stages:
        for index, file in enumerate(own):
            same = [one for one in own[:index] if one.rank == file.rank]
            if same:
                raise ValueError(
                    f"{file.file}: rank {file.rank} is in another file too, {same[0].file}, "
                    "with rows in the same layers: give one dump at a time"
                )
    return [own for _, own in stages]


def _idle_of(stage: list[RankFile], idle: list[RankFile]) -> list[RankFile]:
    """Of the files that name no layer, one for each rank that the stage lacks: that with most of its passes. They leave ``idle``."""
    passes = {pass_id for file in stage for pass_id in file.passes}
    chosen = []
    for rank in sorted({file.rank for file in idle} - {file.rank for file in stage}):
        own = [file for file in idle if file.rank == rank]
        chosen.append(max(own, key=lambda file: len(passes & file.passes.keys())))
    idle[:] = [file for file in idle if not any(file is one for one in chosen)]
    return chosen


def _size(files: list[RankFile], kept: list[RankFile], given: int | None) -> int:
    """The EP size: as given, or the ranks that recorded. What the files themselves tell of it must agree."""
    found = {file.rank for file in kept}
    if len(files) > len(kept) and len(found) == 1:
        raise ValueError(
            f"{files[0].file}: {len(files)} files of rank {kept[0].rank} hold the same rows: the server's ranks "
            f"split each expert (TP without EP), so {_RECORD_AGAIN}"
        )
    size = max(found) + 1 if given is None else given
    for file in files:
        if file.dispatched not in (None, size):
            raise ValueError(
                f"{file.file}: its dispatch went to {file.dispatched} ranks, and "
                f"{f'the files of {size} are here' if given is None else f'--ep is {size}'}: "
                f"give every rank's file, of all hosts, and --ep {file.dispatched} or none"
            )
    return size


def _ordered(files: list[RankFile], ranks: int, given: bool, staged: bool) -> list[RankFile]:
    """By rank, which must be 0 to ``ranks - 1``; ``given``: as ``--ep`` says."""
    by_rank = {file.rank: file for file in files}
    missing = list(islice((rank for rank in range(ranks) if rank not in by_rank), 9))
    if not missing and len(by_rank) == ranks:
        return [by_rank[rank] for rank in range(ranks)]
    where = ""
    if staged:
        layers = torch.stack([_layers(file) for file in files]).any(dim=0).nonzero()
        where = f" in the pipeline stage of layers {int(layers.min())} to {int(layers.max())}"
    what_if = f"--ep {ranks} --placement trivial to see what {ranks} ranks would do"
    if not missing:
        raise ValueError(
            f"ranks {sorted(by_rank)} of {ranks} are here{where}, none missing: {len(by_rank)} ranks recorded, "
            f"so leave --ep out, or give {what_if}"
        )
    named = f"{missing[:8]}{' and more' * (len(missing) > 8)}"
    raise ValueError(
        f"ranks {sorted(by_rank)} of {ranks} are here{where}, {named} missing: "
        "give every rank's file (each host writes those of its own ranks)"
        + f", or {what_if}"
        * (given and max(by_rank) < min(missing))
    )


def _passes(files: list[RankFile]) -> tuple[dict[int, list[Tensor]], int]:
    """Passes in order in which any rank routed anything, each with every rank's part; and how many were left out.

    Start and dump reach each rank between two of its own passes, so ranks of a server under traffic may differ by
    some at either end: these are left out. One that is missing elsewhere is an error.
    """
    used = [
        pass_id
        for pass_id in sorted(set().union(*(file.passes for file in files)))
        if any(pass_id in file.passes and routed(file.passes[pass_id]).any() for file in files)
    ]
    whole = {i: [file.passes[i] for file in files if i in file.passes] for i in used}
    whole = {pass_id: parts for pass_id, parts in whole.items() if len(parts) == len(files)}
    for pass_id in used:
        if pass_id in whole or (whole and _is_at_an_end(pass_id, min(whole), max(whole))):
            continue
        missing = [file.rank for file in files if pass_id not in file.passes]
        raise ValueError(
            f"forward_pass_id {pass_id}: ranks {missing} have no record of it; "
            "dump all ranks at once"
        )
    return whole, len(used) - len(whole)


def _is_at_an_end(pass_id: int, first: int, last: int) -> bool:
    return first - _MOST_APART <= pass_id < first or last < pass_id <= last + _MOST_APART


def _joined(stages: list[dict[int, list[Tensor]]]) -> dict[int, list[Tensor]]:
    """The stages' passes as one: each layer from the stage that routed it."""
    joined: dict[int, list[Tensor]] = {}
    for pass_id in sorted(set().union(*stages)):
        parts = [stage[pass_id] for stage in stages if pass_id in stage]
        joined[pass_id] = [_overlaid(list(own)) for own in zip(*parts, strict=True)]
    return joined


def _overlaid(parts: list[Tensor]) -> Tensor:
    """One rank's stages of a pass. Rows that a stage lacks are unused, -1."""
    if parts[0].dim() == 2:
        return torch.stack(parts).sum(0, dtype=torch.int64)
    shape = (parts[0].shape[0], max(part.shape[1] for part in parts), parts[0].shape[2])
    whole = torch.full(shape, -1, dtype=torch.int32)
    for part in parts:
        own = routed(part)
        whole[own, : part.shape[1]] = part[own]
    return whole


def _notes(files: list[RankFile], kept: list[RankFile], stages: int) -> list[str]:
    notes = []
    if len(kept) < len(files):
        notes.append(
            f"{len(files)} files are of {len({file.rank for file in kept})} ranks: files that hold the same rows "
            "of the same rank were taken once."
        )
    if stages > 1:
        notes.append(f"{stages} pipeline stages were joined by their layers.")
    if len(files) == 1:
        notes.append(
            f"Only rank {files[0].rank}'s file is here, so this is EP 1, where there is nothing to level: "
            "give every rank's file."
        )
    return notes


def _notes_on_passes(
    files: list[RankFile], stages: list[dict[int, list[Tensor]]], left_out: int
) -> list[str]:
    notes = []
    if left_out:
        notes.append(
            f"{left_out} passes at the beginning or the end, which not every rank recorded, were left out."
        )
    records = sum(file.records for file in files)
    used = sum(len(parts) for passes in stages for parts in passes.values())
    if not left_out and used < records:
        notes.append(
            f"{records - used} of {records} records routed nothing, as a draft model's (MTP, EAGLE) do "
            "and those of passes without requests, and were left out."
        )
    return notes


def _check_sources_differ(passes: dict[int, list[Tensor]], files: int) -> None:
    """Where every rank routed the same rows in every pass, they were not each rank's own."""
    parts = list(passes.values())
    if files < 2 or any(not torch.equal(own, of[0]) for of in parts for own in of[1:]):
        return
    raise ValueError(
        f"all {files} files hold the same rows in every pass: every rank of the server routed all tokens "
        f"(TP without EP, or no all-to-all), so {_RECORD_AGAIN}"
    )


def _are_received(passes: dict[int, list[Tensor]], ranks: int, experts: int) -> bool:
    """Counts after the dispatch: no rank has any outside its own experts (low-latency gatherer).

    Raises:
        ValueError: if the ranks' own experts are those of a larger EP size, so that files are missing.
    """
    for size in range(max(ranks, 2), experts + 1):
        if experts % size == 0 and _are_own(passes, experts // size):
            break
    else:
        return False
    if size == ranks:
        return True
    raise ValueError(
        f"each rank's counts lie in its own {experts // size} of {experts} experts, as {size} ranks or more "
        f"record them in low-latency mode, and the files of {ranks} are here: give every rank's file, of all hosts"
    )


def _are_own(passes: dict[int, list[Tensor]], experts_per_rank: int) -> bool:
    for parts in passes.values():
        for rank, counts in enumerate(parts):
            own = counts[:, rank * experts_per_rank : (rank + 1) * experts_per_rank]
            if int(counts.sum()) != int(own.sum()):
                return False
    return True


def _columns(passes: dict[int, list[Tensor]], given: int | None) -> int:
    """Top-k: the columns in use anywhere."""
    top_k = 0
    for parts in passes.values():
        for ids in parts:
            used = (ids >= 0).flatten(0, 1).any(dim=0).nonzero()
            top_k = max(top_k, int(used.max()) + 1 if used.numel() else 0)
    if top_k == 0:
        raise ValueError("no record holds a single routed id: record while the server serves")
    _check_last_differs(passes, top_k)
    if given not in (None, ANY_TOP_K, top_k):
        raise ValueError(f"--top-k {given}: the dump's tokens have {top_k} experts")
    return top_k


def _check_last_differs(passes: dict[int, list[Tensor]], top_k: int) -> None:
    """No router gives hundreds of rows, of all layers, the same expert in one column: that is padding by another number than -1."""
    last = torch.cat([ids[:, :, top_k - 1].flatten() for ids in next(iter(passes.values()))])
    used = last[last >= 0]
    if top_k > 1 and len(used) >= _ENOUGH_ROWS and bool((used == used[0]).all()):
        raise ValueError(
            f"topk_ids_of_layer has {int(used[0])} in column {top_k - 1} of all {len(used)} rows: columns that are not in use "
            "must be -1, and fused shared experts off (--disable-shared-experts-fusion)"
        )
