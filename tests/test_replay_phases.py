"""Prefill and decode in a recording: told apart, weighted by what takes time, each with its own verdict."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs import CostModel
from waterfill_rs.cli import main

RANKS, EXPERTS, TOP_K, LAYERS = 4, 16, 4, 2
PREFILL, DECODE, IDLE = 1, 2, 4
LEVEL = [[rank * 4 + token % 4 for rank in range(RANKS)] for token in range(400)]
"""Each token has one expert on each rank."""


def ids(tokens):
    """``[L, tokens, 8]`` of the same ids in every layer."""
    found = torch.full((LAYERS, len(tokens), 8), -1, dtype=torch.int32)
    if tokens:
        found[:, :, :TOP_K] = torch.tensor(tokens, dtype=torch.int32)
    return found


def tiny(pass_id, rank):
    """Three tokens, drawn from the first half of the experts more often."""
    generator = torch.Generator().manual_seed(pass_id * RANKS + rank)
    drawn = torch.rand(3, EXPERTS, generator=generator) + torch.linspace(0.3, 0, EXPERTS)
    return drawn.topk(TOP_K).indices.tolist()


def record(folder, passes, field="topk_ids_of_layer"):
    """``passes``: id to ``(mode, tokens)`` a rank; a mode of None is not recorded."""
    folder.mkdir(exist_ok=True)
    for rank in range(RANKS):
        records = []
        for pass_id, by_rank in passes.items():
            mode, tokens = by_rank[rank]
            # In an order of its own: ranks whose rows are all the same are no EP ranks.
            values = ids(tokens[rank:] + tokens[:rank])
            if field == "global_physical_count":
                flat = values[0][values[0] >= 0]
                values = torch.bincount(flat, minlength=EXPERTS).repeat(LAYERS, 1).int()
            one = {"forward_pass_id": pass_id, "rank": rank, field: values}
            records.append(one if mode is None else {**one, "forward_mode": mode})
        mapping = torch.arange(EXPERTS).repeat(LAYERS, 1)
        content = {"records": records, "last_physical_to_logical_map": mapping}
        torch.save(content, folder / f"{rank}.pt")
    return folder


def replay(folder, capsys, *options):
    """The JSON's rows, and what was printed."""
    out = folder.parent / "out.json"
    assert main(["replay", str(folder), "--json", str(out), *options]) == 0
    return json.loads(out.read_text())["rows"], capsys.readouterr().out


@pytest.fixture
def served(tmp_path):
    """Two level prefills of 1,600 tokens, then 40 uneven decode passes of 12."""
    passes = {i: [(PREFILL, LEVEL)] * RANKS for i in (0, 1)}
    passes |= {i: [(DECODE, tiny(i, rank)) for rank in range(RANKS)] for i in range(100, 140)}
    return record(tmp_path / "served", passes)


def part_gone(rows, phase):
    """What live takes off home, of rows or of time."""
    sums = {
        policy: sum(r["max"] for r in rows if r["policy"] == policy and r["phase"] in phase)
        for policy in ("home", "live")
    }
    return 1 - sums["live"] / sums["home"]


def test_tiny_decode_passes_do_not_make_it_worth_turning_on(served, capsys):
    rows, said = replay(served, capsys)
    assert {row["pass"]: row["phase"] for row in rows} == {
        i: "prefill" if i < 2 else "decode" for i in (0, 1, *range(100, 140))
    }
    assert part_gone(rows, ("prefill",)) == 0 and part_gone(rows, ("decode",)) > 0.1
    prefill, decode = said.split("\ndecode: 40 passes\n")
    assert "prefill: 2 passes" in prefill
    assert "in every layer of every pass (2 layers, 2 passes)" in prefill
    assert "Live counts take 0.0% off the slowest rank's rows" in prefill
    assert "no shared row is placed" in decode
    assert f"take {part_gone(rows, ('decode',)):.1%} off the slowest rank's rows there" in decode
    # 2 passes of 1600 tokens, 40 of 12.
    assert f"Prefill has {3200 / 3680:.1%} of the rows" in decode
    assert "worth turning on" not in said and said.count("little to gain here") == 2
    assert said.endswith("told apart by forward_mode.\n")


def test_tables_weigh_a_pass_by_its_rows(tmp_path, capsys):
    passes = {i: [(DECODE, tiny(i, rank)) for rank in range(RANKS)] for i in range(100, 104)}
    passes |= {5: [(DECODE, LEVEL[:300])] * RANKS}
    rows, said = replay(record(tmp_path / "served", passes), capsys, "--policy", "home")
    ratio = sum(row["max"] for row in rows) / sum(row["mean"] for row in rows)
    plain = sum(row["max"] / row["mean"] for row in rows) / len(rows)
    assert ratio < 1.03 and plain > 1.1
    assert f"home {ratio:>19.4f}" in said, said


def test_prefill_alone_can_be_worth_it_and_decode_adds_nothing(tmp_path, capsys):
    # Rank 0 gets 120 of 400 routed rows a rank: 1.2 of the mean, below 1 + 1/4.
    uneven = [[0, 4, 8, 12] for _ in range(320)] + [[0, 1, 5, 9] for _ in range(80)]
    passes = {0: [(PREFILL, uneven)] * RANKS}
    passes[1] = [(DECODE, uneven[:3])] * RANKS
    rows, said = replay(record(tmp_path / "served", passes), capsys)
    home = next(r for r in rows if r["policy"] == "home" and r["pass"] == 0)
    # Routed rows of each source: 480, 400, 400, 320; all of them four times; its own 400 tokens stay.
    assert home["routed_max"] == 1920 and home["max"] == 2320 and home["mean"] == 2000
    assert part_gone(rows, ("prefill",)) == pytest.approx(1 - 2000 / 2320)
    assert f"Live counts take {1 - 2000 / 2320:.1%} off" in said and "worth turning on" in said
    whole = LAYERS * 320 / sum(r["max"] for r in rows if r["policy"] == "home")
    assert (
        f"Live counts take {whole:.1%} off the slowest rank's\nrows of prefill and decode" in said
    )
    assert "place experts first" not in said


def test_above_one_and_one_kth_experts_must_be_placed_first(tmp_path, capsys):
    hot = [[0, 1, 2, 4 + token % 12] for token in range(200)]  # three of four rows on rank 0
    passes = {7: [(PREFILL, hot)] * RANKS, 8: [(PREFILL, LEVEL[:200])] * RANKS}
    rows, said = replay(record(tmp_path / "served", passes), capsys)
    live = [row for row in rows if row["policy"] == "live" and row["pass"] == 7]
    assert all(row["max"] == row["optimum"] == row["routed_max"] == 2400 for row in live)
    assert "Shared rows can level 0 of 2 layers in every pass." in said
    assert (
        "For 50.0% of the rows routed max/mean is above 1 + 1/4 = 1.250: place experts first"
        in said
    )
    # The demo says it too, and has no such options.
    assert "waterfill-rs replay --redundant" in said
    _, said = replay(tmp_path / "served", capsys, "--least-tokens", "800")
    assert "2 passes" in said
    record(tmp_path / "served", {7: passes[7]})
    _, said = replay(tmp_path / "served", capsys)
    assert "and never layers 0-1." in said


def test_weights_are_times_where_a_cost_model_is_given(served, capsys):
    rows, said = replay(served, capsys, "--cost-model", "roofline:20,0.08,64")
    model = CostModel.roofline(20, 0.08, 64)
    level = next(r for r in rows if r["pass"] == 0 and r["policy"] == "home")
    # Four experts of 400 rows and the shared one's 400.
    assert level["max"] == 5 * model.cost(400)
    home = [row for row in rows if row["policy"] == "home"]
    prefill = sum(row["mean"] for row in home if row["phase"] == "prefill")
    share = prefill / sum(row["mean"] for row in home)
    assert share < 0.2, "in decode time is the weights', so the share is another than that of rows"
    assert f"Prefill has {share:.1%} of the time" in said and "off the slowest rank's\ntime" in said


@pytest.mark.parametrize("mode, kept", [("prefill", 2), ("decode", 40), ("all", 42)])
def test_one_phase_alone(served, capsys, mode, kept):
    rows, said = replay(served, capsys, "--forward-mode", mode)
    note = f"\n{42 - kept} of 42 passes are left out: --forward-mode {mode}, --least-tokens 0.\n"
    assert (note in said) == (mode != "all")
    assert len({row["pass"] for row in rows}) == kept and f", {kept} passes\n" in said
    assert ("\nprefill: " in said, "\ndecode: " in said) == (mode != "decode", mode != "prefill")
    assert ("Prefill has" in said) == (mode == "all")


def test_small_passes_are_left_out_and_none_left_is_said(served, capsys):
    rows, _ = replay(served, capsys, "--least-tokens", "13")
    assert {row["pass"] for row in rows} == {0, 1}
    rows, _ = replay(served, capsys, "--least-tokens", "12")
    assert len({row["pass"] for row in rows}) == 42
    command = ["replay", str(served), "--forward-mode", "decode", "--least-tokens", "13"]
    assert main(command) == 2
    assert "no pass is left of 2 prefill, 40 decode; the largest has 1600 tokens" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("field", ["topk_ids_of_layer", "global_physical_count"])
def test_without_modes_the_size_tells(field, tmp_path, capsys):
    passes = {
        3: [(None, LEVEL[:128])] * RANKS,
        4: [(None, LEVEL[:129]), *[(None, LEVEL[:8])] * (RANKS - 1)],
    }
    folder = record(tmp_path / "served", passes, field)
    rows, said = replay(folder, capsys, "--top-k", str(TOP_K))
    assert {row["pass"]: row["phase"] for row in rows} == {3: "decode", 4: "prefill"}
    assert "by size in 2 of 2 passes" in said and "more than 128 tokens" in said


def test_tokens_are_counted_wherever_their_ids_are(tmp_path, capsys):
    tokens = [[-1, 4, 8, 12] for _ in range(129)]
    passes = {3: [(None, tokens), *[(None, LEVEL[:9])] * (RANKS - 1)]}
    rows, _ = replay(record(tmp_path / "served", passes), capsys, "--least-tokens", "156")
    assert {(row["phase"], row["tokens"]) for row in rows} == {("prefill", 156)}


def test_what_if_tokens_of_one_rank_were_on_several_they_keep_their_phase(tmp_path, capsys):
    folder = record(tmp_path / "served", {3: [(None, LEVEL[:200])] * RANKS})
    for rank in range(1, RANKS):
        (folder / f"{rank}.pt").unlink()
    rows, _ = replay(folder, capsys, "--ep", "4", "--placement", "trivial")
    assert {row["phase"] for row in rows} == {"prefill"}


@pytest.mark.parametrize(
    "modes, tokens, phase",
    [
        ((PREFILL, DECODE, DECODE, IDLE), 4, "prefill"),  # as soon as one rank prefills
        ((3, DECODE, DECODE, DECODE), 4, "prefill"),  # MIXED
        ((DECODE, DECODE, IDLE, DECODE), 300, "decode"),
        ((5, 5, 5, 5), 300, "decode"),  # TARGET_VERIFY
        ((9, 9, 9, 9), 4, "decode"),  # other numbers mean other things in other versions
        ((9, 9, 9, IDLE), 300, "prefill"),
    ],
)
def test_a_pass_is_prefill_if_any_rank_prefills(modes, tokens, phase, tmp_path, capsys):
    by_rank = [(mode, LEVEL[: 0 if mode == IDLE else tokens]) for mode in modes]
    rows, _ = replay(record(tmp_path / "served", {5: by_rank}), capsys)
    assert {row["phase"] for row in rows} == {phase}


def test_sums_over_passes_have_no_phase(tmp_path, capsys):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": [[400] * EXPERTS]}))
    rows, said = replay(path, capsys, "--ep", "4", "--top-k", "4")
    assert {row["phase"] for row in rows} == {None}
    assert (
        "all: 1 pass\n" in said
        and "prefill and decode cannot be told apart: the verdict holds for prefills." in said
    )
    command = ["replay", str(path), "--ep", "4", "--top-k", "4", "--forward-mode", "decode"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--forward-mode decode: the counts are sums over passes, which have no phase" in error
