"""Messages between the driver and an engine's process: JSON, one a line, over two pipes."""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any


class Closed(Exception):
    """The other side is gone."""


class Late(Exception):
    """Nothing came in time."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Write one message whole.

    Raises:
        Closed: nobody reads.
    """
    line = memoryview(json.dumps(message, allow_nan=False).encode() + b"\n")
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except BrokenPipeError as error:
        raise Closed from error


class Reader:
    """The messages of one pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._held = b""

    def next(self, seconds: float | None = None) -> dict[str, Any]:
        """The next message; without ``seconds`` however long it takes.

        Raises:
            Closed: the pipe ended, within a message or between two.
            Late: no whole message within ``seconds``.
            ValueError: a line that is no JSON object.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._held:
            rest = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self.descriptor], [], [], rest)[0]:
                raise Late
            part = os.read(self.descriptor, 1 << 16)
            if not part:
                raise Closed
            self._held += part
        line, _, self._held = self._held.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"a message is a JSON object, not {line[:60]!r}")
        return message
