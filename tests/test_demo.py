"""The demo, as a command and as numbers."""

import json

import pytest

from waterfill_rs.cli import main
from waterfill_rs.workload import Router, documents, tokenize


def test_tokens_and_routes_are_the_same_every_time():
    text = "def f(x):\n    return x + 1\n"
    assert tokenize(text) == tokenize(text)
    assert len(set(tokenize("x x"))) == 2  # a word and a space
    tokens = next(documents([]))[:100]
    ids = Router(64, 6, layer=1).route(tokens)
    assert ids == Router(64, 6, layer=1).route(tokens)
    assert ids != Router(64, 6, layer=2).route(tokens)
    rows = [ids[i : i + 6] for i in range(0, len(ids), 6)]
    assert all(len(set(row)) == 6 and 0 <= min(row) <= max(row) < 64 for row in rows)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    file = tmp_path_factory.mktemp("demo") / "new folder" / "demo.json"
    command = ["demo", "--ranks", "4", "--experts", "32", "--top-k", "3", "--tokens", "64"]
    assert main([*command, "--layers", "2", "--steps", "3", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_json_has_every_layer_step_and_policy(comparison):
    assert (comparison["ranks"], comparison["experts"], comparison["top_k"]) == (4, 32, 3)
    found = {(row["layer"], row["pass"], row["policy"]) for row in comparison["rows"]}
    wanted = {(i, j, p) for i in range(2) for j in range(3) for p in ("home", "own-counts", "live")}
    assert found == wanted and len(comparison["rows"]) == len(wanted)


def test_rows_add_up_and_live_is_the_optimum(comparison):
    for row in comparison["rows"]:
        # 64 tokens x 4 ranks, 3 routed rows and a shared one each, over 4 ranks.
        assert row["tokens"] == 256 and row["mean"] == 256.0
        assert row["max"] >= row["optimum"] >= max(row["routed_max"], row["mean"])
        assert row["policy"] != "live" or row["max"] == row["optimum"]
        assert row["policy"] != "home" or row["extra_copies"] == 0


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--ranks", "7"], "256 physical experts over 7 ranks leave 4"),
        (["--top-k", "300"], "top-k 300: give 1 to 256"),
        (["no such folder"], "no such folder: there is no such file"),
        (["--ranks", "1024", "--experts", "1024", "--tokens", "9999"], "the text ends at"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(arguments, text, capsys, tmp_path):
    file = tmp_path / "demo.json"
    assert main(["demo", *arguments, "--json", str(file)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
