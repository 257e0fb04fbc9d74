"""sglang's own kernels have the signatures of those that the calibration's tests stand in for."""

import inspect

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

from test_calibrate_prefill import ep_gather, ep_scatter

from waterfill_rs.calibrate.prefill import Kernels


def test_the_installed_sglang_s_kernels_take_what_the_fakes_take(sglang):
    loaded = Kernels.load()
    expected = list(inspect.signature(ep_scatter).parameters)
    found = list(inspect.signature(loaded.ep_scatter).parameters)
    assert [name for name in found if name != "num_valid_tokens_per_expert"][:10] == expected
    assert inspect.signature(loaded.ep_gather).parameters.keys() == (
        inspect.signature(ep_gather).parameters.keys()
    )
    scales = inspect.signature(loaded.tma_align_input_scale).parameters
    assert list(scales) == ["input_scale"]
