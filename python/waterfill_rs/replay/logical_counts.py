"""``logical_count``: what modes stat and stat_approx write, and what sglang's ``--init-expert-location`` reads.

It is ``[L, E]``, or ``[steps, L, E]`` of a ring of steps, summed over the ranks; or ``[R, L, E]`` where
``logical_count_layout`` is ``rank_layer_expert``. The numbers may be floats that are whole. It says nothing of where
experts lie: that is in ``physical_to_logical_map`` ``[L, P]``, in the same file or in another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waterfill_rs.replay import whole_numbers
from waterfill_rs.replay.placements import check_divides
from waterfill_rs.replay.recorded import Counts, given_top_k, replicated, top_k_doubts

__all__ = ["MAP", "read"]

MAP = "physical_to_logical_map"


def read(
    contents: list[tuple[str, dict[str, Any]]],
    placed: tuple[str, dict[str, Any]] | None,
    ranks: int | None,
    top_k: int | None,
    *,
    placed_anew: bool = False,
) -> Counts:
    """The counts of the files, which must be equal, with the map of ``placed``, or else of the file itself.

    ``placed_anew``: where experts lie will be forgotten, so nothing is said of it, and counts over all ranks are of one.

    Raises:
        ValueError: naming file, field and number.
    """
    file, content = contents[0]
    counts = _counts(file, content)
    notes = _copies(contents, counts)
    by_rank = _is_by_rank(file, content)
    if by_rank and counts.dim() != 3:
        raise ValueError(
            f"{file}: logical_count is {list(counts.shape)}: rank_layer_expert is [R, L, E]"
        )
    if by_rank and ranks not in (None, counts.shape[0]):
        raise ValueError(
            f"{file}: logical_count is of {counts.shape[0]} ranks, --ep is {ranks}: leave --ep out, "
            f"or give --ep {ranks} --placement trivial to see what {ranks} ranks would do"
        )
    if by_rank:
        ranks = int(counts.shape[0])
    elif placed_anew:
        ranks = 1
    if ranks is None:
        raise ValueError(f"{file}: logical_count does not tell the EP size: give --ep")
    if placed is None and MAP in content:
        placed = (file, content)
    mapping = None if placed is None else _map(*placed, counts)
    if placed is None or mapping is None:
        kind, where = "logical", "these are taken to lie in order, without replicas."
    else:
        kind = "physical"
        counts = _on_physical(counts, mapping)
        where = (
            f"these lie as {MAP} of {placed[0]} says, "
            "and the rows of an expert with replicas are taken to be split evenly over them."
        )
    if not placed_anew:
        notes.append(f"The counts are of logical experts: {where}")
    experts = int(counts.shape[-1])
    check_divides(experts, kind, ranks)
    top_k = given_top_k(top_k, experts)
    notes += top_k_doubts([counts.sum(-1)], top_k)
    mappings = (
        None if placed is None or mapping is None else replicated(f"{placed[0]}: {MAP}", mapping)
    )
    if by_rank:
        whole_numbers.check_range(f"{file}: logical_count of all ranks", counts.sum(0))
        return Counts(
            ranks, experts, top_k, mappings, notes, {0: counts}, summed=True, places=mapping
        )
    if not placed_anew:
        notes.append("Tokens are taken to be spread evenly over the ranks.")
    steps = counts if counts.dim() == 3 else counts[None]
    # A ring buffer: steps that were not used are zero.
    used = {step: one[None] for step, one in enumerate(steps) if int(one.sum())}
    summed = counts.dim() == 2
    return Counts(ranks, experts, top_k, mappings, notes, used, summed=summed, places=mapping)


def _is_by_rank(file: str, content: dict[str, Any]) -> bool:
    layout = content.get("logical_count_layout")
    if layout not in (None, "rank_layer_expert"):
        raise ValueError(
            f"{file}: logical_count_layout is {layout!r:.40}: give 'rank_layer_expert', "
            "or none for [L, E] and [steps, L, E]"
        )
    return layout is not None


def _counts(file: str, content: dict[str, Any]) -> Tensor:
    name = f"{file}: logical_count"
    counts = whole_numbers.read(name, content["logical_count"], (2, 3), "[L, E] or [steps, L, E]")
    whole_numbers.check_range(name, counts)
    if not int(counts.max()):
        raise ValueError(f"{name} is zero everywhere: record while the server serves")
    return counts


def _copies(contents: list[tuple[str, dict[str, Any]]], counts: Tensor) -> list[str]:
    """Each pipeline stage writes the counts of all stages: equal files are one recording, others are refused."""
    for file, content in contents[1:]:
        if not torch.equal(_counts(file, content), counts):
            raise ValueError(
                f"{file}: a second file with 'logical_count', and not that of {contents[0][0]}: "
                "give one at a time"
            )
    if len(contents) == 1:
        return []
    return [f"{len(contents)} files hold the same counts, as pipeline stages write: one was taken."]


def _map(file: str, content: dict[str, Any], counts: Tensor) -> Tensor:
    """``[L, P]``, of as many layers and logical experts as the counts."""
    name = f"{file}: {MAP}"
    mapping = whole_numbers.read(name, content[MAP], (2,), "[L, P]")
    layers, experts = counts.shape[-2:]
    if mapping.shape[0] != layers:
        raise ValueError(
            f"{name} has {mapping.shape[0]} layers, logical_count has {layers}: give those of one model"
        )
    for layer, row in enumerate(mapping):
        missing = sorted(set(range(experts)) ^ set(row.tolist()))
        if missing:
            raise ValueError(
                f"{name} of layer {layer}: its experts are not 0 to {experts - 1}, as logical_count's are; "
                f"the first that does not fit is {missing[0]}"
            )
    return mapping


def _on_physical(counts: Tensor, mapping: Tensor) -> Tensor:
    """``[..., L, P]``: each logical expert's rows split evenly over its replicas, the first ones taking the rest."""
    order = torch.zeros_like(mapping)
    replicas = torch.zeros(counts.shape[-2:], dtype=torch.int64)
    ones = torch.ones(mapping.shape[0], 1, dtype=torch.int64)
    for physical in range(mapping.shape[1]):
        logical = mapping[:, physical : physical + 1]
        order[:, physical : physical + 1] = replicas.gather(1, logical)
        replicas.scatter_add_(1, logical, ones)
    index = mapping.expand(*counts.shape[:-2], *mapping.shape)
    rows = counts.gather(-1, index)
    split = replicas.gather(1, mapping)
    return rows // split + (order < rows % split)
