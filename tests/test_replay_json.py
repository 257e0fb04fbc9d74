"""The replay's JSON: what was read and assumed, and a summary that a plain computation over its rows gives too."""

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import EXPERTS, RANKS, dump
from test_replay_phases import PREFILL, record, served  # noqa: F401

import waterfill_rs
from waterfill_rs.cli import main
from waterfill_rs.policies.comparison import POLICIES

ROOFLINE = "roofline:2,0.1,8"


def replay(folder, capsys, *options):
    """The JSON's object, and what was printed."""
    out = folder.parent / "out.json"
    assert main(["replay", str(folder), "--json", str(out), *options]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def total(rows, field):
    return sum(row[field] for row in rows)


def test_it_says_what_was_read_and_in_which_unit(served, capsys):  # noqa: F811
    found, said = replay(served, capsys)
    assert found["version"] == waterfill_rs.__version__ and found["paths"] == [str(served)]
    assert (found["cost_model"], found["unit"]) == ("rows", "rows")
    assert found["notes"] and all(note in said for note in found["notes"])
    found, _ = replay(served, capsys, "--cost-model", ROOFLINE)
    assert (found["cost_model"], found["unit"]) == (ROOFLINE, "picoseconds")
    found, _ = replay(served, capsys, "--beside", str(served), "--ep", "2,4")
    assert found["paths"] == [str(served)] * 2 and found["unit"] == "rows"
    assert [one["ranks"] for one in found["compared"]] == [2, 4] * 2
    assert all(one["summary"]["phases"] for one in found["compared"])


@pytest.mark.parametrize("model", ["rows", ROOFLINE])
def test_the_summary_is_that_of_the_rows(served, capsys, model):  # noqa: F811
    found, said = replay(served, capsys, "--cost-model", model)
    phases = found["summary"]["phases"]
    assert [(one["phase"], one["passes"], one["layers"]) for one in phases] == [
        ("prefill", 2, 2),
        ("decode", 40, 2),
    ]
    for one in phases:
        rows = {}
        for row in found["rows"]:
            if row["phase"] == one["phase"]:
                rows.setdefault(row["policy"], []).append(row)
        mean = total(rows["home"], "mean")
        assert list(one["policies"]) == list(rows)
        for policy, own in rows.items():
            numbers = one["policies"][policy]
            assert numbers["ratio"] == pytest.approx(total(own, "max") / mean)
            assert f"{policy:<14}{numbers['ratio']:>10.4f}{numbers['worst']:>9.4f}" in said
            tokens = total(own, "tokens")
            copies = sum(row["extra_copies"] * row["tokens"] for row in own) / tokens
            assert numbers["extra_copies"] == pytest.approx(copies)
            loads = [sum(row["loads"][rank] for row in own) / mean for rank in range(RANKS)]
            assert one["rank_loads"][policy] == pytest.approx(loads)
            if policy != "home":
                gain = 1 - total(own, "max") / total(rows["home"], "max")
                assert one["gain"][policy] == pytest.approx(gain)
            if model == ROOFLINE:
                assert numbers["us_a_pass"] == total(own, "max") / one["passes"] / 1e6
            else:
                assert "us_a_pass" not in numbers
        assert one["bound"]["ratio"] == pytest.approx(total(rows["live"], "optimum") / mean)
        assert ("us_a_pass" in one["bound"]) == (model == ROOFLINE)
        assert len(one["hottest"]) == 4 and one["hottest"][0]["times"] >= one["hottest"][1]["times"]


def test_the_verdict_is_the_printed_one(served, capsys):  # noqa: F811
    found, said = replay(served, capsys)
    prefill, decode = found["summary"]["phases"]
    assert (prefill["verdict"], prefill["live_gain"]) == ("little to gain here", 0)
    assert decode["verdict"] is None and decode["gain"]["live"] > 0.1
    assert found["summary"]["verdict"] == "little to gain here" and said.count("to gain here") == 2
    found, _ = replay(served, capsys, "--forward-mode", "decode")
    assert found["summary"]["verdict"] is None and found["summary"]["live_gain"] is None
    found, _ = replay(served, capsys, "--policy", "own-counts")
    (phase, _) = found["summary"]["phases"]
    assert phase["verdict"] is None and "gain" not in phase


def test_each_of_several_has_its_verdict(tmp_path, capsys):
    hot = [[0, 1, 2, 4 + token % 12] for token in range(200)]
    folder = record(tmp_path / "served", {7: [(PREFILL, hot)] * RANKS})
    found, _ = replay(folder, capsys, "--ep", "1,4")
    verdicts = [one["summary"]["verdict"] for one in found["compared"]]
    assert verdicts == ["little to gain here", "place experts first"]


def test_replicas_have_their_logical_ids(tmp_path, capsys):
    folder = tmp_path / "recorded"
    folder.mkdir()
    mapping = torch.tensor([*range(EXPERTS - 1), 0]).repeat(3, 1)
    for rank in range(RANKS):
        torch.save(dump(rank, last_physical_to_logical_map=mapping), folder / f"{rank}.pt")
    found, _ = replay(folder, capsys)
    assert found["redundant"] == 1
    hot = {one["physical"]: one for one in found["summary"]["phases"][0]["hottest"]}
    assert hot[EXPERTS - 1]["logical"] == 0 and hot[EXPERTS - 1]["rank"] == RANKS - 1
    assert all(one["logical"] == number for number, one in hot.items() if number < EXPERTS - 1)


def test_each_row_is_one_line(served, tmp_path):  # noqa: F811
    out = tmp_path / "out.json"
    for options in ([], ["--ep", "2,4"]):
        assert main(["replay", str(served), "--json", str(out), *options]) == 0
        found = json.loads(out.read_text())
        rows = [row for one in found.get("compared", [found]) for row in one["rows"]]
        lines = [line.rstrip(",") for line in out.read_text().splitlines()]
        assert [json.loads(line) for line in lines if line.startswith('{"layer"')] == rows


def keys(value):
    """All keys in it, but policies."""
    if isinstance(value, dict):
        return {key for key in value if key not in POLICIES}.union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_the_docs_name_each_key(served, capsys):  # noqa: F811
    text = (Path(__file__).parents[1] / "docs" / "replay.md").read_text()
    named = set(re.findall("`([a-z_-]+)`", text.split("## The JSON file", 1)[1]))
    found = keys(replay(served, capsys, "--cost-model", ROOFLINE)[0])
    found |= keys(replay(served, capsys, "--ep", "2,4")[0])
    found |= keys(replay(served, capsys, "--redundant", "8", "--cost-model", ROOFLINE)[0])
    values = {"rows", "picoseconds", "prefill", "decode", "null"} | set(POLICIES)
    assert named - values == found - values
