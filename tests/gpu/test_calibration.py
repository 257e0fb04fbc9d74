"""``waterfill-rs calibrate`` on a GPU: figures that can be, in a file that the cost models take."""

from __future__ import annotations

import importlib.util
import math
import time

import pytest

torch = pytest.importorskip("torch")

from waterfill_rs.calibrate import dispatch, kernels, timing
from waterfill_rs.calibrate.job import Plan
from waterfill_rs.cli import main
from waterfill_rs.machine import Machine
from waterfill_rs.replay import cost_models

HIDDEN, INTERMEDIATE = 2048, 1024


def test_the_command_measures_this_gpu(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    shape = ["--hidden", str(HIDDEN), "--intermediate", str(INTERMEDIATE)]
    began = time.monotonic()
    assert main(["calibrate", "--quick", "--json", str(path), *shape]) == 0
    assert time.monotonic() - began < 300
    printed = capsys.readouterr().out
    machine = Machine.load(path)
    assert machine.name == torch.cuda.get_device_name() and machine.name in printed
    assert machine.shape == (HIDDEN, INTERMEDIATE)
    for curve in (machine.expert_us, machine.dense_us, *filter(None, [machine.dispatch_us])):
        assert all(us > 0 for _, us in curve)
        assert curve[-1][1] > 2 * curve[0][1], curve
    assert 0 < machine.active_expert_us <= machine.expert_us[0][1]
    assert machine.launch_us is not None and 0.5 < machine.launch_us < 200
    model = cost_models.parse(str(path))
    assert model.cost(4096) > model.cost(128) > 0


def test_a_time_is_that_of_the_kernels():
    """A GPU that spins for 2 million cycles does so for 1 to 4 ms, whatever the host does."""
    spin = timing.GpuTimer(3)([lambda: torch.cuda._sleep(2_000_000)])
    assert 900 < spin < 4000
    twice = timing.GpuTimer(3)([lambda: torch.cuda._sleep(4_000_000)])
    assert twice == pytest.approx(2 * spin, rel=0.2)


def test_the_weights_do_not_fit_into_the_cache():
    experts = kernels.make(HIDDEN, INTERMEDIATE, 8)
    assert experts.count % 8 == 0
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert experts.count * 3 * HIDDEN * INTERMEDIATE >= 3 * cache


def test_the_kernels_agree_with_torch():
    experts = kernels.make(HIDDEN, INTERMEDIATE, 8)
    kernels.check(experts, HIDDEN)
    x = torch.randn(4 * experts.alignment, HIDDEN, dtype=torch.bfloat16, device="cuda")
    dispatched = experts.dispatched(x)
    out = experts.grouped(dispatched, experts.layout((3, 0, 5, 7), experts.alignment))
    for place, expert in enumerate((3, 0, 5, 7)):
        rows = slice(place * experts.alignment, (place + 1) * experts.alignment)
        alone = experts.dense(x[rows].contiguous(), expert)
        assert math.isfinite(float(alone.float().norm()))
        assert (out[rows] - alone).float().norm() < 0.02 * alone.float().norm()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or importlib.util.find_spec("deep_ep") is None,
    reason="a layer over DeepEP needs deep_ep and two GPUs",
)
@pytest.mark.parametrize("experts", [16, 256])
def test_a_layer_s_prefill_is_timed_both_ways(experts, capfd):
    """The processes compare the two forms with torch before they time them, and say so."""
    plan = Plan((), (), dispatch_tokens=(256,), prefill_tokens=(512, 4096), batches=1)
    said: list[str] = []
    found = dispatch.measure((HIDDEN, INTERMEDIATE), 6, experts, plan, said.append)
    assert not isinstance(found, str), found
    assert not isinstance(found.prefill, str), found.prefill
    local = min(experts // found.ranks, 32)
    assert f"a layer of {found.ranks} x {local} experts is the same fused and overlapped" in said
    assert set(found.prefill) == {512, 4096}
    for overlapped, fused in found.prefill.values():
        assert fused > found.times[256] / 2  # Dispatch is in it.
        assert 0.5 < overlapped / fused < 2
    assert found.prefill[4096][1] > found.prefill[512][1]
    assert "barrier()" not in capfd.readouterr().err
