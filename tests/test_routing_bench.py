"""``benches/routing.py`` from a clone: synthetic routing has the statistics of real routing, and replay reads its dumps."""

import json
from dataclasses import replace

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed: make test installs it")
torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

import dumps
import routing
import synthetic_routing
from synthetic_routing import DEEPSEEK_V2_LITE

from waterfill_rs.cli import main

SMALL = replace(DEEPSEEK_V2_LITE, layers=3, prompts=80)
ALIKE = replace(SMALL, beginning=0.0, topic=0.0, passage=0.0)


def made(statistics, seed=0):
    """Ids, where prompts begin, and the prompt of each token."""
    topk, offsets = synthetic_routing.routing(statistics, seed)
    return topk, offsets, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def chosen(topk, layer):
    """``[tokens, experts]``: whether a token has an expert."""
    found = np.zeros((len(topk), SMALL.experts), bool)
    found[np.arange(len(topk))[:, None], topk[:, layer]] = True
    return found


def test_the_same_seed_gives_the_same_routing():
    first, again, other = (synthetic_routing.routing(SMALL, seed) for seed in (1, 1, 2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    # Another seed has other texts of the same lengths.
    assert sorted(np.diff(first[1])) == sorted(np.diff(other[1]))
    assert (first[0] != other[0]).any()


def test_each_token_has_k_different_experts_in_each_layer():
    topk, offsets, _ = made(SMALL)
    assert topk.shape == (offsets[-1], SMALL.layers, SMALL.top_k)
    assert topk.min() >= 0 and topk.max() < SMALL.experts
    assert (np.diff(np.sort(topk, axis=2), axis=2) > 0).all()


def test_popularity_is_log_normal_and_another_in_each_layer():
    topk, _, _ = made(replace(ALIKE, popularity=0.4, prompts=620))
    logarithms = np.log([chosen(topk, layer).mean(0) for layer in range(3)])
    for layer in range(3):
        assert 0.25 < logarithms[layer].std() < 0.45
        assert abs(np.corrcoef(logarithms[layer], logarithms[layer - 1])[0, 1]) < 0.5


def correlation(topk, prompt, apart):
    """Of two tokens of one prompt so many tokens apart, over experts: 0 for independent ones."""
    found = chosen(topk, 1)
    centred = found - found.mean(0)
    pairs = prompt[apart:] == prompt[:-apart]
    products = (centred[apart:] * centred[:-apart]).sum(1)[pairs]
    return products.mean() / (centred**2).sum(1).mean()


def test_tokens_of_one_text_share_experts():
    topk, _, prompt = made(SMALL)
    near, far = correlation(topk, prompt, 1), correlation(topk, prompt, 64)
    # A recording of DeepSeek-V2-Lite has 0.04 to 0.27 next to each other and 0.015 to 0.07 at a distance of 64.
    assert 0.04 < near < 0.2 and 0.015 < far < 0.08 and far < near
    topk, _, prompt = made(ALIKE)
    assert abs(correlation(topk, prompt, 1)) < 0.01


def test_even_prompts_are_never_replayed_and_decode_has_a_token_of_each_prompt():
    offsets = np.append(0, np.cumsum([50] * 20))
    topk = np.arange(1000, dtype=np.int32)[:, None, None]  # Each token's expert is its number.
    routing = dumps.split(topk, offsets)
    assert routing.experts == 1024 and (routing.unseen // 50 % 2 == 0).all()
    prefill = dumps.passes(routing.replayed, 4, 100)
    assert len(prefill) == 1 and (prefill[0] // 50 % 2 == 1).all() and len(prefill[0]) == 400
    decode = dumps.passes(routing.replayed, 2, 5)
    assert len(decode) == dumps.PASSES
    for step, ids in enumerate(decode):
        assert sorted(ids.ravel() // 50) == list(range(1, 20, 2))
        assert (ids % 50 == 20 + step).all()
    assert dumps.passes(routing.replayed, 4, 1000) == []


def test_packing_evens_the_ranks():
    topk, _, _ = made(replace(SMALL, popularity=0.6))
    of = dumps.packed(topk, 64, 8)
    assert (np.sort(of, axis=1) == np.arange(64)).all()
    for layer in range(3):
        rows = chosen(topk, layer).sum(0)
        worst = [rows[places].reshape(8, 8).sum(1).max() for places in (of[layer], np.arange(64))]
        assert worst[0] < 1.03 * rows.sum() / 8 < worst[1]


REAL = {
    routing.Shape("packed", 8, 1024): (1.107, 1.045, 1.016, 1.049, 1.013),
    routing.Shape("packed", 16, 64): (1.369, 1.282, 1.230, 1.306, 1.227),
    routing.Shape("packed", 32, 64): (1.762, 1.671, 1.620, 1.693, 1.619),
    routing.Shape("packed", 8, 64, uneven=True): None,
    routing.Shape("packed", 8, 8): None,
}
"""Rows of the slowest rank over the mean, by ``routing.POLICIES``, of recorded DeepSeek-V2-Lite routing."""


@pytest.fixture(scope="module")
def synthetic():
    return dumps.read(None)


@pytest.mark.parametrize("shape", REAL, ids=str)
def test_replay_makes_of_it_about_what_it_makes_of_real_routing(shape, synthetic, tmp_path):
    passes = dumps.passes(synthetic.replayed, shape.ranks, shape.tokens)
    dumps.write(tmp_path / "dump", passes, shape.ranks, synthetic.experts, shape.uneven)
    placement, out = tmp_path / "packed.json", tmp_path / "replay.json"
    dumps.write_placement(placement, dumps.packed(synthetic.unseen, synthetic.experts, shape.ranks))
    command = ["replay", tmp_path / "dump", "--placement", placement, "--json", out]
    assert main(list(map(str, command))) == 0
    rows = json.loads(out.read_text())["rows"]
    of = {policy: [row for row in rows if row["policy"] == policy] for policy in routing.POLICIES}
    assert len(of["live"]) == 26 * 4
    assert all(row["max"] == row["optimum"] for row in of["live"])
    assert sum(row["extra_copies"] for row in of["live"]) / len(of["live"]) <= 0.03
    if REAL[shape]:
        mean = sum(row["mean"] for row in of["home"])
        cost = {policy: sum(row["max"] for row in of[policy]) / mean for policy in of}
        for policy, real in zip(routing.POLICIES, REAL[shape], strict=True):
            assert cost[policy] == pytest.approx(real, abs=0.05)
        # As on the recording, each is better than the one before it.
        ranked = ("home", "own-counts", "sglang-static", "sglang-dynamic", "live")
        assert sorted(ranked, key=cost.get, reverse=True) == list(ranked)


def test_without_options_the_headline_table_is_made(monkeypatch):
    monkeypatch.setattr("sys.argv", ["routing.py"])
    assert [str(shape) for shape in routing._shapes(routing._arguments())] == [
        f"packed, EP{ranks}, {tokens} tokens a rank"
        for ranks in (8, 16, 32)
        for tokens in (64, 1024)
    ]
    monkeypatch.setattr("sys.argv", ["routing.py", "--all"])
    assert len(routing._shapes(routing._arguments())) == 2 * 3 * 6
    monkeypatch.setattr("sys.argv", ["routing.py", "--ep", "8", "--tokens", "64", "--uneven"])
    assert [str(shape) for shape in routing._shapes(routing._arguments())] == [
        "trivial, EP8, 64 tokens a rank, odd ranks 8",
        "packed, EP8, 64 tokens a rank, odd ranks 8",
    ]


def test_a_dump_from_the_command_line_is_replayed(tmp_path, monkeypatch, capsys):
    topk, offsets, _ = made(SMALL)
    np.savez(tmp_path / "routing.npz", topk=topk, offsets=offsets)
    command = ["dumps.py", tmp_path / "made", "--routing", tmp_path / "routing.npz"]
    command += ["--ranks", "4", "--tokens", "128"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    assert dumps.main() == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == "waterfill-rs" and main(printed[1:]) == 0
    with pytest.raises(SystemExit):  # It writes over nothing.
        dumps.main()
    assert "is there already: give another folder" in capsys.readouterr().err
