"""Placements on real routing, EP 8 to 32 by 8 to 1024 tokens a rank: ``routing.py MAKE_DUMPS``.

MAKE_DUMPS writes recorder dumps: ``MAKE_DUMPS FOLDER --packed --ranks R --tokens N [--decode]``. Fails if live
counts miss the optimum in any layer and pass, or send more than 0.03 extra copies a token on average, or if a
replay takes more than 20 s or 1 GiB beyond what importing torch takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = (8, 16, 32)
TOKENS = (8, 32, 64, 128, 256, 1024)
POLICIES = ("home", "sglang-static", "sglang-dynamic", "own-counts", "live")
MOST_COPIES = 0.03
MOST_SECONDS, MOST_MIB = 20.0, 1024.0

# Each prints its peak memory in KiB as the last line.
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
TORCH_ALONE = "import torch" + PEAK
REPLAY = "import sys; from waterfill_rs.cli import main; code = main()" + PEAK + "; sys.exit(code)"


def main() -> int:
    make_dumps = Path(sys.argv[1])
    failed = False
    print(
        "EP    N      "
        + "".join(f"{policy:>15}" for policy in POLICIES)
        + "   copies: static, dynamic, live    missed    seconds, MiB beyond torch"
    )
    torch_alone = measured(TORCH_ALONE)[1]
    for ranks in RANKS:
        for tokens in TOKENS:
            with tempfile.TemporaryDirectory() as folder:
                rows, seconds, peak = replay(make_dumps, Path(folder), ranks, tokens)
            live = rows["live"]
            missed = sum(row["max"] != row["optimum"] for row in live)
            memory = peak - torch_alone
            failed |= missed > 0 or mean(live, "extra_copies") > MOST_COPIES
            failed |= seconds > MOST_SECONDS or memory > MOST_MIB
            ratios = "".join(f"{ratio(rows[policy]):>15.4f}" for policy in POLICIES)
            sent = (rows["sglang-static"], rows["sglang-dynamic"], live)
            copies = ", ".join(f"{mean(own, 'extra_copies'):.4f}" for own in sent)
            print(
                f"{ranks:<6}{tokens:<7}{ratios}   {copies}   {missed} of {len(live)}   "
                f"{seconds:.1f}, {memory:.0f}",
                flush=True,
            )
    return int(failed)


def replay(
    make_dumps: Path, folder: Path, ranks: int, tokens: int
) -> tuple[dict[str, list[dict]], float, float]:
    """Rows by policy, and the replay's seconds and peak MiB."""
    # Few tokens a rank are what decoding has, as far as there are prompts for it.
    decode = ["--decode"] if ranks * tokens <= 256 else []
    # The data has 61,912 tokens.
    passes = max(1, min(4, 61_912 // (ranks * tokens)))
    shape = ["--ranks", str(ranks), "--tokens", str(tokens), "--passes", str(passes), *decode]
    make = [sys.executable, make_dumps, folder / "dump", "--packed", *shape]
    subprocess.run(make, check=True, capture_output=True)
    seconds, peak = measured(REPLAY, "replay", folder / "dump", "--json", folder / "out.json")
    rows = json.loads((folder / "out.json").read_text())["rows"]
    by_policy = {policy: [row for row in rows if row["policy"] == policy] for policy in POLICIES}
    return by_policy, seconds, peak


def measured(program: str, *arguments: object) -> tuple[float, float]:
    """Seconds and peak MiB of a Python process, start and imports included."""
    start = time.monotonic()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - start, int(done.stdout.split()[-1]) / 1024


def ratio(rows: list[dict]) -> float:
    return sum(row["max"] / row["mean"] for row in rows) / len(rows)


def mean(rows: list[dict], field: str) -> float:
    return sum(row[field] for row in rows) / len(rows)


if __name__ == "__main__":
    sys.exit(main())
