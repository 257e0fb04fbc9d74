"""Redundant experts in a replay: replicas chosen batch by batch, active experts, and what trivial places do."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs import CostModel
from waterfill_rs.cli import main
from waterfill_rs.placement import place
from waterfill_rs.placement.trivial import is_trivial
from waterfill_rs.policies import live_replicas
from waterfill_rs.policies.comparison import Layer, compare
from waterfill_rs.policies.routed_rows import RoutedRows, measure, print_routed_rows, trap
from waterfill_rs.replay import placements

ROWS = CostModel.rows()
RANKS = 4
MAPPING = [physical % 8 for physical in range(12)]
"""Eight experts, of which the first four stand again, on the last ranks."""


def layer(routed, phase="decode", mapping=MAPPING, pass_id=0):
    return Layer(3, pass_id, routed, [sum(routed) // 8] * RANKS, mapping=mapping, phase=phase)


def replay(path, *options):
    out = path.parent / "out.json"
    assert main(["replay", str(path), "--top-k", "2", "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


@pytest.fixture
def counts(tmp_path):
    """Sums of one layer: the experts with most rows are the last ones, of which sglang's default replicates none."""
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": [[20, 20, 20, 20, 400, 380, 420, 400]]}))
    return path


def test_one_replica_an_expert_has_the_fewest_active_experts_and_is_for_decode():
    routed = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    found = {r.policy: r for r in compare(layer(routed), ["joint", "single-replica"])}
    assert set(found) == {"joint", "single-replica"}
    plan = live_replicas.plan("single-replica", routed, [0] * RANKS, MAPPING, ROWS)
    assert sum(rows > 0 for rows in plan.replica_rows) == 8, "of each expert one replica"
    for phase in ("prefill", None):
        found = compare(layer(routed, phase), ["joint", "single-replica"])
        assert [result.policy for result in found] == ["joint"]


def max_rows(of_expert):
    each = len(of_expert) // RANKS
    return max(sum(of_expert[rank * each :][:each]) for rank in range(RANKS))


@pytest.mark.parametrize(
    "rows, way",
    [(10, "single-replica"), (180, "single-replica"), (20_000, "joint")],
)
def test_a_server_splits_rows_where_they_cost_more_than_weights(rows, way):
    routed = [rows * (1 + physical) for physical in range(12)]
    if way == "single-replica":
        routed = [rows // 3] * 12
    plans = {
        policy: live_replicas.plan(policy, routed, [0] * RANKS, MAPPING, ROWS).replica_rows
        for policy in ("joint", "single-replica", "replicas")
    }
    assert plans["joint"] != plans["single-replica"]
    # A server does not know how rows were routed, so a split as level may be another one.
    slowest = {policy: max_rows(of_expert) for policy, of_expert in plans.items()}
    assert slowest["replicas"] == slowest[way]
    active = {policy: sum(rows > 0 for rows in of_expert) for policy, of_expert in plans.items()}
    assert (active["replicas"] > 8) == (way == "joint")


def test_a_servers_choice_does_not_go_by_the_replays_cost_model():
    routed = [20_000 * (1 + physical) for physical in range(12)]
    weights = CostModel.roofline(weights_us=1e6, row_us=0.001, tile=1)
    plans = [
        live_replicas.plan("replicas", routed, [0] * RANKS, MAPPING, model).replica_rows
        for model in (ROWS, weights)
    ]
    assert plans[0] == plans[1]


def test_routed_rows_by_choice_of_replicas():
    totals: dict[str, RoutedRows] = {}
    # Rank 0 holds experts 0 to 2, rank 1 3 to 5, rank 2 6, 7 and 0, rank 3 1 to 3.
    routed = [5, 5, 0, 0, 9, 9, 20, 0, 5, 5, 0, 0]
    measure(layer(routed), None, ROWS, totals)
    assert set(totals) == {"recorded", "no-redundant", "joint", "single-replica", "replicas"}
    assert (totals["recorded"].most, totals["recorded"].active) == (25, 2)
    # Two experts a rank: 10 + 10, 0, 9 + 9, 20.
    assert (totals["no-redundant"].most, totals["no-redundant"].active) == (20, 2)
    # Rank 2 alone has expert 6, so it needs no other one: 20 at least.
    assert totals["joint"].most == 20
    assert totals["single-replica"].active == totals["replicas"].active == 2
    before = totals["joint"].most
    measure(layer(routed, pass_id=1), None, ROWS, totals)
    assert totals["joint"].most == 2 * before and totals["joint"].layers == 2
    assert totals["joint"].passes == {0, 1}
    assert totals["recorded"].as_json(timed=False) == {"ratio": 25 / (58 / 4), "active": 2}
    picoseconds = totals["recorded"].as_json(timed=True)["us_a_pass"]
    assert picoseconds == 25 / 1e6
    nothing: dict[str, RoutedRows] = {}
    measure(layer(routed, mapping=None), None, ROWS, nothing)
    assert nothing == {}


def test_all_choices_have_the_mean_of_the_recorded_rows_under_a_cost_model():
    totals: dict[str, RoutedRows] = {}
    model = CostModel.roofline(weights_us=10, row_us=1, tile=1)
    measure(layer([4] * 12), [0, 4, 1, 5, 2, 6, 3, 7, 0, 1, 2, 3], model, totals)
    assert len({total.mean for total in totals.values()}) == 1
    assert totals["recorded"].most == 30e6 and totals["single-replica"].most == 20e6
    assert {"place", "place-replicas"} < set(totals)


def test_replay_says_that_trivial_places_are_worse_than_none_and_by_how_much(counts, capsys):
    found = replay(counts, "--ep", "4", "--redundant", "4")
    said = capsys.readouterr().out
    # Rank 2 has experts 6, 7 and half of 0; 6 and 7 have no second replica.
    mean = 1680 / 4
    routed = found["summary"]["phases"][0]["routed"]
    assert routed["recorded"]["ratio"] == pytest.approx((420 + 400 + 10) / mean)
    assert routed["no-redundant"]["ratio"] == pytest.approx(820 / mean)
    placed = place.place([[20, 20, 20, 20, 400, 380, 420, 400]], ranks=4, redundant=4)
    assert not is_trivial([placed])
    assert routed["place-replicas"]["ratio"] < 1.01
    assert found["trivial"] is True
    numbers = (
        routed[c]["ratio"] for c in ("recorded", "no-redundant", "replicas", "place-replicas")
    )
    texts = [f"{number:.3f}" for number in numbers]
    assert f"max/mean is {texts[0]}" in said and f"{texts[1]} without redundant experts" in said
    assert f"there give {texts[2]}, and {texts[3]} where waterfill-rs place" in said
    assert "--init-expert-location" in said


def test_worse_is_said_only_where_it_is(capsys):
    def of(ratio):
        return RoutedRows(most=int(1000 * ratio), mean=1000.0, layers=1, passes=frozenset({0}))

    totals = {choice: of(1.3) for choice in ("recorded", "replicas", "joint")}
    totals |= {"no-redundant": of(1.1), "place-replicas": of(1.0)}
    assert "1.300, worse than 1.100 without" in trap(totals)
    totals["no-redundant"] = of(1.4)
    assert "worse" not in trap(totals) and "1.300, and 1.400 without" in trap(totals)
    del totals["no-redundant"]
    assert "without redundant experts" not in trap(totals)
    print_routed_rows(totals, "decode", "rows", trivial=False)
    said = capsys.readouterr().out
    assert "active experts" in said and "trivial" not in said
    print_routed_rows({}, "decode", "rows", trivial=True)
    assert capsys.readouterr().out == ""


def test_places_that_are_not_trivial_are_not_told_of(counts, capsys):
    found = replay(counts, "--ep", "4", "--redundant", "4", "--placement", "place")
    said = capsys.readouterr().out
    assert found["trivial"] is False and "trivial places" not in said
    routed = found["summary"]["phases"][0]["routed"]
    assert "place" not in routed and routed["replicas"]["ratio"] < 1.01
    assert "Experts stand as waterfill-rs place puts them for this very recording" in said
    assert "active experts" not in said, "sums over passes tell nothing of them"


def test_without_redundant_experts_and_with_other_policies_there_is_no_such_table(counts, capsys):
    replay(counts, "--ep", "4")
    said = capsys.readouterr().out
    assert "Routed rows alone" not in said
    assert (
        "joint, single-replica, replicas are left out: no expert of this dump has replicas." in said
    )
    replay(counts, "--ep", "4", "--redundant", "4", "--policy", "home")
    assert "Routed rows alone" not in capsys.readouterr().out
    assert (
        main(
            [
                "replay",
                str(counts),
                "--top-k",
                "2",
                "--ep",
                "4",
                "--redundant",
                "4",
                "--policy",
                "single-replica",
            ]
        )
        == 2
    )
    assert "one replica an expert is for decode, and no pass here is one" in capsys.readouterr().err


def test_of_several_ep_sizes_each_is_told_of(counts, capsys):
    replay(counts, "--ep", "2,4", "--redundant", "4")
    said = capsys.readouterr().out
    for ranks in (2, 4):
        assert f"counts.json, EP{ranks}, all: Redundant experts stand in trivial places" in said


def test_the_page_has_the_table_too(counts, tmp_path):
    page = tmp_path / "page.html"
    replay(counts, "--ep", "4", "--redundant", "4", "--html", str(page))
    assert "Routed rows alone, by choice of replicas" in page.read_text()


def test_more_redundant_experts_than_there_are_places_are_refused_by_place(counts, capsys):
    options = ["--ep", "4", "--redundant", "28", "--placement", "place"]
    assert main(["replay", str(counts), "--top-k", "2", *options]) == 2
    assert "8 experts on 4 ranks have at most 24 redundant ones" in capsys.readouterr().err
    # sglang's default takes them, with an expert twice on a rank.
    assert replay(counts, "--ep", "4", "--redundant", "28")["redundant"] == 28


@pytest.mark.parametrize(
    "mapping, trivial",
    [
        ([[0, 1, 2, 3, 0, 1]], True),
        ([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]], True),
        ([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 1, 0]], False),
        ([[0, 1, 0, 1, 0, 1]], True),
        ([[0, 1, 2, 3]], False),
        ([[0, 1, 2, 3], [3, 1, 2, 0]], False),
        ([], False),
        ([[]], False),
    ],
)
def test_which_maps_are_sglangs_default(mapping, trivial):
    assert is_trivial(mapping) is trivial


def test_what_ifs_trivial_placement_is_one():
    assert is_trivial(placements.trivial(3, 8, 2).tolist())


def test_under_a_cost_model_a_servers_choice_is_in_its_unit():
    model = CostModel.roofline(weights_us=10, row_us=1, tile=1)
    (found,) = compare(layer([4] * 12), ["replicas"], model)
    assert found.optimum == found.max >= 20e6
