"""Runs one of sglang's command-line modules that loads no plugins, with plugins loaded:

    python -m waterfill_rs.sglang.with_plugins sglang.benchmark.one_batch --model-path ... --enable-waterfill

The processes that it spawns load them too, because each of them runs the main module first, which is this one.
"""

from __future__ import annotations

import importlib
import sys

__all__ = ["main"]


def main() -> None:
    """Call ``cli_main`` of the module that the first argument names; the others are its own.

    Raises:
        SystemExit: no module, one without ``cli_main``, or a plugin that sglang did not load, with what to do.
    """
    from waterfill_rs.sglang.plugin import is_registered

    if len(sys.argv) < 2:
        raise SystemExit("waterfill-rs: give a module of sglang's, like sglang.benchmark.one_batch")
    if not is_registered():
        raise SystemExit("waterfill-rs: sglang did not load waterfill-rs: run waterfill-rs doctor")
    name = sys.argv.pop(1)
    module = importlib.import_module(name)
    if not hasattr(module, "cli_main"):
        raise SystemExit(
            f"waterfill-rs: {name} has no cli_main: measure a server with sglang's bench_serving instead"
        )
    module.cli_main()


if __name__ in ("__main__", "__mp_main__"):
    from sglang.srt.plugins import load_plugins

    load_plugins()

if __name__ == "__main__":
    main()
