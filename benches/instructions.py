"""Count the core's instructions under valgrind and compare with ``instructions.json``.

Times on shared machines are noise; instructions are not. Each case runs with two numbers of repetitions, and
the difference is what one costs. A case that takes over a tenth more than recorded ends this with exit code 1;
``--write`` records. Without valgrind it says so and ends well.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_suffix(".json")
CASES = (
    "plan-8",
    "plan-72",
    "plan-1024",
    "plan-table-8x256",
    "joint-32x288",
    "count-4096x6",
    "expand-4096x6",
)
TOLERANCE = 1.10
FEW, MANY = 5, 15


def main() -> int:
    if shutil.which("valgrind") is None:
        print("instructions: not counted, valgrind is not installed")
        return 0
    program = build()
    counted = {case: per_call(program, case) for case in CASES}
    if "--write" in sys.argv[1:]:
        RECORDED.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    worse = 0
    for case, now in counted.items():
        ratio = now / recorded[case]
        worse += ratio > TOLERANCE
        verdict = "MORE THAN RECORDED" if ratio > TOLERANCE else "ok"
        print(
            f"{case:<18}{now:>10} instructions, recorded {recorded[case]:>10}: {ratio:.3f} {verdict}"
        )
    return int(worse > 0)


def build() -> Path:
    """The example, built as a release."""
    command = [
        "cargo",
        "build",
        "--release",
        "--package",
        "waterfill-core",
        "--example",
        "instructions",
    ]
    output = subprocess.run(
        [*command, "--message-format=json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    made = (json.loads(line).get("executable") for line in output.splitlines())
    return Path(next(path for path in made if path))


def per_call(program: Path, case: str) -> int:
    few, many = (instructions(program, case, times) for times in (FEW, MANY))
    return (many - few) // (MANY - FEW)


def instructions(program: Path, case: str, times: int) -> int:
    """All that one process executes."""
    command = [
        "valgrind",
        "--tool=callgrind",
        "--callgrind-out-file=/dev/null",
        program,
        case,
        str(times),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise RuntimeError(f"valgrind printed no count: {done.stderr}")
    return int(found.group(1))


if __name__ == "__main__":
    sys.exit(main())
