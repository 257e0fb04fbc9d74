"""A MoE layer over real DeepEP: rank processes on one GPU, the shared expert in the slot that sglang gives it.

Start ``nvidia-cuda-mps-control -d`` before: ranks wait for each other on the GPU. Skipped without DeepEP.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deep_ep") is None,
    reason="deep_ep is not installed: this compares a layer's output over DeepEP",
)
RANK = Path(__file__).parents[1] / "support" / "deepep_layer.py"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_layers_output_is_that_of_shared_experts_at_home(ranks, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(ranks), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [
        f"rank {rank}:\n{errors[-3000:]}"
        for rank, (process, (_, errors)) in enumerate(zip(processes, ended, strict=True))
        if process.returncode
    ]
    assert not failed, "\n".join(failed)
    told = [json.loads(printed.splitlines()[-1]) for printed, _ in ended]
    worst = {name: max(each[name] for each in told) for name in told[0]}
    print(f"{ranks} ranks: {worst}")
    assert sum(each["moved"] for each in told) > 0  # The plans did differ from home.
