"""The expert-parallel peers of a model, and whether all of them serve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang_versions import Seams

__all__ = ["Peers", "peers_of_maps", "peers_of_next_model"]

LONGEST_WAIT_S = 120.0
"""For the other ranks at preparation. sglang has a barrier once all ranks have loaded a model: a kernel is made meanwhile."""
_runners = itertools.count()
"""Models prepared so far in this process: target and draft models call in an order of their own each."""


@dataclass(frozen=True)
class Peers:
    """The expert-parallel ranks of one model. ``store``: keys of their own. ``coordinator``: sglang's group."""

    store: Any
    coordinator: Any

    def agree(
        self, reasons: Sequence[str], question: str = "serves", answer: str = "serves"
    ) -> list[str]:
        """Either all ranks do it, in the same way, or none: this rank's reasons against it, else the other ranks'.

        A rank that does not come is one that does not; should it come later, it is told so.

        Args:
            question: what is agreed on; each is asked once.
            answer: how this rank would do it.
        """
        try:
            return self._agree(reasons, question, answer)
        except RuntimeError as error:  # The store is gone with the rank that has it.
            return list(reasons) or [f"the other ranks cannot be asked: {error}"]

    def _agree(self, reasons: Sequence[str], question: str, answer: str) -> list[str]:
        ranks: list[int] = list(self.coordinator.ranks)
        own = ranks.index(dist.get_rank())
        self.store.set(f"{question}/{own}", "; ".join(reasons) or answer)
        if reasons:
            return list(reasons)
        # Whoever knows first decides: the others may have waited longer, or shorter.
        found = self._found(len(ranks), question, answer)
        decided: bytes = self.store.compare_set(f"{question}/decided", "", found)
        return [] if decided.decode() == answer else [decided.decode()]

    def _found(self, ranks: int, question: str, answer: str) -> str:
        """What keeps another rank from it, or ``answer``."""
        for rank in range(ranks):
            key = f"{question}/{rank}"
            try:
                self.store.wait([key], timedelta(seconds=LONGEST_WAIT_S))
            except RuntimeError:
                return (
                    f"EP rank {rank} did not come within {LONGEST_WAIT_S:g} s: is waterfill-rs installed and on there, "
                    "as on the others?"
                )
            if (word := self.store.get(key).decode()) != answer:
                return f"EP rank {rank}: {word}"
        return answer


def peers_of_next_model(seams: Seams) -> Peers | None:
    """All ranks of a group ask once for each of their models. None without ``torch.distributed``."""
    return _peers(seams, str(next(_runners)))


def peers_of_maps(seams: Seams) -> Peers | None:
    """Those who make the same maps of experts, which sglang does before any model. None without ``torch.distributed``."""
    return _peers(seams, "maps")


def _peers(seams: Seams, about: str) -> Peers | None:
    if not dist.is_initialized():
        return None
    coordinator: Any = resolve(seams.group)()
    ranks = "-".join(map(str, coordinator.ranks))
    rendezvous: Any = dist.distributed_c10d
    prefix = f"waterfill_rs/{about}/{ranks}"
    return Peers(rendezvous.PrefixStore(prefix, rendezvous._get_default_store()), coordinator)
