"""What if: other EP sizes, redundant experts and places, against a plain computation of where each row goes."""

import json
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import EXPERTS, LAYERS, RANKS, TOKENS, TOP_K, dump, ids_of
from test_replay_counts import per_pass

from waterfill_rs.cli import main
from waterfill_rs.placement.spread import spread
from waterfill_rs.replay import dump_files

PASSES = (100, 101)
COUNTS = [91, 131, 41, 60, 105, 164, 40, 5, 72, 57, 182, 87]
"""Of 12 experts: they divide over 8 ranks only with redundant ones."""


def save(folder, content):
    folder.mkdir()
    for rank in range(RANKS):
        torch.save(content(rank), folder / f"{rank}.pt")
    return folder


@pytest.fixture
def tokens(tmp_path):
    return save(tmp_path / "tokens", dump)


@pytest.fixture
def counts(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": [COUNTS]}))
    return path


def replay(path, *options):
    """The JSON object, of which rows are by layer, pass and policy."""
    out = path.parent / "replay.json"
    assert main(["replay", str(path), "--json", str(out), *options]) == 0
    found = json.loads(out.read_text())
    for one in found.get("compared", [found]):
        one["rows"] = {(row["layer"], row["pass"], row["policy"]): row for row in one["rows"]}
    return found


def refused(capsys, path, *options):
    assert main(["replay", str(path), *options]) == 2
    error = capsys.readouterr().err.removeprefix("importing sglang for its EPLB\n")
    assert error.count("\n") == 1, error
    return error


def loads(by_source, mapping, ranks):
    """Routed rows a rank. ``by_source``: each source's ids in order; the n-th row of an expert takes its replica n + source."""
    places = {}
    for physical, logical in enumerate(mapping):
        places.setdefault(logical, []).append(physical)
    rows = [0] * ranks
    for source, ids in enumerate(by_source):
        seen = dict.fromkeys(places, source)
        for logical in ids:
            physical = places[logical][seen[logical] % len(places[logical])]
            seen[logical] += 1
            rows[physical * ranks // len(mapping)] += 1
    return rows


def flat(ids):
    return [expert for expert in ids.flatten().tolist() if expert >= 0]


def test_counts_that_divide_only_with_redundant_experts_say_which_would_do(counts, capsys):
    error = refused(capsys, counts, "--ep", "8", "--top-k", "2")
    assert "12 logical experts do not divide over 8 ranks: give --redundant 4, 12, 20 " in error
    assert "an --ep that divides 12 (1, 2, 3, 4, 6, 12)" in error and "right --ep" not in error
    error = refused(capsys, counts, "--ep", "8", "--top-k", "2", "--redundant", "3")
    assert "12 logical experts and 3 redundant ones do not divide over 8 ranks" in error
    assert "give --redundant 4, 12, 20 " in error
    error = refused(capsys, counts, "--ep", "4", "--top-k", "2", "--redundant", "3")
    assert "give --redundant 4, 8, 12 " in error
    for redundant in (4, 12, 20):
        found = replay(counts, "--ep", "8", "--top-k", "2", "--redundant", str(redundant))
        assert (found["ranks"], found["experts"]) == (8, 12 + redundant)
        assert found["redundant"] == redundant


def test_redundant_experts_stand_as_in_sglangs_default(counts, capsys):
    found = replay(counts, "--ep", "8", "--top-k", "2", "--redundant", "4")
    halves = [(count - count // 2, count // 2) for count in COUNTS[:4]]
    rows = [first for first, _ in halves] + COUNTS[4:] + [second for _, second in halves]
    ranks = [rows[i] + rows[i + 1] for i in range(0, 16, 2)]
    home = found["rows"][0, 0, "home"]
    assert home["routed_max"] == max(ranks) == 269
    total = sum(COUNTS) // 2 + sum(COUNTS) % 2
    assert home["tokens"] == total and home["mean"] == (sum(COUNTS) + total) / 8
    spread = [(total + rank) // 8 for rank in range(8)]
    assert home["max"] == max(map(sum, zip(ranks, spread, strict=True)))
    said = capsys.readouterr().out
    assert "8 ranks, 16 physical experts (4 redundant), top 2, 1 pass\n" in said
    assert "sglang's default" in said and "split evenly" in said


@pytest.mark.parametrize("redundant", [0, 4])
def test_tokens_take_replicas_in_turn(tokens, redundant):
    found = replay(tokens, "--redundant", str(redundant), "--placement", "trivial")
    mapping = [physical % EXPERTS for physical in range(EXPERTS + redundant)]
    for pass_id in PASSES:
        for layer in range(1, LAYERS):
            by_source = [flat(ids_of(rank, pass_id)[layer]) for rank in range(RANKS)]
            routed = loads(by_source, mapping, RANKS)
            row = found["rows"][layer, pass_id, "home"]
            assert row["routed_max"] == max(routed) and row["max"] == max(routed) + TOKENS - 2
    assert ((1, 100, "joint") in found["rows"]) == (redundant > 0)
    assert found["rows"][1, 100, "sglang-static"]["extra_copies"] is not None


@pytest.mark.parametrize("redundant", [0, 4])
def test_spread_places_are_those_of_a_server_without_a_placement(tokens, redundant, tmp_path):
    found = replay(tokens, "--redundant", str(redundant), "--placement", "spread")
    row = spread(EXPERTS, redundant, RANKS) if redundant else list(range(EXPERTS))
    path = tmp_path / "spread.json"
    path.write_text(json.dumps({"physical_to_logical_map": [row] * LAYERS}))
    assert found["rows"] == replay(tokens, "--placement", str(path))["rows"]
    assert found["trivial"] is False


def test_counts_of_each_source_are_split_as_its_tokens_are(tokens, tmp_path):
    options = ["--top-k", str(TOP_K), "--redundant", "8"]
    of_tokens = replay(tokens, *options)["rows"]
    of_counts = replay(save(tmp_path / "per_pass", per_pass), *options)["rows"]
    assert (1, 100, "own-counts") in of_counts
    for key, row in of_counts.items():
        if (
            key[2] == "single-replica"
        ):  # Counts of so few rows are taken for decode, these tokens are prefill.
            continue
        assert row["routed_max"] == of_tokens[key]["routed_max"]
        if key[2] in ("home", "live"):
            assert row["max"] == of_tokens[key]["max"]


def test_a_map_in_a_file_and_the_recording_that_was_placed_so_say_the_same(tokens, tmp_path):
    mapping = [15, 3, 3, 0, 1, 2, 14, 4, 5, 6, 13, 7, 8, 9, 12, 10, 11, 0, 1, 2]
    where = {logical: physical for physical, logical in reversed(list(enumerate(mapping)))}

    def placed(rank):
        content = dump(rank)
        for record in content["records"]:
            ids = record["topk_ids_of_layer"]
            record["topk_ids_of_layer"] = ids.clone().apply_(lambda i: where.get(i, -1)).int()
        physical = torch.tensor(mapping).repeat(LAYERS, 1)
        return {**content, "last_physical_to_logical_map": physical}

    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": [mapping] * LAYERS}))
    recorded = save(tmp_path / "placed", placed)
    ours = replay(tokens, "--placement", str(path))
    assert ours["redundant"] == 4
    assert replay(recorded, "--placement", str(path))["rows"] == ours["rows"]
    # Where it stood is forgotten, and found again.
    assert replay(recorded, "--placement", "trivial")["rows"] == replay(tokens)["rows"]
    routed = loads([flat(ids_of(rank, 101)[2]) for rank in range(RANKS)], mapping, RANKS)
    assert ours["rows"][2, 101, "home"]["routed_max"] == max(routed)


def test_experts_that_only_changed_places_go_back(tokens, tmp_path):
    mapping = [15, 3, 0, 1, 2, 14, 4, 5, 6, 13, 7, 8, 9, 12, 10, 11]  # no replicas
    where = {logical: physical for physical, logical in enumerate(mapping)}

    def placed(rank):
        content = dump(rank)
        for record in content["records"]:
            ids = record["topk_ids_of_layer"]
            record["topk_ids_of_layer"] = ids.clone().apply_(lambda i: where.get(i, -1)).int()
        physical = torch.tensor(mapping).repeat(LAYERS, 1)
        return {**content, "last_physical_to_logical_map": physical}

    recorded = save(tmp_path / "placed", placed)
    plain = replay(tokens)["rows"]
    assert replay(recorded)["rows"] != plain
    assert replay(recorded, "--placement", "trivial")["rows"] == plain


def test_several_ep_sizes_are_one_table(tokens, capsys):
    found = replay(tokens, "--ep", "2,4,16")["compared"]
    assert [one["ranks"] for one in found] == [2, 4, 16]
    for one in found:
        ranks = one["ranks"]
        whole = torch.cat([ids_of(rank, 100)[1, 2:] for rank in range(RANKS)])
        routed = loads([flat(whole)], list(range(EXPERTS)), ranks)
        home = one["rows"][1, 100, "home"]
        assert home["routed_max"] == max(routed) and home["tokens"] == RANKS * (TOKENS - 2)
        own = [len(part) for part in whole.tensor_split(ranks)]
        assert home["max"] == max(map(sum, zip(routed, own, strict=True)))
    assert found[1]["rows"] == replay(tokens)["rows"]
    capsys.readouterr()
    assert main(["replay", str(tokens), "--ep", "2,4,16"]) == 0
    said = capsys.readouterr().out
    assert "The tokens of 4 ranks are cut evenly over 16" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("tokens ")]
    assert [line[1:4] for line in lines] == [[str(n), "0", "prefill"] for n in (2, 4, 16)]
    rows = found[2]["rows"].values()
    home = [row for row in rows if row["policy"] == "home"]
    ratio = sum(row["max"] for row in home) / sum(row["mean"] for row in home)
    routed = sum(row["routed_max"] for row in home) / (
        sum(row["tokens"] for row in home) * TOP_K / 16
    )
    assert lines[2][4:6] == [f"{routed:.4f}", f"{ratio:.4f}"]


def test_ep_sizes_that_do_not_divide_are_left_out_and_told(tokens, tmp_path, capsys):
    found = replay(tokens, "--ep", "5,2,4")["compared"]
    said = capsys.readouterr().out
    assert [one["ranks"] for one in found] == [2, 4]
    line = (
        "EP 5 is left out: 16 logical experts do not divide over 5 ranks: give --redundant 4, 9, 14"
    )
    assert said.count(line) == 1 and all(
        any(line in note for note in one["notes"]) for one in found
    )
    assert replay(tokens, "--ep", "5,4")["ranks"] == 4  # one is left: a recording, not a table
    error = refused(capsys, tokens, "--ep", "5,7")
    assert "over 5 ranks: give --redundant 4, 9, 14" in error
    assert "over 7 ranks: give --redundant 5, 12, 19" in error
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[*TRIVIAL, 1, 2, 3, 4]] * 3}))
    found = replay(tokens, "--ep", "4,8,10", "--placement", str(path))["compared"]
    assert [one["ranks"] for one in found] == [4, 10]
    assert any("20 physical experts do not divide over 8 ranks" in n for n in found[0]["notes"])


def test_the_same_ep_size_twice_is_one(tokens):
    assert [one["ranks"] for one in replay(tokens, "--ep", "4,2,4")["compared"]] == [4, 2]


def test_another_placement_is_read_once_for_all_ep_sizes(tokens, counts, monkeypatch):
    pytest.importorskip("sglang.srt.eplb.eplb_algorithms.deepseek")
    other = tokens.parent / "other.json"
    other.write_text(json.dumps({"logical_count": [list(range(1, 17))] * 3}))
    read = []
    load = dump_files.load_all
    monkeypatch.setattr(
        dump_files, "load_all", lambda paths: read.append(str(paths[0])) or load(paths)
    )
    replay(tokens, "--ep", "2,4,8", "--placement", str(other))
    assert read.count(str(tokens)) == 1 and read.count(str(other)) <= 2


def test_a_recording_beside_that_does_not_fit_is_told_to_be_that_one(
    tokens, counts, tmp_path, capsys
):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": [TRIVIAL] * 3}))
    for options, text in (
        ([], "counts.json: logical_count does not tell the EP size: give --ep"),
        (["--ep", "4"], "counts do not tell how many experts a token has: give --top-k"),
        (
            ["--ep", "8,4", "--top-k", str(TOP_K), "--placement", str(path)],
            "map.json: physical_to_logical_map has 3 layers, the recording has 1",
        ),
    ):
        error = refused(capsys, tokens, "--beside", str(counts), *options)
        assert error.startswith("waterfill-rs: --beside: ") and text in error, error
    assert "--beside: nowhere: there is no such file" in refused(
        capsys, tokens, "--beside", "nowhere"
    )
    # The first one's own fault is not the other's.
    assert "--beside" not in refused(capsys, counts, "--beside", str(tokens))


def test_json_text_is_no_name(tokens, capsys):
    text = json.dumps({"logical_count": [[7] * 16] * 3})
    found = replay(tokens, "--beside", text, "--ep", "4", "--top-k", str(TOP_K))["compared"]
    assert [one["recording"] for one in found] == ["tokens", "the JSON text"]
    mapping = json.dumps({"physical_to_logical_map": [TRIVIAL] * 3})
    found = replay(tokens, "--placement", mapping + " " * 300)
    assert "Experts stand as the JSON text says." in found["notes"]


def test_what_was_left_out_in_reading_is_told_with_a_what_if_too(tokens):
    torch.save({"weight": torch.zeros(2)}, tokens / "model.pth")
    for file in sorted(tokens.glob("*.pt")):
        file.rename(tokens / f"expert_distribution_recorder_1_{file.name}")
    for options in ([], ["--redundant", "4"]):
        notes = replay(tokens, *options)["notes"]
        assert any("1 files were not read: model.pth" in note for note in notes)
        assert any("The EP size is taken to be 4" in note for note in notes)


def test_counts_placed_anew_are_not_said_to_lie_in_order(counts):
    notes = replay(counts, "--ep", "8", "--top-k", "2", "--redundant", "4")["notes"]
    assert not any("in order, without replicas" in note for note in notes)
    assert sum("Tokens are taken to be spread evenly" in note for note in notes) == 1


def test_another_ep_size_does_not_make_a_decode_pass_a_prefill(tmp_path):
    path = save(tmp_path / "per_pass", per_pass)  # 38 tokens a rank, 152 on one
    found = replay(path, "--top-k", str(TOP_K), "--ep", "1,4")["compared"]
    assert [one["ranks"] for one in found] == [1, 4]
    assert {row["phase"] for one in found for row in one["rows"].values()} == {"decode"}


def test_json_text_beside_json_text_is_not_its_own_name(capsys):
    texts = [json.dumps({"logical_count": [[9, 8, 7, more]]}) for more in (6, 5)]
    options = ["--ep", "2", "--top-k", "2"]
    assert main(["replay", texts[0], "--beside", texts[1], *options]) == 0
    said = capsys.readouterr().out
    assert "\nthe JSON text  " in said and "\nthe JSON text (--beside)  " in said
    assert "logical_count" not in said


def test_two_recordings_beside_each_other(tokens, tmp_path, capsys):
    def one_pass(rank):
        content = dump(rank)
        return {**content, "records": content["records"][:1]}

    other = save(tmp_path / "other", one_pass)
    found = replay(tokens, "--beside", str(other))["compared"]
    assert [one["recording"] for one in found] == ["tokens", "other"]
    assert {key[1] for key in found[1]["rows"]} == {100}
    assert all(found[0]["rows"][key] == row for key, row in found[1]["rows"].items())
    same = save(tmp_path / "again", one_pass).rename(tmp_path / "other" / "tokens")
    compared = replay(tokens, "--beside", str(same), "--ep", "2,4")["compared"]
    assert [one["recording"] for one in compared] == [str(tokens)] * 2 + [str(same)] * 2


def test_eplb_is_the_installed_sglangs(tokens, counts, capsys):
    deepseek = pytest.importorskip("sglang.srt.eplb.eplb_algorithms.deepseek")
    found = replay(counts, "--ep", "8", "--top-k", "2", "--redundant", "4", "--placement", "eplb")
    mapping = deepseek.rebalance_experts(torch.tensor([COUNTS]), 16, 1, 1, 8, False)[0][0].tolist()
    rows, copies = [0] * 8, {logical: mapping.count(logical) for logical in mapping}
    for physical, logical in enumerate(mapping):
        before = mapping[:physical].count(logical)
        rows[physical // 2] += (COUNTS[logical] + copies[logical] - 1 - before) // copies[logical]
    assert sum(rows) == sum(COUNTS)
    home = found["rows"][0, 0, "home"]
    assert home["routed_max"] == max(rows) < 269, "sglang's default place has 269"
    assert "for this very recording" in capsys.readouterr().out
    # The counts of another recording: here the same ones, so the same places.
    other = ["--ep", "8", "--top-k", "2", "--redundant", "4", "--placement", str(counts)]
    assert replay(counts, *other)["rows"] == found["rows"]
    assert "12 experts in 1 layers, the recording has 16 in 3" in refused(
        capsys, tokens, "--placement", str(counts)
    )


def test_eplb_without_sglang_is_a_clear_error(tokens, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("sglang.srt.eplb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sglang.srt.eplb", None)
    error = refused(capsys, tokens, "--placement", "eplb")
    assert "sglang's own EPLB, which cannot be imported" in error and "install sglang" in error


TRIVIAL = list(range(EXPERTS))


@pytest.mark.parametrize(
    "content, options, text",
    [
        ([TRIVIAL] * 2, [], "physical_to_logical_map has 2 layers, the recording has 3"),
        (
            [[*TRIVIAL[:-1], 0]] * 3,
            [],
            "of layer 0: lacks expert 15: the recording has experts 0 to 15",
        ),
        ([[*TRIVIAL, 16, 0, 0, 0]] * 3, [], "of layer 0: names expert 16"),
        ([[*TRIVIAL, 3]] * 3, [], "17 physical experts do not divide over 4 ranks"),
        (
            [[*TRIVIAL, 1, 2, 3, 4]] * 3,
            ["--redundant", "8"],
            "has 4 redundant experts, --redundant is 8",
        ),
        ([[0.5] * 16] * 3, [], "physical_to_logical_map[0, 0] is 0.5: give whole numbers"),
        ([[0], [1, 2]], [], "is no array"),
    ],
)
def test_maps_that_do_not_fit_are_refused(content, options, text, tokens, tmp_path, capsys):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"physical_to_logical_map": content}))
    error = refused(capsys, tokens, "--placement", str(path), *options)
    assert error.startswith(f"waterfill-rs: {path}: ") and text in error


def test_options_that_cannot_be_are_refused(tokens, counts, tmp_path, capsys):
    error = refused(capsys, tokens, "--placement", "nowhere")
    assert (
        "--placement nowhere: there is no such file or folder: give trivial, spread, eplb, place, a file"
        in error
    )
    assert "--redundant -1: give at least 0" in refused(capsys, tokens, "--redundant", "-1")
    assert "--ep 0: give at least 1" in refused(capsys, tokens, "--ep", "4,0")
    assert "give --ep" in refused(capsys, counts, "--top-k", "2", "--redundant", "4")
    error = refused(capsys, tokens, "--ep", "2,4", "--plot", str(tmp_path / "x.png"))
    assert "--plot draws one recording at one EP size" in error
    with pytest.raises(SystemExit):
        main(["replay", str(tokens), "--ep", "4;8"])
    assert "'4;8': give a whole number, or several like 8,16,32" in capsys.readouterr().err
    for options in (["--placement", ""], ["--beside", ""]):
        with pytest.raises(SystemExit):
            main(["replay", str(tokens), *options])
        assert f"{options[0]}: is empty: give a file or a folder" in capsys.readouterr().err
