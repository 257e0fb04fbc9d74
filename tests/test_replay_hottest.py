"""The replay names slow ranks and hot experts: against counts by hand."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs.cli import main

RANKS, EXPERTS, TOP_K = 2, 8, 2
# Rank 0 has experts 0 to 3. Rows of layer 1: expert 5 has 60 of 200, of layer 2: expert 0 has 90, and rank 0 170.
ROWS = {1: [20, 30, 10, 40, 10, 60, 20, 10], 2: [90, 40, 20, 20, 10, 10, 5, 5]}
MAPPING = [0, 1, 2, 3, 4, 3, 5, 6]
PREFILL, DECODE = 1, 2


def pairs(rows):
    """Tokens of two experts that have so many rows; no token has one expert twice."""
    left = sorted(expert for expert, number in enumerate(rows) for _ in range(number))
    half = len(left) // 2
    return torch.tensor([left[:half], left[half:]]).T


def record(folder, modes=(PREFILL,)):
    folder.mkdir()
    for rank in range(RANKS):
        records = []
        for pass_id, mode in enumerate(modes):
            ids = torch.full((3, 50, 8), -1, dtype=torch.int32)
            for layer, rows in ROWS.items():
                ids[layer, :, :TOP_K] = pairs(rows)[rank::RANKS]
            records.append(
                dict(forward_pass_id=pass_id, rank=rank, forward_mode=mode, topk_ids_of_layer=ids)
            )
        mapping = torch.tensor(MAPPING).repeat(3, 1)
        torch.save(
            dict(records=records, last_physical_to_logical_map=mapping), folder / f"{rank}.pt"
        )
    return folder


def replay(capsys, *options):
    assert main(["replay", *map(str, options)]) == 0
    return capsys.readouterr().out.splitlines()


def test_slow_ranks_and_hot_experts_are_those_of_a_count_by_hand(tmp_path, capsys):
    said = replay(capsys, record(tmp_path / "recorded"))
    start = next(i for i, line in enumerate(said) if line.startswith("bound")) + 1
    # 50 shared rows a rank. Both layers: rank 0 has 100 + 170 routed rows, the mean is 2 x 150. Live sends all shared rows
    # of layer 2, and half of layer 1, to rank 1.
    assert said[start : start + 4] == [
        f"Slowest ranks over the mean (home, live): rank 0 {370 / 300:.3f}, {320 / 300:.3f}; "
        f"rank 1 {230 / 300:.3f}, {280 / 300:.3f}.",
        "Hottest experts, rows over their layer's mean expert, the least level layers first:",
        f"  layer 2: expert 0 on rank 0, {90 / 25:.1f} times; expert 1 on rank 0, {40 / 25:.1f} times",
        f"  layer 1: expert 5 (logical 3) on rank 1, {60 / 25:.1f} times; expert 3 on rank 0, "
        f"{40 / 25:.1f} times",
    ]


def test_each_phase_has_its_own(tmp_path, capsys):
    said = replay(capsys, record(tmp_path / "recorded", (PREFILL, DECODE, DECODE)))
    assert sum(line.startswith("Slowest ranks") for line in said) == 2
    assert sum(line.startswith("  layer 2: expert 0 on rank 0, 3.6 times") for line in said) == 2


def test_policies_that_were_not_asked_for_are_not_named(tmp_path, capsys):
    folder = record(tmp_path / "recorded")
    said = "\n".join(replay(capsys, folder, "--policy", "live"))
    assert "Slowest ranks over the mean (live): rank 0 1.067; rank 1 0.933." in said
    said = "\n".join(replay(capsys, folder, "--policy", "own-counts"))
    assert "Slowest ranks" not in said and "  layer 2: expert 0" in said


def test_counts_have_them_too(tmp_path, capsys):
    path = tmp_path / "counts.json"
    path.write_text(str({"logical_count": [ROWS[1], ROWS[2]]}).replace("'", '"'))
    said = replay(capsys, path, "--ep", RANKS, "--top-k", TOP_K)
    hot = next(i for i, line in enumerate(said) if line.startswith("Hottest"))
    assert said[hot + 1].startswith("  layer 1: expert 0 on rank 0, 3.6 times")
    assert said[hot + 2].startswith("  layer 0: expert 5 on rank 1, 2.4 times")


def test_experts_that_were_placed_anew_keep_their_logical_numbers(tmp_path, capsys):
    path, map_file = tmp_path / "counts.json", tmp_path / "map.json"
    path.write_text(str({"logical_count": [ROWS[1]]}).replace("'", '"'))
    turned = list(reversed(range(len(ROWS[1]))))
    map_file.write_text(str({"physical_to_logical_map": [turned]}).replace("'", '"'))
    said = replay(capsys, path, "--ep", RANKS, "--top-k", TOP_K, "--placement", map_file)
    hottest = ROWS[1].index(max(ROWS[1]))
    place = turned.index(hottest)
    assert any(f": expert {place} (logical {hottest}) on rank" in line for line in said), said
