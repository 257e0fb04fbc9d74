"""Spread places: what a server with redundant experts and without a placement starts with."""

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
    for ranks in (2, 4, 8, 16, 32, 64)
    for redundant in (ranks, 2 * ranks, 3 * ranks, 8 * ranks)
    if experts % ranks == 0 and redundant <= experts * (ranks - 1)
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
    assert spread(6, 4, 2) == [0, 2, 4, 1, 3, 1, 3, 5, 0, 2]
    # A guest is of the next rank, then of the one after it.
    assert by_rank(spread(8, 8, 4), 4) == [[0, 4, 1, 6], [1, 5, 2, 7], [2, 6, 3, 4], [3, 7, 0, 5]]


@pytest.mark.parametrize("experts, redundant, ranks", SHAPES)
def test_every_expert_is_there_once_first_and_joined(experts, redundant, ranks):
    mapping = spread(experts, redundant, ranks)
    held = by_rank(mapping, ranks)
    first = experts // ranks
    assert len(mapping) == experts + redundant
    assert sorted(expert for of in held for expert in of[:first]) == list(range(experts))
    assert primaries.are_first(mapping, experts, ranks)
    assert all(len(set(of)) == len(of) for of in held)
    assert are_joined(held) and not is_trivial([mapping])
    assert _native.ReplicaTable(ranks, mapping).first_primaries == first
    # As many guests of each rank, to one.
    lent = np.bincount(np.array(mapping) % ranks, minlength=ranks) - first
    assert lent.max() - lent.min() <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_any_number_of_redundant_experts_that_stand_apart(ranks):
    for experts in range(ranks, 25, ranks):
        for redundant in range(0, experts * (ranks - 1) + 1, ranks):
            held = by_rank(spread(experts, redundant, ranks), ranks)
            assert all(len(set(of)) == (experts + redundant) // ranks for of in held)
        with pytest.raises(ValueError, match=f"have no places on {ranks} ranks"):
            spread(experts, experts * (ranks - 1) + ranks, ranks)


@pytest.mark.parametrize("sizes", [(8, 1, 2), (0, 2, 2), (7, 1, 2), (256, 32, 72)])
def test_what_does_not_divide_is_refused(sizes):
    with pytest.raises(ValueError, match=rf"{sizes[0]} \+ {sizes[1]} experts do not divide over"):
        spread(*sizes)


@pytest.mark.parametrize("ranks, redundant", [(4, 16), (8, 32), (16, 32), (32, 32), (64, 64)])
def test_live_plans_are_more_level_there_than_in_trivial_places(ranks, redundant):
    (workloads,) = synthetic_routing.expert_rows(4, 1, 256, 1_000_000, 7).transpose(1, 0, 2)
    spread_out = spread(256, redundant, ranks)
    trivial = [physical % 256 for physical in range(256 + redundant)]
    for rows in workloads.tolist():
        assert place.joint(spread_out, rows, ranks) < place.joint(trivial, rows, ranks)
