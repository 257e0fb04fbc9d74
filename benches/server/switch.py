"""One layer's balancer in any of the modes, alike on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from waterfill_rs.sglang.preparation import lend

STATIC_OFF = "SGLANG_DISABLE_STATIC_WATERFILL"


class Switch:
    """Stands in for ``expand_topk`` of one of our balancers.

    Args:
        ours: the balancer.
        theirs: sglang's class.
        weight: its constructor's fifth parameter: see ``waterfill_rs.sglang_versions``.
        mode: tells the mode of the forward that runs.
        own: makes what exchanges nothing; asked at the first call that needs it.
    """

    def __init__(
        self,
        ours: Any,
        theirs: type,
        weight: str,
        mode: Callable[[], str],
        own: Callable[[Any], Any],
    ) -> None:
        self._ours, self._expand = ours, ours.expand_topk
        lend(theirs, type(ours))
        self._mode, self._own = mode, own
        self._static = _sglangs(ours, theirs, weight, static=True)
        self._dynamic = _sglangs(ours, theirs, weight, static=False)

    def __call__(self, topk_output: Any, num_tokens: int, **options: Any) -> Any:
        mode = self._mode()
        # The package's own, which sees what is forced for the forward.
        if mode in ("live", "overlap", "live-replicas", "auto-replicas"):
            return self._expand(topk_output, num_tokens, **options)
        if mode in ("own", "sglang-replicas"):
            live = self._ours.exchange
            other = self._own(self._ours) if mode == "own" else WithoutReplicas(live)
            self._ours.exchange = other
            try:
                return self._expand(topk_output, num_tokens, **options)
            finally:
                self._ours.exchange = live
        if mode == "sglang-dynamic":
            return self._dynamic.expand_topk(topk_output, num_tokens)
        if mode == "sglang" or not num_tokens:
            return self._static.expand_topk(topk_output, num_tokens)
        if mode == "home":
            return self._static._expand_local_shared(topk_output)
        raise ValueError(f"mode {mode!r} is none that a balancer can have")


class WithoutReplicas:
    """An exchange whose calls are of no layer that has replicas: all ranks make them, and replicas stay as sglang chose."""

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange

    def expand(
        self, ids: Any, weights: Any, shared_weight: float, *, layer: int | None = None
    ) -> Any:
        return self._exchange.expand(ids, weights, shared_weight, layer=None)

    def move_up(self, ids: Any, *, layer: int | None = None, live: bool = True) -> Any:
        return self._exchange.move_up(ids, layer=None, live=live)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)


def _sglangs(ours: Any, theirs: type, weight: str, *, static: bool) -> Any:
    """sglang's balancer of the same layer."""
    value = ours.shared_weight
    if weight != "shared_weight":
        value = 1 / value if value else 0.0
    before = os.environ.get(STATIC_OFF)
    os.environ[STATIC_OFF] = "0" if static else "1"
    try:
        balancer = theirs(
            num_routed_experts=ours.num_routed_experts,
            world_size=ours.world_size,
            rank=ours.rank,
            layer_id=ours.layer_id,
            **{weight: value},
        )
    finally:
        if before is None:
            del os.environ[STATIC_OFF]
        else:
            os.environ[STATIC_OFF] = before
    balancer.shared_weight = ours.shared_weight
    return balancer


def own_exchange(made: dict[str, Any]) -> Callable[[Any], Any]:
    """Makes the exchange without a board once for all layers of this process, and keeps it in ``made``."""

    def of(balancer: Any) -> Any:
        if "own" not in made:
            from waterfill_rs.exchange.device import DeviceExchange

            made["own"] = DeviceExchange(
                balancer.exchange.device,
                balancer.member,
                reason="the bench compares it",
            )
        return made["own"]

    return of
