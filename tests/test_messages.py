"""docs/messages.md has every message of the code, and no other."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "waterfill_rs"
WORD = re.compile(r"[A-Za-z]{2}")
OF_RUST = (
    "waterfill-*/src/error.rs",
    "waterfill-board/src/thread.rs",
    "waterfill-cuda/src/installed.rs",
    "waterfill-cuda/src/runner.rs",
    "waterfill-cuda/src/shape.rs",
)


def _normal(text: str) -> str:
    """One blank between words, each value ``{}``, no joints at the ends."""
    return " ".join(re.sub(r"%[dgrs]|\{:\w+\}", "{}", text).split()).strip(" :;,")


def _is_message(text: str) -> bool:
    """Two words or more that are no values, or that something failed."""
    words = [word for word in text.split() if "{}" not in word and WORD.search(word)]
    return len(words) >= 2 or "failed:" in words


def _of_python(source: str) -> set[str]:
    """Texts of a module: all but docstrings, help of flags, descriptions of metrics, parsed code and assertions."""
    tree = ast.parse(source)
    left_out = {
        id(child)
        for node in ast.walk(tree)
        for part in _shown_elsewhere(node)
        for child in ast.walk(part)
    }
    texts = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            left_out.update(id(part) for part in node.values)
            parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            texts.add(_normal("".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(_normal(node.value))
    return {text for text in texts if _is_message(text)}


def _shown_elsewhere(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield node  # A docstring.
    elif isinstance(node, ast.Assign):
        names = {getattr(target, "id", getattr(target, "attr", "")) for target in node.targets}
        if names & {"_VALUES", "__doc__"}:
            yield node
    elif isinstance(node, ast.keyword) and node.arg == "help":
        yield node
    elif isinstance(node, ast.Call):
        first = node.args[0] if node.args else None
        if ast.unparse(node.func) in ("ast.parse", "AssertionError"):
            yield node
        if isinstance(first, ast.Constant) and str(first.value).startswith("sglang:"):
            yield from node.args


def _of_rust(source: str) -> set[str]:
    """Texts of a module, without those of its tests, and the reasons of its attributes."""
    source = source.split("#[cfg(test)]")[0]
    source = re.sub(r"^\s*//.*$|\.expect\(\"[^\"]*\"\)", "", source, flags=re.MULTILINE)
    texts = (
        re.sub(r"\\\n\s*", "", text)
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', source, re.DOTALL)
    )
    return {
        text
        for text in (_normal(re.sub(r"\{[^}]*\}", "{}", each)) for each in texts)
        if _is_message(text)
    }


def _of_code() -> set[str]:
    rooms = (PACKAGE.glob(f"{room}/*.py") for room in ("sglang", "exchange"))
    alone = ("config.py", "sglang_flags.py", "placement/spread.py")
    modules = [*itertools.chain(*rooms), *(PACKAGE / name for name in alone)]
    found = set().union(*(_of_python(module.read_text()) for module in modules))
    return found.union(
        *(
            _of_rust(module.read_text())
            for pattern in OF_RUST
            for module in (ROOT / "rust").glob(pattern)
        )
    )


def _of_page(page: str) -> list[str]:
    """What is in backticks in the first cell of each row of a table."""
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    return [_normal(text) for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_the_page_has_every_message_of_the_code_and_no_other():
    code, page = _of_code(), _of_page((ROOT / "docs" / "messages.md").read_text())
    assert sorted(code - set(page)) == [], "messages that docs/messages.md lacks"
    assert sorted(set(page) - code) == [], "rows of docs/messages.md that no code has"
    assert len(page) == len(set(page)), "a message stands there twice"
    assert len(page) > 100


def test_a_row_has_a_cause_and_what_to_do():
    for line in (ROOT / "docs" / "messages.md").read_text().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 3 and all(cells), line


def test_what_counts_as_a_message():
    source = '''
"""A docstring of words."""
_VALUES = {"a flag": "its help text"}
logger.warning("waterfill-rs: rank %d is late: " "%s", rank, why)
gauge("sglang:x", "Its own description.")
parser.add_argument("--flag", help="A help text.")
def f():
    """Another docstring of words."""
    raise ValueError(f"{name}={value!r}: give one of {', '.join(known)}")
    raise AssertionError("no message to anybody")
    return [f"{key}: {value}", "name", {"its reason": "that follows it"}, "its sum is {:08x}"]
'''
    assert _of_python(source) == {
        "waterfill-rs: rank {} is late: {}",
        "{}={}: give one of {}",
        "that follows it",
        "its reason",
        "its sum is {}",
    }
    rust = '/// "No such text here"\nwrite!(f, "{name} has {found} entries: \\\n    give {}", 1)'
    assert _of_rust(rust) == {"{} has {} entries: give {}"}
