"""The replay of dumps that hold counts, and of replicas: against the same routing with its tokens."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from test_replay import EXPERTS, LAYERS, RANKS, TOKENS, TOP_K, dump, ids_of

import waterfill_rs
from waterfill_rs.cli import main

PASSES = (100, 101)
PER_RANK = EXPERTS // RANKS


def counts_of(rank, pass_id):
    """``[L, P]``"""
    layers = (layer.flatten() for layer in ids_of(rank, pass_id))
    return torch.stack([torch.bincount(ids[ids >= 0], minlength=EXPERTS) for ids in layers])


def per_pass(rank, counts=counts_of):
    records = [
        dict(forward_pass_id=p, rank=rank, global_physical_count=counts(rank, p).int())
        for p in PASSES
    ]
    return dict(
        records=records, last_physical_to_logical_map=torch.arange(EXPERTS).repeat(LAYERS, 1)
    )


def received_of(rank, pass_id):
    """What the low-latency gatherer sees: own experts only, of all sources."""
    counts = sum(counts_of(source, pass_id) for source in range(RANKS))
    mine = torch.zeros_like(counts)
    block = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    mine[:, block] = counts[:, block]
    return mine


def replay(tmp_path, files, *options):
    """Rows by layer, pass and policy."""
    folder = tmp_path / "dump"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        torch.save(content, folder / name)
    out = tmp_path / "replay.json"
    assert main(["replay", str(folder), "--json", str(out), *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    return {(row["layer"], row["pass"], row["policy"]): row for row in rows}


@pytest.fixture
def of_tokens(tmp_path_factory):
    files = {f"{rank}.pt": dump(rank) for rank in range(RANKS)}
    return replay(tmp_path_factory.mktemp("tokens"), files)


def test_counts_of_each_source_give_what_tokens_give(tmp_path, of_tokens, capsys):
    found = replay(tmp_path, {f"{r}.pt": per_pass(r) for r in range(RANKS)}, "--top-k", str(TOP_K))
    assert {policy for _, _, policy in found} == {"home", "own-counts", "live"}
    for key, row in found.items():
        assert row["extra_copies"] is None
        assert {k: row[k] for k in ("tokens", "routed_max", "mean", "optimum")} == {
            k: of_tokens[key][k] for k in ("tokens", "routed_max", "mean", "optimum")
        }
        if key[2] != "own-counts":  # which does not know the visits
            assert row["max"] == of_tokens[key]["max"]
    assert (
        "sglang-static is left out: this dump holds counts, not tokens." in capsys.readouterr().out
    )


def test_received_counts_have_no_source(tmp_path, of_tokens, capsys):
    files = {f"{rank}.pt": per_pass(rank, received_of) for rank in range(RANKS)}
    found = replay(tmp_path, files, "--top-k", str(TOP_K))
    assert {policy for _, _, policy in found} == {"home", "live"}
    assert all(row["max"] == of_tokens[key]["max"] for key, row in found.items())
    assert "what each rank received" in capsys.readouterr().out


def test_stat_is_a_ring_of_steps(tmp_path, of_tokens):
    steps = torch.zeros(5, LAYERS, EXPERTS, dtype=torch.int32)
    for step, pass_id in ((3, 100), (1, 101)):
        steps[step] = sum(counts_of(rank, pass_id) for rank in range(RANKS))
    content = dict(rank=0, logical_count=steps, average_utilization_rate_over_window=None)
    found = replay(tmp_path, {"stat.pt": content}, "--top-k", str(TOP_K), "--ep", str(RANKS))
    assert {pass_id for _, pass_id, _ in found} == {1, 3}
    for (layer, step, policy), row in found.items():
        assert row["max"] == of_tokens[layer, {3: 100, 1: 101}[step], policy]["max"]


def test_logical_counts_as_json_and_by_rank(tmp_path, of_tokens):
    by_rank = torch.stack([counts_of(rank, 100) for rank in range(RANKS)])
    layout = dict(logical_count=by_rank, logical_count_layout="rank_layer_expert")
    found = replay(tmp_path, {"ranks.pt": layout}, "--top-k", str(TOP_K))
    for policy in ("home", "live"):
        assert found[1, 0, policy]["max"] == of_tokens[1, 100, policy]["max"]
    assert (1, 0, "own-counts") in found
    path, out = tmp_path / "counts.json", tmp_path / "json.json"
    path.write_text(json.dumps({"logical_count": by_rank.sum(0).tolist()}))
    arguments = ["replay", str(path), "--top-k", str(TOP_K), "--ep", str(RANKS), "--json", str(out)]
    assert main(arguments) == 0
    rows = {(row["layer"], row["policy"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows[1, "live"]["max"] == of_tokens[1, 100, "live"]["max"]


def test_joint_is_where_experts_have_replicas_and_is_level(tmp_path):
    # Physical experts 3, 7, 11, 15 are second replicas of the first expert of the next rank.
    mapping = [12, 0, 1, 3, 3, 2, 4, 6, 6, 5, 7, 9, 9, 8, 10, 12]
    order = {logical: i for i, logical in enumerate(dict.fromkeys(sorted(mapping)))}
    mapping = torch.tensor([order[logical] for logical in mapping]).repeat(LAYERS, 1)
    files = {
        f"{rank}.pt": dump(rank, last_physical_to_logical_map=mapping) for rank in range(RANKS)
    }
    found = replay(tmp_path, files)
    for (layer, pass_id, policy), row in found.items():
        live = found[layer, pass_id, "live"]
        if policy == "joint":
            assert row["max"] <= live["max"] and row["mean"] == live["mean"]
            assert row["max"] == -(-RANKS * (TOKENS - 2) * (TOP_K + 1) // RANKS)  # level
    assert any(policy == "joint" for _, _, policy in found)


def test_policies_and_cost_models(tmp_path, capsys):
    curve = tmp_path / "curve.json"
    curve.write_text("[[16, 20.0], [64, 31.5], [1024, 90.0]]")
    files = {f"{rank}.pt": dump(rank) for rank in range(RANKS)}
    chosen = ["--policy", "live", "--policy", "home"]
    found = replay(tmp_path, files, *chosen, "--cost-model", str(curve))
    assert {policy for _, _, policy in found} == {"home", "live"}
    model = waterfill_rs.CostModel.table([(16, 20.0), (64, 31.5), (1024, 90.0)])
    routed = sum(counts_of(rank, 100)[1] for rank in range(RANKS))
    slowest, _ = waterfill_rs.max_and_mean(
        routed, [TOKENS - 2] * RANKS, ranks=RANKS, cost_model=model
    )
    assert found[1, 100, "home"]["max"] == slowest
    assert found[1, 100, "live"]["max"] == found[1, 100, "live"]["optimum"] <= slowest
    replay(tmp_path, files, "--cost-model", "roofline:20,0.08,64")
    texts = ["nothing", "roofline:1,2", "roofline:nan,1,64", "roofline:1,2,3,4", "roofline:1,2,-5"]
    texts.append(str(tmp_path / "dump" / "0.pt"))
    for number, table in enumerate(BAD_TABLES):
        file = tmp_path / f"{number}.json"
        file.write_text(table)
        texts.append(str(file))
    for text in texts:
        assert main(["replay", str(tmp_path / "dump"), "--cost-model", text]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"waterfill-rs: --cost-model {text}: "), error
        assert error.count("\n") == 1, error


BAD_TABLES = (
    "[[-5, 1]]",
    "[[8, 0]]",
    "[[8, NaN]]",
    "[[Infinity, 1]]",
    "[[8.5, 1]]",
    '[["8", 1]]',
    "[[8, 1" + "0" * 400 + "]]",
    "[" * 100_000,
    "",
)

BROKEN = {
    "no top-k": (per_pass(0), [], "give --top-k"),
    "no ep": (
        dict(logical_count=torch.ones(2, 16, dtype=torch.int32)),
        ["--top-k", "2"],
        "give --ep",
    ),
    "odd ep": (
        dict(logical_count=torch.ones(2, 16, dtype=torch.int32)),
        ["--top-k", "2", "--ep", "3"],
        "16 logical experts do not divide over 3 ranks",
    ),
    "negative": (
        dict(logical_count=-torch.ones(2, 16).int()),
        ["--ep", "2"],
        "logical_count has -1",
    ),
    "more than the core counts": (
        dict(logical_count=torch.full((2, 16), 2**28 + 1, dtype=torch.int64)),
        ["--ep", "2"],
        "logical_count has 4294967312 rows in a layer",
    ),
    "ids beyond 32 bits": (
        dict(logical_count=torch.full((2, 16), 2**60, dtype=torch.int64)),
        ["--ep", "2"],
        f"logical_count has {2**60} rows in a layer",
    ),
    "few dimensions by rank": (
        dict(logical_count=torch.ones(2, 16).int(), logical_count_layout="rank_layer_expert"),
        [],
        "logical_count is [2, 16]: rank_layer_expert is [R, L, E]",
    ),
    "top-k too large": (
        dict(logical_count=torch.ones(2, 16).int()),
        ["--ep", "2", "--top-k", "17"],
        "--top-k 17: the dump has 16 experts",
    ),
    "no counts": (
        per_pass(0, lambda rank, pass_id: torch.zeros(LAYERS, EXPERTS)),
        ["--top-k", "3"],
        "global_physical_count is zero everywhere",
    ),
    "halves": (
        dict(logical_count=torch.ones(2, 16) / 2),
        ["--ep", "2"],
        "logical_count[0, 0] is 0.5",
    ),
    "zeros": (dict(logical_count=torch.zeros(3, 2, 16).int()), ["--ep", "2"], "zero everywhere"),
    "ragged": (dict(logical_count=[[1, 2], [3]]), ["--ep", "2"], "no array of integers"),
    "other ranks": (
        dict(logical_count=torch.ones(4, 2, 16).int(), logical_count_layout="rank_layer_expert"),
        ["--ep", "8"],
        "of 4 ranks, --ep is 8",
    ),
    "no ep at all": (per_pass(0), ["--ep", "0"], "--ep 0: give at least 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_counts_are_refused_by_field_and_number(name, tmp_path, capsys):
    content, options, text = BROKEN[name]
    torch.save(content, tmp_path / "one.pt")
    out = tmp_path / "out.json"
    assert main(["replay", str(tmp_path), "--json", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1, error
    assert not out.exists()
