"""The checks of ``waterfill-rs doctor``: each is given what it looks at, and gives one finding."""

from __future__ import annotations

import ctypes
import difflib
import errno
import itertools
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from waterfill_rs import _native
from waterfill_rs.config import (
    BACKEND_VARIABLE,
    EXCHANGE_VARIABLE,
    MACHINE_VARIABLE,
    PLANNER_VARIABLE,
    REPLICAS_VARIABLE,
    REQUIRE_VARIABLE,
    SHARED_VARIABLE,
    TIMEOUT_VARIABLE,
    Config,
)
from waterfill_rs.exchange.boards import is_board_name
from waterfill_rs.machine import Machine

__all__ = [
    "Entry",
    "Finding",
    "boards",
    "cgroup_quota",
    "cpus",
    "driver",
    "mps",
    "nvrtc",
    "one_batch",
    "package",
    "plugin",
    "python",
    "sglang",
    "shared_memory",
    "variables",
    "visible_gpus",
    "without_board",
]

Severity = Literal["ok", "warn", "fail"]
PLUGIN = "waterfill_rs"
VARIABLES = (
    BACKEND_VARIABLE,
    REQUIRE_VARIABLE,
    EXCHANGE_VARIABLE,
    TIMEOUT_VARIABLE,
    PLANNER_VARIABLE,
    SHARED_VARIABLE,
    MACHINE_VARIABLE,
    REPLICAS_VARIABLE,
)
LEAST_CAP_US = 100_000
"""Below it, ranks that are late for usual reasons cost live plans; the planner may be asleep for 8 ms of it."""
USUAL_EXPERTS = 256
MOST_NAMED = 8
"""Ranks that are named one by one."""


class Entry(NamedTuple):
    """An entry point: its name, what it names, and the distribution that has it."""

    name: str
    value: str
    distribution: str


@dataclass(frozen=True)
class Finding:
    """``warn``: it serves, but not as well as it could. ``fail``: it does not. ``advice``: what to do."""

    check: str
    severity: Severity
    text: str
    advice: str = ""


def python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version[:3]))
    if version[:2] < (3, 10):
        return Finding("python", "fail", text, "use Python 3.10 or newer")
    if version[:2] < (3, 11):
        return Finding("python", "warn", text, "sglang 0.5.23 needs Python 3.11 or newer")
    return Finding("python", "ok", text)


def package(native: str, installed: Mapping[Path, str], folder: Path) -> Finding:
    """``native``: the compiled module's version. ``installed``: versions of this package's metadata, by place, in the order in which Python looks."""
    text = f"{native}, from {folder}"
    if not installed:
        return Finding(
            "package", "fail", f"{text}, not installed", "sglang finds it once it is: pip install"
        )
    version, *others = installed.values()  # Python and sglang take the first.
    if version != native:
        return Finding(
            "package",
            "fail",
            f"the package is {version} and its compiled module {native}",
            "install it anew: pip install --force-reinstall waterfill-rs",
        )
    if others:
        places = ", ".join(f"{version} in {place}" for place, version in installed.items())
        text += f", installed {len(installed)} times: {places}"
        return Finding("package", "warn", text, "keep one: the first of them is used")
    return Finding("package", "ok", text)


def sglang(found: str | None, named: bool, known: str) -> Finding:
    """``found``: its version. ``named``: is it in the table of versions, which spans ``known``?"""
    if found is None:
        advice = "install waterfill-rs into the environment that sglang is in"
        return Finding("sglang", "warn", "not installed here: nothing to plug into", advice)
    if not named:
        text = f"{found}: not in the table of versions, {known}"
        advice = "it is used if its Waterfill looks the same: see with waterfill-rs doctor --deep"
        return Finding("sglang", "warn", text, advice)
    return Finding("sglang", "ok", f"{found}, in the table of versions, {known}")


def plugin(
    plugins: Sequence[Entry],
    platforms: Sequence[Entry],
    environment: Mapping[str, str],
    sglang: Path | None = None,
) -> Finding:
    """Does sglang, installed in this folder, see the entry point once, and do its two variables let it through?"""
    if sglang is not None and not (sglang / "srt/plugins").is_dir():
        text = f"the sglang in {sglang} loads no plugins (it has no sglang.srt.plugins)"
        return Finding("plugin", "fail", text, "use one of the table of versions")
    ours = [entry for entry in plugins if entry.name == PLUGIN]
    if not ours:
        return Finding(
            "plugin",
            "fail",
            f"no entry point {PLUGIN} in sglang.srt.plugins",
            "install the wheel into this environment; a folder on PYTHONPATH has no entry points",
        )
    if len(ours) > 1:
        owners = ", ".join(f"{entry.distribution} ({entry.value})" for entry in ours)
        text = f"{len(ours)} distributions have an entry point {PLUGIN}: {owners}"
        return Finding("plugin", "fail", text, "uninstall all but one: sglang takes any of them")
    selected = environment.get("SGLANG_PLATFORM", "")
    if selected and selected not in {entry.name for entry in platforms}:
        text = f"SGLANG_PLATFORM={selected!r} names no entry point: sglang itself does not start"
        there = ", ".join(sorted(entry.name for entry in platforms)) or "none"
        return Finding("plugin", "fail", text, f"unset it; there are: {there}")
    left_out = {e.distribution for e in platforms if selected and e.name != selected}
    if ours[0].distribution in left_out:
        text = f"SGLANG_PLATFORM={selected} leaves {ours[0].distribution} out"
        return Finding("plugin", "fail", text, "it also has a platform: install it without")
    return _plugin_filter(plugins, platforms, environment)


def _plugin_filter(
    plugins: Sequence[Entry], platforms: Sequence[Entry], environment: Mapping[str, str]
) -> Finding:
    """As sglang reads it: any text but an empty one is a list of all that is loaded, if of nothing."""
    text = environment.get("SGLANG_PLUGINS", "")
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {entry.name for entry in (*plugins, *platforms)}
    wrong = [name for name in names if name not in known]
    if text and PLUGIN not in names:
        advice = f"add {PLUGIN} to it, with that spelling, or unset it"
        return Finding(
            "plugin", "fail", f"SGLANG_PLUGINS={text!r}{_left_out(names, wrong)}", advice
        )
    if wrong:
        told = f"SGLANG_PLUGINS={text!r}: {', '.join(wrong)} names no entry point"
        return Finding("plugin", "warn", told, f"there are {', '.join(sorted(known))}")
    return Finding("plugin", "ok", f"entry point {PLUGIN} seen once, not filtered out")


def _left_out(names: Sequence[str], wrong: Sequence[str]) -> str:
    """Why a list does not let us through."""
    if not names:
        return " names nothing, and is not empty: sglang loads no plugin at all"
    if any(name.strip("\"'") == PLUGIN for name in names):
        return ": the quotes are part of the name there"
    meant = difflib.get_close_matches(PLUGIN, wrong, 1)
    return f": {meant[0]} names no entry point" if meant else " does not name it"


_ONE_BATCH = {
    "sglang.benchmark.one_batch": "benchmark/one_batch.py",
    "sglang.bench_one_batch": "bench_one_batch.py",
}
"""sglang's benchmark of one batch, since 0.5.15 and before."""


def one_batch(sglang: Path | None) -> Finding:
    """``sglang``: the folder of the installed package. Whose Waterfill does its benchmark of one batch measure?"""
    for module, file in _ONE_BATCH.items():
        if sglang is None or not (sglang / file).is_file():
            continue
        code = (sglang / file).read_text(errors="replace")
        if "load_plugins" in code:
            return Finding("one_batch", "ok", f"{module} loads plugins")
        ours = f"python -m waterfill_rs.sglang.with_plugins {module}"
        text = f"{module} loads no plugins, so it measures sglang's own Waterfill, even where ours is required"
        return Finding("one_batch", "ok", f"{text}; for ours: {ours}")
    return Finding("one_batch", "ok", "sglang has no such benchmark here")


def variables(environment: Mapping[str, str]) -> Finding:
    """Values, and names that look like ours and are none."""
    try:
        config = Config.from_environment(environment)
    except ValueError as error:
        return Finding("variables", "fail", str(error), "set it to one of these, or unset it")
    for name in sorted(environment):
        if name.startswith(BACKEND_VARIABLE) and name not in VARIABLES:
            meant = difflib.get_close_matches(name, VARIABLES, 1)
            advice = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(VARIABLES)}"
            return Finding("variables", "warn", f"unknown variable {name} is ignored", advice)
    board = config.board
    planner = board.pace if board.core is None else f"{board.pace}:{board.core}"
    text = (
        f"{config.backend}{', required' if config.required else ''}, exchange {config.exchange}, "
        f"a layer waits at most {board.cap_us} us, planner {planner}, shared experts {config.shared}, "
        f"replicas {config.replicas}"
    )
    if not config.enabled:
        left = "sglang is left as it is" + (
            ", and the requirement changes nothing" if config.required else ""
        )
        return Finding("variables", "warn", f"{text}: {left}", f"unset {BACKEND_VARIABLE}")
    if (refusal := _against_machine(config)) is not None:
        advice = f"give a file of waterfill-rs calibrate --json, or unset {MACHINE_VARIABLE}: the server stops"
        return Finding("variables", "fail", f"{text}; {refusal}", advice)
    if board.cap_us < LEAST_CAP_US:
        advice = f"unset {TIMEOUT_VARIABLE}: ranks of a prefill are a millisecond apart, and then no rank has a live plan"
        return Finding("variables", "warn", text, advice)
    return Finding("variables", "ok", text)


def _against_machine(config: Config) -> str | None:
    """Why the file of measurements, which only ``auto`` opens, cannot be read."""
    if not config.enabled or config.machine is None or config.shared != "auto":
        return None
    try:
        Machine.load(Path(config.machine))
    except (OSError, ValueError) as error:
        return f"{MACHINE_VARIABLE}={config.machine}: {error}"
    return None


def without_board(choice: str, gpus: int) -> Severity:
    """How bad it is that no board can be had. ``choice``: the exchange that was asked for.

    With ``auto`` ranks take own counts, and with ``solo`` they need none. On GPUs each rank of the group has a board too.
    """
    if choice == "board" or (choice == "group" and gpus):
        return "fail"
    return "warn" if choice == "auto" else "ok"


def shared_memory(
    folder: Path,
    mounts: str,
    free: int | None,
    ranks: int,
    choice: str = "auto",
    gpus: int = 0,
    redundant: int = 0,
) -> Finding:
    """``mounts``: as in ``/proc/mounts``. ``free``: bytes, if the folder is there. ``choice``: the exchange asked for.

    ``redundant``: the redundant experts of a server here, which add words to its board.
    """
    severity = without_board(choice, gpus)
    if choice == "group" and not gpus:
        text = "exchange group is for CUDA devices: with layers on the CPU the server stops"
        return Finding("shm", "warn", text, "WATERFILL_RS_EXCHANGE=auto")
    if severity == "ok":
        return Finding("shm", "ok", f"not needed with exchange {choice}")
    others = "; until then it serves, with own counts" if severity == "warn" else ""
    if not folder.is_dir() or free is None:
        return Finding("shm", severity, f"{folder} is not there", f"mount a tmpfs on it{others}")
    mode = stat.S_IMODE(folder.stat().st_mode)
    kinds = [line.split()[2] for line in mounts.splitlines() if line.split()[1] == str(folder)]
    kind = kinds[-1] if kinds else "no file system of its own"
    usual, most = _experts(ranks, USUAL_EXPERTS, redundant), _native.MAX_RANKS
    many = _experts(most, most, redundant)
    needed = 2 * _native.board_bytes(ranks, usual, redundant)
    largest = _native.board_bytes(most, many, redundant)
    if not mounts:
        text = f"/proc is not there, and a board gets its name by it; {folder} itself may be well"
        return Finding("shm", severity, text, f"mount /proc{others}")
    text = (
        f"{folder}: {kind}, mode {mode:04o}, {_mib(free)} MiB free; two boards of {ranks} ranks x "
        f"{usual} experts{_redundant(redundant)} take {_mib(needed)}, one of {most} x {many} {_mib(largest)}"
    )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room in it" if full else f"make it writable for user {os.getuid()}"
        text = f"{text}; a file cannot be made: {error.strerror}"
        return Finding("shm", severity, text, advice + others)
    if free < needed:
        advice = "give it more: docker --shm-size, in Kubernetes an emptyDir with medium: Memory"
        return Finding("shm", severity, text, advice + others)
    if kind != "tmpfs":
        return Finding(
            "shm", "warn", text, "mount a tmpfs on it: counts would be written to a disk"
        )
    if mode & 0o1002 == 0o0002:
        return Finding("shm", "warn", text, f"chmod 1777 {folder}: any user can delete a board")
    return Finding("shm", "ok", text)


def _experts(ranks: int, logical: int, redundant: int) -> int:
    """Physical experts, as many on each rank."""
    return -(-(logical + redundant) // ranks) * ranks


def _redundant(redundant: int) -> str:
    return f", {redundant} of them redundant," if redundant else ""


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def cgroup_quota(root: Path, membership: str) -> float | None:
    """CPUs that this process may use a moment, the least of its groups'; None without a limit.

    ``root``: where cgroups are mounted. ``membership``: as in ``/proc/self/cgroup``.
    """
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        group = top / path.lstrip("/")
        # In a container the path may be the host's: then only its own root is to be seen.
        for folder in (top, group, *(parent for parent in group.parents if top in parent.parents)):
            found += _quota_of(folder)
    return min(found, default=None)


def _quota_of(folder: Path) -> list[float]:
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


def cpus(cores: int, quota: float | None, ranks: int, pace: str, gpus: int = 0) -> Finding:
    """``cores``: that this process may run on. The cores are shared by ``ranks`` and what sglang runs beside."""
    limit = (
        "no limit by a cgroup" if quota is None else f"a cgroup limits them to {quota:g} at once"
    )
    text = f"{cores} cores, {limit}; {ranks} ranks, planner {pace}"
    usable = cores if quota is None else min(cores, quota)
    # With layers on GPUs a thread plans: a core's work as long as the server is busy.
    threads = int(gpus > 0 or pace in ("park", "spin"))
    if threads:
        text += ", which takes one core while the server is busy"
    if pace == "inline" and gpus:
        advice = "WATERFILL_RS_PLANNER=auto: ranks with layers on a GPU refuse inline, and end"
        return Finding("cpu", "fail", text, advice)
    calm = "WATERFILL_RS_PLANNER=" + ("park" if gpus else "inline")
    if pace == "spin" and usable < ranks + 1:
        advice = f"{calm}, or give {ranks + 1} CPUs: the spinning thread needs its own"
        return Finding("cpu", "warn", text, advice)
    if pace == "spin" and quota is not None:
        return Finding("cpu", "warn", text, f"{calm}: a spinning thread uses the group's time up")
    if usable < 2 * ranks + threads:
        planner = " and one for the planner" if threads else ""
        advice = f"give 2 CPUs a rank{planner} ({2 * ranks + threads}): with fewer, layers wait for a core"
        return Finding("cpu", "warn", text, advice)
    return Finding("cpu", "ok", text)


def visible_gpus(devices: Path, environment: Mapping[str, str], uuids: Sequence[str] = ()) -> int:
    """NVIDIA devices in ``devices`` (/dev) that CUDA_VISIBLE_DEVICES leaves, by CUDA's rule.

    CUDA reads the list up to the first entry that names no device; if one is named twice, none is visible. The first
    entry decides whether all are indices, UUIDs or MIG devices, of which a process sees one.

    Args:
        uuids: of the devices, as ``GPU-...``; if not known, each UUID is taken for that of a device.
    """
    found = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*"))
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    entries = [entry.strip() for entry in chosen.split(",")]
    if entries[0].startswith("MIG-"):
        return min(found, 1)
    by_uuid = entries[0].startswith("GPU-")
    name = (lambda entry: _of_uuid(entry, uuids)) if by_uuid else _index
    named = list(itertools.takewhile(lambda device: device is not None, map(name, entries)))
    if not by_uuid:
        named = list(itertools.takewhile(lambda index: index in range(found), named))
    return 0 if len(set(named)) < len(named) else min(found, len(named))


def _index(entry: str) -> int | None:
    """The number that an entry begins with, as C's ``strtol`` reads it."""
    number = re.match(r"[+-]?\d+", entry, re.ASCII)
    return int(number[0]) if number else None


def _of_uuid(entry: str, uuids: Sequence[str]) -> str | None:
    """The UUID that an entry, which may be its beginning, names."""
    if not entry.startswith("GPU-"):
        return None
    if not uuids:
        return entry
    meant = [uuid for uuid in uuids if uuid.startswith(entry)]
    return meant[0] if len(meant) == 1 else None


Load = Callable[[str], Any]
"""``ctypes.CDLL`` or its like: OSError if there is none. Loading these two libraries makes no CUDA context."""


def driver(gpus: int, load: Load = ctypes.CDLL) -> Finding:
    version = ctypes.c_int()
    try:
        load("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError as error:
        if not gpus:
            return Finding("gpu", "ok", "no NVIDIA GPU and no driver: layers run on the CPU")
        advice = "in a container: --gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Finding("gpu", "fail", f"{gpus} GPUs, and no driver library: {error}", advice)
    text = f"{gpus} GPUs, driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if not gpus:
        advice = "see CUDA_VISIBLE_DEVICES; in a container: --gpus all"
        return Finding("gpu", "warn", text, advice)
    return Finding("gpu", "ok", text)


def nvrtc(gpus: int, files: Iterable[str], load: Load = ctypes.CDLL) -> Finding:
    """One of ``files``, else wherever the loader finds it."""
    if not gpus:
        return Finding("nvrtc", "ok", "not needed without a GPU")
    errors = []
    for name in (*files, "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            load(name)
            return Finding("nvrtc", "ok", name)
        except OSError as error:
            errors.append(str(error))
    advice = "install the wheel that torch depends on (nvidia-cuda-nvrtc), or set CUDA_HOME"
    return Finding("nvrtc", "fail", f"no NVRTC: {'; '.join(errors)}", advice)


def mps(gpus: int, ranks: int, pipes: Path) -> Finding:
    """``pipes``: CUDA_MPS_PIPE_DIRECTORY or its default."""
    runs = (pipes / "control").exists()
    text = f"{ranks} ranks on {gpus} GPUs, MPS {'runs' if runs else 'does not run'} in {pipes}"
    if gpus and ranks > gpus and not runs:
        advice = "start nvidia-cuda-mps-control -d: without it, ranks on one GPU take turns in time slices"
        return Finding("mps", "warn", text, advice)
    return Finding("mps", "ok", text if gpus else "not needed without a GPU")


def boards(
    folder: Path, seen: Sequence[Mapping[str, Any]], is_left_behind: Callable[[Path], bool]
) -> Finding:
    """``seen``: snapshots of the boards in use. ``is_left_behind``: whether the creator of the board of this name is gone."""
    in_use = {snapshot["name"] for snapshot in seen}
    stale = [
        path
        for path in sorted(folder.glob("*"))
        if is_board_name(path.name) and path.name not in in_use and is_left_behind(path)
    ]
    if stale:
        names = " ".join(map(str, stale))
        advice = f"rm {names}; or start a server, which removes them"
        return Finding("boards", "warn", f"left by processes that are gone: {names}", advice)
    gone = [told for snapshot in seen if (told := _gone(snapshot))]
    if gone:
        text = f"{len(seen)} in use; gone: {', '.join(gone)}"
        return Finding(
            "boards", "warn", text, "restart that server; waterfill-rs status tells more"
        )
    return Finding("boards", "ok", f"{len(seen)} in use now, none left behind")


def _gone(snapshot: Mapping[str, Any]) -> str:
    """The ranks of a board whose processes ended, in words."""
    ranks = [rank for rank, tally in enumerate(snapshot["by_rank"]) if tally["alive"] is False]
    if len(ranks) > MOST_NAMED:
        return f"{len(ranks)} of {len(snapshot['by_rank'])} ranks of {snapshot['name']}"
    told = ", ".join(map(str, ranks))
    return f"rank{'s' * (len(ranks) > 1)} {told} of {snapshot['name']}" if ranks else ""
