"""The files that `make wheels` made: found by the version that they must have."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist" / "release"
ARCHITECTURES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}

_workspace = (ROOT / "Cargo.toml").read_text()
VERSION = re.search(r'^version = "(.+)"$', _workspace, re.MULTILINE)[1]


def made(name):
    """The made file of that name; skips the test where there is none."""
    if not (DIST / name).exists():
        pytest.skip(f"no dist/release/{name}: make wheels builds it")
    return DIST / name


def sdist():
    return made(f"waterfill_rs-{VERSION}.tar.gz")


def wheel(architecture):
    return made(f"waterfill_rs-{VERSION}-cp310-abi3-manylinux_2_28_{architecture}.whl")


def output(*command, cwd=None):
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout
