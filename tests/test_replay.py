"""The replay: numbers against a plain computation, and every broken dump refused by name."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs.cli import main
from waterfill_rs.replay import command as replay

RANKS, EXPERTS, TOP_K, LAYERS, TOKENS = 4, 16, 3, 3, 40


def ids_of(rank, pass_id):
    """``[L, tokens, 8]``; layer 0 is dense, two columns of eight rows are padding."""
    generator = torch.Generator().manual_seed(rank * 10 + pass_id)
    ids = torch.full((LAYERS, TOKENS, 8), -1, dtype=torch.int32)
    drawn = torch.rand(LAYERS - 1, TOKENS, EXPERTS, generator=generator) + torch.linspace(
        0, 0.4, EXPERTS
    )
    ids[1:, :, :TOP_K] = drawn.topk(TOP_K).indices.int()
    ids[:, :2] = -1
    return ids


def dump(rank, **changes):
    records = [
        dict(forward_pass_id=p, rank=rank, forward_mode=1, topk_ids_of_layer=ids_of(rank, p))
        for p in (100, 101)
    ]
    mapping = torch.arange(EXPERTS).repeat(LAYERS, 1)
    return {**dict(records=records, last_physical_to_logical_map=mapping), **changes}


@pytest.fixture
def folder(tmp_path):
    for rank in range(RANKS):
        torch.save(dump(rank), tmp_path / f"expert_distribution_recorder_0_{rank}.pt")
    return tmp_path


def test_numbers_are_those_of_a_plain_computation(folder, tmp_path, capsys):
    out = tmp_path / "out" / "replay.json"
    assert main(["replay", str(folder), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["ranks"], found["experts"], found["top_k"]) == (RANKS, EXPERTS, TOP_K)
    rows = {(row["layer"], row["pass"], row["policy"]): row for row in found["rows"]}
    assert len(rows) == (LAYERS - 1) * 2 * 5
    for (layer, pass_id, policy), row in rows.items():
        routed = torch.zeros(RANKS, dtype=torch.int64)
        for rank in range(RANKS):
            ids = ids_of(rank, pass_id)[layer].flatten()
            routed += torch.bincount(ids[ids >= 0] // (EXPERTS // RANKS), minlength=RANKS)
        tokens = RANKS * (TOKENS - 2)
        assert row["tokens"] == tokens and row["routed_max"] == int(routed.max())
        assert row["mean"] == tokens * (TOP_K + 1) / RANKS
        level = int(routed.max())
        while int((level - routed).sum()) < tokens:
            level += 1
        assert row["optimum"] == level
        assert len(row["loads"]) == RANKS and sum(row["loads"]) == tokens * (TOP_K + 1)
        assert max(row["loads"]) == row["max"]
        if policy == "home":
            assert row["loads"] == [int(rows) + TOKENS - 2 for rows in routed]
            assert row["extra_copies"] == 0
        if policy == "live":
            assert row["max"] == level and 0 <= row["extra_copies"] < 0.2
        assert row["max"] >= level
    said = capsys.readouterr().out
    assert "the optimum in every layer of every pass (2 layers, 2 passes)" in said
    assert "told apart by forward_mode." in said


def change(record_field, value):
    def apply(content):
        content["records"][1][record_field] = value

    return apply


def drop(field):
    return lambda content: content["records"][0].pop(field)


def too_large(content):
    content["records"][0]["topk_ids_of_layer"][2, 5, 1] = EXPERTS


BROKEN = {
    "no records": (lambda c: c.pop("records"), "no 'records'"),
    "no map": (
        lambda c: c.pop("last_physical_to_logical_map"),
        "has no 'last_physical_to_logical_map'",
    ),
    "flat map": (
        lambda c: c.update(last_physical_to_logical_map=torch.arange(4)),
        "last_physical_to_logical_map is torch.int64 [4]: integers [L, P]",
    ),
    "no pass id": (drop("forward_pass_id"), "record 0 has no 'forward_pass_id'"),
    "no rank": (drop("rank"), "record 0 has no 'rank'"),
    "no tokens": (drop("topk_ids_of_layer"), "record 0 has no 'topk_ids_of_layer'"),
    "pass twice": (change("forward_pass_id", 100), "forward_pass_id 100 is there twice"),
    "another pass": (change("forward_pass_id", 7), "forward_pass_id 7: ranks"),
    "two ranks": (change("rank", 1), "records of ranks [1, 2]"),
    "records no list": (lambda c: c.update(records=5), "records is int 5"),
    "records a tensor": (lambda c: c.update(records=torch.ones(2)), "records is Tensor tensor("),
    "records empty": (
        lambda c: c.update(records=[]),
        "holds no record, and by its name is rank 2's, of which there is no other file",
    ),
    "rank no number": (change("rank", "2"), "rank is '2': give an integer"),
    "rank a list": (change("rank", [2]), "rank is [2]: give an integer"),
    "pass id none": (change("forward_pass_id", None), "forward_pass_id is None: give an integer"),
    "other columns": (
        change("topk_ids_of_layer", torch.zeros(LAYERS, TOKENS, 4, dtype=torch.int32)),
        "forward_pass_id 101 has 4 columns of ids",
    ),
    "keys of all kinds": (lambda c: (c.pop("records"), c.update({3: 4})), "no 'records'"),
    "float map": (
        lambda c: c.update(last_physical_to_logical_map=torch.full((LAYERS, EXPERTS), 0.5)),
        "last_physical_to_logical_map[0, 0] is 0.5: give whole numbers",
    ),
    "another map": (
        lambda c: c.update(
            last_physical_to_logical_map=torch.arange(EXPERTS).flip(0).repeat(LAYERS, 1)
        ),
        "last_physical_to_logical_map is not that of",
    ),
    "sparse ids": (
        change("topk_ids_of_layer", torch.zeros(2, 3, 8, dtype=torch.int32).to_sparse()),
        "topk_ids_of_layer is torch.int32 [2, 3, 8]: integers [L, tokens, K]",
    ),
    "ids of halves": (
        change("topk_ids_of_layer", torch.full((3, 3, 8), 0.5)),
        "topk_ids_of_layer[0, 0, 0] is 0.5: give whole numbers",
    ),
    "flat ids": (
        change("topk_ids_of_layer", torch.zeros(8, dtype=torch.int32)),
        "topk_ids_of_layer is torch.int32 [8]: integers [L, tokens, K]",
    ),
    "ids that may be -1 or 255": (
        change("topk_ids_of_layer", torch.full((3, 3, 8), 255, dtype=torch.uint8)),
        "is torch.uint8 and holds 255, which may be a -1",
    ),
    "two dispatches": (
        lambda c: [
            record.update(misc_objects=[{"layer_id": 1, "num_tokens_per_rank": [9] * ranks}])
            for record, ranks in zip(c["records"], (4, 8), strict=True)
        ],
        "its dispatches went to 4 and 8 ranks",
    ),
    "id too large": (
        too_large,
        "has id 16 of 16 experts: if that is a fused shared expert's, record with",
    ),
    "rank of another file": (
        lambda c: [record.update(rank=3) for record in c["records"]],
        "rank 3 is in another file too",
    ),
    "other experts": (
        lambda c: c.update(last_physical_to_logical_map=torch.zeros(3, 18, dtype=torch.int64)),
        "18 physical experts",
    ),
}


def refused(arguments, text, capsys, out):
    assert main(["replay", *map(str, arguments), "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1, error
    assert not out.exists()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_dumps_are_refused_by_file_field_and_number(name, folder, capsys, tmp_path):
    spoil, text = BROKEN[name]
    content = dump(2)
    spoil(content)
    torch.save(content, folder / "expert_distribution_recorder_0_2.pt")
    refused([folder], text, capsys, tmp_path / "out.json")


def test_broken_files_are_refused(folder, capsys, tmp_path):
    out = tmp_path / "out.json"
    first = folder / "expert_distribution_recorder_0_0.pt"
    whole = first.read_bytes()
    refused([folder / "nothing"], "there is no such file", capsys, out)
    refused([folder, "--ep", 6], "ranks [0, 1, 2, 3] of 6", capsys, out)
    refused([folder, "--ep", 3000], "9, 10, 11] and more missing", capsys, out)
    for content, text in [
        (b"", "empty (0 bytes)"),
        (whole[:500], "500 bytes"),
        (b"x" * 99, "99 bytes"),
    ]:
        first.write_bytes(content)
        refused([folder], text, capsys, out)
    first.unlink()
    refused([folder, "--ep", 4], "[0] missing", capsys, out)
    refused([tmp_path / "out"], "no such file", capsys, out)


@pytest.mark.parametrize(
    "option, name, text",
    [
        ("--json", "folder", "give a file, not a folder"),
        ("--plot", "folder", "give a file, not a folder"),
        ("--json", "file/x.json", "is no folder to write in"),
        ("--plot", "file/x.png", "is no folder to write in"),
        ("--plot", "x.xyz", "no picture of the kind 'xyz': give one of"),
        ("--json", "/proc/x.json", "cannot be written"),
    ],
)
def test_outputs_that_cannot_be_written_leave_nothing(option, name, text, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = set(tmp_path.rglob("*"))
    other = {"--json": "--plot", "--plot": "--json"}[option]
    command = ["replay", str(folder), option, str(tmp_path / name), other, str(tmp_path / "o.png")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert name in error and text in error and error.count("\n") == 1, error
    assert set(tmp_path.rglob("*")) == before


def test_a_picture_is_written_under_the_name_given(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("new/replay.png", "without an ending"):
        assert main(["replay", str(folder), "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))


def test_torch_has_one_thread_while_it_works_and_its_own_after(folder, monkeypatch):
    seen = []

    def compare(*arguments):
        seen.append(torch.get_num_threads())
        return before(*arguments)

    before = replay.compare
    monkeypatch.setattr(replay, "compare", compare)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["replay", str(folder)]) == 0
        assert set(seen) == {1} and torch.get_num_threads() == 3
        assert main(["replay", str(folder), "--ep", "9"]) == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
