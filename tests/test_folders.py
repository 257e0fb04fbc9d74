"""What each folder of tests may hold and need: other folders are run where there is no GPU, or no sglang."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))
SUPPORT = [name for name in FILES if name.startswith("support/")]
GPU = re.compile(r"""\.cuda\(\)|device=["']cuda""")


def imported(text):
    """Packages that a module imports or asks for when it is imported itself: not those of its functions."""
    todo, found = list(ast.parse(text).body), set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and "importorskip" in ast.dump(node.func):
            found.add(ast.literal_eval(node.args[0]).split(".")[0])
        todo += ast.iter_child_nodes(node)
    return found


def imported_by(name):
    """The same of a test, and of the helpers that it imports."""
    todo, seen, found = [name], set(), set()
    while todo:
        now = imported((TESTS / todo.pop()).read_text())
        helpers = {f"support/{package}.py" for package in now} & set(SUPPORT)
        todo += helpers - seen
        seen |= helpers
        found |= now
    return found


def test_helpers_are_in_support_and_tests_are_not():
    names = {name: name.rpartition("/")[2] for name in FILES}
    for name in FILES:
        is_test = names[name].startswith("test_") or names[name] == "conftest.py"
        assert is_test != (name in SUPPORT), name
    assert len(SUPPORT) > 10 and len(set(names.values()) - {"conftest.py"}) == len(FILES) - 2


def test_these_checks_see_what_they_look_for():
    within = "try:\n    from sglang.srt import x\nexcept ImportError:\n    pass"
    for text in ("import sglang.srt", within, "a = pytest.importorskip('sglang.srt', reason='')"):
        assert "sglang" in imported(text)
    assert "sglang" not in imported("def f():\n    import sglang\nimport waterfill_rs.sglang")
    assert "sglang" in imported_by("sglang/test_live_ranks.py")
    assert GPU.search((TESTS / "gpu" / "test_live.py").read_text())


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("test_")])
def test_without_sglang_or_a_gpu_what_is_here_can_be_imported(name):
    text = (TESTS / name).read_text()
    assert "sglang" not in imported_by(name)
    assert name == Path(__file__).name or not GPU.search(text)


@pytest.mark.parametrize("name", FILES)
def test_no_file_outside_the_repository_is_read(name):
    to_root, text = name.count("/") + 1, (TESTS / name).read_text()
    for up in re.findall(r"__file__\)(?:\.resolve\(\))?\.parents\[(\d+)\]", text):
        assert int(up) <= to_root
    assert name == Path(__file__).name or "shared/data" not in text
