"""How long a GPU takes for calls, and the host for launching one kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

__all__ = ["GpuTimer", "launch_us", "sleep"]

_CALLS = 16  # At least so many calls lie between two events.
_ATTEMPTS = 6


class GpuTimer:
    """Times calls by CUDA events on the current stream, one call after the other, as in a busy layer.

    The GPU sleeps while the host launches, so that no launch is waited for: a call's time is that of its kernels.
    """

    def __init__(self, batches: int) -> None:
        """``batches``: how many times the calls are timed; the median counts."""
        self._batches = batches

    def __call__(self, calls: Sequence[Callable[[], object]]) -> float:
        """Microseconds of a call. Each call runs twice before it is timed, so kernels are compiled then.

        Raises:
            RuntimeError: if the host does not launch fast enough, whatever the GPU's sleep.
        """
        calls = list(calls)
        for call in calls * 2:
            call()
        torch.cuda.synchronize()
        rounds = -(-_CALLS // len(calls))
        began = time.perf_counter()
        for call in calls * rounds:
            call()
        sleep_us = 2e6 * (time.perf_counter() - began) + 200
        torch.cuda.synchronize()
        times = []
        for _ in range(self._batches):
            us, sleep_us = self._undisturbed(calls, rounds, sleep_us)
            times.append(us)
        return statistics.median(times)

    def _undisturbed(
        self, calls: list[Callable[[], object]], rounds: int, sleep_us: float
    ) -> tuple[float, float]:
        """The time of a call, and the sleep in which all of them were launched."""
        for _ in range(_ATTEMPTS):
            us, in_time = self._batch(calls, rounds, sleep_us)
            if in_time:
                return us, sleep_us
            sleep_us *= 2
        text = f"the host did not launch {rounds * len(calls)} calls in {sleep_us / 2e3:.0f} ms"
        raise RuntimeError(f"{text}: stop what else runs on this machine's CPUs")

    @staticmethod
    def _batch(
        calls: list[Callable[[], object]], rounds: int, sleep_us: float
    ) -> tuple[float, bool]:
        """Microseconds of a call, and whether all were launched before the first began."""
        event: Any = partial(torch.cuda.Event, enable_timing=True)  # Untyped.
        start, end = event(), event()
        sleep(sleep_us)
        start.record()
        for call in calls * rounds:
            call()
        end.record()
        in_time = not start.query()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / (rounds * len(calls)), in_time


def launch_us(batches: int = 21, launches: int = 200) -> float:
    """Host microseconds of one eager launch of a kernel of one element: the median of the batches' means."""
    value = torch.zeros(1, device="cuda")
    times = []
    for _ in range(batches + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            value.add_(1)
        times.append((time.perf_counter() - began) * 1e6 / launches)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def sleep(us: float) -> None:
    """Keep the current stream busy for at least ``us`` microseconds, at a clock of up to 2 GHz."""
    if us:
        spin: Any = torch.cuda._sleep  # Untyped.
        spin(int(us * 2000))
