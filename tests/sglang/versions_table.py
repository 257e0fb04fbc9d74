"""Writes what ``test_versions.py`` found into the pages that show it, between their markers: ``REPORT.json PAGE...``."""

import json
import re
import sys
from pathlib import Path

COLUMNS = {
    "V3 router": "v3_router",
    "hash router (V4)": "hash_router",
    "flags": "flags",
    "redundant experts": "redundant experts_that_do_not",
    "recorder": "recorder",
    "elastic EP refused": "elastic",
    "off, other models": "off_leaves other_models",
}
"""Heading: what its checks' names begin with."""
BEGIN, END = "<!-- versions: make test-versions writes this -->", "<!-- end of versions -->"


def cell(checks, beginnings):
    found = [v for name, v in checks.items() if name.startswith(tuple(beginnings.split()))]
    if all(outcome.startswith("none:") for outcome in found):
        return "none"
    return "yes" if all(outcome == "ok" for outcome in found) else "**no**"


def order(version):
    return [int(number) for number in re.findall(r"\d+", version)]


def table(reports):
    lines = [f"| sglang | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for version in sorted(reports, key=order):
        cells = [cell(reports[version], beginnings) for beginnings in COLUMNS.values()]
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(report, *pages):
    rendered = table(json.loads(Path(report).read_text()))
    for page in map(Path, pages):
        before, _, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{page} has no {BEGIN} and {END}")
        page.write_text(f"{before}{BEGIN}\n{rendered}\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
