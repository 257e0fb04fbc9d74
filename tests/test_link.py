"""Rounds between ranks that come late, break and come back: threads as ranks, then processes in network namespaces."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
import torch.distributed as dist

from waterfill_rs.exchange.link import Limits, Link


def words(rank, call):
    return torch.tensor([rank, call], dtype=torch.int32)


def pair(limits):
    """Two ranks' ends, made on two threads."""
    store, ends = dist.HashStore(), [None, None]

    def make(rank):
        ends[rank] = Link(store, rank, 2, limits)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def together(ends, calls, pace=0.0):
    """Each rank's gathered words of these calls, ``pace`` seconds apart, the ranks on a thread each."""
    found = [[], []]

    def run(rank):
        for call in calls:
            gathered = ends[rank].gather(words(rank, call))
            found[rank].append(None if gathered is None else gathered.tolist())
            time.sleep(pace)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def both(call):
    return [[0, call], [1, call]]


def test_a_late_rank_is_waited_for_twice_and_met_again_in_step(caplog):
    caplog.set_level(logging.INFO)
    ends = pair(Limits(wait=0.3, lost=60))
    assert together(ends, range(5)) == [[both(call) for call in range(5)]] * 2
    begun = time.monotonic()
    assert [ends[0].gather(words(0, call)) for call in range(5, 25)] == [None] * 20
    assert 0.55 < time.monotonic() - begun < 2
    assert ends[0].tally == {"live": 5, "timed_out": 2, "broken": 18}
    # The other one finds what was sent meanwhile, each call with its own.
    assert [ends[1].gather(words(1, c)).tolist() for c in range(5, 25)] == [
        both(call) for call in range(5, 25)
    ]
    found = together(ends, range(25, 65), pace=0.01)
    assert found[0][-5:] == found[1][-5:] == [both(call) for call in range(60, 65)]
    assert ends[0].tally["live"] > 5
    said = [record.message for record in caplog.records]
    assert sum("2 rounds in a row" in text for text in said) == 1
    assert sum("live again" in text for text in said) == 1


def test_connections_that_broke_are_made_anew_and_all_go_on_at_one_call(caplog):
    caplog.set_level(logging.INFO)
    ends = pair(Limits(wait=0.1, lost=0.5))
    together(ends, range(3))
    assert ends[0].gather(words(0, 3)) is None
    time.sleep(1)  # That round fails, and what it was on.
    call, live, begun = 4, [0, 0], time.monotonic()
    ends[1].gather(words(1, 3))
    while min(live) < 50 and time.monotonic() - begun < 60:
        found = together(ends, range(call, call + 10))
        for rank in range(2):
            for i, gathered in enumerate(found[rank]):
                assert gathered in (None, both(call + i))
                live[rank] += gathered is not None
        call += 10
        time.sleep(0.01)
    assert min(live) >= 50, (live, [record.message for record in caplog.records])
    for end in ends:
        assert sum(end.tally.values()) == call
        end.close()
    said = [record.message for record in caplog.records]
    assert sum("are lost" in text for text in said) == 2
    assert sum("live again" in text for text in said) == 2


def test_a_rank_that_is_calls_ahead_lets_the_others_catch_up():
    ends = pair(Limits(wait=0.3, lost=60))
    together(ends, range(5))
    for call in range(5, 10):
        assert ends[0].gather(words(0, call)) is None
    # From here on rank 0 is five calls ahead, at the same pace.
    found = [[], []]

    def run(rank, calls):
        for call in calls:
            gathered = ends[rank].gather(words(rank, call))
            found[rank].append(gathered is not None)
            time.sleep(0.01)

    threads = [threading.Thread(target=run, args=(r, range(10 - 5 * r, 100))) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[0][-20:]) and all(found[1][-20:]), found


LOSES = """
import os, sys, torch, torch.distributed as dist
from waterfill_rs.exchange.link import Link
rank, folder, closes = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
link = Link(dist.FileStore(folder + "/store", 2), rank, 2)
def gather():
    return link.gather(torch.zeros(1, dtype=torch.int32))
assert gather() is not None
if rank == 1:
    os._exit(0)
while link._group is not None:
    gather()
if closes:
    link.close()
"""


@pytest.mark.parametrize("closes", [True, False])
def test_a_process_that_looks_for_a_lost_rank_ends_as_any_other(tmp_path, closes):
    arguments = [str(tmp_path), str(closes)]
    started = [
        subprocess.Popen([sys.executable, "-c", LOSES, str(rank), *arguments]) for rank in range(2)
    ]
    assert [process.wait(timeout=60) for process in started] == [0, 0]


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable, which ``cut(True)`` cuts: their prefixes, their cards, and ``cut``."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command here (iproute2): network namespaces cannot be joined")
    names = [f"waterfill-{os.getpid()}-{rank}" for rank in range(2)]

    def ip(*arguments, check=True):
        return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)

    if (made := ip("netns", "add", names[0], check=False)).returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        cards = ["wf0", "wf1"]
        peer = ["peer", "name", cards[1], "netns", names[1]]
        made = ip("link", "add", cards[0], "netns", names[0], "type", "veth", *peer, check=False)
        if made.returncode:
            pytest.skip(f"a pair of veth cannot be made here: {made.stderr.strip()}")
        for rank in range(2):
            inside = ["-n", names[rank]]
            ip(*inside, "address", "add", f"10.231.7.{rank + 1}/24", "dev", cards[rank])
            ip(*inside, "link", "set", cards[rank], "up")
            ip(*inside, "link", "set", "lo", "up")

        def cut(down):
            ip("-n", names[0], "link", "set", cards[0], "down" if down else "up")

        yield [["ip", "netns", "exec", name] for name in names], cards, cut
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def until(true, seconds=60):
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "lost, cut_for, said",
    [
        (30, 1.0, {"rounds in a row took over": 1, "are lost": 0, "live again": 1}),
        (1, 3.0, {"are lost": 1, "live again": 1}),
    ],
    ids=["the rounds come late", "the connections are made anew"],
)
def test_two_hosts_go_on_alone_while_the_cable_is_cut_and_meet_again(
    hosts, tmp_path, lost, cut_for, said
):
    prefixes, cards, cut = hosts
    script = Path(__file__).with_name("cut_ranks.py")
    started = [
        subprocess.Popen(
            [*prefixes[rank], sys.executable, script, str(rank), str(lost), tmp_path],
            env={**os.environ, "GLOO_SOCKET_IFNAME": cards[rank]},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

    def seen(rank):
        try:
            return json.loads((tmp_path / f"{rank}.json").read_text())
        except (OSError, ValueError):
            assert started[rank].poll() is None, started[rank].communicate()[1]
            return {"live": 0, "broken": 0}

    try:
        until(lambda: min(seen(rank)["live"] for rank in range(2)) > 20)
        cut(True)
        time.sleep(cut_for)
        until(lambda: min(seen(rank)["broken"] for rank in range(2)) > 0)
        alone = [seen(rank) for rank in range(2)]
        cut(False)
        until(lambda: all(seen(r)["live"] > alone[r]["live"] + 20 for r in range(2)))
        (tmp_path / "stop").touch()
        for rank, process in enumerate(started):
            _, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
            for text, times in said.items():
                assert error.count(text) == times, f"rank {rank}: {error}"
            at_last = seen(rank)
            assert at_last["refused"] == 0
            assert at_last["longest_s"] < 0.2 + 0.6, at_last
            print(f"rank {rank}: {at_last}")
    finally:
        for process in started:
            process.kill()
