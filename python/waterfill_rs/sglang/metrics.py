"""What this process's exchanges count, on sglang's own ``/metrics`` page: names ``sglang:waterfill_*``.

Pushed after sglang's scheduler has pushed its own stats, which it does once in many passes and only with
``--enable-metrics``, and at most once in ``INTERVAL_S``: nothing is done here layer by layer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import waterfill_rs
from waterfill_rs._native import OUTCOMES
from waterfill_rs.sglang.panics import panics_are_errors

__all__ = ["SEAM", "Page", "after_log_stats", "install", "stand_aside", "watch", "watch_shared"]

logger = logging.getLogger(__name__)

SEAM = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats"
"""``(self, stats)``, hooked after; ``self.labels`` are those of all of the scheduler's metrics."""

INTERVAL_S = 5.0
REASONS = ("late", "silent", "given_up", "refused")
"""Why the planner had no plan, as a snapshot counts it."""
_POWERS = (*range(11, 21), 22, 24, 27, 30, 33)
WAIT_BUCKETS_S = tuple(2**power / 1e9 for power in _POWERS)
"""2 microseconds to 8.6 seconds. Powers of two nanoseconds, because the board's own buckets end there too."""


class Counting(Protocol):
    """What is asked of an exchange; ``board``, if it has one, is asked for by the leader."""

    reason: str

    @property
    def name(self) -> str: ...
    def tally(self) -> Mapping[str, Any]: ...


def install() -> None:
    """Hook sglang's stats. Called once, while plugins register."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SEAM, after_log_stats, HookType.AFTER)


def watch(exchange: Counting, *, leads: bool) -> None:
    """Show this exchange from now on. ``leads``: rank 0, which tells of all ranks what the board knows."""
    _page.watch(exchange, leads=leads)


def watch_shared(tally: Mapping[str, int]) -> None:
    """Show from now on where shared experts ran: calls of layers by ``overlapped`` and ``fused``."""
    _page.shared.append(tally)


def stand_aside(reason: str) -> None:
    """Show that sglang's own Waterfill stays, and why."""
    _page.reasons_off.append(reason)


def after_log_stats(result: Any, collector: Any, *_: Any, **__: Any) -> None:
    """After sglang's ``log_stats``: whatever fails here is told once and costs the metrics, not the server."""
    try:
        _page.push(collector.labels)
    except Exception:
        logger.warning("waterfill-rs metrics stop: they could not be pushed", exc_info=True)
        _page.clear()


class Page:
    """What one process shows. ``clock``: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reasons_off: list[str] = []
        self.shared: list[Mapping[str, int]] = []
        self._shared_pushed: dict[str, int] = {}
        self._watched: list[_Watched] = []
        self._metrics: _Metrics | None = None
        self._clock = clock
        self._next = 0.0

    def watch(self, exchange: Counting, *, leads: bool) -> None:
        self._watched.append(_Watched(exchange, leads))

    def clear(self) -> None:
        """Show nothing more."""
        self.reasons_off, self.shared, self._watched = [], [], []

    @panics_are_errors
    def push(self, labels: Mapping[str, Any]) -> None:
        """Add what came since the last push, under these labels, unless that was a moment ago."""
        now = self._clock()
        if now < self._next or not (self._watched or self.reasons_off):
            return
        self._next = now + INTERVAL_S
        if self._metrics is None:
            self._metrics = _Metrics(tuple(labels))
        for reason in self.reasons_off:
            self._metrics.info.labels(**_info("off", reason), **labels).set(1)
        self._push_shared(self._metrics, labels)
        plans = [watched.push(self._metrics, labels) for watched in self._watched]
        mean = sum(plan.get("mean", 0) for plan in plans)
        for placement in ("home", "planned") if mean else ():
            slowest = sum(plan.get(f"{placement}_max", 0) for plan in plans)
            ratio = self._metrics.imbalance.labels(placement=placement, **labels)
            ratio.set(slowest / mean)

    def _push_shared(self, metrics: _Metrics, labels: Mapping[str, Any]) -> None:
        for place in self.shared[0] if self.shared else ():
            calls = sum(tally[place] for tally in self.shared)
            new = calls - self._shared_pushed.get(place, 0)
            self._shared_pushed[place] = calls
            metrics.shared.labels(place=place, **labels).inc(new)


class _Watched:
    """One exchange, and what of it has been pushed."""

    def __init__(self, exchange: Counting, leads: bool) -> None:
        self._exchange = exchange
        self._board: Any = getattr(exchange, "board", None) if leads else None
        self._pushed: dict[Any, int] = {}

    def push(self, metrics: _Metrics, labels: Mapping[str, Any]) -> dict[str, int]:
        """Gives what the planner's sums grew by."""
        metrics.info.labels(**_info(self._exchange.name, self._exchange.reason), **labels).set(1)
        tally = self._exchange.tally()
        grown = {
            result: self._grown(result, tally[result]) for result in OUTCOMES if result in tally
        }
        for result, new in grown.items():
            metrics.exchanges.labels(result=result, **labels).inc(new)
        if calls := sum(grown.values()):
            metrics.share.labels(**labels).set(grown["live"] / calls)
        if "wait_us" in tally:
            self._push_waits(metrics.waits.labels(**labels), tally["wait_us"]["buckets"])
        return self._push_board(metrics, labels) if self._board is not None else {}

    def _push_waits(self, histogram: Any, buckets: Iterable[tuple[float, int]]) -> None:
        for limit_us, count in buckets:
            if new := self._grown(("wait", limit_us), count):
                _observe(histogram, limit_us, new)

    def _push_board(self, metrics: _Metrics, labels: Mapping[str, Any]) -> dict[str, int]:
        snapshot = self._board.snapshot()
        planner = snapshot["planner"]
        for peer, tally in enumerate(snapshot["by_rank"]):
            missed = metrics.missed.labels(peer=peer, **labels)
            missed.inc(self._grown(("missed", peer), planner["missed"][peer]))
            if (
                tally["alive"] is not None
            ):  # None of a rank that did not come yet, or cannot be watched.
                metrics.alive.labels(peer=peer, **labels).set(tally["alive"])
        for reason in REASONS:
            none = metrics.none.labels(reason=reason, **labels)
            none.inc(self._grown(("none", reason), planner[reason]))
        sums = ("home_max", "planned_max", "mean")
        return {name: self._grown(name, planner[name]) for name in sums}

    def _grown(self, key: Any, value: int) -> int:
        """Since it was last asked for."""
        new = value - self._pushed.get(key, 0)
        self._pushed[key] = value
        return max(0, new)


class _Metrics:
    """Made at the first push: sglang sets prometheus_client's folder before it may be imported."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        def gauge(name: str, text: str, *own: str) -> Any:
            # As sglang's own: the page shows the last value set, without the process's id.
            return Gauge(name, text, (*labels, *own), multiprocess_mode="mostrecent")

        self.info = gauge(
            "sglang:waterfill_info",
            "1; which exchange the MoE layers use, or off, and why.",
            "version",
            "exchange",
            "reason",
        )
        self.exchanges = Counter(
            "sglang:waterfill_exchange_total",
            "Exchanges of counts, one a MoE layer and pass, by how they ended.",
            (*labels, "result"),
        )
        self.shared = Counter(
            "sglang:waterfill_shared_total",
            "Eager calls of MoE layers by where their shared expert ran: overlapped or fused. No replay of a graph is one.",
            (*labels, "place"),
        )
        self.share = gauge(
            "sglang:waterfill_live_ratio",
            "Exchanges with a live plan over all of them, since the last push.",
        )
        self.none = Counter(
            "sglang:waterfill_none_total",
            "Exchanges for which the planner had no plan, so that all ranks took own counts, by why.",
            (*labels, "reason"),
        )
        self.waits = Histogram(
            "sglang:waterfill_exchange_seconds",
            "How long exchanges waited for the plan; the sum is up to a quarter too high.",
            labels,
            buckets=WAIT_BUCKETS_S,
        )
        self.imbalance = gauge(
            "sglang:waterfill_imbalance_ratio",
            "Rows of the slowest rank over the mean, since the last push: shared rows at home, as planned.",
            "placement",
        )
        self.missed = Counter(
            "sglang:waterfill_missed_total",
            "Exchanges that were ended without this rank's counts, because it was late or gone.",
            (*labels, "peer"),
        )
        self.alive = gauge(
            "sglang:waterfill_peer_alive", "Whether this rank's process lives: 1 or 0.", "peer"
        )


def _info(exchange: str, reason: str) -> dict[str, str]:
    return {"version": waterfill_rs.__version__, "exchange": exchange, "reason": reason}


def _observe(histogram: Any, limit_us: float, times: int) -> None:
    """``times`` waits of less than ``limit_us`` at once, for which prometheus_client has no call of its own."""
    buckets, total = getattr(histogram, "_buckets", None), getattr(histogram, "_sum", None)
    if buckets is None or total is None:  # Another prometheus_client: slower, and the same.
        for _ in range(times):
            histogram.observe(limit_us / 1e6)
        return
    total.inc(limit_us / 1e6 * times)
    nanoseconds = round(limit_us * 1000)
    holding = (i for i, power in enumerate(_POWERS) if nanoseconds <= 2**power)
    buckets[next(holding, len(_POWERS))].inc(times)


_page = Page()
