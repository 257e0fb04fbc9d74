"""The dictionaries that ``_native`` gives have the keys and kinds of values that its stub says."""

import ast
import os
from pathlib import Path

import pytest

import waterfill_rs
from waterfill_rs import CostModel, _native

KINDS = {
    "int": int,
    "float": float,
    "bool | None": (bool, type(None)),
    "str": str,
    "list[int]": list,
    "list[tuple[float, int]]": list,
}


@pytest.fixture(scope="module")
def stub():
    """Each class of the stub by its name."""
    text = Path(waterfill_rs.__file__).with_name("_native.pyi").read_text()
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def fields(stub, name):
    """What the stub says of a ``TypedDict``: each key and its type, those of the classes that it extends too."""
    found = {}
    for base in stub[name].bases:
        found |= fields(stub, base.id) if base.id in stub else {}
    for node in stub[name].body:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = ast.unparse(node.annotation)
    return found


def check(stub, name, value):
    expected = fields(stub, name)
    assert value.keys() == expected.keys(), name
    for key, kind in expected.items():
        if kind in stub:
            check(stub, kind, value[key])
        elif kind.removeprefix("list[").removesuffix("]") in stub:
            for each in value[key]:
                check(stub, kind.removeprefix("list[").removesuffix("]"), each)
        else:
            assert isinstance(value[key], KINDS[kind]), (name, key, value[key])


def test_a_snapshot_has_what_the_stub_says(stub):
    board = _native.Board.create(f"waterfill-rs-{os.getpid()}-types", 2, 4, 7)
    board.unlink()
    port = _native.Port(board, 1, CostModel.rows())
    check(stub, "Snapshot", board.snapshot())
    check(stub, "Tally", port.tally())
    assert board.snapshot()["version"] == _native.SNAPSHOT_VERSION
    assert [rank["alive"] for rank in board.snapshot()["by_rank"]] == [None, True]
