"""Where NVRTC is, which compiles the kernel; found without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["files"]


def files() -> list[str]:
    """Its files in the wheels that torch brings, then in ``CUDA_HOME``; where there are none, the loader may know one."""
    wheels = [Path(entry) / "nvidia" for entry in sys.path if entry]
    folders = [wheel / name / "lib" for wheel in wheels for name in ("cu13", "cuda_nvrtc")]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "lib64")
    return [str(file) for folder in folders for file in sorted(folder.glob("libnvrtc.so.1[0-9]"))]
