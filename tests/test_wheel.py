"""The wheel by itself, in an environment that has nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of scripts of an environment with the wheel alone."""
    folder = tmp_path_factory.mktemp("wheel")
    maturin = Path(sys.executable).with_name("maturin")
    if not maturin.exists():
        pytest.skip("maturin is not installed beside this Python: make test installs it")
    build = [maturin, "build", "--release", "--quiet", "--out", folder]
    subprocess.run(build, cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    scripts = folder / "venv" / "bin"
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1 and "abi3" in wheels[0].name
    install = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-index", wheels[0]]
    subprocess.run(install, check=True)
    return scripts


def run(*command):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=clean)


def test_imports_with_nothing_else_installed(alone):
    code = "import waterfill_rs; print(waterfill_rs.plan([9, 1], [2, 2], ranks=2).optimum)"
    done = run(alone / "python", "-c", code)
    assert done.stdout.strip() == "9", done.stderr


def test_command_prints_help_and_runs_the_demo(alone):
    assert "demo" in run(alone / "waterfill-rs", "--help").stdout
    done = run(alone / "waterfill-rs", "demo", "--steps", "1", "--layers", "1")
    assert done.returncode == 0 and "the optimum in every layer of every pass" in done.stdout, (
        done.stderr
    )


def test_entry_point_is_the_one_that_sglang_looks_for(alone):
    code = (
        "from importlib.metadata import entry_points;"
        "print([e.value for e in entry_points(group='sglang.srt.plugins')])"
    )
    assert run(alone / "python", "-c", code).stdout.strip() == "['waterfill_rs.sglang:register']"
