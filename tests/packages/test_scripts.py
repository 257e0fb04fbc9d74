"""Where a part cannot be had, the script that brings it fails and says why: `make test-packages` then leaves it out."""

import os
import subprocess

import pytest
from release import ROOT


@pytest.fixture
def bring(tmp_path):
    """Run a script of tools with programs of ours in front of the machine's."""

    def run(script, argument, **programs):
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [ROOT / "tools" / script, argument]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


def test_without_a_standard_library_there_is_no_wheel(bring, tmp_path):
    done = bring("rust_target.sh", "aarch64", rustc=f"echo {tmp_path}", rustup="exit 1")
    assert done.returncode == 1
    assert "no wheel for aarch64" in done.stderr and "rustup cannot add it" in done.stderr


def test_a_standard_library_that_rustup_adds_will_do(bring, tmp_path):
    folder = tmp_path / "lib/rustlib/aarch64-unknown-linux-gnu/lib"
    add = f"mkdir -p {folder}; touch {folder}/libstd-1.rlib"
    done = bring("rust_target.sh", "aarch64", rustc=f"echo {tmp_path}", rustup=add)
    assert done.returncode == 0, done.stderr


def test_other_machines_are_not_emulated_upon(bring, tmp_path):
    done = bring("emulator.sh", tmp_path / "emulator", uname="echo aarch64")
    assert done.returncode == 1 and "this machine is not x86_64" in done.stderr


def test_without_debians_packages_nothing_is_emulated(bring, tmp_path):
    done = bring("emulator.sh", tmp_path / "emulator", **{"apt-get": "exit 100"})
    assert done.returncode == 1 and "apt-get update failed" in done.stderr
    assert not (tmp_path / "emulator" / "ready").exists()
