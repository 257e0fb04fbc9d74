"""A call on the CPU in one native trip, against count, plan and expand by the public functions, bit for bit."""

import os
import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

import waterfill_rs
from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.host import BoardExchange, SoloExchange
from waterfill_rs.exchange.member import Member
from waterfill_rs.torch import count, expand_topk, move_up

SHARED_WEIGHT = 0.4


def batch(rows, top_k, experts, seed, ids_as, weights_as):
    """Ids with empty slots and padding, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(1)[:, :top_k]
    ids[torch.rand(rows, top_k, generator=generator) < 0.1] = -1
    ids[torch.rand(rows, generator=generator) < 0.1] = -1
    weights = torch.rand(rows, top_k, generator=generator)
    return ids.to(ids_as).contiguous(), weights.to(weights_as)


def own_quotas(ids, member):
    counts, visits, tokens = count(ids, physical_experts=member.experts, ranks=member.ranks)
    return waterfill_rs.own_quotas(counts, visits, tokens, ranks=member.ranks, rank=member.rank)


def by_parts(ids, weights, member, quotas):
    return expand_topk(
        ids,
        weights,
        physical_experts=member.experts,
        ranks=member.ranks,
        rank=member.rank,
        shared_weight=SHARED_WEIGHT,
        quotas=quotas,
    )


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("weights_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_as", [torch.int32, torch.int64])
@pytest.mark.parametrize("member", [Member(1, 16, 0), Member(8, 64, 3), Member(72, 288, 71)])
def test_own_counts_in_one_trip_are_those_of_the_parts(member, ids_as, weights_as):
    exchange = SoloExchange(member, CostModel.rows(), "a test")
    for seed, rows in enumerate((0, 1, 7, 64, 300, 1024, 2)):
        ids, weights = batch(rows, 6, member.experts, seed, ids_as, weights_as)
        before = ids.clone(), weights.clone()
        quotas = own_quotas(ids, member)
        found = exchange.expand(ids, weights, SHARED_WEIGHT)
        assert_same(found, by_parts(ids, weights, member, quotas))
        assert exchange.quotas == quotas
        assert torch.equal(ids, before[0]) and torch.equal(weights, before[1])
        moved = exchange.move_up(ids)
        assert torch.equal(moved, move_up(ids, physical_experts=member.experts, ranks=member.ranks))
    assert exchange.tally() == {"calls": 7}


@pytest.fixture
def two():
    """``open(patience_us, cap_us)``: both ranks' ends of a board, rank 0 with the planner in its waits."""
    board = _native.Board.create(f"waterfill-rs-{os.getpid()}-trip", 2, 16, 7)
    board.unlink()

    def end(rank, patience_us, cap_us):
        times = {"patience_us": patience_us, "cap_us": cap_us}
        member = Member(2, 16, rank)
        return BoardExchange(
            board, member, CostModel.rows(), **times, pace="inline", reason="a test"
        )

    return lambda patience_us, cap_us: [end(rank, patience_us, cap_us) for rank in range(2)]


def test_live_counts_in_one_trip_are_those_of_the_parts(two):
    ends, calls, found = two(9_000_000, 10_000_000), range(40), [[], []]
    made = [
        [batch(3 * (c % 7) + r, 4, 16, 2 * c + r, torch.int32, torch.bfloat16) for c in calls]
        for r in range(2)
    ]

    def run(rank):
        found[rank] = [ends[rank].expand(*routed, SHARED_WEIGHT) for routed in made[rank]]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for c in calls:
        counted = [count(made[r][c][0], physical_experts=16, ranks=2) for r in range(2)]
        plan = waterfill_rs.plan(
            [sum(rows) for rows in zip(*(counts for counts, _, _ in counted), strict=True)],
            [tokens for _, _, tokens in counted],
            ranks=2,
            visits=[visits for _, visits, _ in counted],
        )
        for r in range(2):
            quotas = plan.quotas_of(r)
            assert_same(found[r][c], by_parts(*made[r][c], ends[r].member, quotas))
    assert [end.tally()["live"] for end in ends] == [len(calls)] * 2


@pytest.mark.parametrize(
    "rank, patience_us, cap_us, outcome",
    [(0, 1, 10_000_000, "none"), (1, 1, 2_000, "timed_out"), (1, 1, 2_000, "broken")],
)
def test_without_a_plan_one_trip_is_that_of_own_counts(two, rank, patience_us, cap_us, outcome):
    """The other rank lives and does not call, so rank 0's planner has no plan, and rank 1 has no planner."""
    ends = two(patience_us, cap_us)
    end = ends[rank]
    for seed in range(2 if outcome == "broken" else 0):
        end.expand(*batch(9, 4, 16, seed, torch.int32, torch.float32), SHARED_WEIGHT)
    before = end.tally()[outcome]
    ids, weights = batch(200, 4, 16, 9, torch.int64, torch.float32)
    found = end.expand(ids, weights, SHARED_WEIGHT)
    assert end.tally()[outcome] == before + 1, end.tally()
    assert_same(found, by_parts(ids, weights, end.member, own_quotas(ids, end.member)))


REFUSED = {
    "id too large": (lambda ids, weights: (ids + 16, weights), "expert id 16 in row 0, column 0"),
    "other weights": (
        lambda ids, weights: (ids, weights.double()),
        "topk_weights is torch.float64",
    ),
    "other rows": (lambda ids, weights: (ids, weights[:4]), r"topk_weights has shape \(4, 3\)"),
    "on meta": (lambda ids, weights: (ids.to("meta"), weights), "is on meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_no_call(two, name):
    end = two(1, 10_000_000)[0]
    solo = SoloExchange(Member(2, 16, 0), CostModel.rows(), "a test")
    change, text = REFUSED[name]
    changed = change(torch.zeros(5, 3, dtype=torch.int32), torch.zeros(5, 3))
    for exchange in (end, solo):
        with pytest.raises(ValueError, match=text):
            exchange.expand(*changed, 1.0)
        assert exchange.tally()["calls"] == 0


@pytest.mark.parametrize(
    "ranks, experts, rank, text",
    [
        (4, 18, 0, "18 physical experts over 4 ranks"),
        (0, 16, 0, "16 physical experts over 0 ranks"),
        (4, 0, 0, "0 physical experts over 4 ranks"),
        (4, 16, 4, "rank 4: give one from 0 to 3"),
        (4, 16, -1, "rank -1: give one from 0 to 3"),
    ],
)
def test_no_member_is_outside_its_group(ranks, experts, rank, text):
    with pytest.raises(ValueError, match=text):
        Member(ranks, experts, rank)
