"""The wheel for this machine by itself, in an environment that has nothing else."""

import os
import platform
import subprocess
import sys

import pytest
from release import wheel


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of scripts of an environment with the wheel alone."""
    folder = tmp_path_factory.mktemp("wheel")
    made = wheel(platform.machine())
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    scripts = folder / "bin"
    install = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-index", made]
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
