"""Maps that others made, repaired: beside every swap of small maps, and never anything but swaps."""

import random
from collections import Counter
from itertools import combinations

import pytest

from waterfill_rs.placement import primaries
from waterfill_rs.placement.repair import repaired

SIZES = ((2, 4, 4), (2, 6, 4), (3, 6, 3), (3, 6, 6), (4, 4, 4), (4, 8, 4), (4, 8, 8), (5, 5, 5))
"""Ranks, experts, redundant experts."""


def made(seed):
    """A map whose replicas are of a few experts, with twins by chance; rows by logical expert; ranks."""
    draws = random.Random(seed)
    ranks, experts, redundant = draws.choice(SIZES)
    hot = draws.randint(1, min(experts, 4))
    mapping = [*range(experts), *(draws.randrange(hot) for _ in range(redundant))]
    spread = draws.choice([1, 3, 6, 99])
    mapping.sort(key=lambda expert: expert + spread * draws.random())
    return mapping, [draws.randint(0, 9) for _ in range(experts)], ranks


def held(mapping, ranks):
    slots = len(mapping) // ranks
    return [mapping[rank * slots : (rank + 1) * slots] for rank in range(ranks)]


def is_even(mapping, experts, ranks):
    """By definition: each expert on one of its ranks, and none over ``E / R``; all ways at once, an expert at a time."""
    ways = {(experts // ranks,) * ranks}
    for expert in range(experts):
        on = [rank for rank, of in enumerate(held(mapping, ranks)) if expert in of]
        ways = {
            (*room[:rank], room[rank] - 1, *room[rank + 1 :])
            for room in ways
            for rank in on
            if room[rank]
        }
    return bool(ways)


def all_swapped(mapping, ranks):
    """The two ranks of each lawful swap, and the map after it. No expert comes to a rank that has it."""
    slots, of = len(mapping) // ranks, held(mapping, ranks)
    for p, q in combinations(range(len(mapping)), 2):
        a, b, mine, theirs = p // slots, q // slots, mapping[p], mapping[q]
        if a != b and mine not in of[b] and theirs not in of[a]:
            after = list(mapping)
            after[p], after[q] = theirs, mine
            yield {a, b}, after


def loads(mapping, rows, ranks):
    replicas = Counter(mapping)
    return [sum(rows[e] / replicas[e] for e in of) for of in held(mapping, ranks)]


def swaps(before, after):
    return sum(a != b for a, b in zip(before, after, strict=True)) / 2


def twins(mapping, ranks):
    return sum(len(of) - len(set(of)) for of in held(mapping, ranks))


@pytest.mark.parametrize("per_host", [1, 2])
def test_where_one_swap_does_it_the_best_one_is_made(per_host):
    mended = 0
    for seed in range(1500):
        mapping, rows, ranks = made(seed)
        experts = len(rows)
        found = repaired(mapping, rows, ranks, per_host)
        if is_even(mapping, experts, ranks):
            assert found == mapping
            continue
        do_it = [
            (
                max(on) // per_host != min(on) // per_host,
                max(loads(after, rows, ranks)[r] for r in on),
            )
            for on, after in all_swapped(mapping, ranks)
            if is_even(after, experts, ranks)
        ]
        if do_it:
            assert swaps(mapping, found) == 1 and is_even(found, experts, ranks)
            of = held(mapping, ranks), held(found, ranks)
            on = [rank for rank in range(ranks) if of[0][rank] != of[1][rank]]
            hotter = max(loads(found, rows, ranks)[rank] for rank in on)
            assert (on[1] // per_host != on[0] // per_host, hotter) == pytest.approx(min(do_it))
            mended += 1
    assert mended > 300


def test_where_it_takes_several_they_are_as_few_as_can_be():
    by_swaps = Counter()
    for seed in range(1500):
        mapping, rows, ranks = made(seed)
        experts = len(rows)
        found = repaired(mapping, rows, ranks)
        number = swaps(mapping, found)
        by_swaps[number] += 1
        assert sorted(found) == sorted(mapping) and twins(found, ranks) <= twins(mapping, ranks)
        fewest = primaries.fewest(found, experts, ranks)
        assert (fewest * ranks == experts) == is_even(found, experts, ranks)
        if number:
            assert is_even(found, experts, ranks)
        if number == 2:
            once = (after for _, after in all_swapped(mapping, ranks))
            assert not any(is_even(after, experts, ranks) for after in once)
    assert by_swaps[2] > 50


def test_a_twin_is_one_primary_replica_and_may_go():
    # Expert 2 can be primary on the second rank, where 3 is twice.
    assert repaired([0, 1, 2, 3, 3, 2], [5, 4, 9, 2], 2) == [0, 1, 2, 3, 3, 2]
    # It cannot here: the rows that level both ranks best are its 9, for one of a twin of 3.
    assert repaired([0, 1, 2, 3, 3, 3], [5, 4, 9, 3], 2) == [0, 1, 3, 2, 3, 3]


@pytest.mark.parametrize(
    "mapping, experts, ranks",
    [
        ([0, 1, 2, 3, 4, 0], 5, 2),  # 5 experts do not divide.
        ([0, 1, 1], 2, 2),
        ([0, 1, 3, 3], 4, 2),  # Expert 2 is nowhere.
        ([0, 0, 0, 0, 1, 1, 1, 3, 0, 4, 2, 5], 6, 3),  # A swap that helps would make a twin.
    ],
)
def test_what_cannot_be_repaired_stays(mapping, experts, ranks):
    assert repaired(mapping, [1] * experts, ranks) == mapping
