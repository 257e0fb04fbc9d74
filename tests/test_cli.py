"""What holds of every command of ``waterfill-rs``."""

import os
import subprocess
import sys

MAIN = "import sys; from waterfill_rs.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_reader_that_left_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as output:
        command = [sys.executable, "-c", MAIN, "status", "--json"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
