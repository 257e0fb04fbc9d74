"""The replay's words where shared rows cannot level anything, where replicas could, and where a policy is worse than home."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay_phases import EXPERTS, LEVEL, PREFILL, RANKS, TOP_K, record, replay

from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.verdict import print_verdict

HOT = [[0, 1, 2, 4 + token % 12] for token in range(200)]
"""Three of four rows are on rank 0: shared rows level nothing."""


def test_where_no_layer_can_be_levelled_the_verdict_is_to_place_experts_first(tmp_path, capsys):
    folder = record(tmp_path / "served", {7: [(PREFILL, HOT)] * RANKS})
    rows, said = replay(folder, capsys)
    home, live = (sum(r["max"] for r in rows if r["policy"] == p) for p in ("home", "live"))
    assert live < home, "the shared rows of rank 0 go elsewhere"
    assert f"Live counts take {1 - live / home:.1%} off the slowest rank's rows" in said
    assert "%: place experts first.\n" in said
    assert "worth turning on" not in said and "little to gain" not in said


def test_one_layer_in_ten_thousand_does_not_change_that(tmp_path, capsys):
    passes = {7: [(PREFILL, HOT * 20)] * RANKS, 8: [(PREFILL, LEVEL[:40])] * RANKS}
    _, said = replay(record(tmp_path / "served", passes), capsys)
    assert "%: place experts first.\n" in said
    passes[8] = [(PREFILL, LEVEL)] * RANKS
    _, said = replay(record(tmp_path / "served", passes), capsys)
    assert "worth turning on" in said


def replicated(tmp_path, beside):
    """Counts of one layer: expert 0 is on the first and on the last rank, beside three experts of ``beside`` rows and of 100."""
    mapping = [*range(EXPERTS - 1), 0]
    counts = [600, *[beside] * 3, *[100] * (EXPERTS - 5)]
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": [counts], "physical_to_logical_map": [mapping]}))
    return path


def test_where_joint_is_far_better_the_words_say_by_how_much(tmp_path, capsys):
    rows, said = replay(replicated(tmp_path, 250), capsys, "--ep", "4", "--top-k", str(TOP_K))
    most = {row["policy"]: row["max"] for row in rows}
    assert most["joint"] < 0.98 * most["live"]
    assert (
        f"joint) is far better: {1 - most['joint'] / most['home']:.1%}, and "
        f"{1 - most['joint'] / most['live']:.1%} less rows than\nlive counts alone." in said
    )
    rows, said = replay(replicated(tmp_path, 100), capsys, "--ep", "4", "--top-k", str(TOP_K))
    assert "far better" not in said and "(joint) it is" in said


def result(policy, slowest):
    known = dict(layer=0, pass_id=0, tokens=9, routed_max=90, mean=100.0, home_mean=100.0)
    return Result(
        policy=policy, max=slowest, optimum=100, extra_copies=0.0, loads=[slowest], **known
    )


def test_what_is_worse_than_home_adds_and_takes_nothing_off(capsys):
    print_verdict([result("home", 200), result("own-counts", 210), result("live", 150)], TOP_K)
    said = capsys.readouterr().out
    assert "Live counts take 25.0% off the slowest rank's rows, own counts add 5.0%: worth" in said
    print_verdict([result("home", 200), result("live", 202)], TOP_K)
    assert "Live counts add 1.0% to the slowest rank's rows: little" in capsys.readouterr().out
    print_verdict([result("home", 200), result("live", 200)], TOP_K)
    assert "Live counts take 0.0% off" in capsys.readouterr().out


def test_a_slowest_rank_below_the_mean_of_home_is_said_to_be_below(tmp_path, capsys):
    # Any expert with rows takes 2 us. Three ranks have four such and the last has three. At home a shared one is beside them:
    # 10, 10, 10 and 8, of which the mean is 9.5. All shared rows on the last rank: 8 each.
    tokens = [[first, 4 + first, 8 + first, 12 + first] for first in range(3)] + [[3, 7, 11, 0]]
    folder = record(tmp_path / "served", {7: [(PREFILL, tokens)] * RANKS})
    page = tmp_path / "page.html"
    _, said = replay(folder, capsys, "--cost-model", "roofline:2,0.1,8", "--html", str(page))
    above, below = f"{10 / 9.5 - 1:.1%}", f"{1 - 8 / 9.5:.1%}"
    assert f"The slowest rank is {above} above the mean with shared experts at home,\n" in said
    assert f" {below} below it from live counts, weighted by time." in said
    text = page.read_text()
    assert f"at home: the slowest rank is {above} above the mean<" in text
    assert f"live plan: the slowest rank is {below} below the mean<" in text
