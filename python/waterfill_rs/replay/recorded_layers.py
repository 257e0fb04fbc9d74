"""A recording layer by layer, as ``comparison`` takes it: counted, and with what sglang's Waterfill would have chosen."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from waterfill_rs.policies.comparison import MOVE_ROUTED, Batch, Layer
from waterfill_rs.replay import sglang_waterfill
from waterfill_rs.replay.recorded import Counts, Tokens

__all__ = ["layers", "left_out"]


def layers(
    dump: Tokens | Counts, policies: Collection[str], chosen: dict[int, str | None]
) -> Iterator[Layer]:
    """Every layer of the chosen passes, with their phases, in which anything was routed; the others are dense."""
    if isinstance(dump, Tokens):
        yield from _of_tokens(dump, policies, chosen)
    else:
        yield from _of_counts(dump, chosen)


def left_out(
    found: Collection[str], policies: Collection[str], dump: Tokens | Counts
) -> Iterator[str]:
    """Which of the policies were not found, and why: a sentence each."""
    of_sglang = (
        f"its kernel does not take {dump.ranks} ranks"
        if isinstance(dump, Tokens)
        else "this dump holds counts, not tokens"
    )
    reasons = {
        "sglang-static": of_sglang,
        "sglang-dynamic": of_sglang,
        "own-counts": "this dump does not tell whose tokens the counts are",
        **dict.fromkeys(MOVE_ROUTED, "no expert of this dump has replicas"),
    }
    if dump.mappings is not None:
        reasons["single-replica"] = "one replica an expert is for decode, and no pass here is one"
    missing = [policy for policy in policies if policy not in found]
    for reason in dict.fromkeys(reasons[policy] for policy in missing if policy in MOVE_ROUTED):
        own = [one for one in missing if one in MOVE_ROUTED and reasons[one] == reason]
        yield f"{', '.join(own)} {'are' if len(own) > 1 else 'is'} left out: {reason}."
    for policy in (policy for policy in missing if policy not in MOVE_ROUTED):
        yield f"{policy} is left out: {reasons[policy]}."


def _of_tokens(
    dump: Tokens, policies: Collection[str], chosen: dict[int, str | None]
) -> Iterator[Layer]:
    for pass_id, phase in chosen.items():
        tensors = dump.passes[pass_id]
        for layer in range(tensors[0].shape[0]):
            ids = [own[layer, :, : dump.top_k].contiguous() for own in tensors]
            batches = [
                Batch.of(own, own.data_ptr(), *own.shape, experts=dump.experts, ranks=dump.ranks)
                for own in ids
            ]
            if any(batch.tokens for batch in batches):
                mapping = dump.mappings[layer] if dump.mappings else None
                known = {
                    "mapping": mapping,
                    "phase": phase,
                    "sglangs": _sglangs(ids, dump, policies),
                }
                yield Layer.of_batches(layer, pass_id, batches, **known)


def _sglangs(
    ids: list[Tensor], dump: Tokens, policies: Collection[str]
) -> dict[str, list[array[int]]]:
    """What sglang's own modes would choose, as far as they are asked for; nothing for an EP size that they do not take."""
    if not sglang_waterfill.serves(dump.ranks):
        return {}
    found = {}
    if "sglang-static" in policies:
        shape = {"physical_experts": dump.experts, "ranks": dump.ranks}
        found["sglang-static"] = [
            sglang_waterfill.static_ranks(own, rank=rank, **shape) for rank, own in enumerate(ids)
        ]
    if "sglang-dynamic" in policies:
        found["sglang-dynamic"] = sglang_waterfill.dynamic_ranks(ids, physical_experts=dump.experts)
    return {
        policy: [array("i", own.tolist()) for own in by_rank] for policy, by_rank in found.items()
    }


def _of_counts(dump: Counts, chosen: dict[int, str | None]) -> Iterator[Layer]:
    for pass_id, phase in chosen.items():
        counts = dump.passes[pass_id]
        by_layer: list[list[list[int]]] = counts.transpose(0, 1).tolist()
        sums: list[list[int]] = counts.sum(0, dtype=torch.int64).tolist()
        for layer, (known, routed) in enumerate(zip(by_layer, sums, strict=True)):
            if not any(routed):
                continue
            sources = known if len(known) == dump.ranks else None
            if sources:
                tokens = [-(-sum(own) // dump.top_k) for own in sources]
            else:
                total = -(-sum(routed) // dump.top_k)
                tokens = [(total + rank) // dump.ranks for rank in range(dump.ranks)]
            mapping = dump.mappings[layer] if dump.mappings else None
            yield Layer(layer, pass_id, routed, tokens, sources, mapping=mapping, phase=phase)
