"""Recordings of servers as they run: draft models, pipeline stages, idle ranks, TP, hosts whose files are missing."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import EXPERTS, LAYERS, RANKS, TOP_K, dump, ids_of
from test_replay_counts import PASSES, counts_of, per_pass, received_of
from test_replay_inputs import level, refused, replay

from waterfill_rs.cli import main
from waterfill_rs.replay import dumps

TOP = ["--top-k", str(TOP_K)]
MODES = {
    "per_token": (dump, []),
    "per_pass": (per_pass, TOP),
    "low latency": (lambda rank: per_pass(rank, received_of), TOP),
}
"""What a rank writes, and the options that replay needs."""


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def write(folder, contents):
    """Files named as sglang names them: the time, then the rank."""
    folder.mkdir(exist_ok=True)
    for index, content in enumerate(contents):
        rank = content["records"][0]["rank"]
        torch.save(content, folder / f"expert_distribution_recorder_17549.{index}_{rank}.pt")
    return folder


def every_row(path, tmp_path, *options):
    """What replay writes of the routing, all of it: but not the recording's name and paths, and what was left out of it."""
    out = tmp_path / "rows" / "out.json"
    assert main(["replay", str(path), "--json", str(out), *options]) == 0
    written = json.loads(out.read_text())
    assert written["rows"]
    unlike = ("recording", "paths", "notes")
    return {name: of for name, of in written.items() if name not in unlike}


def field(content):
    first = content["records"][0]
    return "topk_ids_of_layer" if "topk_ids_of_layer" in first else "global_physical_count"


def empty(content, pass_id, tokens=5):
    """A draft model's record: what the gatherer holds after its reset."""
    name = field(content)
    shape = (LAYERS, tokens, 8) if name == "topk_ids_of_layer" else (LAYERS, EXPERTS)
    value = torch.full(shape, -1 if len(shape) == 3 else 0, dtype=torch.int32)
    return {"forward_pass_id": pass_id, "rank": content["records"][0]["rank"], name: value}


def with_draft(content):
    """Two passes of the target, 100 and 101, among a draft's 99 to 102."""
    first, second = content["records"]
    draft = [empty(content, pass_id) for pass_id in (99, 100, 101, 102)]
    return {**content, "records": [draft[0], draft[1], first, second, draft[2], draft[3]]}


# Draft models


def test_a_draft_models_empty_records_change_nothing(mode, tmp_path, capsys):
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    without = every_row(write(tmp_path / "without", contents), tmp_path, *options)
    assert "routed nothing" not in capsys.readouterr().out
    folder = write(tmp_path / "with", [with_draft(content) for content in contents])
    assert every_row(folder, tmp_path, *options) == without
    assert {row["pass"] for row in without["rows"]} == set(PASSES)
    out = capsys.readouterr().out
    assert "16 of 24 records routed nothing, as a draft model's (MTP, EAGLE) do" in out
    assert "2 passes" in out


def test_draft_passes_that_not_every_rank_has_are_no_missing_passes(mode, tmp_path):
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    without = every_row(write(tmp_path / "without", contents), tmp_path, *options)
    contents[2]["records"].append(empty(contents[2], 700))
    assert every_row(write(tmp_path / "with", contents), tmp_path, *options) == without


def test_an_idle_rank_takes_part_with_no_rows(tmp_path):
    """Rank 1 has no request in pass 100: sglang records no token there, and its draft's pass has five."""
    contents = [with_draft(dump(rank)) for rank in range(RANKS)]
    for record in contents[1]["records"]:
        if record["forward_pass_id"] == 100:
            record["topk_ids_of_layer"] = empty(contents[1], 100)["topk_ids_of_layer"][:, :0]
    found = replay(write(tmp_path / "idle", contents), tmp_path)
    for layer in range(1, LAYERS):
        counts = sum(counts_of(rank, 100)[layer] for rank in (0, 2, 3))
        assert found[layer, 100]["optimum"] == level(counts, RANKS, TOP_K)[0]
        assert found[layer, 100]["tokens"] == 3 * 38 and found[layer, 101]["tokens"] == 4 * 38


def test_a_passs_modes_are_those_of_the_ranks_that_routed(tmp_path):
    """EXTEND 1 and TARGET_VERIFY 5 of the target, DECODE 2 of the draft, IDLE 4 of rank 1."""
    contents = [with_draft(dump(rank)) for rank in range(RANKS)]
    for content in contents:
        for record in content["records"]:
            target = bool((record["topk_ids_of_layer"] >= 0).any())
            record["forward_mode"] = {100: 1, 101: 5}[record["forward_pass_id"]] if target else 2
    for record in contents[1]["records"]:
        if record["forward_pass_id"] == 100:
            record.update(
                forward_mode=4, topk_ids_of_layer=empty(contents[1], 100)["topk_ids_of_layer"]
            )
    read = dumps.read([write(tmp_path / "modes", contents)], None, None)
    assert read.modes == {100: [1, 1, 1], 101: [5, 5, 5, 5]} and not read.summed
    counts = [per_pass(rank) for rank in range(RANKS)]
    assert dumps.read([write(tmp_path / "none", counts)], None, TOP_K).modes == {100: [], 101: []}


def test_two_full_records_of_one_number_are_refused(mode, tmp_path, capsys):
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    contents[3]["records"][1]["forward_pass_id"] = 100
    error = refused(write(tmp_path / "twice", contents), capsys, *options)
    assert "forward_pass_id 100 is there twice, and both routed rows" in error


def test_a_recording_of_nothing_but_drafts_is_refused(mode, tmp_path, capsys):
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    for content in contents:
        content["records"] = [empty(content, pass_id) for pass_id in (1, 1, 2)]
    error = refused(write(tmp_path / "empty", contents), capsys, *options)
    assert "record while the server serves" in error


def test_ranks_that_started_and_ended_a_pass_apart_are_joined(mode, tmp_path, capsys):
    """Under traffic, start and dump reach each rank between two of its own passes."""
    make, options = mode
    whole = replay(write(tmp_path / "whole", [make(r) for r in range(RANKS)]), tmp_path, *options)
    contents = [make(rank) for rank in range(RANKS)]
    contents[0]["records"].insert(0, {**contents[0]["records"][0], "forward_pass_id": 99})
    contents[1]["records"].append({**contents[1]["records"][1], "forward_pass_id": 102})
    assert replay(write(tmp_path / "apart", contents), tmp_path, *options) == whole
    assert "2 passes at the beginning or the end, which not every rank" in capsys.readouterr().out


def test_a_pass_missing_in_the_middle_or_far_out_is_refused(mode, tmp_path, capsys):
    make, options = mode
    for number, missing in (("middle", 101), ("far", 500)):
        contents = [make(rank) for rank in range(RANKS)]
        for content in contents:
            last = content["records"][1]
            content["records"].append({**last, "forward_pass_id": 102})
            if missing == 500 and last["rank"] != 2:
                content["records"].append({**last, "forward_pass_id": 500})
        if missing == 101:
            del contents[2]["records"][1]
        error = refused(write(tmp_path / number, contents), capsys, *options)
        assert f"forward_pass_id {missing}: ranks [2] have no record of it" in error


# Pipeline stages


def stage_of(content, layers, later=0):
    """What the stage of these layers writes of a recording; its passes numbered later by as much."""
    name = field(content)
    records = []
    for record in content["records"]:
        values = torch.full_like(record[name], -1 if record[name].dim() == 3 else 0)
        values[layers] = record[name][layers]
        records.append(
            {**record, name: values, "forward_pass_id": record["forward_pass_id"] + later}
        )
    return {**content, "records": records}


def staged(make, later=0):
    """Layer 0 is dense: stage 0 has it and layer 1, stage 1 has layer 2."""
    return [
        stage_of(make(rank), layers, late)
        for layers, late in (([0, 1], 0), ([2], later))
        for rank in range(RANKS)
    ]


def test_pipeline_stages_are_joined_by_their_layers(mode, tmp_path, capsys):
    make, options = mode
    whole = write(tmp_path / "whole", [make(rank) for rank in range(RANKS)])
    whole = every_row(whole, tmp_path, *options)
    assert every_row(write(tmp_path / "staged", staged(make)), tmp_path, *options) == whole
    out = capsys.readouterr().out
    assert "2 pipeline stages were joined by their layers." in out and f"{RANKS} ranks" in out


def test_stages_that_number_passes_apart_keep_their_layers(mode, tmp_path):
    make, options = mode
    whole = write(tmp_path / "whole", [make(rank) for rank in range(RANKS)])
    whole = replay(whole, tmp_path, *options)
    found = replay(write(tmp_path / "staged", staged(make, later=50)), tmp_path, *options)
    assert set(found) == {(1, 100), (1, 101), (2, 150), (2, 151)}
    for (layer, pass_id), row in found.items():
        assert row == {**whole[layer, pass_id - 50 * (layer == 2)], "pass": pass_id}


def test_a_stage_may_have_fewer_tokens_of_a_pass(tmp_path):
    contents = staged(dump)
    for content in contents[RANKS:]:
        for record in content["records"]:
            record["topk_ids_of_layer"] = record["topk_ids_of_layer"][:, :12]
    read = dumps.read([write(tmp_path / "staged", contents)], None, None)
    for rank, ids in enumerate(read.passes[100]):
        assert torch.equal(ids[1], ids_of(rank, 100)[1])
        assert torch.equal(ids[2, :12], ids_of(rank, 100)[2, :12]) and (ids[2, 12:] == -1).all()


def test_an_idle_rank_has_an_empty_file_of_each_stage(tmp_path):
    contents = staged(dump)
    for content in contents:
        if content["records"][0]["rank"] == 2:
            content["records"] = [empty(content, pass_id) for pass_id in PASSES]
    found = replay(write(tmp_path / "staged", contents), tmp_path)
    for (layer, pass_id), row in found.items():
        counts = sum(counts_of(rank, pass_id)[layer] for rank in (0, 1, 3))
        assert row["optimum"] == level(counts, RANKS, TOP_K)[0] and row["tokens"] == 3 * 38
    assert len(found) == 4


def test_a_stage_that_lacks_a_rank_is_named_by_its_layers(mode, tmp_path, capsys):
    make, options = mode
    contents = staged(make)
    del contents[RANKS + 1]
    error = refused(write(tmp_path / "staged", contents), capsys, *options)
    assert (
        "ranks [0, 2, 3] of 4 are here in the pipeline stage of layers 2 to 2, [1] missing" in error
    )


def test_two_recordings_in_one_folder_are_refused(mode, tmp_path, capsys):
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    again = [make(rank) for rank in range(RANKS)]
    for content in again:
        for record in content["records"]:
            record["forward_pass_id"] += 7
    error = refused(write(tmp_path / "two", contents + again), capsys, *options)
    assert "rank 0 is in another file too" in error and "give one dump at a time" in error
    assert error.count("expert_distribution_recorder_") == 2


def test_an_earlier_dump_without_traffic_is_left_out(mode, tmp_path, capsys):
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    contents[2]["records"] = [empty(contents[2], pass_id) for pass_id in PASSES]  # idle
    alone = every_row(write(tmp_path / "alone", contents), tmp_path, *options)
    earlier = [
        {**content, "records": [empty(content, pass_id) for pass_id in (7, 8)]}
        for content in contents
    ]
    capsys.readouterr()
    assert every_row(write(tmp_path / "two", earlier + contents), tmp_path, *options) == alone
    assert "4 files routed nothing, and were left out." in capsys.readouterr().out
    error = refused(write(tmp_path / "empty", earlier + earlier), capsys, *options)
    assert "has no routed row, nor has any other file: record while the server serves" in error


def test_a_dump_without_any_record_is_left_out(mode, tmp_path, capsys):
    """A server that served nothing yet has had no pass at all."""
    make, options = mode
    contents = [make(rank) for rank in range(RANKS)]
    alone = every_row(write(tmp_path / "alone", contents), tmp_path, *options)
    folder = write(tmp_path / "two", contents)
    for rank in range(RANKS):
        earlier = {**make(rank), "records": []}
        torch.save(earlier, folder / f"expert_distribution_recorder_16000.5_{rank}.pt")
    capsys.readouterr()
    assert every_row(folder, tmp_path, *options) == alone
    assert "4 files hold no record, as dumps without traffic do" in capsys.readouterr().out
    # Its names tell of ranks whose other files are missing.
    folder = write(tmp_path / "three", contents[:2])
    torch.save({**make(3), "records": []}, folder / "expert_distribution_recorder_16000.5_3.pt.gz")
    error = refused(folder, capsys, *options)
    assert "3.pt.gz: holds no record, and by its name is rank 3's" in error
    for file in folder.iterdir():
        torch.save({**make(0), "records": []}, file)
    error = refused(folder, capsys, *options)
    assert "holds no record, nor does any other file: record while the server serves" in error


def test_each_stage_writes_the_same_statistics(tmp_path, capsys):
    counts = sum(counts_of(rank, 100) for rank in range(RANKS))
    files = [tmp_path / f"expert_distribution_recorder_1.{stage}.pt" for stage in range(2)]
    for file in files:
        torch.save({"rank": 0, "logical_count": counts[None]}, file)
    found = replay(tmp_path, tmp_path, "--ep", str(RANKS), *TOP)
    assert found[1, 0]["optimum"] == level(counts[1], RANKS, TOP_K)[0]
    assert "2 files hold the same counts" in capsys.readouterr().out
    torch.save({"rank": 0, "logical_count": counts[None] + 1}, files[1])
    error = refused(tmp_path, capsys, "--ep", str(RANKS), *TOP)
    assert "a second file with 'logical_count', and not that of" in error


# Ranks and files that are not as many


def as_rank(content, rank):
    return {**content, "records": [{**record, "rank": rank} for record in content["records"]]}


@pytest.mark.parametrize("make, options", [MODES["per_token"], MODES["per_pass"]])
@pytest.mark.parametrize(
    "ranks", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]], ids=["TP4", "TP4 by rank", "EP2 of TP4"]
)
def test_ranks_that_all_routed_all_tokens_are_no_sources(make, options, ranks, tmp_path, capsys):
    """sglang without all-to-all: rank is the EP rank, or (0.5.13) the TP rank, and every rank routes every token."""
    folder = write(tmp_path / "tp", [as_rank(make(0), rank) for rank in ranks])
    error = refused(folder, capsys, *options)
    assert "hold the same rows" in error and "TP without EP" in error, error
    assert "Record with --moe-a2a-backend deepep" in error


def test_ranks_that_split_experts_are_taken_once(tmp_path, capsys):
    """EP 4, two GPUs to an expert."""
    once = every_row(write(tmp_path / "once", [dump(rank) for rank in range(RANKS)]), tmp_path)
    twice = [dump(rank) for rank in range(RANKS) for _ in range(2)]
    capsys.readouterr()
    assert every_row(write(tmp_path / "twice", twice), tmp_path) == once
    assert "8 files are of 4 ranks" in capsys.readouterr().out


def test_ranks_of_other_hosts_are_missed(mode, tmp_path, capsys):
    make, options = mode
    folder = write(tmp_path / "second_host", [make(rank) for rank in (2, 3)])
    error = refused(folder, capsys, *options)
    assert "ranks [2, 3] of 4 are here, [0, 1] missing" in error
    assert "each host writes those of its own ranks" in error


def test_counts_of_a_low_latency_recording_tell_the_ranks_that_are_missed(tmp_path, capsys):
    make, options = MODES["low latency"]
    for ranks, least in (([0, 1], 4), ([0], 2)):
        folder = write(tmp_path / f"first_{len(ranks)}", [make(rank) for rank in ranks])
        error = refused(folder, capsys, *options)
        own = f"its own {EXPERTS // least} of 16 experts, as {least} ranks or more record them"
        assert own in error, error
        assert f"the files of {len(ranks)} are here" in error


@pytest.mark.parametrize("name", MODES)
def test_the_ep_size_is_said_to_be_taken_where_nothing_tells_it(name, tmp_path, capsys):
    """Ranks 0 and 1 of 4: only a low-latency recording tells, and a recorded dispatch (below)."""
    make, options = MODES[name]
    told = name == "low latency"
    taken = "The EP size is taken to be {0}: the files of {0} ranks are here, and nothing in them tells of more."
    whole = write(tmp_path / "whole", [make(rank) for rank in range(RANKS)])
    every_row(whole, tmp_path, *options)
    assert (taken.format(4) in capsys.readouterr().out) is not told
    every_row(whole, tmp_path, *options, "--ep", "4")
    assert "The EP size" not in capsys.readouterr().out
    half = write(tmp_path / "half", [make(rank) for rank in range(2)])
    if told:
        assert "the files of 2 are here" in refused(half, capsys, *options)
    else:
        every_row(half, tmp_path, *options)
        assert taken.format(2) in capsys.readouterr().out


def test_ranks_over_which_experts_do_not_divide_are_too_few(mode, tmp_path, capsys):
    make, options = mode
    folder = write(tmp_path / "three", [make(rank) for rank in range(3)])
    error = refused(folder, capsys, *options)
    assert "the files of 3 ranks are here, and 16 physical experts do not divide over 3" in error
    assert "give every rank's file (each host writes those of its own ranks)" in error


def test_deepep_tells_the_ranks_that_are_missed(tmp_path, capsys):
    contents = [dump(rank) for rank in range(2)]
    for content, sent in zip(contents, ([9, 9, 9, 9], torch.ones(4)), strict=True):
        for record in content["records"]:
            record["misc_objects"] = [{"layer_id": 1, "num_tokens_per_rank": sent}]
    folder = write(tmp_path / "first_host", contents)
    error = refused(folder, capsys)
    assert "its dispatch went to 4 ranks, and the files of 2 are here" in error
    assert "--ep is 2" in refused(folder, capsys, "--ep", "2")


def test_more_ranks_recorded_than_ep_says(mode, tmp_path, capsys):
    make, options = mode
    folder = write(tmp_path / "four", [make(rank) for rank in range(RANKS)])
    error = refused(folder, capsys, *options, "--ep", "2")
    assert "ranks [0, 1, 2, 3] of 2 are here, none missing: 4 ranks recorded" in error
    assert (
        "leave --ep out, or give --ep 2 --placement trivial to see what 2 ranks would do" in error
    )
    error = refused(folder, capsys, *options, "--ep", "8")
    assert "[4, 5, 6, 7] missing: give every rank's file (each host" in error
    assert "or --ep 8 --placement trivial to see what 8 ranks would do" in error
    assert replay(folder, tmp_path, *options, "--ep", "8", "--placement", "trivial")


@pytest.mark.parametrize("make, options", [MODES["per_token"], MODES["per_pass"]])
def test_one_rank_alone_is_said_to_be_one(make, options, tmp_path, capsys):
    replay(write(tmp_path / "one", [make(0)]), tmp_path, *options)
    assert "Only rank 0's file is here, so this is EP 1" in capsys.readouterr().out


def test_a_rank_far_out_takes_no_time(tmp_path, capsys):
    folder = write(tmp_path / "far", [dump(0), as_rank(dump(1), 10**12)])
    assert "[1, 2, 3, 4, 5, 6, 7, 8] and more missing" in refused(folder, capsys)


MTP = [(41, 1), 38, 39, (42, 5), 40, 41, (43, 5), 42, 43, (44, 5), 44, 45, (45, 5), 46, 47]
"""A server's records in the order in which sglang 0.5.23 writes them: the target's by pass and mode, and its draft's passes."""


def as_mtp_server(rank, per_token):
    """Of an MTP server: the draft's passes have the target's numbers, and route nothing."""
    records = []
    for pass_id, mode in ((p if isinstance(p, tuple) else (p, 2)) for p in MTP):
        ids = ids_of(rank, pass_id)
        if mode == 2:
            ids[:] = -1
        record = {"forward_pass_id": pass_id, "rank": rank, "gatherer_key": "primary"}
        counts = torch.stack([torch.bincount(of[of >= 0], minlength=EXPERTS) for of in ids])
        record["global_physical_count"] = counts.int()
        if per_token:
            record |= {"forward_mode": mode, "topk_ids_of_layer": ids, "misc_objects": []}
        records.append(record)
    return {**dump(rank), "records": records}


def test_recordings_of_an_mtp_server(tmp_path):
    """In both modes of the recorder they are the target's passes, and what each policy makes of them is the same."""
    written = {
        per_token: write(
            tmp_path / str(per_token), [as_mtp_server(rank, per_token) for rank in range(RANKS)]
        )
        for per_token in (True, False)
    }
    tokens = every_row(written[True], tmp_path)
    counts = every_row(written[False], tmp_path, *TOP)
    assert {row["pass"] for row in tokens["rows"]} == {41, 42, 43, 44, 45}
    keys = ("layer", "pass", "policy", "tokens", "routed_max", "max", "optimum")
    for policy in ("home", "live"):
        of = [
            [[row[key] for key in keys] for row in found["rows"] if row["policy"] == policy]
            for found in (tokens, counts)
        ]
        assert of[0] == of[1] and len(of[0]) == 5 * (LAYERS - 1)
    found = replay(written[True], tmp_path)
    routed = sum(counts_of(rank, 41)[1] for rank in range(RANKS))
    optimum, routed_max = level(routed, RANKS, TOP_K)
    assert (found[1, 41]["optimum"], found[1, 41]["routed_max"]) == (optimum, routed_max)


def test_a_recording_of_two_pipeline_stages_has_each_layer_once(tmp_path):
    """Two ranks a stage, 6 tokens each, top 4 of 16, no dense layer: each stage has -1 in the other's layers."""
    random = torch.Generator().manual_seed(7)
    ids = torch.rand(2, 4, 6, 16, generator=random).topk(4).indices.int()  # [rank, layer, token, 4]
    contents = []
    for layers in (slice(0, 2), slice(2, 4)):
        for rank in range(2):
            own = torch.full((4, 6, 8), -1, dtype=torch.int32)
            own[layers, :, :4] = ids[rank, layers]
            record = {"forward_pass_id": 10, "rank": rank, "forward_mode": 1}
            record |= {"gatherer_key": "primary", "topk_ids_of_layer": own, "misc_objects": []}
            places = torch.arange(16).repeat(4, 1)
            contents.append({"records": [record], "last_physical_to_logical_map": places})
    found = replay(write(tmp_path / "stages", contents), tmp_path)
    assert set(found) == {(layer, 10) for layer in range(4)}
    for (layer, _), row in found.items():
        routed = torch.bincount(ids[:, layer].flatten().long(), minlength=16)
        optimum, routed_max = level(routed, 2, 4)
        assert (row["tokens"], row["mean"]) == (12, 30)
        assert (row["optimum"], row["routed_max"]) == (optimum, routed_max)
