"""The expert-parallel peers of a model, and whether all of them serve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from waterfill_rs.sglang.compat import Seams, resolve

__all__ = ["Peers", "peers_of_next_model"]

LONGEST_WAIT_S = 120.0
"""For the other ranks at preparation. sglang has a barrier once all ranks have loaded a model: a kernel is made meanwhile."""
_runners = itertools.count()
"""Models prepared so far in this process: target and draft models call in an order of their own each."""
_SERVES = "serves"


@dataclass(frozen=True)
class Peers:
    """The expert-parallel ranks of one model. ``store``: keys of their own. ``coordinator``: sglang's group."""

    store: Any
    coordinator: Any

    def agree(self, reasons: Sequence[str]) -> list[str]:
        """Either all ranks serve, or none: this rank's reasons against it, if it has any, else the other ranks'.

        A rank that does not come is one that does not serve; should it come later, it is told so.
        """
        ranks: list[int] = list(self.coordinator.ranks)
        own = ranks.index(dist.get_rank())
        self.store.set(f"serves/{own}", "; ".join(reasons) or _SERVES)
        if reasons:
            return list(reasons)
        # Whoever knows first decides: the others may have waited longer, or shorter.
        decided: bytes = self.store.compare_set("decided", "", self._found(len(ranks)))
        return [] if decided.decode() == _SERVES else [decided.decode()]

    def _found(self, ranks: int) -> str:
        """What keeps another rank from serving, or ``_SERVES``."""
        for rank in range(ranks):
            key = f"serves/{rank}"
            try:
                self.store.wait([key], timedelta(seconds=LONGEST_WAIT_S))
            except RuntimeError:
                return (
                    f"EP rank {rank} did not come within {LONGEST_WAIT_S:g} s: is waterfill-rs installed and on there, "
                    "as on the others?"
                )
            if (word := self.store.get(key).decode()) != _SERVES:
                return f"EP rank {rank}: {word}"
        return _SERVES


def peers_of_next_model(seams: Seams) -> Peers | None:
    """All ranks of a group ask once for each of their models. None without ``torch.distributed``."""
    runner = next(_runners)
    if not dist.is_initialized():
        return None
    coordinator: Any = resolve(seams.group)()
    ranks = "-".join(map(str, coordinator.ranks))
    rendezvous: Any = dist.distributed_c10d
    prefix = f"waterfill_rs/{runner}/{ranks}"
    return Peers(rendezvous.PrefixStore(prefix, rendezvous._get_default_store()), coordinator)
