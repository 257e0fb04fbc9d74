"""``waterfill-rs calibrate`` without a GPU: what it makes of times, its kernels' arguments, its errors."""

import json
import subprocess
import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import dispatch_ranks
from fake_deep_gemm import SHAPE, FakeDeepGemm, fp8_experts

from waterfill_rs.calibrate import command as calibrate
from waterfill_rs.calibrate import dispatch, kernels, timing
from waterfill_rs.calibrate.command import GROUP, Times, machine_from, measure, table
from waterfill_rs.calibrate.job import Dispatched, Job, Plan
from waterfill_rs.calibrate.kernels import Bf16Experts, check, quantise_blocks, quantise_rows
from waterfill_rs.cli import main
from waterfill_rs.machine import Machine
from waterfill_rs.replay import cost_models

PLAN = Plan(
    dense_tokens=(64, 512), tiles=(1, 2, 4), dispatch_tokens=(64,), prefill_tokens=(512,), batches=1
)


class FakeExperts:
    """Two groups of experts whose calls record what they were called with."""

    count = 2 * GROUP
    alignment = 128

    def dense(self, x, expert):
        return ("dense", x, (expert,))

    def dispatched(self, x):
        return x

    def layout(self, experts, rows):
        return tuple(experts), rows

    def grouped(self, dispatched, layout):
        experts, rows = layout
        assert dispatched == len(experts) * rows
        return ("grouped", rows, experts)


def fake_timer(seen):
    """Times like a GPU's: 20 us a call, and each expert 10 us and 0.05 a row above 128."""

    def timer(calls):
        made = [call() for call in calls]
        seen.extend(made)
        kind, rows, experts = made[0]
        assert {(k, r, len(e)) for k, r, e in made} == {(kind, rows, len(experts))}
        return 20 + len(experts) * (10 + 0.05 * max(0, rows - 128))

    return timer


def measured():
    seen, said = [], []
    times = measure(FakeExperts(), fake_timer(seen), PLAN, lambda tokens: tokens, said.append)
    return times, seen, said


def test_every_point_is_timed_through_all_experts():
    times, seen, said = measured()
    assert set(times.dense) == {64, 512}
    by_rows = {(n, rows) for n in (1, GROUP) for rows in (128, 256, 512)}
    assert set(times.grouped) == by_rows | {(2, 128), (4, 128)}
    assert len(said) == len(times.dense) + len(times.grouped)
    for kind, rows, of in {(kind, rows, len(experts)) for kind, rows, experts in seen}:
        ran = [
            e for k, r, experts in seen for e in experts if (k, r, len(experts)) == (kind, rows, of)
        ]
        assert sorted(ran) == list(range(FakeExperts.count))


def test_a_machine_s_model_gives_the_times_back():
    times, _, _ = measured()
    machine = machine_from(
        "GPU", "a test", SHAPE, times, Dispatched(4, 8, {64: 30.0, 128: 29.0}, "no room"), 5.0
    )
    assert (machine.call_us, machine.active_expert_us) == (20, 10)
    for (experts, rows), us in times.grouped.items():
        assert machine.grouped([rows] * experts, *SHAPE) == pytest.approx(us, abs=0.1)
    assert machine.dense(512, *SHAPE) == times.dense[512]
    assert machine.dispatch_us == ((64, 30.0), (128, 30.0))  # A fall is noise.
    assert (machine.dispatch_ranks, machine.dispatch_top_k, machine.launch_us) == (4, 8, 5.0)


def test_noise_does_not_make_a_machine_that_cannot_be():
    times, _, _ = measured()
    without_call = Times(times.dense, {k: float(k[0] * 10) for k in times.grouped})
    machine = machine_from("GPU", "a test", SHAPE, without_call, "no deep_ep", None)
    assert (machine.call_us, machine.dispatch_us, machine.launch_us) == (0, (), None)
    busy = Times(times.dense, dict.fromkeys(times.grouped, 30.0))
    with pytest.raises(RuntimeError, match=r"8 experts took 30\.0 us and one 30\.0: .*idle"):
        machine_from("GPU", "a test", SHAPE, busy, "no deep_ep", None)


def test_the_table_shows_every_time():
    times, _, _ = measured()
    dispatched = Dispatched(4, 8, {64: 31.5}, "no room")
    machine = machine_from("GPU", "a test", SHAPE, times, dispatched, 5.2)
    lines = list(table(machine, times, dispatched))
    assert "prefill was not measured: no room" in lines
    assert ["128", "30.0", "40.0", "60.0", "100.0"] in [line.split() for line in lines]
    assert ["256", "36.4", "-", "-", "151.2"] in [line.split() for line in lines]
    assert ["64", "31.5"] in [line.split() for line in lines]
    assert any("5.2" in line for line in lines)
    assert "dispatch was not measured: no deep_ep" in list(table(machine, times, "no deep_ep"))


@pytest.mark.parametrize(
    "experts", [fp8_experts(), Bf16Experts(*SHAPE, 3, "this is a test", device="cpu")]
)
def test_the_kernels_are_called_so_that_they_compute_the_expert(experts):
    check(experts, SHAPE[0], "cpu")
    assert not experts.poisoned
    x = torch.randn(384, SHAPE[0], dtype=torch.bfloat16)
    grouped = experts.grouped(experts.dispatched(x), experts.layout((2, 0, 1), 128))
    for expert, rows in ((2, slice(0, 128)), (0, slice(128, 256)), (1, slice(256, 384))):
        torch.testing.assert_close(grouped[rows], experts.dense(x[rows], expert))
        assert (grouped[rows] - experts.dense(x[rows], (expert + 1) % 3)).norm() > grouped[
            rows
        ].norm() / 2


def test_kernels_that_compute_something_else_are_refused():
    with pytest.raises(RuntimeError, match=r"dense MLP differs .* by 0\.\d+ of its norm"):
        check(fp8_experts(wrong_by=1.1), SHAPE[0], "cpu")


def test_kernels_that_leave_rows_out_are_refused(monkeypatch):
    experts = fp8_experts()
    full = FakeDeepGemm.m_grouped_fp8_gemm_nt_contiguous

    def half(self, a, b, d, m_indices):
        rows = slice(0, len(m_indices) // 2)
        full(self, (a[0][rows], a[1][rows]), b, d[rows], m_indices[rows])

    monkeypatch.setattr(FakeDeepGemm, "m_grouped_fp8_gemm_nt_contiguous", half)
    with pytest.raises(RuntimeError, match="grouped GEMM differs from torch's by nan"):
        check(experts, SHAPE[0], "cpu")


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_quantisation_keeps_the_values(powers_of_two):
    x = torch.randn(256, 384, dtype=torch.bfloat16) * torch.logspace(-3, 3, 384).bfloat16()
    by_rows, row_scales = quantise_rows(x, powers_of_two=powers_of_two)
    by_blocks, block_scales = quantise_blocks(x, powers_of_two=powers_of_two)
    assert (row_scales.shape, block_scales.shape) == ((256, 3), (2, 3))
    spread = block_scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    for back in (
        by_rows.float() * row_scales.repeat_interleave(128, 1),
        by_blocks.float() * spread,
    ):
        assert (back - x.float()).norm() < 0.04 * x.float().norm()
    for scales in (row_scales, block_scales):
        assert bool((scales.log2().frac() == 0).all()) == powers_of_two


def test_the_first_helper_that_works_is_taken():
    found, reason = kernels.first_working(("math:sqrt", "math:cos"), lambda f: f(0) == 1)
    assert (found(0), reason) == (1, "")
    found, reason = kernels.first_working(("no_such:f", "math:no_such"), lambda f: True)
    assert found is None and reason.startswith("f of no_such: ModuleNotFoundError")


def prefill_lines(prefill):
    times, _, _ = measured()
    dispatched = Dispatched(4, 8, {64: 31.5}, prefill)
    machine = machine_from("GPU", "a test", SHAPE, times, dispatched, 5.2)
    assert machine.prefill_us == tuple((n, *pair) for n, pair in sorted(prefill.items()))
    return list(table(machine, times, dispatched))


def test_the_table_says_from_how_many_tokens_on_prefill_overlaps():
    slower, faster = (1200.0, 1000.0), (800.0, 1000.0)
    lines = prefill_lines({8192: faster, 1024: slower, 4096: slower})
    assert lines[-1] == (
        "by these figures prefill is fused, from 8192 tokens a rank on it overlaps"
    )
    rows = [line.split() for line in lines[-4:-1]]
    assert rows[0] == ["1024", "1200.0", "1000.0", "1.200"]
    assert rows[2] == ["8192", "800.0", "1000.0", "0.800"]
    never, always = prefill_lines({512: slower})[-1], prefill_lines({512: faster})[-1]
    assert never == "by these figures prefill is fused at any number of tokens"
    assert always == "by these figures prefill overlaps at any number of tokens"


def job(dispatch=(64, 128), prefill=(512,)):
    return Job(2, 128, 128, 2, 8, dispatch, prefill, 0)


def collected(job, work):
    said = []
    return dispatch._collect(job, work, said.append), said


def test_dispatch_collects_its_ranks_times():
    found, said = collected(job(), dispatch_ranks.report_times)
    assert found == Dispatched(2, 2, {64: 66.0, 128: 130.0}, {512: (514.0, 256.0)})
    assert len(said) == 4 and said[2] == "the forms agree"


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (dispatch_ranks.fail_on_rank_1, "rank 1: OSError: no NVLink"),
        (dispatch_ranks.die_on_rank_1, "a rank's process ended with code 3"),
    ],
)
def test_dispatch_that_fails_says_why(work, reason):
    assert collected(job(), work)[0] == reason


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (dispatch_ranks.fail_in_prefill, "rank 0: RuntimeError: forms differ"),
        (dispatch_ranks.die_in_prefill, "a rank's process ended with code 3"),
        (dispatch_ranks.no_memory, "not even 512 tokens a rank fit into memory"),
    ],
)
def test_prefill_that_fails_does_not_cost_dispatch(work, reason):
    assert collected(job(), work)[0] == Dispatched(2, 2, {64: 66.0, 128: 130.0}, reason)


def test_ranks_that_hang_are_ended(monkeypatch):
    monkeypatch.setattr(dispatch, "_SILENT_S", 0)
    found, _ = collected(job(), dispatch_ranks.fail_on_rank_1)
    assert found == "the ranks' processes reported nothing for 0 s"


def test_dispatch_that_cannot_be_measured_says_why(monkeypatch):
    def reason(gpus, experts=256):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return dispatch.measure(SHAPE, 2, experts, PLAN, print)

    assert reason(1) == "1 GPU visible, and 256 experts over 2, 4 or 8 are needed"
    assert reason(3, experts=255) == "3 GPUs visible, and 255 experts over 2, 4 or 8 are needed"
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert reason(2).startswith("deep_ep cannot be imported (")


def test_bad_arguments_are_refused_before_a_gpu_is_looked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "_gpu", lambda: pytest.fail("looked for a GPU"))
    file = tmp_path / "file"
    file.touch()
    cases = {
        ("--json", str(tmp_path)): f"{tmp_path}: cannot be written: give a file, not a folder",
        ("--json", f"{file}/gpu.json"): f"{file}/gpu.json: cannot be written",
        ("--hidden", "100"): "--hidden 100: give a multiple of 128 from 128 to 65536",
        ("--intermediate", "0"): "--intermediate 0: give a multiple of 128",
        ("--top-k", "0"): "--top-k 0: give 1 to 32",
        ("--experts", "4"): "--experts 4: give at least --top-k (8)",
    }
    for arguments, expected in cases.items():
        assert main(["calibrate", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"waterfill-rs: {expected}") and error.count("\n") == 1


def test_without_a_gpu_the_command_says_what_is_missing():
    code = "import torch; torch.cuda.is_available = lambda: False; torch.version.cuda = {}; "
    code += "import sys; from waterfill_rs.cli import main; sys.exit(main(['calibrate']))"
    cases = {"'13.0'": "sees none (CUDA_VISIBLE_DEVICES is ", "None": "is built without CUDA"}
    for version, expected in cases.items():
        command = [sys.executable, "-c", code.format(version)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("waterfill-rs: calibrate needs a GPU, and")
        assert expected in done.stderr and done.stderr.count("\n") == 1


def test_without_torch_the_command_says_so():
    code = "import sys; sys.modules['torch'] = None; from waterfill_rs.cli import main; "
    code += "sys.exit(main(['calibrate']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("waterfill-rs: calibrate needs torch, which sglang brings")


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "waterfill_rs.cli", "calibrate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--quick" in done.stdout


@pytest.fixture
def no_gpu(monkeypatch):
    """A GPU that is not there, and how many of it are visible."""
    experts = FakeExperts()
    experts.description = "fake kernels"
    monkeypatch.setattr(calibrate, "_gpu", lambda: "NVIDIA Test")
    monkeypatch.setattr(kernels, "make", lambda *shape: experts)
    monkeypatch.setattr(kernels, "check", lambda *_: None)
    monkeypatch.setattr(calibrate, "_inputs", lambda hidden: lambda tokens: tokens)
    monkeypatch.setattr(timing, "GpuTimer", lambda batches: fake_timer([]))
    monkeypatch.setattr(timing, "launch_us", lambda: 4.5)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    return lambda gpus: monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_the_whole_command_with_a_gpu_that_is_not_there(tmp_path, capsys, no_gpu):
    no_gpu(1)
    path = tmp_path / "gpu.json"
    assert main(["calibrate", "--quick", "--json", str(path), "--hidden", "256"]) == 0
    printed = capsys.readouterr()
    assert "dispatch was not measured: 1 GPU visible" in printed.out
    assert "grouped GEMM, 8 x 2048 rows" in printed.err
    machine = Machine.load(path)
    assert (machine.name, machine.shape, machine.launch_us) == ("NVIDIA Test", (256, 2048), 4.5)
    assert "fake kernels" in machine.source
    assert (machine.dispatch_us, machine.prefill_us) == ((), ())
    assert json.loads(path.read_text())["version"] == 1
    assert cost_models.parse(str(path)).cost(128) == 10e6


def test_the_whole_command_with_two_gpus_that_are_not_there(tmp_path, capsys, no_gpu, monkeypatch):
    no_gpu(2)
    monkeypatch.setattr(dispatch, "_rank", dispatch_ranks.report_times)
    path = tmp_path / "gpu.json"
    assert main(["calibrate", "--quick", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "prefill, 4096 tokens a rank: overlapped 4098.0 us, fused 2048.0 us" in printed.err
    assert "by these figures prefill is fused at any number of tokens" in printed.out
    machine = Machine.load(path)
    assert machine.dispatch_us[0] == (256, 258.0) and machine.dispatch_ranks == 2
    tokens = (1024, 4096, 8192)
    assert machine.prefill_us == tuple((n, n + 2.0, n / 2) for n in tokens)


class FakeGpu:
    """A GPU whose kernels take 10 us, and a host that takes ``launch_us`` to launch one."""

    def __init__(self, monkeypatch, launch_us):
        self.launch_us = launch_us
        self.host = self.gpu = 0.0
        for name in ("Event", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr("time.perf_counter", lambda: self.host / 1e6)

    def kernel(self, us=10.0):
        self.host += self.launch_us
        self.gpu = max(self.gpu, self.host) + us

    def synchronize(self):
        self.host = max(self.host, self.gpu)

    def _sleep(self, cycles):
        self.gpu = max(self.gpu, self.host) + cycles / 2000

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.gpu, gpu.host)

            def query(self):
                return self.at <= gpu.host

            def synchronize(self):
                gpu.synchronize()

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        return Event()


@pytest.mark.parametrize("launch_us", [1.0, 50.0])
def test_a_slow_host_does_not_lengthen_the_time(monkeypatch, launch_us):
    gpu = FakeGpu(monkeypatch, launch_us)
    assert timing.GpuTimer(3)([gpu.kernel] * 8) == pytest.approx(10)


def test_a_host_that_gets_slower_gets_more_time_or_an_error(monkeypatch):
    gpu = FakeGpu(monkeypatch, 1.0)
    launched = []

    def slower_from(call, factor):
        launched.append(1)
        gpu.launch_us = factor if len(launched) > call else 1.0
        gpu.kernel()

    timer = timing.GpuTimer(3)
    # Two rounds of 8 warm up, two more show how fast the host is, and then it is 40 times slower.
    assert timer([lambda: slower_from(32, 40.0)] * 8) == pytest.approx(10)
    launched.clear()
    with pytest.raises(RuntimeError, match=r"the host did not launch 16 calls in \d+ ms"):
        timer([lambda: slower_from(32, 4e5)] * 8)
