"""What holds of every command of ``waterfill-rs``."""

import os
import subprocess
import sys

MAIN = "import sys; from waterfill_rs.cli import main; sys.exit(main(sys.argv[1:]))"
RANK_GONE = """
from waterfill_rs import boards
def find(*_): raise BrokenPipeError("a rank's pipe")
boards.find = find
"""


def run(code, output):
    command = [sys.executable, "-c", code, "status", "--json"]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_left_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as output:
        done = run(MAIN, output)
    assert (done.returncode, done.stderr) == (141, "")


def test_any_other_broken_pipe_is_one():
    done = run(RANK_GONE + MAIN, subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "waterfill-rs: a rank's pipe\n")
