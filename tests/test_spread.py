"""Spread places: what a server with redundant experts and without a placement starts with."""

import random

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed: make test installs it")

import synthetic_routing

from waterfill_rs import _native
from waterfill_rs.placement import place, primaries
from waterfill_rs.placement.spread import spread
from waterfill_rs.placement.trivial import is_trivial

SHAPES = [
    (experts, redundant, ranks)
    for experts in (16, 64, 160, 256, 384)
    for ranks in (1, 2, 4, 8, 16, 32, 64)
    for redundant in (ranks, 2 * ranks, 3 * ranks, 8 * ranks)
    if experts % ranks == 0
]


def by_rank(mapping, ranks):
    slots = len(mapping) // ranks
    return [mapping[rank * slots : (rank + 1) * slots] for rank in range(ranks)]


def are_joined(held):
    """Do chains of replicas join all ranks?"""
    reached, new = set(held[0]), True
    while new:
        new = False
        for of in held:
            if not reached.isdisjoint(of) and not reached.issuperset(of):
                reached.update(of)
                new = True
    return all(reached.issuperset(of) for of in held)


def test_a_small_one():
    # Ranks have 0 2 4 and 1 3 5, and each other's first two as guests.
    assert spread(6, 4, 2, 2) == [0, 2, 4, 1, 3, 1, 3, 5, 0, 2]
    # Two hosts of two ranks: the first has 0 to 3. A guest is of the next rank, then of the one after it.
    assert by_rank(spread(8, 8, 4, 2), 4) == [
        [0, 2, 1, 6],
        [1, 3, 4, 7],
        [4, 6, 5, 2],
        [5, 7, 0, 3],
    ]


@pytest.mark.parametrize("experts, redundant, ranks", SHAPES)
def test_every_expert_is_there_once_first_and_joined(experts, redundant, ranks):
    mapping = spread(experts, redundant, ranks, ranks)
    held = by_rank(mapping, ranks)
    first = experts // ranks
    assert len(mapping) == experts + redundant
    assert sorted(expert for of in held for expert in of[:first]) == list(range(experts))
    assert primaries.are_first(mapping, experts, ranks)
    twins = len(mapping) > experts * ranks
    assert all(len(set(of)) == len(of) for of in held) or twins
    assert (are_joined(held) and not is_trivial([mapping])) or ranks == 1
    if not twins:
        table = _native.ReplicaTable(ranks, mapping)
        assert table.first_primaries == first
        # As many guests of each rank, to one.
        lent = np.bincount(np.array(mapping) % ranks, minlength=ranks) - first
        assert lent.max() - lent.min() <= 1


@pytest.mark.parametrize("seed", range(80))
def test_any_sizes_and_no_twins_where_that_can_be(seed):
    draws = random.Random(seed)
    ranks, experts = draws.randint(1, 12), draws.randint(1, 40)
    slots = draws.randint(-(-experts // ranks), experts + 1)
    per_host = draws.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
    mapping = spread(experts, slots * ranks - experts, ranks, per_host)
    assert len(mapping) == slots * ranks and set(mapping) == set(range(experts))
    held = by_rank(mapping, ranks)
    assert all(len(set(of)) == min(slots, experts) for of in held)
    assert experts % ranks or primaries.are_first(mapping, experts, ranks)


@pytest.mark.parametrize("ranks, per_host", [(8, 4), (16, 8), (32, 8), (12, 4)])
def test_hosts_keep_their_own_experts(ranks, per_host):
    experts, hosts = 192, ranks // per_host
    held = by_rank(spread(experts, ranks, ranks, per_host), ranks)
    for rank, of in enumerate(held):
        assert {expert * hosts // experts for expert in of[: experts // ranks]} == {
            rank // per_host
        }
    assert are_joined(held)
    # Ranks that do not divide over hosts are as of one.
    assert spread(experts, ranks, ranks, 5) == spread(experts, ranks, ranks, ranks)


@pytest.mark.parametrize("sizes", [(8, 1, 2), (0, 2, 2), (8, -2, 2)])
def test_what_makes_no_map_is_refused(sizes):
    with pytest.raises(ValueError, match="do not divide over 2 ranks"):
        spread(*sizes, 2)


@pytest.mark.parametrize("ranks, redundant", [(4, 16), (8, 32), (16, 32)])
def test_live_plans_are_more_level_there_than_in_trivial_places(ranks, redundant):
    (workloads,) = synthetic_routing.expert_rows(4, 1, 256, 1_000_000, 7).transpose(1, 0, 2)
    spread_out = spread(256, redundant, ranks, ranks)
    trivial = [physical % 256 for physical in range(256 + redundant)]
    for rows in workloads.tolist():
        assert place.joint(spread_out, rows, ranks) < place.joint(trivial, rows, ranks)
