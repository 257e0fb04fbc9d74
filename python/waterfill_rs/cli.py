"""The command ``waterfill-rs``. Bad input ends it with one clear line and exit code 2."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
from collections.abc import Sequence

import waterfill_rs
from waterfill_rs.calibrate import command as calibrate
from waterfill_rs.demo import command as demo
from waterfill_rs.operate import doctor, status
from waterfill_rs.replay import command as replay
from waterfill_rs.replay import place_command as place

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="waterfill-rs", description=waterfill_rs.__doc__)
    parser.add_argument("--version", action="version", version=waterfill_rs.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    demo.add_command(commands)
    replay.add_command(commands)
    place.add_command(commands)
    status.add_commands(commands)
    doctor.add_command(commands)
    calibrate.add_command(commands)
    parsed = parser.parse_args(arguments)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            # Paths may hold what a terminal's encoding does not.
            output.reconfigure(errors="backslashreplace")
    try:
        parsed.run(parsed)
        if sys.stdout is not None:  # As where it was closed: `>&-`.
            sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            # No error; and the interpreter flushes once more, which must not fail after us.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # As shells have it: 128 and SIGPIPE's number.
        print(f"waterfill-rs: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"waterfill-rs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # As shells have it: 128 and SIGINT's number.
    return 0


def _reader_left() -> bool:
    """Is standard output a pipe that nobody reads any more, as after ``head``? poll(2) tells. Other pipes are ranks'."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


if __name__ == "__main__":
    sys.exit(main())
