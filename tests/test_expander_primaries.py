"""What ``Expander.move_up`` hands to its launch with primary replicas, and what it refuses; no GPU."""

import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

from waterfill_rs.cuda import Expander

EXPERTS, TOP_K = 6, 2


@pytest.fixture
def run():
    """One whose device is the CPU and whose launch notes what it was given, in ``launched``."""
    expander, launched = object.__new__(Expander), []
    vars(expander).update(
        device=torch.device("cpu"), experts=EXPERTS, top_k=TOP_K, _index=-1, _ids=torch.int32
    )
    expander._move_up = lambda *arguments: launched.append(arguments)
    expander._stream = lambda: 77
    return types.SimpleNamespace(move_up=expander.move_up, launched=launched)


def test_both_tables_are_handed_on_or_none(run):
    ids = torch.zeros((3, TOP_K), dtype=torch.int32)
    primaries, logical = torch.arange(EXPERTS, dtype=torch.int32), torch.arange(EXPERTS)
    for tables in ((), (primaries,), (primaries, logical)):
        out = run.move_up(ids, *tables)
        assert out.dtype == torch.int64 and out.shape == ids.shape
        there = [table.data_ptr() for table in tables] + [0] * (2 - len(tables))
        assert run.launched.pop() == (ids.data_ptr(), out.data_ptr(), 6, *there, 77)


def test_tables_that_do_not_fit_are_refused_before_the_launch(run):
    ids = torch.zeros((3, TOP_K), dtype=torch.int32)
    primaries, logical = torch.arange(EXPERTS, dtype=torch.int32), torch.arange(EXPERTS)
    for wrong, beside, text in [
        (primaries.long(), logical, "primaries is torch.int64: give torch.int32"),
        (primaries[1:], logical, r"primaries has shape \(5,\): give \(6,\)"),
        (primaries.repeat(2)[::2], logical, "primaries has strides"),
        (primaries, logical.int(), "logical is torch.int32: give torch.int64"),
        (primaries, logical[None], r"logical has shape \(1, 6\)"),
        (primaries.to("meta"), logical, "primaries is on meta"),
    ]:
        with pytest.raises(ValueError, match=text):
            run.move_up(ids, wrong, beside)
    assert run.launched == []
