"""Plans through the binding, against a plain definition of the level."""

import random
import subprocess
import sys

import pytest

import waterfill_rs
from waterfill_rs import _native


def smallest_level(loads, rows, eligible):
    level = max(loads)
    while sum(max(0, level - load) for load, ok in zip(loads, eligible, strict=True) if ok) < rows:
        level += 1
    return level


def test_optimum_is_the_smallest_level_on_2000_problems():
    rng = random.Random(7)
    for _ in range(2000):
        ranks = rng.randint(1, 40)
        loads = [rng.randint(0, 90) for _ in range(ranks)]
        tokens = [rng.randint(0, 20) for _ in range(ranks)]
        eligible = [rng.random() < 0.8 for _ in range(ranks)]
        eligible[rng.randrange(ranks)] = True
        plan = waterfill_rs.plan(loads, tokens, ranks=ranks, eligible=eligible)
        assert plan.optimum == smallest_level(loads, sum(tokens), eligible)
        quotas = [plan.quotas_of(source) for source in range(ranks)]
        assert [sum(row) for row in quotas] == tokens
        assert [sum(column) for column in zip(*quotas, strict=True)] == plan.shared_rows
        assert all(ok or rows == 0 for ok, rows in zip(eligible, plan.shared_rows, strict=True))
        assert waterfill_rs.max_and_mean(loads, plan.shared_rows, ranks=ranks)[0] == plan.optimum


def test_joint_levels_what_shared_rows_alone_cannot():
    # Expert 0 is hot and has a replica on the idle rank.
    mapping = [0, 1, 2, 3, 4, 0]
    routed = [60, 10, 10, 10, 10, 0]
    live = waterfill_rs.plan(routed, [10] * 3, ranks=3, physical_to_logical=mapping)
    joint = waterfill_rs.plan(
        routed, [10] * 3, ranks=3, physical_to_logical=mapping, policy="joint"
    )
    assert live.optimum == 70
    assert joint.optimum == -(-(100 + 30) // 3)
    assert joint.replica_rows[0] + joint.replica_rows[5] == 60
    assert joint.replica_rows[1:5] == routed[1:5]


def test_single_replica_reads_the_fewest_weights_and_then_costs_least():
    # Experts 0 and 1 are on both ranks. Split, each rank has three active experts; the fewest is two on each.
    mapping = [0, 1, 2, 0, 1, 3]
    model = waterfill_rs.CostModel.roofline(10.0, 1.0, 1)
    plan = waterfill_rs.plan(
        [4, 3, 30, 4, 3, 2],
        [0, 0],
        ranks=2,
        physical_to_logical=mapping,
        policy="single_replica",
        cost_model=model,
    )
    # Rank 0 has the 30 rows of expert 2, so it takes the fewer rows: expert 1's.
    assert plan.replica_rows == [0, 6, 30, 8, 0, 2]
    assert plan.optimum == model.cost(30) + model.cost(6)


def test_costs_are_those_of_a_count_by_hand():
    routed, placements = [3, 0, 70, 1], [[5, 0], [0, 5]]
    rows = waterfill_rs.CostModel.rows()
    found = _native.costs(routed, placements, ranks=2, cost_model=rows)
    assert found == [[8, 71], [3, 76]]
    for shared, costs in zip(placements, found, strict=True):
        assert waterfill_rs.max_and_mean(routed, shared, ranks=2) == (max(costs), sum(costs) / 2)
    # Weights take a microsecond, and so does each started tile of 64 rows.
    model = waterfill_rs.CostModel.roofline(1.0, 1 / 64, 64)
    found = _native.costs(routed, placements, ranks=2, cost_model=model)
    assert found == [[2_000_000, 3_000_000], [1_000_000, 4_000_000]]
    with pytest.raises(ValueError, match="shared has 1 entries: give 2"):
        _native.costs(routed, [[1, 2], [5]], ranks=2, cost_model=rows)


REFUSED = [
    (dict(routed=[1, 2], tokens=[1], ranks=2), "tokens has 1 entries: give 2"),
    (dict(routed=[1, 2, 3], tokens=[1, 1], ranks=2), "3 physical experts over 2 ranks leave 1"),
    (dict(routed=[], tokens=[], ranks=0), "0 ranks"),
    (dict(routed=[1] * 1025, tokens=[1] * 1025, ranks=1025), "1025 ranks"),
    (dict(routed=[1, 2], tokens=[1, 1], ranks=2, visits=[1, 2, 3]), "visits has 3 entries: give 4"),
    (dict(routed=[1, 2], tokens=[1, 1], ranks=2, eligible=[True]), "eligible has 1 entries"),
    (dict(routed=[1, 2], tokens=[1, 1], ranks=2, eligible=[False] * 2), "none of the 2 ranks"),
    (dict(routed=[2**32 - 1] * 2, tokens=[1, 1], ranks=2), "the sum of routed rows is 8589934590"),
    (dict(routed=[1, 2], tokens=[1, 1], ranks=2, policy="best"), "policy 'best'"),
    (
        dict(routed=[1, 2], tokens=[1, 1], ranks=2, physical_to_logical=[0, 2]),
        "logical expert 1 of 3",
    ),
]


@pytest.mark.parametrize("arguments, text", REFUSED, ids=[text for _, text in REFUSED])
def test_bad_input_is_refused_with_its_numbers(arguments, text):
    with pytest.raises(ValueError, match=text):
        waterfill_rs.plan(**arguments)


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(8, float("nan"))], [(8, 2.0), (9, 1.0)]])
def test_cost_tables_that_make_no_sense_are_refused(points):
    with pytest.raises(ValueError, match=r"cost|table"):
        waterfill_rs.CostModel.table(points)


def test_import_needs_neither_numpy_nor_torch_nor_sglang():
    code = "import sys, waterfill_rs; print({'numpy', 'torch', 'sglang'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_score_is_that_of_a_count_by_hand():
    # 2 ranks, 2 experts each; the last row of rank 1 is padding.
    ids = [[[0, 1], [0, 2]], [[3, 2], [0, -1], [-1, -1]]]
    assert waterfill_rs.score(ids, [[0, 1], [1, 1, -1]], physical_experts=4) == (6, 5.5, 0, 1)
    assert waterfill_rs.score(ids, [[1, 1], [0, 1, 99]], physical_experts=4) == (6, 5.5, 2, 3)
    with pytest.raises(ValueError, match="3 ids and 2 shared ranks"):
        waterfill_rs.score([[0, 1, 2]], [[0, 0]], physical_experts=4)
    with pytest.raises(ValueError, match="shared_rank of 1 ranks, topk_ids of 2"):
        waterfill_rs.score(ids, [[0, 0]], physical_experts=4)
    with pytest.raises(ValueError, match="expert id 4"):
        waterfill_rs.score([[[4, 0]], []], [[0], []], physical_experts=4)
    with pytest.raises(ValueError, match="shared_rank 2: give a rank from 0 to 1"):
        waterfill_rs.score(ids, [[0, 2], [1, 1, -1]], physical_experts=4)


def test_own_quotas_refuse_with_the_numbers():
    own = dict(routed=[3, 1], visits=[2, 1], tokens=2)
    assert sum(waterfill_rs.own_quotas(**own, ranks=2, rank=0)) == 2
    with pytest.raises(ValueError, match=f"{10**18}"):  # an error, not a panic
        waterfill_rs.own_quotas(**own, ranks=10**18, rank=0)
    with pytest.raises(ValueError, match="source 2: give a rank from 0 to 1"):
        waterfill_rs.own_quotas(**own, ranks=2, rank=2)


def test_more_experts_than_tables_should_hold_are_refused():
    with pytest.raises(ValueError, match=f"number of physical experts is {2**21}"):
        waterfill_rs.plan([1, 1], [1, 1], ranks=2, physical_experts=2**21)


def test_numbers_that_no_count_can_be_are_named():
    two = dict(tokens=[1, 1], ranks=2)
    for arguments, text in [
        (dict(two, routed=[1, -2]), r"routed\[1\] is -2: give an integer from 0 to 4294967295"),
        (dict(two, routed=[2**32, 1]), r"routed\[0\] is 4294967296"),
        (dict(two, routed=[1, 2.5]), r"routed\[1\] is 2.5"),
        (dict(two, routed=[1, 2], ranks=-2), "ranks is -2"),
        (dict(two, routed=[1, 2], visits=[1, 1, 1, -1]), r"visits\[3\] is -1"),
        (dict(two, routed=[1, 2], physical_experts=-4), "physical_experts is -4"),
        (
            dict(two, routed=[1, 2], physical_experts=4, physical_to_logical=[0, 1]),
            "physical_to_logical has 2 entries, physical_experts is 4",
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            waterfill_rs.plan(**arguments)
    with pytest.raises(ValueError, match="tokens is -3"):
        waterfill_rs.own_quotas([1, 2], [1, 1], -3, ranks=2, rank=0)
    with pytest.raises(ValueError, match=r"shared_rows\[0\] is -1"):
        waterfill_rs.max_and_mean([1, 2], [-1, 1], ranks=2)
    with pytest.raises(ValueError, match="topk_ids of rank 0"):
        waterfill_rs.score([[[2**40]]], [[0]], physical_experts=4)


def test_joint_gives_no_row_to_a_rank_that_is_not_eligible():
    plan = waterfill_rs.plan(
        [60, 10, 10, 10, 10, 0],
        [10] * 3,
        ranks=3,
        physical_to_logical=[0, 1, 2, 3, 4, 0],
        eligible=[True, True, False],
        policy="joint",
    )
    assert plan.replica_rows == [60, 10, 10, 10, 10, 0] and plan.shared_rows[2] == 0


def test_numbers_that_the_core_cannot_take_are_refused_by_name():
    from waterfill_rs import CostModel

    for call in (
        lambda: CostModel.table([(-5, 1.0)]),
        lambda: CostModel.roofline(1.0, 1.0, -5),
        lambda: CostModel.rows().cost(-1),
        lambda: CostModel.rows().cost(2**40),
        lambda: waterfill_rs.plan([1], [1], ranks=1).quotas_of(-1),
    ):
        with pytest.raises(ValueError, match="give an integer from 0 to"):
            call()


def test_counts_a_rank_are_not_taken_for_counts_an_expert():
    from waterfill_rs import CostModel

    model = CostModel.table([(10, 1.0), (20, 2.0)])
    with pytest.raises(ValueError, match="physical_experts=2 if each rank has one expert"):
        waterfill_rs.plan([1, 2], [1, 1], ranks=2, cost_model=model)
    assert waterfill_rs.plan([1, 2], [1, 1], ranks=2, physical_experts=2, cost_model=model).optimum
