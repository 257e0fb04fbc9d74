"""The driver's end of an engine: starts its process, asks for rounds, shows its log where it fails, ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.protocol import Closed, Late, Reader, send

TAIL_LINES = 40
STOP_S = 8.0
TELLING = (
    "waterfill-rs active",
    "waterfill-rs is off",
    "waterfill-rs balances nothing",
    "server bench:",
    "Failed to load plugin",
    "Failed to execute general plugin",
    "Failed to apply hooks",
)
"""Of the log's lines, those that say what was started."""


class Failed(Exception):
    """An engine is of no more use."""


class Engine:
    """One engine's process and, below it, sglang's. Its standard streams go to ``log``."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """``command`` gets the descriptors of the commands and the replies as its last arguments."""
        self.name, self.log = name, log
        commands, self._commands = os.pipe()
        replies, written = os.pipe()
        self._reader = Reader(replies)
        self.ready: dict[str, Any] = {}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, str(commands), str(written)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=log.parent,
                pass_fds=(commands, written),
                start_new_session=True,
            )
        os.close(commands)
        os.close(written)

    def wait_ready(self, seconds: float) -> None:
        """
        Raises:
            Failed: it ended, or was not up in time; with the end of its log.
        """
        self.ready = self._next(seconds, "it was not up")

    def round(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Run one round.

        Raises:
            Failed: it ended, reported a failure, or took longer than ``seconds``; with the end of its log.
        """
        try:
            send(self._commands, dict(message))
        except Closed:
            raise Failed(self._told("it has ended")) from None
        return self._next(seconds, f"no results of round {message.get('round')}")

    def _next(self, seconds: float, lacking: str) -> dict[str, Any]:
        try:
            reply = self._reader.next(seconds)
        except Late:
            raise Failed(self._told(f"{lacking} within {seconds:.0f} s")) from None
        except Closed:
            raise Failed(self._told("its process ended")) from None
        if "failed" in reply:
            raise Failed(self._told(reply["failed"]))
        return reply

    def _told(self, what: str) -> str:
        return f"engine {self.name}: {what}; the end of {self.log}:\n{self.tail()}"

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of its log, long lines cut."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line[:240]}" for line in text[-lines:])

    def telling(self) -> list[str]:
        """What its log says of Waterfill, each once."""
        text = self.log.read_text(errors="replace").splitlines()
        found = [
            line[line.index(word) :][:200] for line in text for word in TELLING if word in line
        ]
        return list(dict.fromkeys(found))

    def ask_to_end(self) -> None:
        """It ends once no round runs; does not wait."""
        if self._commands >= 0:
            os.close(self._commands)
            self._commands = -1

    def stop(self) -> None:
        """End the process and all below it; a second call does nothing."""
        self.ask_to_end()
        end = time.monotonic() + (STOP_S if self.ready else 0)
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        # Its own session: whatever it left behind ends with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._reader.descriptor >= 0:
            os.close(self._reader.descriptor)
            self._reader.descriptor = -1


def stop_all(engines: Sequence[Engine]) -> None:
    """All at once, so that their ends overlap."""
    for engine in engines:
        engine.ask_to_end()
    for engine in engines:
        engine.stop()


def wait_all(engines: Sequence[Engine], seconds: float) -> list[Engine]:
    """Those that came up; of the others the reason is printed, and they are stopped."""
    end = time.monotonic() + seconds
    up = []
    for engine in engines:
        try:
            engine.wait_ready(max(1.0, end - time.monotonic()))
        except Failed as failure:
            print(failure, file=sys.stderr, flush=True)
            engine.stop()
            continue
        print(f"engine {engine.name} is up after {engine.ready['ready']:.0f} s", flush=True)
        for line in engine.telling():
            print(f"    {line}", flush=True)
        up.append(engine)
    return up
