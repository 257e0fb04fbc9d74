"""The line in the log when too few calls are live: when it comes, whom it names, and how seldom."""

import itertools
import logging
import time

import pytest

pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs._native import OUTCOMES
from waterfill_rs.sglang import live_share
from waterfill_rs.sglang.live_share import LONGEST_PAUSE_S, LiveShare
from waterfill_rs.sglang.preparation import lend


def tally(live, none=0, timed_out=0, broken=0, missed=0):
    return {"live": live, "none": none, "timed_out": timed_out, "broken": broken, "missed": missed}


class Ranks:
    """Two ranks' tallies, which grow."""

    def __init__(self):
        self.now = 0.0
        self.share = LiveShare(clock=lambda: self.now)
        self.counts = [
            dict.fromkeys(("live", "none", "timed_out", "broken", "missed"), 0) for _ in "01"
        ]
        assert self.share.look(self.counts) is None

    def grow(self, first, second):
        for counts, more in zip(self.counts, (first, second), strict=True):
            for name, count in more.items():
                counts[name] += count
        return self.share.look(self.counts)


def test_it_names_who_was_late_and_what_to_do():
    ranks = Ranks()
    assert ranks.grow(tally(995, none=5), tally(995, none=5, missed=5)) is None, "within 1%"
    told = ranks.grow(tally(989, none=11), tally(989, none=10, timed_out=1, missed=11))
    assert told.startswith("1.1% of the last 1000 calls of rank 0 had no live plan")
    assert "11 none" in told and "by rank: {1: 11}" in told and "waterfill-rs top" in told


def test_fewer_than_a_thousand_calls_are_looked_at_later():
    ranks = Ranks()
    assert ranks.grow(tally(400, none=100), tally(500)) is None
    assert "10.0% of the last 1000 calls" in ranks.grow(tally(500), tally(500))


def test_each_reason_has_its_advice():
    others = [outcome for outcome in OUTCOMES if outcome != "live"]
    assert list(live_share._BOARD) == list(live_share._GROUP) == others
    for name, words in (
        ("none", "compiles kernels"),
        ("timed_out", "is late: give it a CPU"),
        ("broken", "is gone or always late"),
    ):
        told = Ranks().grow(tally(900, **{name: 100}), tally(1000))
        assert words in told and f"100 {name}" in told


def test_it_is_told_ever_more_seldom_and_anew_once_all_was_well():
    ranks, bad, good = (
        Ranks(),
        (tally(500, none=500), tally(500, none=500)),
        (tally(1000), tally(1000)),
    )
    times = []
    for _ in range(30 * 60):
        ranks.now += 10
        if ranks.grow(*bad):
            times.append(ranks.now)
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert gaps[:4] == [60, 120, 240, 480] and max(gaps) == LONGEST_PAUSE_S
    ranks.now += 10
    assert ranks.grow(*good) is None
    ranks.now += LONGEST_PAUSE_S
    assert ranks.grow(*bad)
    ranks.now += 60
    assert ranks.grow(*bad), "a minute again"


def test_a_thread_looks_at_an_exchange_as_long_as_it_is_there(monkeypatch, caplog):
    monkeypatch.setattr(live_share, "LOOK_S", 0.01)

    class Exchange:
        name, calls = "group", 0

        def tally(self):
            self.calls += 1000
            return tally(self.calls // 2, broken=self.calls // 2)

    exchange = Exchange()
    with caplog.at_level(logging.WARNING):
        live_share.watch(exchange)
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    (told,) = (record.getMessage() for record in caplog.records)
    assert (
        told.startswith("waterfill-rs: 50.0% of the last")
        and "this process's planner is gone" in told
    )


def test_sglangs_balancer_finds_its_own_methods_by_the_name_that_is_ours():
    class Theirs:
        @staticmethod
        def reduce(value):
            return value + 1

        def expand_topk(self):
            return "theirs"

    class Ours:
        def expand_topk(self):
            return "ours"

    lend(Theirs, Ours)
    assert Ours.reduce(1) == 2 and Ours().expand_topk() == "ours"
