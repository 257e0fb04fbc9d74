"""Without the shared expert's group the masked GEMMs give a call's routed groups what they gave before."""

import types

import pytest
import torch

from waterfill_rs.sglang import routed_groups
from waterfill_rs.sglang.overlap import OverlappedLayer
from waterfill_rs.sglang.routed_groups import BF16, F8, install, slots

SLOTS, ROWS, IN, OUT = 5, 4, 8, 6


class Wrapper:
    """As sglang's module of DeepGEMM: a masked product on the CPU, which says how many groups it was given."""

    def __init__(self):
        self.groups = []
        setattr(self, F8, self._f8)
        setattr(self, BF16, self._bf16)

    def _f8(self, lhs, rhs, out, masked_m, expected_m, overlap_args=None, recipe_a=None):
        assert {len(part) for part in (*lhs, *rhs, out)} == {len(masked_m)}
        self._bf16(lhs[0] * lhs[1], rhs[0] * rhs[1], out, masked_m, expected_m)

    def _bf16(self, a, b, out, masked_m, expected_m):
        self.groups.append(len(a))
        for group, rows in enumerate(masked_m.tolist()):
            out[group, :rows] = a[group, :rows] @ b[group].T


@pytest.fixture
def operands():
    draws = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=draws)  # noqa: E731
    lhs = draw(SLOTS, ROWS, IN), draw(SLOTS, ROWS, 1)
    rhs = draw(SLOTS, OUT, IN), draw(SLOTS, OUT, 1)
    return lhs, rhs, torch.tensor([2, 0, 4, 1, 0], dtype=torch.int32)


def product(wrapper, name, operands, **options):
    lhs, rhs, masked_m = operands
    out = torch.full((len(masked_m), ROWS, OUT), 7.0)
    if name == BF16:
        lhs, rhs = lhs[0], rhs[0]
    getattr(wrapper, name)(lhs, rhs, out, masked_m, 2, **options)
    return out


@pytest.mark.parametrize("name, options", [(F8, {"recipe_a": None}), (F8, {}), (BF16, {})])
def test_results_are_the_same_without_the_shared_group(name, options, operands, monkeypatch):
    wrapper = Wrapper()
    expected = product(wrapper, name, operands, **options)
    install(wrapper)
    assert torch.equal(product(wrapper, name, operands, **options), expected)
    monkeypatch.setattr(slots, "number", SLOTS)
    monkeypatch.setattr(slots, "used", SLOTS - 1)
    assert torch.equal(product(wrapper, name, operands, **options), expected)
    assert wrapper.groups == [SLOTS, SLOTS, SLOTS - 1]


@pytest.mark.parametrize("name", [F8, BF16])
def test_slots_past_the_used_ones_are_left_out(name, operands, monkeypatch):
    """Those of the redundant experts, where rows go to primary replicas alone: they have no rows, and nobody reads them."""
    wrapper = Wrapper()
    masked_m = operands[2]
    masked_m[3:] = 0
    expected = product(wrapper, name, operands)
    install(wrapper)
    monkeypatch.setattr(slots, "number", SLOTS)
    monkeypatch.setattr(slots, "used", 3)
    masked_m[3] = 4  # Only to see that it is not computed.
    assert torch.equal(product(wrapper, name, operands), expected)
    assert wrapper.groups == [SLOTS, 3]


def test_other_groups_and_an_overlapped_combine_stay_whole(operands, monkeypatch):
    wrapper = Wrapper()
    install(wrapper)
    monkeypatch.setattr(slots, "number", SLOTS + 1)
    product(wrapper, F8, operands)
    monkeypatch.setattr(slots, "number", SLOTS)
    product(wrapper, F8, operands, overlap_args=object())
    assert wrapper.groups == [SLOTS, SLOTS]


def test_it_is_put_there_once_and_where_there_is_one(operands, monkeypatch):
    wrapper = Wrapper()
    install(wrapper)
    first = getattr(wrapper, F8)
    install(wrapper)
    assert getattr(wrapper, F8) is first
    install(types.SimpleNamespace())


def test_only_calls_of_an_unfused_layer_leave_it_out(operands):
    wrapper = Wrapper()
    install(wrapper)

    class Moe:
        num_fused_shared_experts = 1
        experts = types.SimpleNamespace(num_local_experts=SLOTS)

        def forward(self, hidden, batch):
            if batch == "fails":
                raise RuntimeError(batch)
            return product(wrapper, F8, operands)

        op_select_experts = op_shared_experts = forward

    moe = Moe()
    choice = types.SimpleNamespace(
        overlaps=lambda batch: batch != "fused", tally={"overlapped": 0, "fused": 0}, extends=False
    )
    layer = OverlappedLayer(moe, types.SimpleNamespace(follow=lambda: None, mlp=None), choice)
    moe.__dict__["num_fused_shared_experts"] = 1
    whole = moe.forward(None, "fused")
    assert torch.equal(moe.forward(None, "overlaps"), whole)
    with pytest.raises(RuntimeError, match="fails"):
        moe.forward(None, "fails")
    assert slots.number == slots.used == 0 and wrapper.groups == [SLOTS, SLOTS - 1]
    assert torch.equal(product(wrapper, F8, operands), whole)
    # Primary replicas in decode alone, and only where they are known to be the first.
    for by_primaries, first, extends, groups in (
        (True, None, False, SLOTS - 1),
        (True, 3, False, 3),
        (True, 3, True, SLOTS - 1),
        (False, 3, False, SLOTS - 1),
    ):
        layer.decodes_by_primaries, layer.primary_slots = by_primaries, first
        choice.extends = extends
        moe.forward(None, "overlaps")
        assert layer.chooses_live == (extends or not by_primaries)
        assert wrapper.groups[-1] == groups and slots.number == slots.used == 0


def test_sglang_has_what_is_put_behind_it():
    wrapper = pytest.importorskip("sglang.srt.layers.deep_gemm_wrapper")
    assert callable(getattr(wrapper, F8)) and callable(getattr(wrapper, BF16))
    assert routed_groups.F8 in wrapper.entrypoint.__dict__
