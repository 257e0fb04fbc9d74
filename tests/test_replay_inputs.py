"""What replay reads: whatever sglang takes as counts and maps, under any name, and the rest refused by what it is."""

import enum
import gzip
import io
import json
import os
import pickle
import threading
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import LAYERS, RANKS, TOP_K, dump
from test_replay_counts import counts_of

from waterfill_rs.cli import main
from waterfill_rs.replay import dumps

SUM = sum(counts_of(rank, 100) for rank in range(RANKS))
"""``[L, E]``, of which layer 0 is dense."""

EP = ["--ep", str(RANKS), "--top-k", str(TOP_K)]


def level(counts, ranks, top_k):
    """The optimum of one layer's physical counts, and the rows of its fullest rank, step by step."""
    routed = torch.as_tensor(counts).view(ranks, -1).sum(1).tolist()
    tokens = -(-sum(routed) // top_k)
    height = max(routed)
    while sum(height - rows for rows in routed) < tokens:
        height += 1
    return height, max(routed)


def replay(path, tmp_path, *options):
    """Rows of policy live, by layer and pass."""
    out = tmp_path / "replayed" / "out.json"
    paths = [str(p) for p in (path if isinstance(path, list) else [path])]
    assert main(["replay", *paths, "--json", str(out), *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    return {(row["layer"], row["pass"]): row for row in rows if row["policy"] == "live"}


def refused(path, capsys, *options):
    """The one line that says why."""
    paths = [str(p) for p in (path if isinstance(path, list) else [path])]
    assert main(["replay", *paths, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("waterfill-rs: "), error
    return error


def check_is_the_sum(found):
    """The rows are those of SUM, of the layers with MoE."""
    assert set(found) == {(layer, 0) for layer in range(1, LAYERS)}
    for (layer, _), row in found.items():
        optimum, routed_max = level(SUM[layer], RANKS, TOP_K)
        assert (row["optimum"], row["max"], row["routed_max"]) == (optimum, optimum, routed_max)


DTYPES = (
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_any_number_type_are_read(dtype, tmp_path):
    assert int(SUM.max()) < 256  # exact in each of them
    torch.save({"logical_count": SUM.to(dtype)}, tmp_path / "counts.pt")
    check_is_the_sum(replay(tmp_path / "counts.pt", tmp_path, *EP))


def test_lists_of_floats_and_of_tensors_are_read(tmp_path):
    for index, counts in enumerate(
        (SUM.tolist(), SUM.double().tolist(), list(SUM), list(SUM.float()), tuple(SUM[None]))
    ):
        file = tmp_path / f"{index}.pt"
        torch.save({"logical_count": counts}, file)
        check_is_the_sum(replay(file, tmp_path, *EP))


def test_floats_are_exact_beyond_what_32_bits_hold(tmp_path):
    # float32 has no 2^24 + 1; 2^31 + 1 is beyond int32.
    counts = [float(2**24 + 1), 0.0, 0.0, float(2**31 + 1)]
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"logical_count": [counts]}))
    dump = dumps.read([file], 2, 1)
    assert dump.passes[0].tolist() == [[[2**24 + 1, 0, 0, 2**31 + 1]]]


def test_published_statistics_are_read_as_json_and_as_torch_file(tmp_path):
    """``[L, E]`` of floats that are whole, the first layers dense: as DeepSeek-V3's are published."""
    counts = [[0.0] * 8, [120.0, 95.0, 310.0, 88.0, 101.0, 77.0, 140.0, 69.0]]
    as_json, as_torch = tmp_path / "counts.json", tmp_path / "counts.pt"
    as_json.write_text(json.dumps({"logical_count": counts}))
    torch.save({"logical_count": torch.tensor(counts)}, as_torch)
    for file in (as_json, as_torch):
        found = replay(file, tmp_path, "--ep", "4", "--top-k", "2")
        assert set(found) == {(1, 0)}
        # Ranks have 215, 398, 178 and 209 rows; the 500 shared rows level them below 398 but for 2.
        assert (found[1, 0]["routed_max"], found[1, 0]["optimum"]) == (398, 398)
        assert (found[1, 0]["tokens"], found[1, 0]["mean"]) == (500, 375)


def as_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


TEXT = json.dumps({"logical_count": SUM.tolist()})
TORCH = as_bytes({"logical_count": SUM})
WRITTEN = {
    "counts.JSON": TEXT.encode(),
    "counts.Json": TEXT.encode(),
    "counts": TEXT.encode(),
    "counts.txt": b"\n  " + TEXT.encode(),
    "bom.json": b"\xef\xbb\xbf" + TEXT.encode(),
    "utf16.json": TEXT.encode("utf-16"),
    "counts.json.gz": gzip.compress(TEXT.encode()),
    "packed.json": gzip.compress(TEXT.encode()),
    "counts.PT": TORCH,
    "counts.bin": TORCH,
    "torch.json": TORCH,
    "counts.pt.gz": gzip.compress(TORCH),
    "json.pt": TEXT.encode(),
    "legacy.pt": as_bytes({"logical_count": SUM}, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_read_by_their_bytes_under_any_name(name, tmp_path):
    (tmp_path / name).write_bytes(WRITTEN[name])
    check_is_the_sum(replay(tmp_path / name, tmp_path, *EP))


def test_a_recording_may_be_packed_and_in_capitals(tmp_path):
    for rank in range(RANKS):
        name = f"expert_distribution_recorder_1.5_{rank}.PT.gz"
        (tmp_path / name).write_bytes(gzip.compress(as_bytes(dump(rank))))
    assert len(replay(tmp_path, tmp_path)) == (LAYERS - 1) * 2


@pytest.mark.parametrize("content", [TEXT.encode(), TORCH, gzip.compress(TORCH)])
def test_a_pipe_is_read(content, tmp_path):
    """A shell's ``<(command)``."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    check_is_the_sum(replay(tmp_path / "pipe", tmp_path, *EP))
    writer.join()


def test_json_text_is_read_as_sglang_reads_it(tmp_path, capsys):
    check_is_the_sum(replay(TEXT, tmp_path, *EP))
    check_is_the_sum(replay(TEXT + " " * 255, tmp_path, *EP))  # longer than a file's name can be
    assert "the JSON text: not JSON" in refused(TEXT[:-1], capsys, *EP)
    assert "the JSON text: found the keys 'counts', no 'records'" in refused(
        '{"counts": [[1]]}', capsys, *EP
    )


def test_sums_over_passes_are_told_from_steps():
    flat, ring = {"logical_count": PLACED}, {"logical_count": [PLACED, PLACED]}
    by_rank = {**ring, "logical_count_layout": "rank_layer_expert"}
    for content, summed in ((flat, True), (ring, False), (by_rank, True)):
        assert dumps.read([Path(json.dumps(content))], 2, 1).summed is summed


# Maps

REPLICATED = [0, 1, 2, 3, 0, 2]
"""Physical to logical: experts 0 and 2 have two replicas. Three ranks have two each."""

PLACED = [[5, 10, 7, 1], [0, 0, 4, 8]]
ON_PHYSICAL = [[3, 10, 4, 1, 2, 3], [0, 0, 2, 8, 0, 2]]
BY_MAP = ["--ep", "3", "--top-k", "1"]


@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize("where", ["beside", "another file", "text"])
def test_a_map_places_the_counts(number, where, tmp_path, capsys):
    counts = {"logical_count": [[number(count) for count in layer] for layer in PLACED]}
    mapping = {"physical_to_logical_map": [[number(expert) for expert in REPLICATED]] * 2}
    file, other = tmp_path / "counts.json", tmp_path / "map.json"
    if where == "beside":
        file.write_text(json.dumps({**counts, **mapping}))
        paths = [file]
    else:
        file.write_text(json.dumps(counts))
        other.write_text(json.dumps(mapping))
        paths = [file, other] if where == "another file" else [json.dumps(mapping), file]
    read = dumps.read(paths, 3, 1)
    assert read.passes[0].tolist() == [ON_PHYSICAL]
    assert (read.experts, read.mappings) == (6, [REPLICATED] * 2)
    found = replay(paths, tmp_path, *BY_MAP)
    for layer, counts in enumerate(ON_PHYSICAL):
        assert found[layer, 0]["optimum"] == level(counts, 3, 1)[0]
    out = capsys.readouterr().out
    assert "these lie as physical_to_logical_map of" in out and "without replicas" not in out


def test_a_map_without_replicas_moves_experts(tmp_path):
    counts = {"logical_count": [PLACED, PLACED], "physical_to_logical_map": [[3, 0, 2, 1]] * 2}
    torch.save({key: torch.tensor(value) for key, value in counts.items()}, tmp_path / "both.pt")
    read = dumps.read([tmp_path / "both.pt"], 2, 1)
    assert read.mappings is None
    assert [one.tolist() for one in read.passes.values()] == [[[[1, 5, 7, 10], [8, 0, 4, 0]]]] * 2


MAPS = {
    "alone": ([{"physical_to_logical_map": [[0, 1]]}], "and not what was routed: give a file"),
    "twice": ([{"physical_to_logical_map": [[0, 1]]}] * 2, "a second physical_to_logical_map"),
    "of other layers": (
        [{"logical_count": PLACED, "physical_to_logical_map": [REPLICATED]}],
        "has 1 layers, logical_count has 2",
    ),
    "that lacks an expert": (
        [{"logical_count": PLACED, "physical_to_logical_map": [REPLICATED, [0, 1, 2, 2, 1, 0]]}],
        "of layer 1: its experts are not 0 to 3, as logical_count's are; the first that does not fit is 3",
    ),
    "of more experts": (
        [{"logical_count": PLACED, "physical_to_logical_map": [[0, 1, 2, 3, 4, 0]] * 2}],
        "the first that does not fit is 4",
    ),
    "of halves": (
        [{"logical_count": PLACED, "physical_to_logical_map": [[0.5, 1, 2, 3, 4, 0]] * 2}],
        "physical_to_logical_map[0, 0] is 0.5",
    ),
    "that does not divide": (
        [{"logical_count": PLACED, "physical_to_logical_map": [[0, 1, 2, 3, 0]] * 2}],
        "5 physical experts do not divide over 3 ranks",
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_that_do_not_fit_are_refused(name, tmp_path, capsys):
    contents, text = MAPS[name]
    files = [tmp_path / f"{index}.json" for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    error = refused(files, capsys, *BY_MAP)
    assert text in error and ".json" in error + ".json" * ("divide" in text), error


def test_a_map_beside_a_recording_is_refused(tmp_path, capsys):
    torch.save(dump(0), tmp_path / "0.pt")
    mapping = '{"physical_to_logical_map": [[0, 1]]}'
    assert "a recording has its own map" in refused([tmp_path / "0.pt", mapping], capsys)
    assert "0.pt: has no 'logical_count'" in refused([tmp_path / "0.pt", TEXT], capsys)


# What is not read

ODD_NUMBERS = {
    "a half": ([[1.0, 2.5]], "logical_count[0, 1] is 2.5: give whole numbers"),
    "nan": ([[1.0, float("nan")]], "logical_count[0, 1] is nan"),
    "inf": ([[float("inf"), 1.0]], "logical_count[0, 0] is inf"),
    "negative": ([[4.0, -3.0]], "logical_count has -3 rows in a layer"),
    "huge": ([[1.0, 1e300]], "logical_count has 1e+300 rows in a layer"),
    "more than the core counts": ([[1.0, 2.0**32]], "has 4294967296 rows in a layer"),
    "huge integer": ([[1, 10**30]], "no array of integers"),
    "ragged": ([[1.0, 2.0], [3.0]], "no array of integers (expected sequence of length 2"),
    "text": ([["1", "2"]], "no array of integers"),
    "none": ([[None, 2]], "no array of integers"),
    "truth": ([[True, False]], "is torch.bool [1, 2]"),
    "empty": ([], "[0]: integers [L, E]"),
    "empty layers": ([[], []], "[2, 0]: integers [L, E]"),
    "flat": ([1, 2], "is torch.int64 [2]: integers [L, E]"),
    "too deep": ([[[[1.0, 2.0]]]], "[1, 1, 1, 2]: integers [L, E]"),
    "a number": (5, "no array of integers, but int 5"),
    "a dict": ({"0": [1, 2]}, "no array of integers, but dict"),
    "zeros": ([[0.0, 0.0]], "zero everywhere"),
}


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize("name", ODD_NUMBERS)
def test_numbers_that_are_no_counts_are_refused(name, as_torch, tmp_path, capsys):
    counts, text = ODD_NUMBERS[name]
    file = tmp_path / "counts"
    content = {"logical_count": counts}
    file.write_bytes(as_bytes(content) if as_torch else json.dumps(content).encode())
    error = refused(file, capsys, "--ep", "2", "--top-k", "1")
    assert text in error and str(file) in error, error


def test_tensors_without_numbers_are_refused(tmp_path, capsys):
    file = tmp_path / "counts.pt"
    torch.save({"logical_count": torch.ones(2, 4, device="meta")}, file)
    assert "is a meta tensor of torch.float32 [2, 4]" in refused(file, capsys, *EP)


def test_a_layout_that_is_not_known_is_refused(tmp_path, capsys):
    file = tmp_path / "counts.json"
    content = {"logical_count": [SUM.tolist()], "logical_count_layout": "layer_rank_expert"}
    file.write_text(json.dumps(content))
    error = refused(file, capsys, *EP)
    assert "logical_count_layout is 'layer_rank_expert': give 'rank_layer_expert'" in error


def test_unsigned_counts_beyond_int64_are_refused(tmp_path, capsys):
    counts = torch.tensor([[2**63 - 1, 1]]).to(torch.uint64) * 2
    torch.save({"logical_count": counts}, tmp_path / "counts.pt")
    assert "rows in a layer" in refused(tmp_path / "counts.pt", capsys, "--ep", "2")


class ForwardMode(enum.IntEnum):
    EXTEND = 1


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


MODEL = {f"layer.{index}.weight": torch.zeros(1) for index in range(20)}
CLASS = {"records": [{"forward_mode": ForwardMode.EXTEND}]}
FOREIGN = {
    "csv": (
        b"layer_id,expert_id,count\n3,0,24\n",
        "a CSV with the columns layer_id, expert_id, count",
    ),
    "tsv": (b"layer\texpert\n3\t0\n", "a CSV with the columns layer, expert"),
    "class": (as_bytes(CLASS), "holds test_replay_inputs.ForwardMode, a class or function"),
    "legacy class": (
        as_bytes(CLASS, _use_new_zipfile_serialization=False),
        "holds test_replay_inputs.ForwardMode, a class or function",
    ),
    "function": (as_bytes({"records": [print]}), "holds print, a class or function"),
    "model": (as_bytes(MODEL), "found the keys 'layer.0.weight', 'layer.1.weight'"),
    "model's rest": (as_bytes(MODEL), "and 12 more, no 'records'"),
    "tensor": (as_bytes(torch.zeros(3)), "found Tensor, no 'records'"),
    "json list": (b"[[1, 2], [3, 4]]", "found list, no 'records'"),
    "json keys": (b'{"counts": [1], "0": 2}', "found the keys 'counts', '0', no 'records'"),
    "json number": (b"5", "found int, no 'records'"),
    "cut json": (b'{"logical_count": [[1, 2', "not JSON (Expecting"),
    "deep json": (b"[" * 100_000, "not JSON"),
    "two texts": (b'{"logical_count": [[1]]}\n{"logical_count": [[1]]}', "not JSON (Extra data"),
    "words": (b"hello", "not JSON (Expecting value"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that is no file of torch.save"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(40), "a numpy array"),
    "npz": (zipped(**{"counts.npy": b"x"}), "a zip archive of counts.npy"),
    "empty zip": (zipped(), "a zip archive of nothing"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}" + bytes(9), "a safetensors file"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "a tar archive, which has to be unpacked: give"),
    "packed tar": (
        gzip.compress(bytes(257) + b"ustar" + bytes(250)),
        "(unpacked): a tar archive, which has to be unpacked: give",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(9), "a zstd archive"),
    "parquet": (b"PAR1" + bytes(9), "a parquet table"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    "page": (b"<!DOCTYPE html>", "an HTML or XML page"),
    "bytes": (bytes(range(200, 256)), "neither a torch file nor JSON (it begins with b'\\xc8"),
    "empty": (b"", "the file is empty (0 bytes)"),
    "packed nothing": (gzip.compress(b""), "a gzip file of nothing"),
    "cut gzip": (gzip.compress(TORCH)[:-20], "not a whole gzip file"),
    "packed csv": (gzip.compress(b"a,b\n1,2\n"), "(unpacked): a CSV with the columns a, b"),
    "cut torch": (TORCH[:400], "not a whole torch file"),
    "cut at the end": (TORCH[:-9], "not a whole torch file"),
    "cut legacy": (WRITTEN["legacy.pt"][:90], "not a whole torch file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_cannot_be_read_is_named_for_what_it_is(name, tmp_path, capsys):
    content, text = FOREIGN[name]
    for suffix in (".pt", ".json", ".csv"):
        file = tmp_path / f"file{suffix}"
        file.write_bytes(content)
        error = refused(file, capsys, *EP)
        assert text in error and str(file) in error, error
        assert ("not a whole torch file" in error) == ("not a whole torch" in text), error


def test_no_code_of_a_file_runs(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pt").write_bytes(as_bytes({"records": [Evil()]}))
    assert "a class or function" in refused(tmp_path / "evil.pt", capsys)
    assert not (tmp_path / "ran").exists()


def test_foreign_files_beside_a_recording_are_told_and_not_read(tmp_path, capsys):
    folder = tmp_path / "recorded"
    folder.mkdir()
    for rank in range(RANKS):
        torch.save(dump(rank), folder / f"expert_distribution_recorder_1.5_{rank}.pt")
    (folder / "notes.txt").write_text("hello")
    (folder / "replay.json").write_text("{}")
    (folder / "inner.pt").mkdir()
    alone = replay(folder, tmp_path)
    assert "not read" not in capsys.readouterr().out
    torch.save(MODEL, folder / "model.pt")
    assert replay(folder, tmp_path) == alone
    assert f"Of {folder}, 1 files were not read: model.pt." in capsys.readouterr().out


def test_folders_without_a_recording(tmp_path, capsys):
    error = refused(tmp_path, capsys)
    assert "no *.pt and no *.json file in this folder\n" in error
    for host in ("host_b", "host_a"):  # as they are copied from each host
        (tmp_path / host).mkdir()
        torch.save(dump(0), tmp_path / host / "0.pt")
    (tmp_path / "empty").mkdir()
    error = refused(tmp_path, capsys)
    assert "in this folder, but in its folders host_a, host_b: give these" in error
    (tmp_path / "counts.JSON").write_text(TEXT)
    check_is_the_sum(replay(tmp_path, tmp_path / "out", *EP))


def test_what_is_given_twice_is_read_once(tmp_path, capsys):
    folder, link = tmp_path / "one", tmp_path / "link"
    folder.mkdir()
    torch.save(dump(0), folder / "0.pt")
    link.symlink_to(folder)
    alone = replay(folder, tmp_path)
    assert "twice" not in capsys.readouterr().out
    for paths in ([folder, folder], [folder / "0.pt"] * 3, [link, folder, link / "0.pt"]):
        assert replay(paths, tmp_path) == alone
        assert f"Files that were given twice were read once: {len(paths) - 1}." in (
            capsys.readouterr().out
        )


def test_what_is_read_is_never_overwritten(tmp_path, capsys):
    folder = tmp_path / "one"
    folder.mkdir()
    files = [folder / f"{rank}.pt" for rank in range(RANKS)]
    for rank, file in enumerate(files):
        torch.save(dump(rank), file)
    counts, link = tmp_path / "counts.json", tmp_path / "link.json"
    counts.write_text(TEXT)
    link.symlink_to(counts)
    for path, options in (
        (counts, ["--json", counts]),
        (counts, ["--json", link]),
        (folder, ["--json", files[2]]),
        (folder, ["--json", counts, "--placement", counts]),
        (folder, ["--json", counts, "--beside", counts, "--top-k", TOP_K, "--ep", RANKS]),
    ):
        error = refused(path, capsys, *map(str, options))
        assert f"--json {options[1]}: this file is read, and would be overwritten" in error
        assert counts.read_text() == TEXT
    # Beside them is no harm, and again.
    for _ in range(2):
        assert main(["replay", str(folder), "--json", str(folder / "replay.json")]) == 0


def test_hidden_files_of_a_folder_are_not_read(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for rank in range(RANKS):
        torch.save(dump(rank), folder / f"{rank}.pt")
        (folder / f"._{rank}.pt").write_bytes(b"\x00\x05\x16\x07" + bytes(200))  # macOS's
    assert replay(folder, tmp_path)


def test_a_folder_with_a_name_like_json_is_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "{a}").mkdir()
    for rank in range(RANKS):
        torch.save(dump(rank), tmp_path / "{a}" / f"{rank}.pt")
    monkeypatch.chdir(tmp_path)
    assert replay("{a}", tmp_path)
    assert "the JSON text: found list, no 'records'" in refused("[[1, 2]]", capsys, *EP)


def test_files_as_users_brought_them(tmp_path, capsys):
    floats = tmp_path / "whole_numbers_as_floats.json"
    rows = [[0.0] * 8, [120.0, 95.0, 310.0, 88.0, 101.0, 77.0, 140.0, 69.0]]
    floats.write_text(json.dumps({"logical_count": rows}))
    found = replay(floats, tmp_path, "--ep", "4", "--top-k", "2")
    assert {key: row["optimum"] for key, row in found.items()} == {(1, 0): 398}
    counts = tmp_path / "counts.JSON"
    counts.write_text('{"logical_count": [[1,2,3,4]]}')
    found = replay(counts, tmp_path, "--ep", "2", "--top-k", "1")
    assert {key: row["optimum"] for key, row in found.items()} == {(0, 0): 10}
    old_recorder = tmp_path / "old_recorder.csv"
    old_recorder.write_text("layer_id,expert_id,count\n3,0,24\n3,1,39\n3,2,13\n3,3,18\n")
    error = refused(old_recorder, capsys, *EP)
    assert "a CSV with the columns layer_id, expert_id, count" in error
    folder = tmp_path / "class_in_a_whole_file"
    folder.mkdir()
    for rank in range(RANKS):
        content = dump(rank)
        for record in content["records"]:
            record["forward_mode"] = ForwardMode.EXTEND
        torch.save(content, folder / f"{rank}.pt")
    error = refused(folder, capsys)
    assert "holds test_replay_inputs.ForwardMode, a class or function" in error
