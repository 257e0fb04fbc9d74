"""Each thing that the doctor names, made to happen; then the command on this machine."""

import ctypes
import errno
import json
import os
import secrets
import sys
from pathlib import Path

import pytest

from waterfill_rs import _native, nvrtc
from waterfill_rs.cli import main
from waterfill_rs.exchange.boards import board_name, is_board_name, is_left_behind
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.operate import checks, doctor, self_test
from waterfill_rs.operate.checks import Entry

OURS = Entry("waterfill_rs", "waterfill_rs.sglang:register", "waterfill-rs")
OTHER = Entry("other", "other:register", "other-plugin")


def check(finding, severity, *texts):
    """The severity, and words of what is found and of what to do."""
    assert finding.severity == severity, finding
    for text in texts:
        assert text in finding.text + finding.advice, (text, finding)
    assert bool(finding.advice) == (severity != "ok"), (
        "each finding but the good ones says what to do"
    )


def test_python():
    check(checks.python((3, 9, 1)), "fail", "3.9.1", "3.10 or newer")
    check(checks.python((3, 10, 4)), "warn", "needs Python 3.11")
    check(checks.python((3, 11, 0)), "ok", "3.11.0")


def test_package():
    here = Path("/here")
    check(checks.package("1.0", {}, here), "fail", "not installed", "pip install")
    check(checks.package("1.0", {here: "1.1"}, here), "fail", "1.1", "module 1.0", "anew")
    twice = {here: "1.0", Path("/there"): "0.9"}
    check(checks.package("1.0", twice, here), "warn", "installed 2 times", "0.9 in /there")
    turned = {Path("/there"): "0.9", here: "1.0"}
    check(checks.package("1.0", turned, here), "fail", "the package is 0.9", "module 1.0")
    check(checks.package("1.0", {here: "1.0"}, here), "ok", "/here")


def test_sglang_version():
    check(doctor._sglang(None), "warn", "not installed here")
    check(doctor._sglang("0.6.0"), "warn", "0.6.0: not in the table of versions", "--deep")
    for version in ("0.5.13", "0.5.16", "0.5.23"):
        check(doctor._sglang(version), "ok", version)
    check(doctor._sglang("0.5.11"), "warn", "0.5.11")
    assert doctor._version("no-such-distribution") is None


@pytest.mark.parametrize(
    "plugins, platforms, environment, level, texts",
    [
        ([], [], {}, "fail", ["no entry point waterfill_rs", "PYTHONPATH"]),
        ([OURS, OURS._replace(distribution="fork")], [], {}, "fail", ["2 dist", "fork"]),
        ([OURS], [], {"SGLANG_PLUGINS": "waterfill-rs"}, "fail", ["waterfill-rs names no entry"]),
        ([OURS, OTHER], [], {"SGLANG_PLUGINS": "other"}, "fail", ["does not name it", "add"]),
        ([OURS], [], {"SGLANG_PLUGINS": "waterfill_rs, othr"}, "warn", ["othr names no entry"]),
        ([OURS], [], {"SGLANG_PLUGINS": " , "}, "fail", ["' , ' names nothing", "no plugin"]),
        ([OURS], [], {"SGLANG_PLUGINS": ","}, "fail", ["',' names nothing", "unset it"]),
        ([OURS], [], {"SGLANG_PLUGINS": " "}, "fail", ["' ' names nothing"]),
        ([OURS], [], {"SGLANG_PLUGINS": ""}, "ok", ["seen once"]),
        ([OURS], [], {"SGLANG_PLUGINS": ",waterfill_rs,\n"}, "ok", ["seen once"]),
        ([OURS], [], {"SGLANG_PLUGINS": "'waterfill_rs'"}, "fail", ["quotes are part"]),
        ([OURS], [], {"SGLANG_PLUGINS": '"waterfill_rs,other"'}, "fail", ["quotes are part"]),
        ([OURS], [], {"SGLANG_PLATFORM": "gpu"}, "fail", ["'gpu' names no entry", "not start"]),
        ([OURS], [], {"SGLANG_PLATFORM": " "}, "fail", ["' ' names no entry", "are: none"]),
        ([OURS], [], {"SGLANG_PLATFORM": ""}, "ok", ["seen once"]),
        ([OURS, OTHER], [], {"SGLANG_PLUGINS": "other, waterfill_rs"}, "ok", ["seen once"]),
        (
            [OURS],
            [Entry("chip", "x:y", "waterfill-rs"), Entry("gpu", "x:y", "gpus")],
            {"SGLANG_PLATFORM": "gpu"},
            "fail",
            ["SGLANG_PLATFORM=gpu leaves waterfill-rs out"],
        ),
        ([OURS], [Entry("gpu", "x:y", "gpus")], {"SGLANG_PLATFORM": "gpu"}, "ok", ["seen once"]),
    ],
)
def test_plugin(plugins, platforms, environment, level, texts):
    check(checks.plugin(plugins, platforms, environment), level, *texts)


def test_a_sglang_that_loads_no_plugins(tmp_path):
    check(checks.plugin([OURS], [], {}, tmp_path), "fail", "no sglang.srt.plugins", "table")
    put(tmp_path, "srt/plugins/__init__.py", "")
    check(checks.plugin([OURS], [], {}, tmp_path), "ok", "seen once")


def fake_distribution(folder, name, version, entry_points):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{entry_points}\n")


def test_distributions_are_found_as_they_lie(tmp_path, monkeypatch):
    fake_distribution(tmp_path / "a", "fork-of-it", "1.0", "waterfill_rs = fork:register")
    fake_distribution(tmp_path / "b", "waterfill-rs", "9.9", "waterfill_rs = x:register")
    for folder in ("a", "b"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    entries = doctor._entries("sglang.srt.plugins")
    assert Entry("waterfill_rs", "fork:register", "fork-of-it") in entries
    check(checks.plugin(entries, [], {}), "fail", "fork-of-it (fork:register)")
    assert doctor._installed()[tmp_path / "b"] == "9.9"


def test_variables():
    check(checks.variables({}), "ok", "auto, exchange auto, a layer waits at most 1000000 us")
    check(checks.variables({"WATERFILL_RS": "none"}), "fail", "WATERFILL_RS='none'")
    check(checks.variables({"WATERFILL_RS_TIMEOUT": "5"}), "warn", "mean WATERFILL_RS_TIMEOUT_US")
    check(checks.variables({f"WATERFILL_RS{'9' * 40}": "5"}), "warn", "is ignored", "there are")
    off = {"WATERFILL_RS": "off"}
    check(checks.variables(off), "warn", "sglang is left as it is")
    required = off | {"WATERFILL_RS_REQUIRE": "1"}
    check(checks.variables(required), "warn", "as it is, and the requirement changes nothing")
    before = {"WATERFILL_RS_TIMEOUT_US": "500"}
    check(checks.variables(before), "warn", "at most 500 us", "unset WATERFILL_RS_TIMEOUT_US")
    check(checks.variables(before | off), "warn", "sglang is left as it is", "unset WATERFILL_RS")
    check(checks.variables({"WATERFILL_RS_PLANNER": "spin:9"}), "ok", "planner spin:9")
    check(checks.variables({"WATERFILL_RS_REQUIRE": "1"}), "ok", "required")


@pytest.mark.parametrize(
    "ranks, experts, redundant",
    [(1, 1, 0), (2, 6, 0), (8, 256, 0), (12, 12, 0), (72, 288, 0), (8, 288, 32), (64, 512, 256)],
)
def test_a_board_takes_what_the_doctor_says(ranks, experts, redundant):
    name = f"waterfill-rs-{os.getpid()}-{ranks:x}"
    board = _native.Board.create(name, ranks, experts, 7, redundant)
    try:
        assert board.path.stat().st_size == _native.board_bytes(ranks, experts, redundant)
    finally:
        board.unlink()


def test_shared_memory(tmp_path):
    folder, plenty = tmp_path / "shm", 2**30
    mounts = f"none {folder} tmpfs rw 0 0\n"
    check(checks.shared_memory(folder, mounts, None, 8), "warn", "is not there", "mount a tmpfs")
    folder.mkdir()
    folder.chmod(0o1777)
    check(checks.shared_memory(folder, mounts, plenty, 8), "ok", "tmpfs, mode 1777, 1,024.0 MiB")
    small = 2 * _native.board_bytes(8, 256) - 1
    check(checks.shared_memory(folder, mounts, small, 8), "warn", "0.2 MiB free", "--shm-size")
    root = "none / ext4 rw 0 0\n"
    check(checks.shared_memory(folder, root, plenty, 8), "warn", "no file system of its own")
    disk = mounts.replace("tmpfs", "ext4")
    check(checks.shared_memory(folder, disk, plenty, 8), "warn", "ext4", "written to a disk")
    folder.chmod(0o777)
    check(checks.shared_memory(folder, mounts, plenty, 8), "warn", "0777", "delete a board")
    refusing = Path("/proc")  # no file can be made there, by root neither
    check(checks.shared_memory(refusing, mounts, plenty, 8), "warn", "cannot be made", "writable")
    check(checks.shared_memory(folder, "", plenty, 8), "warn", "/proc is not there", "mount /proc")
    check(checks.shared_memory(folder, "", plenty, 8, "board"), "fail", "/proc is not there")
    assert doctor._free(tmp_path / "absent") is None and doctor._free(tmp_path) > 0


@pytest.mark.parametrize(
    "ranks, redundant, text, experts",
    [
        (8, 0, "two boards of 8 ranks x 256 experts take 0.2,", 256),
        (6, 0, "two boards of 6 ranks x 258 experts take 0.1,", 258),
        (8, 256, "two boards of 8 ranks x 512 experts, 256 of them redundant, take 0.4,", 512),
        (6, 32, "two boards of 6 ranks x 288 experts, 32 of them redundant, take 0.1,", 288),
    ],
)
def test_redundant_experts_take_shared_memory(ranks, redundant, text, experts, tmp_path):
    mounts, needed = (
        f"none {tmp_path} tmpfs rw 0 0\n",
        2 * _native.board_bytes(ranks, experts, redundant),
    )
    tmp_path.chmod(0o1777)
    found = checks.shared_memory(tmp_path, mounts, needed, ranks, redundant=redundant)
    check(found, "ok", text)
    found = checks.shared_memory(tmp_path, mounts, needed - 1, ranks, redundant=redundant)
    check(found, "warn", text, "--shm-size")


def test_a_file_system_without_room_for_a_name_is_not_one_to_be_made_writable(
    tmp_path, monkeypatch
):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", full)
    mounts = f"none {tmp_path} tmpfs rw,nr_inodes=2 0 0\n"
    check(checks.shared_memory(tmp_path, mounts, 2**30, 8), "warn", "No space", "make room")


@pytest.mark.parametrize(
    "choice, gpus, level, text",
    [
        ("auto", 0, "warn", "it serves, with own counts"),
        ("auto", 8, "warn", "it serves, with own counts"),
        ("board", 0, "fail", "mount a tmpfs"),
        ("group", 8, "fail", "mount a tmpfs"),
        ("group", 0, "warn", "exchange group is for CUDA devices"),
        ("solo", 8, "ok", "not needed with exchange solo"),
    ],
)
def test_no_shared_memory_is_as_bad_as_what_was_asked_for(choice, gpus, level, text, tmp_path):
    found = checks.shared_memory(tmp_path / "absent", "", None, 8, choice, gpus)
    check(found, level, text)

    def full(_):
        raise OSError("No space left on device")

    without = checks.without_board(choice, gpus)
    found = doctor.exchange(BoardSettings(), full, without)
    check(found, without, "No space left")
    assert without == level or choice == "group"


def test_the_benchmark_that_measures_sglangs_own_is_told(tmp_path):
    check(checks.one_batch(None), "ok", "no such benchmark")
    put(tmp_path, "bench_one_batch.py", "def main(): pass")
    ours = "python -m waterfill_rs.sglang.with_plugins sglang."
    check(
        checks.one_batch(tmp_path), "ok", "sglang's own Waterfill, even", f"{ours}bench_one_batch"
    )
    put(tmp_path, "benchmark/one_batch.py", "def cli_main(): pass")
    check(checks.one_batch(tmp_path), "ok", f"{ours}benchmark.one_batch")
    put(tmp_path, "benchmark/one_batch.py", "load_plugins()")
    check(checks.one_batch(tmp_path), "ok", "one_batch loads plugins")
    assert doctor._folder("no_such_package") is None


def test_a_file_of_measurements_that_stops_the_server_is_told(tmp_path):
    absent = {"WATERFILL_RS_MACHINE": str(tmp_path / "absent.json")}
    check(checks.variables(absent), "fail", "absent.json", "calibrate --json", "server stops")
    put(tmp_path, "other.json", "[]")
    other = {"WATERFILL_RS_MACHINE": str(tmp_path / "other.json")}
    check(checks.variables(other), "fail", "other.json")
    check(checks.variables(other | {"WATERFILL_RS_SHARED": "fused"}), "ok", "fused")


def put(root, name, text):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    "files, membership, quota",
    [
        ({}, "0::/", None),
        ({"cpu.max": "max 100000\n"}, "0::/", None),
        ({"cpu.max": "150000 100000\n"}, "0::/", 1.5),
        ({"cpu.max": "800000 100000\n", "pod/cpu.max": "200000 100000\n"}, "0::/pod/one", 2.0),
        ({"cpu.max": "400000 100000\n"}, "0::/a/path/of/the/host", 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/", None),
        (
            {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            "5:memory:/y\n4:cpu,cpuacct:/x\n0::/",
            0.5,
        ),
    ],
)
def test_cgroup_quota(files, membership, quota, tmp_path):
    for name, text in files.items():
        put(tmp_path, name, text)
    assert checks.cgroup_quota(tmp_path, membership) == quota


def test_cpus():
    check(checks.cpus(64, None, 8, "inline"), "ok", "64 cores, no limit")
    check(checks.cpus(64, 16.0, 8, "inline"), "ok", "limits them to 16")
    check(checks.cpus(64, 7.5, 8, "inline"), "warn", "7.5 at once", "2 CPUs a rank (16)")
    check(checks.cpus(12, None, 8, "inline"), "warn", "2 CPUs a rank")
    check(checks.cpus(64, 32.0, 8, "spin"), "warn", "PLANNER=inline", "uses the group's time up")
    check(checks.cpus(8, None, 8, "spin"), "warn", "give 9 CPUs")
    check(checks.cpus(64, 8.0, 8, "spin"), "warn", "give 9 CPUs")
    busy = "planner auto, which takes one core while the server is busy"
    check(checks.cpus(64, None, 8, "auto", gpus=8), "ok", busy)
    check(checks.cpus(16, None, 8, "auto", gpus=8), "warn", "and one for the planner (17)")


class Library:
    def cuDriverGetVersion(self, address):
        address._obj.value = 13020


def absent(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_gpus_and_driver(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        put(tmp_path, name, "")
    assert checks.visible_gpus(tmp_path, {}) == 2
    check(checks.driver(0, absent), "ok", "no NVIDIA GPU")
    check(checks.driver(2, absent), "fail", "2 GPUs, and no driver library", "--gpus all")
    check(checks.driver(0, lambda name: Library()), "warn", "CUDA 13.2", "CUDA_VISIBLE_DEVICES")
    check(checks.driver(2, lambda name: Library()), "ok", "2 GPUs, driver for CUDA 13.2")


@pytest.mark.parametrize(
    "chosen, count",
    [
        ("", 0),
        (" ", 0),
        ("-1", 0),
        ("none", 0),
        ("NoDevFiles", 0),
        ("1", 1),
        ("3,0, 1", 3),
        ("0,1,2,3", 4),
        ("0,9,1", 1),  # read up to the first that names no device
        ("0,-1,1", 1),
        ("0,,1", 1),
        (",0", 0),
        ("9,0", 0),
        ("0,1,", 2),
        ("0,x,1", 1),
        ("1gpu2,2ampere", 2),  # the number that an entry begins with
        ("0,0", 0),  # twice: none
        ("0,1,0", 0),
        ("0,9,0", 1),
        ('"0,1"', 0),
        ("GPU-aa11,GPU-bb22", 2),
        ("GPU-aa", 1),  # the beginning of a UUID
        ("GPU-cc", 0),  # of two
        ("GPU-aa11,GPU-zz,GPU-bb22", 1),
        ("GPU-aa11,GPU-aa", 0),
        ("GPU-aa11,1", 1),
        ("0,GPU-bb22", 1),
        ("MIG-5a,MIG-5b", 1),  # a process sees one
        ("MIG-GPU-aa11/1/0", 1),
    ],
)
def test_cuda_visible_devices_by_cudas_own_rule(chosen, count, tmp_path):
    for number, uuid in enumerate(("aa11", "bb22", "cc33", "cc44")):
        put(tmp_path, f"nvidia{number}", "")
        information = f"Model: NVIDIA H100\nGPU UUID: \t GPU-{uuid}\nBus Type: PCIe\n"
        put(tmp_path, f"driver/gpus/{number}/information", information)
    uuids = doctor._uuids(tmp_path / "driver")
    assert checks.visible_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": chosen}, uuids) == count


def test_uuids_are_taken_for_devices_where_the_driver_tells_none(tmp_path):
    put(tmp_path, "nvidia0", "")
    assert doctor._uuids(tmp_path / "absent") == []
    assert checks.visible_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": "GPU-aa11"}) == 1


def test_nvrtc(tmp_path, monkeypatch):
    file = "nvidia/cu13/lib/libnvrtc.so.13"
    put(tmp_path, file, "no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    files, loaded = nvrtc.files(), []
    assert files == [str(tmp_path / file)]
    check(checks.nvrtc(0, files, absent), "ok", "not needed")
    check(checks.nvrtc(1, files, loaded.append), "ok", "libnvrtc.so.13")
    assert loaded == files

    def only_files(name):  # Another test may have loaded the real one, which is then found by name.
        return ctypes.CDLL(name) if "/" in name else absent(name)

    check(checks.nvrtc(1, files, only_files), "fail", "no NVRTC", str(tmp_path), "cuda-nvrtc")


def test_nvrtc_of_cuda_home_comes_last(tmp_path, monkeypatch):
    for folder in ("nvidia/cuda_nvrtc/lib", "lib64"):
        put(tmp_path, f"{folder}/libnvrtc.so.12", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvrtc.files() == [
        str(tmp_path / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
        str(tmp_path / "lib64/libnvrtc.so.12"),
    ]


def test_mps(tmp_path):
    check(checks.mps(0, 8, tmp_path), "ok", "without a GPU")
    check(checks.mps(8, 8, tmp_path), "ok", "does not run")
    check(checks.mps(1, 8, tmp_path), "warn", "8 ranks on 1 GPUs", "nvidia-cuda-mps-control -d")
    put(tmp_path, "control", "")
    check(checks.mps(1, 8, tmp_path), "ok", "MPS runs")


def test_boards(tmp_path):
    for name in ("waterfill-rs-11-aa", "waterfill-rs-22-bb", "waterfill-rs-33-cc", "other-11-aa"):
        put(tmp_path, name, "")
    rank = {"process": 11, "alive": True}
    seen = [{"name": "waterfill-rs-33-cc", "by_rank": [rank, {"process": 0, "alive": None}]}]
    check(checks.boards(tmp_path, seen, lambda path: "-11-" in path.name), "warn", "rm", "-11-aa")
    check(checks.boards(tmp_path, seen, lambda path: False), "ok", "1 in use now")
    seen[0]["by_rank"].append({"process": 33, "alive": False})
    check(checks.boards(tmp_path, seen, lambda path: False), "warn", "rank 2 of", "restart")
    seen[0]["by_rank"] += [{"process": 34, "alive": False}] * 61
    found = checks.boards(tmp_path, seen, lambda path: False)
    check(found, "warn", "gone: 62 of 64 ranks of waterfill-rs-33-cc")
    assert len(found.text) < 100


def test_a_name_that_is_made_is_known_again():
    assert is_board_name(board_name())
    for other in ("", "waterfill-rs-", "waterfill-rs-7-", "waterfill-rs-7-xy", f"x{board_name()}"):
        assert not is_board_name(other), other


def test_more_ranks_than_there_can_be_are_refused(capsys):
    most = _native.MAX_RANKS
    assert main(["doctor", "--ranks", str(most + 1)]) == 2
    assert f"--ranks {most + 1}: give 1 to {most}" in capsys.readouterr().err


def test_a_board_is_left_behind_once_its_creator_is_gone():
    name = f"waterfill-rs-{os.getpid()}-{secrets.token_hex(8)}"
    board = _native.Board.create(name, 2, 4, 7)
    path = board.path
    try:
        assert not is_left_behind(path)
        # Whoever has it open now, its creator's lock is free.
        attached = _native.Board.attach(name, 2, 4, 7)
        del board
        assert is_left_behind(path)
    finally:
        attached.unlink()
    assert not is_left_behind(path)


def test_exchange_is_judged_by_what_was_live():
    def judged(calls, live):
        return doctor.exchange(BoardSettings(), lambda _: self_test.Calls(calls, live, 5.25, 99))

    check(judged(1000, 950), "ok", "950 of 1000 calls live", "at most 1000000", "wait 5.2 us")
    check(judged(1000, 899), "warn", "own counts")
    check(judged(1000, 0), "warn", "WATERFILL_RS_EXCHANGE=solo")


@pytest.mark.parametrize("pace", ["auto", "inline", "park", "spin"])
def test_two_processes_really_exchange(pace):
    found = self_test.run(BoardSettings(cap_us=1_000_000, pace=pace), seconds=0.2)
    assert found.live == found.calls == self_test.BURSTS * self_test.CALLS
    assert 0 < found.median_us <= found.longest_us


def test_a_process_that_ends_is_told(monkeypatch):
    monkeypatch.setattr(
        self_test, "EXPERTS", 254
    )  # in this process only: the others refuse its board
    check(doctor.exchange(BoardSettings(), self_test.run), "fail", "ended: ", "experts is 0xfe")
    monkeypatch.setattr(self_test, "_rank", os.abort)
    check(doctor.exchange(BoardSettings(), self_test.run), "fail", "self-test ended (see above)")


def test_a_core_that_is_not_there_is_told_in_words(capfd):
    settings = BoardSettings(pace="spin", core=1023)
    found = doctor.exchange(settings, self_test.run)
    check(found, "fail", "planner's thread to core 1023", "WATERFILL_RS_PLANNER=auto, or spin:CORE")
    assert "Traceback" not in capfd.readouterr().err
    check(doctor.exchange(settings, self_test.run, checks.without_board("solo", 0)), "warn", "core")


def test_a_check_that_fails_itself_does_not_end_the_others(monkeypatch, capsys):
    monkeypatch.setattr(checks, "cpus", lambda *_: 1 / 0)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "fail cpu        the check itself failed: ZeroDivisionError" in printed
    assert "2 processes, planner auto" in printed


BALANCER, FLAGS = "sglang.x.WaterfillBalancer", "sglang.x.add_cli_args"


@pytest.mark.parametrize(
    "code, stands, errors, enabled, level, texts",
    [
        (0, {BALANCER: True, FLAGS: True}, "", True, "ok", ["all 2"]),
        (0, {BALANCER: False, FLAGS: True}, "", True, "fail", [BALANCER, "remove one"]),
        (0, {FLAGS: True}, "waterfill-rs is off: reason", True, "fail", ["is off: reason"]),
        (0, {FLAGS: True}, "", False, "ok", ["all 1"]),
        (0, {}, "Traceback: it was not loaded", True, "fail", ["it was not loaded"]),
        (0, {}, "", True, "fail", ["not replaced: nothing was said"]),
        (1, {}, "waterfill-rs cannot serve:\n- no", True, "fail", ["cannot serve:; - no"]),
    ],
)
def test_hooks(code, stands, errors, enabled, level, texts):
    printed = json.dumps({"hooks": stands, "against_overlap": []})
    loaded = code, f"noise\n{printed}\n", errors
    check(doctor.hooks(lambda: loaded, enabled=enabled), level, *texts)


@pytest.mark.parametrize(
    "code, reasons, level, texts",
    [
        (0, [], "ok", ["beside dispatch"]),
        (0, ["no such part", "a hook"], "warn", ["stay fused", "no such part; a hook"]),
        (1, [], "warn", ["not seen", "see hooks"]),
    ],
)
def test_overlap(code, reasons, level, texts):
    printed = json.dumps({"hooks": {}, "against_overlap": reasons})
    check(doctor.overlap(lambda: (code, f"noise\n{printed}\n", "")), level, *texts)


def test_where_shared_experts_run_is_one_of_our_variables():
    check(checks.variables({"WATERFILL_RS_SHARED": "overlap"}), "ok", "shared experts overlap")
    check(checks.variables({"WATERFILL_RS_REPLICAS": "live"}), "ok", "replicas live")
    check(checks.variables({"WATERFILL_RS_REPLICA": "live"}), "warn", "mean WATERFILL_RS_REPLICAS")
    check(checks.variables({"WATERFILL_RS_SHARE": "overlap"}), "warn", "mean WATERFILL_RS_SHARED")
    check(checks.variables({"WATERFILL_RS_SHARED": "on"}), "fail", "auto, overlap, fused")


def test_hooks_that_take_too_long_to_look_at(monkeypatch):
    monkeypatch.setattr(doctor, "DEEP_S", 0.01)
    check(doctor.hooks(doctor._load_hooks, enabled=True), "fail", "not done in 0.01 s")


def test_the_command_here(capsys, monkeypatch):
    monkeypatch.setenv("WATERFILL_RS_TIMEOUT_US", "1000000")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    code = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["ok"]) == (doctor.JSON_VERSION, code == 0)
    severities = {one["check"]: one["level"] for one in told["checks"]}
    assert severities["exchange"] == severities["variables"] == severities["python"] == "ok"
    monkeypatch.setenv("WATERFILL_RS", "none")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "fail variables  WATERFILL_RS='none': give one of" in printed.out
    assert "-> set it to one of these" in printed.out
    assert "checks failed" in printed.err and "variables" in printed.err
    assert main(["doctor", "--ranks", "0"]) == 2
