"""Two real processes of the real sglang, of which one cannot or may not serve: no rank waits for it for ever."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked

CODE = "import sys, unlike_ranks; unlike_ranks.main(int(sys.argv[1]), sys.argv[2], sys.argv[3] == 'without', 5.0)"
SGLANGS = "sglang.srt.layers.moe.waterfill"


def run_both(folder, *, without=False, **of_rank_1):
    def run(rank):
        lacks = "without" if without and rank == 1 else "has"
        variables = of_rank_1 if rank == 1 else {}
        return forked.run(CODE, str(rank), str(folder), lacks, timeout_s=90, **variables)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def balancer_and_seconds(done):
    assert done.returncode == 0, done.stderr[-3000:]
    module, seconds = done.stdout.split()[-2:]
    return module, float(seconds)


def test_a_rank_that_cannot_serve_takes_all_to_sglangs_own(tmp_path):
    ranks = run_both(tmp_path, without=True)
    for rank, reason in enumerate(("EP rank 1: no NVRTC here", "no NVRTC here")):
        module, seconds = balancer_and_seconds(ranks[rank])
        assert module == SGLANGS and seconds < 5
        told = f"waterfill-rs is off, sglang's own Waterfill stays: {reason}"
        assert ranks[rank].stderr.count(told) == 1


def test_a_rank_where_it_is_off_is_waited_for_and_named(tmp_path):
    ranks = run_both(tmp_path, WATERFILL_RS="off")
    module, seconds = balancer_and_seconds(ranks[0])
    assert module == SGLANGS and 5 <= seconds < 30
    assert "stays: EP rank 1 did not come within 5 s: is waterfill-rs installed and on there" in ranks[0].stderr  # fmt: skip
    assert balancer_and_seconds(ranks[1])[0] == SGLANGS


def test_required_on_one_rank_it_stops_with_the_others_reason(tmp_path):
    ranks = run_both(tmp_path, without=True, WATERFILL_RS_REQUIRE="1")
    assert ranks[1].returncode == 1 and "- no NVRTC here" in ranks[1].stderr
    assert balancer_and_seconds(ranks[0])[0] == SGLANGS
    assert "EP rank 1: no NVRTC here" in ranks[0].stderr
