"""The source distribution: `make wheels` builds the wheels from it; here is what else it has and has not."""

import re
import tarfile

import pytest
from release import ROOT, VERSION, output, sdist


@pytest.fixture(scope="module")
def names():
    with tarfile.open(sdist()) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames()}


def test_has_what_a_build_reads(names):
    assert {"Cargo.lock", "Cargo.toml", "pyproject.toml", "README.md", "LICENSE"} <= names
    kernels = (ROOT / "rust/waterfill-cuda/kernels").iterdir()
    assert {f"rust/waterfill-cuda/kernels/{kernel.name}" for kernel in kernels} <= names


def test_a_wheel_has_no_crate_of_the_tests():
    command = "cargo tree --locked --edges normal,build --prefix none --package waterfill-py"
    crates = {line.split()[0] for line in output(*command.split(), cwd=ROOT).splitlines()}
    assert {"waterfill-cuda", "waterfill-core"} <= crates
    assert not crates & {"cuda-emulator", "waterfill-testing"}


def test_has_every_python_file_of_the_package(names):
    package = (ROOT / "python").rglob("*.py*")
    files = {str(path.relative_to(ROOT)) for path in package if "__pycache__" not in path.parts}
    assert files <= names


def test_has_nothing_that_was_built(names):
    assert [name for name in names if re.search(r"\.(so|pyc|whl|o|rlib)$|^target/", name)] == []


def test_version_is_the_workspaces():
    with tarfile.open(sdist()) as archive:
        text = archive.extractfile(f"waterfill_rs-{VERSION}/PKG-INFO").read().decode()
    assert f"\nVersion: {VERSION}\n" in text
