"""Prints which hooks of ours are in place once sglang has loaded its plugins, and whether shared experts can run beside
dispatch there: ``python -m`` in a fresh process.

sglang 0.5.23 has no question for that, and logs nothing that is seen when a hook is not applied.
"""

from __future__ import annotations

import json
import pkgutil
from typing import Any

__all__ = ["against_overlap", "found"]


def found() -> dict[str, bool]:
    """Each of sglang's names that we hook: is what stands there ours?"""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    return {
        target: all(_stands(target, hook) for hook in ours)
        for target, hooks in HookRegistry._hooks.items()
        if (ours := [hook for _, hook, *_ in hooks if hook.__module__.startswith("waterfill_rs")])
    }


def _stands(target: str, hook: Any) -> bool:
    """A class stands for itself; a function is held by the wrapper that sglang made, or by one below it."""
    try:
        there = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    while there is not None:
        cells = getattr(there, "__closure__", None) or ()
        if there is hook or any(cell.cell_contents is hook for cell in cells):
            return True
        there = getattr(there, "__wrapped__", None)
    return False


def against_overlap() -> list[str]:
    """Why no layer of this sglang, with the plugins it has, can run its shared expert beside dispatch."""
    from waterfill_rs.sglang import compat

    seams, reasons = compat.find()
    return compat.against_overlap(seams) if seams else reasons


if __name__ == "__main__":
    print(json.dumps({"hooks": found(), "against_overlap": against_overlap()}))
