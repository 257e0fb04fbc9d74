"""sglang's own modes as policies of the replay: what their models choose, where they decide nothing, where they are left out."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs.cli import main
from waterfill_rs.replay import sglang_waterfill

EXPERTS, TOP_K = 12, 3
OF_SGLANG = ("sglang-static", "sglang-dynamic")


def record(folder, sizes):
    """One layer of one pass; ranks have so many tokens. Returns each rank's ids ``[N, K]``."""
    folder.mkdir()
    found = []
    for rank, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(rank)
        drawn = torch.rand(size, EXPERTS, generator=generator) + torch.linspace(0.4, 0, EXPERTS)
        found.append(drawn.topk(TOP_K).indices.int())
        ids = torch.full((1, size, 8), -1, dtype=torch.int32)
        ids[0, :, :TOP_K] = found[-1]
        one = {"forward_pass_id": 5, "rank": rank, "forward_mode": 1, "topk_ids_of_layer": ids}
        mapping = torch.arange(EXPERTS)[None]
        content = {"records": [one], "last_physical_to_logical_map": mapping}
        torch.save(content, folder / f"{rank}.pt")
    return found


def replay(folder, capsys, *options):
    out = folder.parent / "out.json"
    assert main(["replay", str(folder), "--json", str(out), *options]) == 0
    rows = {row["policy"]: row for row in json.loads(out.read_text())["rows"]}
    return rows, capsys.readouterr().out


def test_they_are_what_their_models_choose(tmp_path, capsys):
    ids = record(tmp_path / "recorded", (300, 20, 200, 90))
    rows, said = replay(tmp_path / "recorded", capsys)
    assert [line.split()[0] for line in said.splitlines()[3:10]] == [
        "policy", "home", "sglang-static", "sglang-dynamic", "own-counts", "live", "bound",
    ]  # fmt: skip
    chosen = {
        "sglang-static": [
            sglang_waterfill.static_ranks(own, physical_experts=EXPERTS, ranks=4, rank=rank)
            for rank, own in enumerate(ids)
        ],
        "sglang-dynamic": sglang_waterfill.dynamic_ranks(ids, physical_experts=EXPERTS),
    }
    assert set(chosen["sglang-dynamic"][1].tolist()) == {1}, "20 tokens stay at home"
    routed = sum(torch.bincount(own.flatten() // 3, minlength=4) for own in ids)
    for policy in OF_SGLANG:
        shared = sum(torch.bincount(own, minlength=4) for own in chosen[policy])
        assert rows[policy]["loads"] == (routed + shared).tolist()
        assert rows[policy]["max"] >= rows["live"]["max"]
    assert rows["sglang-dynamic"]["loads"] != rows["sglang-static"]["loads"]


def test_each_is_there_only_if_asked_for(tmp_path, capsys):
    record(tmp_path / "recorded", (100, 100, 100, 100))
    for policy in OF_SGLANG:
        rows, _ = replay(tmp_path / "recorded", capsys, "--policy", policy)
        assert list(rows) == [policy]


def test_sizes_and_counts_that_they_do_not_take_are_told(tmp_path, capsys):
    record(tmp_path / "three", (100, 100, 100))
    rows, said = replay(tmp_path / "three", capsys)
    assert not rows.keys() & set(OF_SGLANG)
    for policy in OF_SGLANG:
        assert f"{policy} is left out: its kernel does not take 3 ranks." in said
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": [[9] * EXPERTS]}))
    _, said = replay(path, capsys, "--ep", "4", "--top-k", "3")
    assert "sglang-dynamic is left out: this dump holds counts, not tokens." in said


@pytest.mark.parametrize(
    "options, words",
    [
        (["joint"], "EP4: joint is left out: no expert of this dump has replicas."),
        (
            ["sglang-dynamic", "--ep", "2,3"],
            "EP3: sglang-dynamic is left out: its kernel does not take 3 ranks.",
        ),
    ],
)
def test_where_no_policy_is_left_the_error_says_which_recording_and_why(
    options, words, tmp_path, capsys
):
    record(tmp_path / "recorded", (100, 100, 100, 100))
    assert main(["replay", str(tmp_path / "recorded"), "--policy", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"waterfill-rs: recorded, {words} No --policy is left."
