"""What a layer asks of an exchange, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from waterfill_rs.exchange.replicas import ReplicaTables

__all__ = ["Exchange"]


class Exchange(Protocol):
    """One rank's end, for layers on the CPU or on a CUDA device. ``reason``: why it is this one, in words."""

    reason: str
    unwatched: str | None
    """Why the other ranks cannot see whether this process lives, if they have to and can't."""
    replicas: ReplicaTables | None
    """The tables that its calls choose replicas by. Without them ids keep the replicas that they are given."""

    @property
    def name(self) -> str:
        """``solo``, ``board`` or ``group``."""
        ...

    def expand(
        self, ids: Tensor, weights: Tensor, shared_weight: float, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One call: count, exchange, and widen ids and weights ``[N, K]`` to ``[N, K + 1]``; N may be 0.

        See ``waterfill_rs.torch.expand_topk`` for what is in them. On the CPU nobody may write them until it returns: it waits
        for other ranks between counting the ids and using them.

        Args:
            layer: whose table of ``replicas`` it goes by; none if there is none of it. An id then names another replica of
                the same logical expert, where the plan has rows for it.

        Raises:
            ValueError: tensors that do not fit, or on the CPU an id at or above the number of experts, with its place.
        """
        ...

    def move_up(self, ids: Tensor, *, layer: int | None = None, live: bool = True) -> Tensor:
        """Ids ``[N, K]`` past the shared experts, int64, for a batch whose shared rows are not routed.

        It is no call, unless there are ``replicas`` and it is ``live``: then all ranks make it, and ids name the replicas that
        the plan has. Not live, with ``replicas``, they name the primary ones.
        See ``waterfill_rs.torch.move_up``.
        """
        ...

    def tally(self) -> Mapping[str, Any]:
        """How the calls so far ended; at least ``calls``."""
        ...

    def close(self) -> None:
        """End what runs beside it. No calls are made afterwards."""
        ...
