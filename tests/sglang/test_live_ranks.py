"""Two real processes of the real sglang: its preparation joins them, and their layers are levelled together."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked

import waterfill_rs


def test_two_ranks_of_sglang_are_levelled_by_live_counts(tmp_path):
    code = "import sys, live_ranks; live_ranks.main(int(sys.argv[1]), sys.argv[2])"

    def run(rank):
        return forked.run(code, str(rank), str(tmp_path), WATERFILL_RS_TIMEOUT_US="10000000")

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, range(2)):
            assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for of_rank in found:
        assert of_rank["name"] == "board"
        assert of_rank["tally"]["live"] == of_rank["tally"]["calls"] == 20
    for calls in zip(*(of_rank["received"] for of_rank in found), strict=True):
        routed = [sum(column) for column in zip(*(c["routed"] for c in calls), strict=True)]
        shared = [sum(column) for column in zip(*(c["shared"] for c in calls), strict=True)]
        tokens = [call["tokens"] for call in calls]
        assert sum(shared) == sum(tokens)
        plan = waterfill_rs.plan(routed, tokens, ranks=2)
        slowest = max(r + s for r, s in zip(routed, shared, strict=True))
        assert slowest == plan.optimum
