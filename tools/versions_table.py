"""Writes what ``test_versions.py`` found into the page that shows it, between its markers: ``REPORT.json PAGE``."""

import json
import re
import sys
from pathlib import Path

COLUMNS = {
    "V3 router": "v3_router classes",
    "hash router (V4)": "hash_router",
    "padding, idle ranks, two batches": "v3_router_gives v3_router_expands hash_router_gives two_batches",
    "draft models": "draft",
    "live counts, 2 ranks": "live",
    "megamoe, idle ranks": "mega_moe",
    "redundant experts, rebalance": "redundant",
    "indivisible experts refused": "experts_that_do_not",
    "shared experts beside dispatch": "overlap",
    "recorder": "recorder",
    "deterministic": "deterministic",
    "elastic EP refused": "elastic",
    "flags": "flags",
    "metrics": "metrics",
    "off, other models": "off_leaves other_models",
}
"""Heading: what its checks' names begin with."""
BEGIN, END = "<!-- versions: make test-versions writes this -->", "<!-- end of versions -->"


def cell(checks, beginnings):
    """What a version's checks of one column came to: yes, none, refused or no."""
    found = {v for name, v in checks.items() if name.startswith(tuple(beginnings.split()))}
    told = {"ok": "yes", "none": "none", "refused": "refused"}
    if not found or not found <= told.keys():
        return "**no**"
    return told[min(found - {"none"} or found)]


def order(version):
    return [int(number) for number in re.findall(r"\d+", version)]


def table(reports):
    lines = [f"| sglang | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for version in sorted(reports, key=order):
        cells = [cell(reports[version], beginnings) for beginnings in COLUMNS.values()]
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(report, page):
    reports = json.loads(Path(report).read_text())
    shown = tuple(" ".join(COLUMNS.values()).split())
    if left_out := {n for checks in reports.values() for n in checks if not n.startswith(shown)}:
        raise SystemExit(f"no column shows {', '.join(sorted(left_out))}")
    page = Path(page)
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} has no {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{table(reports)}\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
