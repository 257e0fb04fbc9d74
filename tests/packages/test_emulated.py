"""The aarch64 wheel under qemu-user: installed by its tag, imported, its rank processes live.

An emulator on x86_64 orders memory as x86_64 does: this shows that the wheel runs, not that its order of memory is right.
"""

import os
import subprocess
import sys

import pytest
from release import ROOT, wheel

PYTHON = ROOT / "target" / "emulator" / "python"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the aarch64 wheel, installed by pip for that machine."""
    if not (PYTHON.parent / "ready").exists():
        pytest.skip("no emulator in target/emulator: tools/emulator.sh makes it")
    folder = tmp_path_factory.mktemp("aarch64")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-compile"]
    there = ["--platform", "manylinux_2_28_aarch64", "--only-binary", ":all:"]
    to = ["--python-version", "3.10", "--target", folder, wheel("aarch64")]
    subprocess.run([*install, *there, *to], check=True)
    return folder


def emulated(installed, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([PYTHON, *arguments], capture_output=True, text=True, env=environment)


def test_imports_and_plans(installed):
    code = (
        "import platform, waterfill_rs;"
        "print(platform.machine(), waterfill_rs.plan([9, 1], [2, 2], ranks=2).optimum)"
    )
    done = emulated(installed, "-c", code)
    assert done.stdout.split() == ["aarch64", "9"], done.stderr


def test_demo_has_live_plans_of_real_processes(installed):
    demo = "from waterfill_rs.cli import main; main()"
    arguments = ["demo", "--ranks", "2", "--steps", "2", "--layers", "1"]
    done = emulated(installed, "-c", demo, *arguments)
    assert done.returncode == 0 and "the optimum in every layer of every pass" in done.stdout, (
        done.stderr
    )
