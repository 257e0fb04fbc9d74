"""``benches/server --outputs``: answers compared to the bit, by hand and with a stand-in for sglang; no GPU."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("numpy")
pytest.importorskip("torch")


from server import model, modes, output_figures, outputs, results, schedule
from server.answers import Answers, bits, number
from test_server_bench_run import run, stub  # noqa: F401


def answer(tokens, logprobs):
    return {"tokens": tokens, "logprobs": [bits(value) for value in logprobs]}


def test_answers_are_compared_until_their_first_difference():
    one = [answer([5, 6, 7], [-0.5, -1.0, -2.0]), answer([5, 5, 5], [-0.5, -0.5, -0.5])]
    assert output_figures.compared(one, one) == {
        "equal": True, "equal_tokens": 6, "equal_logprobs": 6, "first_difference": None,
        "logprob_difference": 0.0, "finite": True,
    }  # fmt: skip
    # The second token of the first prompt differs: what follows it is not compared.
    other = [answer([5, 9, 7], [-0.75, -9.0, -9.0]), one[1]]
    assert output_figures.compared(one, other) == {
        "equal": False, "equal_tokens": 4, "equal_logprobs": 3, "first_difference": 1,
        "logprob_difference": 0.25, "finite": True,
    }  # fmt: skip
    # Equal tokens, and one logprob that differs in its last bit.
    last = {**one[0], "logprobs": [*one[0]["logprobs"][:2], one[0]["logprobs"][2] + 1]}
    found = output_figures.compared(one, [last, one[1]])
    assert not found["equal"] and found["equal_tokens"] == 6 and found["first_difference"] is None
    assert found["logprob_difference"] == 2.0**-22
    # Equal bits that are no numbers prove nothing.
    nothing = [answer([1], [float("nan")])]
    found = output_figures.compared(nothing, nothing)
    assert not found["finite"] and found["logprob_difference"] is None
    found = output_figures.compared([answer([1], [-1.0])], [answer([2], [-1.0])])
    assert (found["equal_tokens"], found["logprob_difference"]) == (0, None)


def test_bits_are_those_of_float32():
    assert bits(1.0) == 0x3F800000 and bits(-0.0) != bits(0.0)
    assert number(bits(-1.5)) == -1.5 and math.isnan(number(bits(float("nan"))))


class Engine:
    """Answers each prompt with its own tokens; ``short`` leaves the last one out."""

    def __init__(self, short=0):
        self.loop = asyncio.new_event_loop()
        self.asked, self.short = [], short

    async def async_generate(self, input_ids, sampling_params, return_logprob, data_parallel_rank):
        assert return_logprob and sampling_params["temperature"] == 0
        self.asked.append((data_parallel_rank, input_ids))
        count = sampling_params["max_new_tokens"] - self.short
        told = [[(-0.5, token, None) for token in prompt[:count]] for prompt in input_ids]
        return [{"meta_info": {"output_token_logprobs": one}} for one in told]


def test_each_rank_is_asked_its_own_prompts():
    engine = Engine()
    told = Answers(engine).ask([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 1, 1]]], 2)
    assert engine.asked == [(0, [[1, 2, 3], [4, 5, 6]]), (1, [[7, 8, 9], [1, 1, 1]])]
    assert [one["tokens"] for one in told] == [[1, 2], [4, 5], [7, 8], [1, 1]]
    assert told[0]["logprobs"] == [bits(-0.5)] * 2
    with pytest.raises(RuntimeError, match="an answer has 1 tokens, and 2 were asked for"):
        Answers(Engine(short=1)).ask([[[1, 2, 3]]], 2)


def test_all_prompts_of_a_rank_are_one_forward():
    (_, switched) = modes.engines("prefill", ["off", "home", "overlap"])
    cell = schedule.Cell("prefill", 8192, 1, "trivial")
    asked = schedule.answers_message(cell, switched, "overlap", 8, 4, 9, first_table=2)
    assert asked["cycle"] == ["overlap"] and asked["placement"] == 3
    assert (asked["requests"], asked["chunk"], asked["tokens"]) == (32, 8 * 96, 8 * 96)
    assert model.output_prompts({"prefill": [64]}) == 8
    # No step may have more tokens than DeepEP's buffers, which are as large as the largest graph.
    assert model.output_prompts({"prefill": [64], "decode": [2, 4]}) == 4


def found_in(tmp_path):
    found = results.read(tmp_path / "out.json")["outputs"]
    return {(entry["phase"], entry["mode"]): entry for entry in found}


def test_equal_engines_are_told_equal_in_every_phase(stub, tmp_path):  # noqa: F811
    options = ["--prefill", "256", "--decode", "4", "--mixed", "16", "--outputs", "--sweeps", "1"]
    done = run(stub, tmp_path, *options, "--modes", "off,home,overlap,auto")
    assert done.returncode == 0, done.stderr
    found = found_in(tmp_path)
    shown = ("off", "home", "overlap", "auto")
    assert set(found) == {
        (phase, mode) for phase in ("prefill", "decode", "mixed") for mode in shown
    }
    for (phase, mode), entry in found.items():
        assert entry["repeated"]["equal"] and entry["different"] > 20
        assert (entry["to_off"] is None) == (mode == "off")
        assert mode == "off" or entry["to_off"]["equal"]
        assert (entry["other_experts"] is None) == (mode != "off")
        assert mode != "off" or entry["other_experts"]["equal_tokens"] < entry["tokens"] / 8
        # Two ranks with 8 prompts, or 4 where the largest graph has 4 tokens; 24 tokens each.
        assert entry["tokens"] == entry["prompts"] * 24 == 2 * 24 * (4 if phase == "decode" else 8)
    assert (
        "- decode: each of home, overlap, auto computes what off computes, bit for bit: 192 tokens"
        in done.stdout
    )
    assert "| prefill | overlap | equal bit for bit | equal bit for bit | 384, " in done.stdout
    assert (
        "- decode: off with other experts beside off, which is how wrong ones look: " in done.stdout
    )
    # Nothing of it is among what is timed.
    cells = {(c["phase"], c["mode"]): c for c in results.read(tmp_path / "out.json")["cells"]}
    assert cells["decode", "home"]["forwards"] == 88
    assert results.read(tmp_path / "out.json")["mismatches"] == []


def test_what_differs_and_what_does_not_repeat_is_told(stub, tmp_path):  # noqa: F811
    stub["STUB_ANSWERS"] = json.dumps({"home": "token", "auto": "varies", "sglang": "nan"})
    options = ["--decode", "8", "--outputs", "--sweeps", "1"]
    done = run(stub, tmp_path, *options, "--modes", "off,home,sglang,overlap,auto")
    assert done.returncode == 0, done.stderr
    found = {mode: entry for (_, mode), entry in found_in(tmp_path).items()}
    home = found["home"]
    # The first of 16 prompts is equal for seven tokens.
    assert home["to_off"]["equal_tokens"] == 15 * 24 + 7
    assert home["to_off"]["first_difference"] == 7
    assert home["to_off"]["logprob_difference"] == pytest.approx(0.25)
    assert home["repeated"]["equal"] and found["overlap"]["to_off"]["equal"]
    told = "367 of 384 tokens equal, the first difference at 7, logprobs differ by at most 0.25"
    assert f"- decode: home beside off, first answers: {told}." in done.stdout
    assert "- decode: overlap computes what off computes, bit for bit" in done.stdout
    assert found["auto"]["to_off"]["equal"] and not found["auto"]["repeated"]["equal"]
    assert "- decode: auto beside off, first answers: equal bit for bit." in done.stdout
    assert "- decode: auto does not repeat itself bit for bit." in done.stdout
    assert (
        "- decode: sglang beside off, first answers: logprobs that are no finite numbers"
        in done.stdout
    )
    assert "off does not repeat" not in done.stdout


def test_an_off_that_does_not_repeat_itself_is_told_first(stub, tmp_path):  # noqa: F811
    stub["STUB_ANSWERS"] = json.dumps({"off": "varies"})
    options = ["--prefill", "256", "--placements", "trivial", "--outputs", "--sweeps", "1"]
    done = run(stub, tmp_path, *options, "--modes", "off,live")
    assert done.returncode == 0, done.stderr
    assert not found_in(tmp_path)["prefill", "off"]["repeated"]["equal"]
    assert "- prefill: off does not repeat itself bit for bit, so no engine" in done.stdout
    # An engine without overlap and home is asked in the mode that it has.
    assert found_in(tmp_path)["prefill", "live"]["to_off"]["equal"]
    assert "- prefill: live beside off, first answers: equal bit for bit." in done.stdout
    assert "computes what off computes" not in done.stdout


def test_engines_with_redundant_experts_answer_beside_off(stub, tmp_path):  # noqa: F811
    """Of each placement, in prefill in each way to choose replicas, and beside sglang's choice of the same placement."""
    stub["STUB_ANSWERS"] = json.dumps({"live-replicas": "token", "off-static": "token"})
    options = ["--redundant", "0,2", "--placement", "place,trivial", "--replicas", "auto,live"]
    done = run(
        stub, tmp_path, *options, "--prefill", "256", "--decode", "4", "--outputs", "--sweeps", "1"
    )
    assert done.returncode == 0, done.stderr
    document = results.read(tmp_path / "out.json")
    found = {
        (one["phase"], one["mode"], one["placement"], one["redundant"]): one
        for one in document["outputs"]
    }
    places = [("place", 2), ("trivial", 2)]
    assert set(found) == {
        (phase, *who)
        for phase in ("prefill", "decode")
        for who in [
            ("off", None, 0),
            ("off-static", "place", 0),
            *[("off-static", *place) for place in places],
            *[(f"{way}-replicas", *place) for way in ("auto", "live") for place in places],
        ]
    }
    for (_, mode, _, _), one in found.items():
        assert one["repeated"]["equal"]
        assert (one["to_off"] is None) == (mode == "off")
        assert (one["to_static"] is None) == (mode in ("off", "off-static"))
        if mode == "auto-replicas":
            assert one["to_off"]["equal"] and one["to_static"]["first_difference"] == 7
        if mode == "live-replicas":
            assert one["to_off"]["first_difference"] == 7 and one["to_static"]["equal"]
    assert "- decode: each of auto-replicas (place + 2), auto-replicas (trivial + 2) computes" in (
        done.stdout
    )
    told = "175 of 192 tokens equal, the first difference at 7, logprobs differ by at most 0.25"
    assert (
        f"| decode | live-replicas | place + 2 | {told} | equal bit for bit | equal bit for bit | 192, "
        in done.stdout
    )
    assert f"- decode: live-replicas (place + 2) beside off, first answers: {told}." in done.stdout
    assert (
        "- decode: live-replicas (place + 2) beside off-static, first answers: equal bit for bit."
        in done.stdout
    )
    assert document["mismatches"] == [] and document["failures"] == []


def test_all_engines_that_are_compared_have_the_same_routing():
    """Off has one answer, so of two recordings only the first one's engines are asked."""
    names = ["dial-1.00-place", "dial-1.30-place"]
    cells = [
        schedule.Cell("decode", tokens, table, name, 16, placed=True)
        for tokens in (4, 8)
        for table, name in enumerate(names)
    ]
    plans = [
        *modes.engines("decode", ["off"]),
        *(
            plan
            for name in names
            for plan in modes.with_redundant("decode", [name], 16, ["static"], ["live"])
        ),
    ]
    asked = []

    class Engines:
        def next_number(self):
            return len(asked) + 1

        def round(self, plan, message, seconds):
            asked.append((plan.name, message["placement"], message["cycle"], message["base"]))
            return {"answers": [answer([1], [-1.0])], "ranks": []}

    phase = SimpleNamespace(
        name="decode", cells=cells, answers={}, output_prompts=8, ranks=2, first_table=5
    )
    outputs.ask(phase, Engines(), plans, SimpleNamespace(left=lambda: 9))
    expected = [
        ("off", 5, ["off"]),
        ("off-static-dial-1.00-place-16", 5, ["off-static"]),
        ("live-replicas-dial-1.00-place-16", 5, ["live-replicas"]),
    ]
    off, *placed = expected
    # Off a third time, with other experts.
    once = [(*off, 0), (*off, 0), (*off, 1), *((*one, 0) for one in placed for _ in range(2))]
    assert asked == once
    place = ("dial-1.00-place", 16)
    assert list(phase.answers) == [("off", None), ("off-static", place), ("live-replicas", place)]
    # Not again, in a later group.
    outputs.ask(phase, Engines(), plans, SimpleNamespace(left=lambda: 9))
    assert asked == once


def test_wrong_outputs_are_refused():
    first = [answer([1], [-1.0])]
    entries = output_figures.entries("decode", {("off", None): [first, first]})
    document = dict.fromkeys(results.FIELDS, "x") | {"ranks": 2, "settings": {}, "cells": []}
    results.check({**document, "outputs": entries})
    # As in results of before there were answers with redundant experts.
    new = ("placement", "redundant", "to_static", "other_experts")
    before = {name: value for name, value in entries[0].items() if name not in new}
    results.check({**document, "outputs": [before]})
    assert "| decode | off |  | equal bit for bit |" in output_figures.lines([before])[0]
    wrong = (("mode", "on"), ("tokens", -1), ("repeated", {}), ("redundant", -1), ("to_static", {}))
    for name, value in wrong:
        with pytest.raises(ValueError, match="outputs 0"):
            results.check({**document, "outputs": [{**entries[0], name: value}]})
