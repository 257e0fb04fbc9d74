"""Two real processes of the real sglang: its preparation joins them, and their layers are levelled together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import waterfill_rs


def test_two_ranks_of_sglang_are_levelled_by_live_counts(tmp_path):
    script = Path(__file__).with_name("live_ranks.py")
    env = {**os.environ, "WATERFILL_RS_TIMEOUT_US": "10000000"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, error = rank.communicate(timeout=400)
        assert rank.returncode == 0, error[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for exchange, name in (("auto", "board"), ("group", "group")):
        for rank in range(2):
            assert found[rank][exchange]["name"] == name
            tally = found[rank][exchange]["tally"]
            assert tally["live"] == tally["calls"] == 20
        both = (found[rank][exchange]["received"] for rank in range(2))
        for calls in zip(*both, strict=True):
            routed = [sum(column) for column in zip(*(c["routed"] for c in calls), strict=True)]
            shared = [sum(column) for column in zip(*(c["shared"] for c in calls), strict=True)]
            tokens = [call["tokens"] for call in calls]
            assert sum(shared) == sum(tokens)
            plan = waterfill_rs.plan(routed, tokens, ranks=2)
            slowest = max(r + s for r, s in zip(routed, shared, strict=True))
            assert slowest == plan.optimum
