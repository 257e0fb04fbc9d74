"""The README is held to what it speaks of: commands, the example, figures and releases."""

import ast
import re
from pathlib import Path

import pytest

from waterfill_rs.cli import main
from waterfill_rs.sglang_versions import KNOWN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("docs/performance.md", "docs/measurements/server-fused.md")


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, row by row; numbers without the commas between thousands."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [
        [re.sub(r"(?<=\d),(?=\d{3}\b)", "", c.strip()) for c in line.split("|")] for line in lines
    ]


def test_make_has_its_commands():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"run", "test"} <= named <= targets


def test_the_package_has_its_commands():
    named = set(re.findall(r"(?:^ {4}|`)waterfill-rs ([a-z]+)", README, re.MULTILINE))
    assert {"doctor", "replay", "status"} <= named
    for command in named:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_its_example_gives_what_it_says():
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    known: dict[str, object] = {}
    exec(example, known)
    said = re.findall(r"^(plan\..*?) +# (.+?): ", example, re.MULTILINE)
    assert len(said) == 3
    for expression, value in said:
        assert eval(expression, known) == ast.literal_eval(value)


def test_each_figure_stands_in_the_page_of_its_server():
    section = README.split("## Results")[1].split("\n## ")[0]
    assert set(PAGES) <= set(re.findall(r"\]\(([^)]*)\)", section))
    performance, fused = ((ROOT / page).read_text() for page in PAGES)
    default, fused = rows(performance.split("## Tokens a second, with no setting")[1]), rows(fused)
    results = rows(section)[2:]
    assert len(results) == 9
    for server, shared, tokens, off, sglangs, ours, ratio, verdict in results:
        machine, step, *placement = server.split(", ")
        assert verdict == _verdict(ratio)
        if machine == "2 H100":
            assert (sglangs, shared) == ("", "unfused" if step == "decode" else "fused")
            assert [[step, tokens, off, ours, ratio]] == [
                [*row[:4], row[6]] for row in default if row[:2] == [step, tokens]
            ]
            continue
        assert machine == "4 H200"
        of = {row[2]: row for row in fused if row[:2] == [tokens, (placement or ["trivial"])[0]]}
        assert [of[mode][6] for mode in ("off", "sglang", "auto")] == [off, sglangs, ours]
        assert of["auto"][4] == ratio


def test_the_figures_with_redundant_experts_are_those_of_their_page():
    page = (ROOT / PAGES[0]).read_text()

    def decode_of(heading: str) -> list[list[str]]:
        section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
        return [row for row in rows(section) if row[0] == "decode"]

    nothing_else = decode_of("With redundant experts, and nothing else")
    faster = sorted(round(100 * (1 - float(row[-1]))) for row in nothing_else)
    assert f"[{faster[0]} to {faster[-1]}% faster](docs/performance.md#" in README
    beside_none = sorted(round(100 * (1 - float(row[-2].split()[0]))) for row in nothing_else)
    assert f"from {beside_none[-1]}% faster to {-beside_none[0]}% slower." in README
    decode = decode_of("With redundant experts and a placement")
    spans = [sorted(float(row[column].split()[0]) for row in decode) for column in (5, 6)]
    said = re.findall(r"(0\.\d{3}) to (\d\.\d{3}) of", README)
    assert said == [(f"{span[0]:.3f}", f"{span[-1]:.3f}") for span in spans]


def _verdict(ratio: str) -> str:
    """Of a ratio with its quartiles in brackets."""
    low, high = map(float, re.findall(r"[\d.]+", ratio)[1:])
    return "faster" if high < 1 else "slower" if low > 1 else "the same"


def test_its_releases_are_those_that_are_tested():
    pinned = re.findall(
        r"^sglang==(\S+)", (ROOT / "requirements/versions.txt").read_text(), re.MULTILINE
    )
    assert f"{len(pinned)} releases of sglang, [{KNOWN}]" in README
    assert f"{pinned[0]} to {pinned[-1]}" == KNOWN
