"""Numbers of rank files as any program may have written them anew, and what they tell of a wrong top-k."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import EXPERTS, LAYERS, RANKS, TOKENS, TOP_K, dump
from test_replay_counts import PASSES, counts_of, per_pass, received_of
from test_replay_inputs import refused
from test_replay_servers import MODES, TOP, every_row, field, write

ALIKE = {
    "int16": lambda values: values.to(torch.int16),
    "int64": lambda values: values.to(torch.int64),
    "float32": lambda values: values.to(torch.float32),
    "bfloat16": lambda values: values.to(torch.bfloat16),
    "lists": lambda values: values.tolist(),
    "lists of floats": lambda values: values.double().tolist(),
}


def changed(content, change):
    """Every array of a rank's file."""
    name = field(content)
    records = [{**record, name: change(record[name])} for record in content["records"]]
    mapping = change(content["last_physical_to_logical_map"])
    return {"records": records, "last_physical_to_logical_map": mapping}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alike", ALIKE)
def test_rank_files_of_any_number_type_are_read(mode, alike, tmp_path):
    make, options = MODES[mode]
    contents = [make(rank) for rank in range(RANKS)]
    folder = write(tmp_path / "changed", [changed(one, ALIKE[alike]) for one in contents])
    as_recorded = every_row(write(tmp_path / "recorded", contents), tmp_path, *options)
    assert every_row(folder, tmp_path, *options) == as_recorded


def test_rank_files_as_json_are_read(tmp_path):
    contents = [dump(rank) for rank in range(RANKS)]
    as_recorded = every_row(write(tmp_path / "recorded", contents), tmp_path)
    folder = tmp_path / "json"
    folder.mkdir()
    for rank, content in enumerate(contents):
        text = json.dumps(changed(content, torch.Tensor.tolist))
        (folder / f"{rank}.json").write_text(text)
    assert every_row(folder, tmp_path) == as_recorded


def test_ids_of_an_idle_rank_may_be_empty_in_any_number_type(tmp_path):
    def idle(dtype):
        contents = [dump(rank) for rank in range(RANKS)]
        for record in contents[1]["records"]:
            record["topk_ids_of_layer"] = torch.empty(LAYERS, 0, 8, dtype=dtype)
        return every_row(write(tmp_path / str(dtype), contents), tmp_path)

    assert idle(torch.int32) == idle(torch.int16) == idle(torch.float32)


def test_large_negative_ids_are_no_experts(tmp_path):
    def filled(value):
        contents = [dump(rank) for rank in range(RANKS)]
        for content in contents:
            for record in content["records"]:
                ids = record["topk_ids_of_layer"].long()
                record["topk_ids_of_layer"] = ids.masked_fill(ids < 0, value)
        return every_row(write(tmp_path / str(value), contents), tmp_path)

    assert filled(-1) == filled(-(2**40))  # whose lowest 32 bits are 0, an expert


def test_columns_padded_with_an_expert_are_refused(tmp_path, capsys):
    contents = [dump(rank) for rank in range(RANKS)]
    for content in contents:
        for record in content["records"]:
            record["topk_ids_of_layer"] = record["topk_ids_of_layer"].clamp(min=0)
    error = refused(write(tmp_path / "padded", contents), capsys)
    rows = LAYERS * TOKENS * RANKS
    assert f"topk_ids_of_layer has 0 in column 7 of all {rows} rows: columns that are not" in error


def test_more_columns_than_experts_are_refused(tmp_path, capsys):
    contents = [dump(rank) for rank in range(RANKS)]
    for content in contents:
        content["last_physical_to_logical_map"] = torch.arange(4).repeat(LAYERS, 1)
        for record in content["records"]:
            shape = (LAYERS, TOKENS, 8)
            record["topk_ids_of_layer"] = torch.randint(0, 4, shape, dtype=torch.int32)
    error = refused(write(tmp_path / "few", contents), capsys)
    assert "tokens have 8 experts of 4: columns that are not in use must be -1" in error


# Top-k that does not fit the rows

DOUBT = "may be wrong: the rows of"


@pytest.mark.parametrize("counts", [counts_of, received_of])
def test_a_top_k_that_does_not_divide_the_rows_is_doubted(counts, tmp_path, capsys):
    folder = write(tmp_path / "counts", [per_pass(rank, counts) for rank in range(RANKS)])
    every_row(folder, tmp_path, *TOP)
    assert DOUBT not in capsys.readouterr().out
    every_row(folder, tmp_path, "--top-k", "5")
    rows, parts = (114, RANKS) if counts is counts_of else (456, 1)
    number = parts * (LAYERS - 1) * len(PASSES)
    said = f"--top-k 5 {DOUBT} {number} of {number} layers and passes are no whole number of tokens"
    said_of = capsys.readouterr().out
    assert f"{said}, as the {rows} of the first." in said_of


def test_a_top_k_that_does_not_divide_sums_is_doubted(tmp_path, capsys):
    file = tmp_path / "counts.json"
    counts = [[0] * EXPERTS, [3] * EXPERTS, [6] * EXPERTS, [3] * (EXPERTS - 1) + [4]]
    file.write_text(json.dumps({"logical_count": counts}))
    every_row(file, tmp_path, "--ep", "4", "--top-k", str(TOP_K))
    assert f"--top-k 3 {DOUBT} 1 of 3 layers and passes" in capsys.readouterr().out
