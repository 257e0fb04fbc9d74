"""``waterfill-rs doctor``: is all here that live balancing in sglang needs, and if not, what to do."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import waterfill_rs
from waterfill_rs import _native, nvrtc
from waterfill_rs.config import PLANNER_VARIABLE, Config
from waterfill_rs.exchange import boards as board_finder
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.operate import checks, self_test, server_commands
from waterfill_rs.operate.checks import Entry, Finding, Severity
from waterfill_rs.sglang_versions import KNOWN, row_of

__all__ = ["add_command", "exchange", "hooks", "overlap"]

JSON_VERSION = 1
DRIVER = Path("/proc/driver/nvidia")
USUAL_RANKS = 8
LEAST_LIVE = 0.9
DEEP_S = 300


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor", help="is everything here that sglang's ranks need", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="the findings, as JSON")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also load sglang with its plugins in a process, about 40 s, and see that all hooks are ours",
    )
    parser.add_argument(
        "--ranks", type=int, help=f"ranks on this host (its GPUs; {USUAL_RANKS} if there are none)"
    )
    parser.add_argument(
        "command",
        nargs="*",
        metavar="WORD",
        help="after --: the server's command, whose redundant experts are looked at (default: servers that run here)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.ranks is not None and not 1 <= arguments.ranks <= _native.MAX_RANKS:
        raise ValueError(f"--ranks {arguments.ranks}: give 1 to {_native.MAX_RANKS}")
    findings = []
    for finding in _findings(arguments.ranks, arguments.deep, arguments.command):
        findings.append(finding)
        if not arguments.json:
            print(_line(finding), flush=True)
    failed = [finding.check for finding in findings if finding.severity == "fail"]
    if arguments.json:
        print(json.dumps(_as_json(findings), indent=1))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def _line(finding: Finding) -> str:
    line = f"{finding.severity:<5}{finding.check:<11}{finding.text}"
    return line + (f"\n{'':16}-> {finding.advice}" if finding.advice else "")


def _as_json(findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "version": JSON_VERSION,
        "package": waterfill_rs.__version__,
        "ok": all(finding.severity != "fail" for finding in findings),
        "checks": [_finding_as_json(finding) for finding in findings],
    }


def _finding_as_json(finding: Finding) -> dict[str, str]:
    """Under the names that version 1 has: ``level`` is the severity."""
    told = asdict(finding)
    return {("level" if name == "severity" else name): value for name, value in told.items()}


def _findings(ranks: int | None, deep: bool, command: Sequence[str]) -> Iterator[Finding]:
    """All checks of this machine, the quick ones first."""
    for name, look in _looks(ranks, deep, command).items():
        try:
            yield look()
        except Exception as error:  # The others' findings are wanted all the more.
            text = f"the check itself failed: {error!r}"
            yield Finding(name, "fail", text, "please report it, with this line")


def _looks(
    ranks: int | None, deep: bool, command: Sequence[str] = ()
) -> dict[str, Callable[[], Finding]]:
    """Each check, bound to this machine."""
    environment = os.environ
    gpus = checks.visible_gpus(Path("/dev"), environment, _uuids(DRIVER))
    ranks_here = ranks or gpus or USUAL_RANKS
    config = _config()
    settings = config.board
    pipes = Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    folder = Path(waterfill_rs.__file__).parent

    @functools.cache
    def servers() -> Mapping[str, Sequence[str]]:
        return {"the given command": command} if command else server_commands.running(Path("/proc"))

    looks: dict[str, Callable[[], Finding]] = {
        "python": lambda: checks.python(sys.version_info[:3]),
        "package": lambda: checks.package(_native.__version__, _installed(), folder),
        "sglang": lambda: _sglang(_version("sglang")),
        "plugin": lambda: checks.plugin(
            _entries("sglang.srt.plugins"),
            _entries("sglang.srt.platforms"),
            environment,
            _folder("sglang"),
        ),
        "one_batch": lambda: checks.one_batch(_folder("sglang")),
        "variables": lambda: checks.variables(environment),
        "placement": lambda: server_commands.placement(servers()),
        "shm": lambda: checks.shared_memory(
            board_finder.SHARED_MEMORY,
            _text(Path("/proc/mounts")),
            _free(board_finder.SHARED_MEMORY),
            ranks_here,
            config.exchange,
            gpus,
            server_commands.redundant_experts(servers()),
        ),
        "cpu": lambda: checks.cpus(
            len(os.sched_getaffinity(0)), _quota(), ranks_here, settings.pace, gpus
        ),
        "gpu": lambda: checks.driver(gpus),
        "nvrtc": lambda: checks.nvrtc(gpus, nvrtc.files()),
        "mps": lambda: checks.mps(gpus, ranks_here, pipes),
        "boards": lambda: checks.boards(
            board_finder.SHARED_MEMORY, _boards(), board_finder.is_left_behind
        ),
        "exchange": lambda: exchange(
            settings, self_test.run, checks.without_board(config.exchange, gpus)
        ),
    }
    if deep:
        load = functools.cache(_load_hooks)
        looks["hooks"] = lambda: hooks(load, enabled=config.enabled)
        looks["overlap"] = lambda: overlap(load)
    return looks


def exchange(
    settings: BoardSettings,
    run: Callable[[BoardSettings], self_test.Calls],
    without: Severity = "warn",
) -> Finding:
    """The self-test, with the wait and the planner that the variables ask for.

    ``without``: how bad it is that no board can be had.
    """
    try:
        found = run(settings)
    except OSError as error:
        advice = "" if without == "ok" else "see shm above"
        return Finding("exchange", without, f"no board for the self-test: {error}", advice)
    except RuntimeError as error:
        advice = "see shm above"
        if settings.core is not None:
            advice = f"{PLANNER_VARIABLE}=auto, or spin:CORE with a core of this machine"
        severity: Severity = (
            "warn" if without == "ok" else "fail"
        )  # Ranks without a board have no planner.
        return Finding("exchange", severity, f"the self-test ended: {error}", advice)
    text = (
        f"2 processes, planner {settings.pace}: {found.live} of {found.calls} calls live, "
        f"median wait {found.median_us:.1f} us, longest {found.longest_us:.0f} (at most {settings.cap_us})"
    )
    if not found.live:
        advice = "see cpu above; WATERFILL_RS_EXCHANGE=solo: all layers take own counts anyway"
        return Finding("exchange", "warn", text, advice)
    if found.live < LEAST_LIVE * found.calls:
        advice = "see cpu above: layers without a live plan take own counts"
        return Finding("exchange", "warn", text, advice)
    return Finding("exchange", "ok", text)


def hooks(load: Callable[[], tuple[int, str, str]], *, enabled: bool) -> Finding:
    """``load``: exit code, what ``loaded_hooks`` printed, and what was written to stderr."""
    code, printed, errors = load()
    told = [line for line in errors.splitlines() if "waterfill-rs" in line or line[:2] == "- "]
    reason = "; ".join(told) or " ".join(errors.split()[-40:]) or "nothing was said"
    if code:
        text = f"loading sglang's plugins ended with code {code}: {reason}"
        return Finding("hooks", "fail", text, "docs/messages.md lists the messages")
    stands: dict[str, bool] = _told(printed)["hooks"]
    if enabled and not any(name.endswith("WaterfillBalancer") for name in stands):
        text = f"sglang's Waterfill is not replaced: {reason}"
        return Finding("hooks", "fail", text, "docs/messages.md lists the messages")
    others = [name for name, ours in stands.items() if not ours]
    if others:
        text = f"not waterfill-rs's after registration: {', '.join(others)}"
        return Finding(
            "hooks", "fail", text, "another plugin hooks the same: remove one of the two"
        )
    return Finding("hooks", "ok", f"all {len(stands)} are in place")


def overlap(load: Callable[[], tuple[int, str, str]]) -> Finding:
    """``load``: as of ``hooks``. Can this sglang's MoE layers run a fused shared expert beside dispatch?"""
    code, printed, _ = load()
    if code:
        return Finding("overlap", "warn", "not seen: sglang's plugins did not load", "see hooks")
    if reasons := _told(printed)["against_overlap"]:
        text = f"shared experts stay fused with the routed ones: {'; '.join(reasons)}"
        advice = (
            "Waterfill works as before; for overlap, use a sglang of the table, without that plugin"
        )
        return Finding("overlap", "warn", text, advice)
    text = "shared experts can run beside dispatch; whether a model's do, its log says"
    return Finding("overlap", "ok", text)


def _told(printed: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return told


def _load_hooks() -> tuple[int, str, str]:
    command = [sys.executable, "-m", "waterfill_rs.sglang.loaded_hooks"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEEP_S)
    except subprocess.TimeoutExpired:
        return -1, "", f"not done in {DEEP_S} s"
    return done.returncode, done.stdout, done.stderr


def _config() -> Config:
    try:
        return Config.from_environment(os.environ)
    except ValueError:
        return Config()  # The variables' own check tells.


def _uuids(driver: Path) -> list[str]:
    """Of the GPUs that NVIDIA's driver tells of in ``driver``; none where it does not."""
    found = (
        re.search(r"^GPU UUID:\s*(GPU-\S+)", _text(path), re.MULTILINE)
        for path in sorted(driver.glob("gpus/*/information"))
    )
    return [uuid[1] for uuid in found if uuid]


def _entries(group: str) -> list[Entry]:
    found = metadata.entry_points(group=group)
    return [Entry(e.name, e.value, e.dist.name if e.dist else "unknown") for e in found]


def _installed() -> dict[Path, str]:
    found = metadata.distributions(name="waterfill-rs")
    return {Path(str(one.locate_file(""))).resolve(): one.version for one in found}


def _sglang(version: str | None) -> Finding:
    named = version is not None and row_of(version) is not None
    return checks.sglang(version, named, KNOWN)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _folder(package: str) -> Path | None:
    """Where it is installed, without importing it."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def _quota() -> float | None:
    return checks.cgroup_quota(Path("/sys/fs/cgroup"), _text(Path("/proc/self/cgroup")))


def _boards() -> Sequence[Mapping[str, Any]]:
    return [board.snapshot() for board in board_finder.find()]


def _free(folder: Path) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
