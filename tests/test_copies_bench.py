"""``benches/copies.py``: what dispatch sends, by live plans and by rows that go first where their token goes anyway."""

from dataclasses import replace

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed: make test installs it")
torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

import copies
import dumps
import synthetic_routing
from synthetic_routing import DEEPSEEK_V2_LITE

MAPPING, EACH = [0, 1, 2, 2, 3, 0, 1, 4, 5], 3
"""Three ranks: experts 0 and 1 are on the first and another, expert 2 is on the first two."""


def test_a_copy_is_a_token_at_a_rank_that_is_not_its_own():
    ids = np.array([[[0, 2]], [[0, 1]], [[0, 4]]])
    assert copies.copies(ids, EACH) == 0 + 1 + 2


def test_rows_go_first_where_their_token_goes_anyway():
    # Of rank 0. Each expert's replicas have a row each, but the tokens are at the wrong ones.
    ids = np.array([[0, 7], [5, 4], [1, 8], [6, 0]])
    best = copies.visited_first(ids, MAPPING, EACH, 0)
    # Expert 0's second replica is visited by the second token alone, and expert 1's by the third.
    assert best.tolist() == [[0, 7], [5, 4], [6, 8], [1, 0]]
    before, after = (copies.copies(np.stack([one] * 3), EACH) for one in (ids, best))
    assert after < before


def test_each_replica_keeps_its_rows_and_each_row_its_expert():
    draws, mapping = np.random.default_rng(0), np.array(MAPPING)
    for _ in range(50):
        logical = np.stack([draws.permutation(6)[:4] for _ in range(40)])
        replicas = [np.flatnonzero(mapping == expert) for expert in range(6)]
        ids = np.array([[draws.choice(replicas[expert]) for expert in row] for row in logical])
        best = copies.visited_first(ids, MAPPING, EACH, 1)
        assert (mapping[best] == logical).all()
        assert (np.bincount(best.ravel()) == np.bincount(ids.ravel())).all()


@pytest.mark.parametrize("fused", [True, False])
def test_live_plans_are_those_of_a_board(fused):
    statistics = replace(DEEPSEEK_V2_LITE, layers=2, prompts=80)
    routing = dumps.split(*synthetic_routing.routing(statistics))
    ranks, redundant = 4, 16
    maps = copies.placed(routing, ranks, redundant)
    (ids,) = dumps.passes(routing.replayed, ranks, 600)[:1]
    of = [{logical: p for p, logical in reversed(list(enumerate(row)))} for row in maps]
    given = np.stack([np.vectorize(of[layer].get)(ids[:, layer]) for layer in range(2)], axis=1)
    (live,) = copies.chosen(maps, [given.astype(np.int32)], ranks, fused)
    assert live.shape == (ranks, 600, 2, 6)
    for layer in range(2):
        mapping = np.array(maps[layer])
        assert (mapping[live[:, :, layer]].reshape(-1, 6) == ids[:, layer]).all()
    primary, lived, visited = copies.judge(routing, [ids], ranks, redundant, fused)
    assert 0 < visited <= lived and primary > 0
