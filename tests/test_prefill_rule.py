"""Whether a prefill's shared experts run beside dispatch: as asked, as measured on this machine, or else fused."""

import dataclasses

import pytest

from waterfill_rs.machine import machine_of
from waterfill_rs.sglang.prefill_rule import PrefillRule

POINTS = ((1024, 300.0, 250.0), (4096, 900.0, 890.0), (8192, 1500.0, 1700.0))
"""Tokens a rank, and a layer's microseconds overlapped and fused: faster overlapped in the last alone."""


def measured(ranks=8):
    return dataclasses.replace(
        machine_of("H200"), dispatch_ranks=ranks, prefill_us=POINTS, name="here"
    )


@pytest.mark.parametrize("tokens", [None, 1, 10**6])
def test_what_was_asked_for_holds_for_every_prefill(tokens):
    overlap = PrefillRule(True, 8, 4096, measured())
    assert overlap(tokens)
    assert overlap.text == "beside dispatch in prefill, as asked"


@pytest.mark.parametrize("machine", [None, machine_of("H200")])
def test_without_a_measurement_a_prefill_is_fused(machine):
    rule = PrefillRule(False, 8, 16384, machine)
    assert not any(rule(tokens) for tokens in (None, 1, 4096, 10**6))
    assert rule.text == "fused in prefill"


def test_a_measurement_decides_by_tokens_and_by_the_most_where_they_are_not_known():
    rule = PrefillRule(False, 8, 16384, measured())
    assert [rule(tokens) for tokens in (1, 4096, 8191, 8192, 10**6)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert rule(None)
    assert not PrefillRule(False, 8, 4096, measured())(None)
    assert "with 1024, 4096, 8192 tokens a rank: beside dispatch with 8192, else fused" in rule.text


def test_a_measurement_between_fewer_ranks_says_nothing_of_more():
    rule = PrefillRule(False, 16, 16384, measured(ranks=8))
    assert not rule(10**6) and rule.text == "fused in prefill"


def test_ranks_that_would_choose_differently_differ_in_words():
    slower = dataclasses.replace(measured(), prefill_us=(*POINTS[:2], (8192, 1700.0, 1500.0)))
    rules = [PrefillRule(False, 8, 16384, machine) for machine in (measured(), slower, None)]
    assert len({rule.text for rule in rules}) == 3
