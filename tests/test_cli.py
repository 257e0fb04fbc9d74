"""What holds of every command of ``waterfill-rs``."""

import os
import subprocess
import sys

MAIN = "import sys; from waterfill_rs.cli import main; sys.exit(main(sys.argv[1:]))"
HELP = """
try:
    main(["--help"])
except SystemExit:
    print({"matplotlib", "numpy", "sglang", "torch"} & set(sys.modules))
"""
RANK_GONE = """
from waterfill_rs.exchange import boards
def find(*_): raise BrokenPipeError("a rank's pipe")
boards.find = find
"""


def run(code, output):
    command = [sys.executable, "-c", code, "status", "--json"]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)


def test_help_needs_nothing_that_may_be_missing():
    code = MAIN.replace("sys.exit(main(sys.argv[1:]))", HELP)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "calibrate" in done.stdout and done.stdout.endswith("\nset()\n")


def test_a_reader_that_left_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as output:
        done = run(MAIN, output)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_output_is_no_error():
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", MAIN, "status", "--json"]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_encoding_lacks_is_written_all_the_same():
    environment = {"PYTHONIOENCODING": "ascii", "WATERFILL_RS_MACHINE": "/größe.json"}
    command = [sys.executable, "-c", MAIN, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert "WATERFILL_RS_MACHINE=/gr\\xf6\\xdfe.json" in done.stdout
    assert done.stderr.startswith("waterfill-rs: ") and "checks failed" in done.stderr


def test_any_other_broken_pipe_is_one():
    done = run(RANK_GONE + MAIN, subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "waterfill-rs: a rank's pipe\n")
