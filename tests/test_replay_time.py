"""The replay with a cost model: one mean for all policies and the bound, and microseconds."""

import json
import re

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import LAYERS, RANKS, dump
from test_replay_phases import served  # noqa: F401

from waterfill_rs.cli import main

ROOFLINE = "roofline:2,0.1,8"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "recorded"
    path.mkdir()
    for rank in range(RANKS):
        torch.save(dump(rank), path / f"{rank}.pt")
    return path


def replay(folder, capsys, *options):
    """The JSON's rows by policy, and what was printed."""
    out = folder.parent / "out.json"
    assert main(["replay", str(folder), "--json", str(out), *options]) == 0
    rows = {}
    for row in json.loads(out.read_text())["rows"]:
        rows.setdefault(row["policy"], []).append(row)
    return rows, capsys.readouterr().out


def line(said, start, number=0):
    """The fields of the line that starts so."""
    return [row.split() for row in said.splitlines() if row.startswith(start)][number]


def total(rows, field):
    return sum(row[field] for row in rows)


def test_all_policies_and_the_bound_have_the_mean_of_shared_experts_at_home(folder, capsys):
    rows, said = replay(folder, capsys, "--cost-model", ROOFLINE)
    home = rows["home"]
    for policy, own in rows.items():
        for at_home, row in zip(home, own, strict=True):
            assert row["home_mean"] == at_home["mean"], policy
            assert row["mean"] == sum(row["loads"]) / RANKS
            assert row["optimum"] == at_home["optimum"] <= row["max"], policy
    # Sums of their own differ, so what is divided by them cannot be compared.
    assert total(rows["live"], "mean") != total(home, "mean")
    mean = total(home, "mean")
    for policy, own in rows.items():
        _, ratio, worst, microseconds, _ = line(said, policy)
        assert ratio == f"{total(own, 'max') / mean:.4f}"
        assert worst == f"{max(row['max'] / row['home_mean'] for row in own):.4f}"
        assert microseconds == f"{total(own, 'max') / 2 / 1e6:.1f}", "two passes"
    bound = ["bound", f"{total(home, 'optimum') / mean:.4f}", f"{total(home, 'optimum') / 2e6:.1f}"]
    assert line(said, "bound") == bound and bound[1:] == line(said, "live")[1:4:2]
    assert "us a pass: the slowest rank's time, summed over layers, mean over passes." in said


def test_rows_have_no_microseconds_and_one_mean_anyway(folder, capsys):
    rows, said = replay(folder, capsys)
    assert all(row["mean"] == row["home_mean"] for own in rows.values() for row in own)
    assert "us a pass" not in said and len(line(said, "bound")) == 2


def test_home_need_not_be_asked_for(folder, capsys):
    rows, said = replay(folder, capsys, "--cost-model", ROOFLINE)
    few, alone = replay(folder, capsys, "--cost-model", ROOFLINE, "--policy", "live")
    assert few["live"] == rows["live"]
    assert line(alone, "live") == line(said, "live") and line(alone, "bound") == line(said, "bound")


def test_each_phase_has_the_microseconds_of_its_passes(served, capsys):  # noqa: F811
    rows, said = replay(served, capsys, "--cost-model", ROOFLINE)
    for number, (phase, passes) in enumerate((("prefill", 2), ("decode", 40))):
        own = [row for row in rows["home"] if row["phase"] == phase]
        assert len(own) == passes * 2
        assert line(said, "home", number)[3] == f"{total(own, 'max') / passes / 1e6:.1f}"


def test_several_ep_sizes_have_a_table_of_microseconds(folder, capsys):
    command = ["replay", str(folder), "--ep", "2,4", "--cost-model", ROOFLINE]
    assert main([*command, "--json", str(folder.parent / "out.json")]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^recorded ", said, re.MULTILINE)) == 4
    for number, one in enumerate(json.loads((folder.parent / "out.json").read_text())["compared"]):
        live = [row for row in one["rows"] if row["policy"] == "live"]
        assert len(live) == (LAYERS - 1) * 2
        times = line(said, "recorded ", 2 + number)
        assert times[-2:] == [
            f"{total(live, 'max') / 2e6:.1f}",
            f"{total(live, 'optimum') / 2e6:.1f}",
        ]


@pytest.mark.parametrize("mapping", [None, [0, 1, 2, 0]])
def test_each_rank_may_have_one_expert(tmp_path, capsys, mapping):
    path = tmp_path / "counts.json"
    counts = [400, 16, 24, 8] if mapping is None else [400, 16, 24]
    content = {"logical_count": [counts]}
    if mapping:
        content["physical_to_logical_map"] = [mapping]
    path.write_text(json.dumps(content))
    options = ("--ep", "4", "--top-k", "2", "--cost-model", ROOFLINE)
    rows, _ = replay(path, capsys, *options)
    routed = [200, 16, 24, 200] if mapping else counts
    tokens = sum(counts) // 2 // 4

    def us(rows):
        return max(2, 0.8 * -(-rows // 8)) if rows else 0

    home = [round(1e6 * (us(own) + us(tokens))) for own in routed]
    assert rows["home"][0]["loads"] == home
    assert rows["live"][0]["max"] == rows["live"][0]["optimum"] < max(home)
    assert ("joint" in rows) == (mapping is not None)
