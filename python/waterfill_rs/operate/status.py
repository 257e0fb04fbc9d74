"""``waterfill-rs status`` and ``top``: what the ranks on this host's boards count, seen from outside."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from waterfill_rs._native import OUTCOMES
from waterfill_rs.exchange import boards

__all__ = ["add_commands"]

NO_BOARD = (
    "no board found: no rank of this user exchanges counts over shared memory on this host "
    "(ranks that are alone or exchange by collectives have none)"
)
_LONGEST_INTERVAL = 86_400
_CLEAR = "\x1b[H\x1b[2J"


def add_commands(commands: Any) -> None:
    status: argparse.ArgumentParser = commands.add_parser(
        "status", help="what the ranks on this host count, once", description=__doc__
    )
    status.add_argument("--json", action="store_true", help="all of it, as JSON")
    status.set_defaults(run=_status)
    top: argparse.ArgumentParser = commands.add_parser(
        "top", help="the same, live, as rates", description=__doc__
    )
    top.add_argument("--interval", type=float, default=1.0, help="seconds between looks (1)")
    top.add_argument("--count", type=int, help="looks, then end (default: until Ctrl-C)")
    top.set_defaults(run=_top)


def _status(arguments: argparse.Namespace) -> None:
    found = [board.snapshot() for board in boards.find()]
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    if not found:
        raise RuntimeError(NO_BOARD)
    for snapshot in found:
        print(describe(snapshot))


def _top(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.interval <= _LONGEST_INTERVAL:
        raise ValueError(
            f"--interval {arguments.interval}: give seconds above 0, up to {_LONGEST_INTERVAL}"
        )
    before: Mapping[str, Mapping[str, Any]] = {}
    looks, last = 0, time.monotonic()
    try:
        while arguments.count is None or looks < arguments.count:
            if looks:
                time.sleep(arguments.interval)
            looks += 1
            now = {snapshot["name"]: snapshot for snapshot in (b.snapshot() for b in boards.find())}
            # More than the interval: looking through /proc takes long where many processes run.
            seconds, last = time.monotonic() - last, time.monotonic()
            text = "\n".join(
                describe(snapshot, before.get(name), seconds) for name, snapshot in now.items()
            )
            print((_CLEAR if sys.stdout.isatty() else "") + (text or NO_BOARD), flush=True)
            before = now
    except KeyboardInterrupt:
        print()


def describe(
    snapshot: Mapping[str, Any], before: Mapping[str, Any] | None = None, seconds: float = 1.0
) -> str:
    """A board in words and numbers; with a snapshot of ``seconds`` before, what came since, a second."""
    planner = snapshot["planner"]
    lines = [
        f"board {snapshot['name']}: {snapshot['ranks']} ranks, {snapshot['experts']} experts, "
        f"planner in process {planner['process']} ({_state(planner)})",
        f"  plans: {planner['whole']} from all ranks, {planner['partial']} without gone ones; no plan: "
        f"{planner['late']} a rank was late, {planner['silent']} it still was, {planner['given_up']} the planner was, "
        f"{planner['refused']} refused counts",
    ]
    if snapshot["redundant"]:
        lines.append(
            f"  replicas of {snapshot['redundant']} redundant experts chosen by {planner['replicas']} plans"
        )
    if planner["mean"]:
        home, planned = (planner[name] / planner["mean"] for name in ("home_max", "planned_max"))
        lines.append(
            f"  slowest rank / mean: {home:.4f} with shared rows at home, {planned:.4f} as planned"
        )
    per = "/s" if before else ""
    lines.append(
        f"{'rank':>6}{'process':>9}{'state':>9}{'live' + per:>11}{'share':>8}{'none' + per:>8}{'timeouts' + per:>12}"
        f"{'broken' + per:>10}{'torn' + per:>8}{'missed' + per:>10}   wait us: p50      p99      max"
    )
    for rank, tally in enumerate(snapshot["by_rank"]):
        then = before["by_rank"][rank] if before else {}
        counts = {name: tally[name] for name in OUTCOMES}
        counts["missed"] = planner["missed"][rank]
        if before:
            then = {**then, "missed": before["planner"]["missed"][rank]}
            counts = {name: count - then[name] for name, count in counts.items()}
        share = live_share(counts)
        if before:
            counts = {name: round(count / seconds) for name, count in counts.items()}
        waits = tally["wait_us"]
        told = [f"{waits[n]:.0f}" if waits["buckets"] else "-" for n in ("p50", "p99", "max")]
        lines.append(
            f"{rank:>6}{tally['process']:>9}{_state(tally):>9}{counts['live']:>11}{share:>8}{counts['none']:>8}"
            f"{counts['timed_out']:>12}{counts['broken']:>10}{counts['torn']:>8}{counts['missed']:>10}"
            f"       {told[0]:>9}{told[1]:>9}{told[2]:>9}"
        )
    return "\n".join(lines)


def live_share(counts: Mapping[str, int]) -> str:
    """Of calls by how they ended, in words; "-" where there were none."""
    calls = sum(counts[name] for name in OUTCOMES)
    # Down, so that 100% are all of them.
    return f"{counts['live'] * 10_000 // calls / 100:.2f}%" if calls else "-"


def _state(each: Mapping[str, Any]) -> str:
    if each["process"] == 0:
        return "absent"
    # None where the kernel cannot tell, as of a rank that could not lock its byte of the board.
    return {True: "alive", False: "gone", None: "unknown"}[each["alive"]]
