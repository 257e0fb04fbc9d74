"""``benches/server --layer-outputs``: layers get the same inputs, and their outputs are compared; no GPU."""

import json
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from server import layer_outputs, layers, modes, results, schedule
from server.control import LAYERS
from test_server_bench_plugin import a_rank, control, set_round  # noqa: F401

HIDDEN, ROWS = 4, 6


class DeepseekV2MoE(torch.nn.Module):
    """Multiplies what it gets."""

    def forward(self, hidden_states, batch, *, scale=2):
        return hidden_states * scale


def some_layers(rank=0):
    """Two layers, and what gives them inputs."""
    moes = [DeepseekV2MoE(), DeepseekV2MoE()]
    return layers.Layers([torch.nn.Identity(), *moes], HIDDEN, ROWS, rank, "cpu"), *moes


def rows_of(number):
    return torch.ones(number, HIDDEN, dtype=torch.bfloat16)


def test_a_forced_layer_has_the_same_inputs_whatever_it_was_given():
    one, _, last = some_layers()
    given = rows_of(5)
    assert last(given, "batch").tolist() == (given * 2).tolist()
    one.force(True)
    made = last(given, "batch", scale=3)
    assert made.tolist() == last(given * 7, "batch", scale=3).tolist()
    assert (made != given * 3).any()
    taken = one.take(5)
    assert taken.shape == (2, 5, HIDDEN) and taken[1].tolist() == made.float().tolist()
    assert not taken[0].any(), "the other layer did not run"
    # As in another engine's rank of the same number; another rank and another layer have others.
    other, other_first, other_last = some_layers()
    other.force(True)
    assert other_last(given * 9, "batch", scale=3).tolist() == made.tolist()
    assert (other_first(given, "batch", scale=3) != made).any()
    strange, _, strange_last = some_layers(rank=1)
    strange.force(True)
    assert (strange_last(given, "batch", scale=3) != made).any()
    one.force(False)
    assert last(given, "batch").tolist() == (given * 2).tolist()


def test_forwards_that_are_too_long_or_empty_are_left_alone():
    one, first, _ = some_layers()
    one.force(True)
    for rows in (ROWS + 1, 0):
        given = rows_of(rows)
        assert first(given, "batch").tolist() == (given * 2).tolist()
    assert not one.take(ROWS).any()


def test_a_rank_writes_what_its_layers_made_and_counts_rebalances(control, tmp_path):  # noqa: F811
    rank = a_rank(control, tmp_path)
    rank.layers, moe, _ = some_layers()
    rank.count_rebalance()
    set_round(control, round=1, kind=LAYERS, asked=1)
    for rows in (4, 2):
        batch = SimpleNamespace(input_ids=torch.zeros(rows), forward_mode=None)
        rank.forward(
            lambda runner, batch: moe(rows_of(len(batch.input_ids)), batch),
            object(),
            batch,
        )
    rank.count_rebalance("metadata", layers=[1])
    rank.write_if_asked()
    told = json.loads((tmp_path / "round-1-0.json").read_text())
    assert told["rebalances"] == 1 and told["forwards"] == []
    found = layer_outputs._read(tmp_path / "layers-1-0.npz")
    assert [one.shape for one in found] == [(2, 4, HIDDEN), (2, 2, HIDDEN)]
    assert found[0][0, :2].tolist() == found[1][0].tolist() and found[0][0].all()
    assert not (tmp_path / "layers-1-0.npz").exists()
    # The next round has none.
    set_round(control, round=2, kind=LAYERS, asked=2)
    rank.before_forward()
    rank.write_if_asked()
    told = json.loads((tmp_path / "round-2-0.json").read_text())
    assert told["rebalances"] == 0 and "layers_file" not in told


def test_rows_are_compared_by_the_norm_of_what_differs():
    prefill, decode = np.full((1, 2, 2), 3.0), np.full((1, 1, 2), 4.0)
    reference = [[prefill, decode]]
    same = layer_outputs.compared(reference, reference)
    nothing = {"rows": 2, "equal": 2, "smallest": 0.0, "median": 0.0, "largest": 0.0}
    assert same == {"prefill": nothing, "decode": nothing | {"rows": 1, "equal": 1}}
    changed = prefill.copy()
    changed[0, 1] = [3.0, 6.0]
    found = layer_outputs.compared(reference, [[changed, decode]])["prefill"]
    assert found["equal"] == 1 and found["smallest"] == 0.0
    assert found["largest"] == pytest.approx(3 / 18**0.5)
    changed[0, 0] = [np.nan, 3.0]
    found = layer_outputs.compared(reference, [[changed, decode]])["prefill"]
    assert found["largest"] == float("inf") and found["equal"] == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        layer_outputs.compared(reference, [[prefill]])


def test_engines_are_held_to_off_and_off_to_itself(tmp_path):
    plans = [
        *modes.engines("decode", ["off"]),
        *modes.with_redundant("decode", ["place"], 2, ["static"], ["live"]),
    ]
    cell = schedule.Cell("decode", 4, 0, "place", 2, placed=True)
    asked = []

    class Engines:
        def next_number(self):
            return len(asked) + 1

        def round(self, plan, message, seconds):
            asked.append((plan.modes[0], message["base"], message["kind"]))
            # Other experts double what off makes; live plans add an eighth, and off-static fails.
            factor = {1: 2.0}.get(message["base"], 1.0)
            factor += {"live-replicas": 0.125}.get(plan.modes[0], 0.0)
            if plan.modes[0] == "off-static":
                return None
            path = tmp_path / f"{len(asked)}.npz"
            made = np.full((1, 2, HIDDEN), factor, dtype=np.float32)
            np.savez(path, **{"0": made, "1": made[:, :1]})
            return {"ranks": [{"layers_file": str(path), "rebalances": 3}]}

    phase = SimpleNamespace(
        name="decode", cells=[cell], layers_found={}, off_layers=[], layer_prompts=0, ranks=1, first_table=0
    )  # fmt: skip
    clock = SimpleNamespace(left=lambda: 9)
    layer_outputs.ask(phase, Engines(), plans, clock)
    assert asked == []
    phase.layer_prompts = 2
    layer_outputs.ask(phase, Engines(), plans, clock)
    assert asked == [
        *(("off", base, LAYERS) for base in (0, 0, 1)),
        *(("off-static", 0, LAYERS) for _ in range(2)),
        *(("live-replicas", 0, LAYERS) for _ in range(2)),
    ]
    off, live = layer_outputs.entries("decode", phase.layers_found)
    assert off["other_experts"]["decode"]["smallest"] == 1.0 and off["placement"] is None
    assert live["to_off"]["prefill"] == live["second_to_off"]["prefill"]
    assert live["to_off"]["prefill"]["largest"] == 0.125 and live["rebalances"] == 6
    document = dict.fromkeys(results.FIELDS, "x") | {"ranks": 1, "settings": {}, "cells": []}
    results.check({**document, "layers": [off, live]})
    (text,) = layer_outputs.lines([off, live])
    assert "| decode | off |  | prefill | 2 | 6 |  |  | 0, 0 | 1 |" in text
    expected = "| decode | live-replicas | place + 2 | decode | 1 | 6 | 0.12, 0.12; 0.12, 0.12 | 0; 0 | 0, 0 |  |"
    assert expected in text
    assert layer_outputs.lines([]) == []


def test_numbers_that_are_not_finite_are_written_as_none():
    (entry,) = layer_outputs.entries(
        "decode",
        {("off", None): {"rebalances": 0, "repeated": {"decode": {"largest": float("inf")}}}},
    )
    assert entry["repeated"]["decode"]["largest"] is None
    json.dumps(entry, allow_nan=False)
