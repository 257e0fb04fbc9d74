"""Prefill and decode told apart in a recording, as this package tells them apart in a server.

A pass is prefill if any rank prefills in it, else decode. sglang's ``per_token`` mode records each rank's ``forward_mode``,
the value of its ``ForwardMode``. Other modes record none, and there the size has to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from waterfill_rs.replay.dumps import Counts, Tokens

__all__ = ["MOST_DECODE_TOKENS", "PHASES", "phases_of", "tokens_of"]

PHASES = ("prefill", "decode")

MOST_DECODE_TOKENS = 128
"""Of one rank. It is the default limit of DeepEP's low-latency dispatch in sglang, in which decode runs."""

# EXTEND and MIXED; DECODE and TARGET_VERIFY. Larger numbers mean different things in different versions of sglang.
_PREFILL, _DECODE = {1, 3}, {2, 5}


def phases_of(dump: Tokens | Counts) -> tuple[dict[int, str | None], str]:
    """Each pass's phase, and a sentence that says what told it. None: sums over passes have no phase."""
    if dump.summed:
        note = "The counts are sums over passes, so prefill and decode cannot be told apart: the verdict holds for prefills."
        return dict.fromkeys(dump.passes), note
    found: dict[int, str | None] = {}
    by_size = 0
    for pass_id in dump.passes:
        phase = _recorded(dump.modes.get(pass_id, ()))
        by_size += phase is None
        found[pass_id] = phase or PHASES[max(tokens_of(dump, pass_id)) <= MOST_DECODE_TOKENS]
    if not by_size:
        return found, "Prefill and decode are told apart by forward_mode."
    return found, (
        f"Prefill and decode are told apart by size in {by_size} of {len(found)} passes, where no forward_mode does: "
        f"decode is a pass in which no rank has more than {MOST_DECODE_TOKENS} tokens."
    )


def tokens_of(dump: Tokens | Counts, pass_id: int) -> list[int]:
    """Each rank's tokens in a pass, in the layer that has most; evenly spread where the sources are not known."""
    from waterfill_rs.replay.dumps import Tokens

    if isinstance(dump, Tokens):
        return [_with_ids(ids) for ids in dump.passes[pass_id]]
    rows: list[int] = dump.passes[pass_id].long().sum(dim=-1).max(dim=-1).values.tolist()
    tokens = [-(-own // dump.top_k) for own in rows]
    if len(tokens) == dump.ranks:
        return tokens
    return [(sum(tokens) + rank) // dump.ranks for rank in range(dump.ranks)]


def _recorded(modes: Sequence[int]) -> str | None:
    """What the ranks' modes say together; None where none of them is one that we know, and IDLE says nothing."""
    if not _PREFILL.isdisjoint(modes):
        return "prefill"
    return None if _DECODE.isdisjoint(modes) else "decode"


def _with_ids(ids: Tensor) -> int:
    """Of ``[L, tokens, K]``: rows with an id, in the layer that has most."""
    return int((ids >= 0).any(dim=2).sum(dim=1).max()) if ids.numel() else 0
