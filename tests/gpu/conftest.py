"""Tests of the kernel: skipped where torch sees no GPU. ``make gpu`` says how to run them there."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch.cuda.is_available() is False: no GPU here")
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(skip)
