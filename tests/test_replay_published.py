"""Statistics as DeepSeek-V3's are published, end to end: ``{"logical_count": [L, E]}``, whole numbers written as floats."""

import json
import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs.cli import main

EXPERTS, TOP_K, DENSE = 256, 8, 3


def drawn(layers, rows):
    """Counts of our own of that shape: the first layers dense, some experts far hotter than others, whole tokens.

    DeepSeek-V3's have medians of 10,000 to 1,600,000 rows an expert, and up to 30 times those for the hottest.
    """
    random.seed(layers + rows)
    counts = [[0] * EXPERTS for _ in range(DENSE)]
    for _ in range(layers - DENSE):
        layer = [int(rows * random.lognormvariate(0, 0.7)) for _ in range(EXPERTS)]
        layer[-1] += -sum(layer) % TOP_K
        counts.append(layer)
    return counts


def write(path, counts):
    floats = [[float(count) for count in layer] for layer in counts]
    if path.suffix == ".json":
        path.write_text(json.dumps({"logical_count": floats}))
    else:
        torch.save({"logical_count": torch.tensor(floats, dtype=torch.float64)}, path)
    return path


def replayed(path, *options):
    """By EP size: number of experts, notes, and rows by layer and policy."""
    out = path.with_suffix(".out")
    command = ["replay", str(path), "--top-k", str(TOP_K), "--json", str(out), *options]
    assert main(command) == 0
    found = json.loads(out.read_text())
    return {
        one["ranks"]: (
            one["experts"],
            one["notes"],
            {(row["layer"], row["policy"]): row for row in one["rows"]},
        )
        for one in found["compared"]
    }


def expected(layer, ranks, redundant):
    """Rows a rank, step by step: expert e stands at e, and the first ones again at the end, with half of their rows."""
    physical = [(count + 1) // 2 if e < redundant else count for e, count in enumerate(layer)]
    physical += [count // 2 for count in layer[:redundant]]
    each = len(physical) // ranks
    routed = [sum(physical[rank * each : (rank + 1) * each]) for rank in range(ranks)]
    tokens = -(-sum(layer) // TOP_K)
    most = max(routed)
    room = sum(most - rows for rows in routed)
    return {
        "tokens": tokens,
        "routed_max": most,
        "mean": (sum(routed) + tokens) / ranks,
        "home": max(rows + (tokens + rank) // ranks for rank, rows in enumerate(routed)),
        "live": most if room >= tokens else -(-(sum(routed) + tokens) // ranks),
    }


def check(rows, counts, ranks, redundant):
    assert {layer for layer, _ in rows} == set(range(DENSE, len(counts)))
    for layer in range(DENSE, len(counts)):
        wanted = expected(counts[layer], ranks, redundant)
        for policy in ("home", "live"):
            row = rows[layer, policy]
            assert row["max"] == wanted[policy] and row["optimum"] == wanted["live"]
            for name in ("tokens", "routed_max"):
                assert row[name] == wanted[name]
            assert row["mean"] == pytest.approx(wanted["mean"], rel=1e-12)


def check_all(path, counts):
    found = replayed(path, "--ep", "8,32,72")
    assert set(found) == {8, 32}
    for ranks, (experts, notes, rows) in found.items():
        assert experts == EXPERTS
        check(rows, counts, ranks, 0)
        note = "EP 72 is left out: 256 logical experts do not divide over 72 ranks: give --redundant 32, 104"
        assert any(note in one for one in notes)
        assert not any("may be wrong" in one for one in notes)
    found = replayed(path, "--ep", "8,32,72", "--redundant", "32")
    assert set(found) == {8, 32, 72}
    for ranks, (experts, _, rows) in found.items():
        assert experts == EXPERTS + 32
        check(rows, counts, ranks, 32)


@pytest.mark.parametrize("name", ["counts.json", "counts.pt"])
@pytest.mark.parametrize("layers, rows", [(58, 8_000), (61, 230_000), (61, 1_600_000)])
def test_statistics_of_that_form_are_replayed(name, layers, rows, tmp_path):
    counts = drawn(layers, rows)
    check_all(write(tmp_path / name, counts), counts)
