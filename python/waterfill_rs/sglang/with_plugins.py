"""Runs one of sglang's command-line modules that loads no plugins, with plugins loaded:

    python -m waterfill_rs.sglang.with_plugins sglang.benchmark.one_batch --model-path ... --enable-waterfill

The processes that it spawns load them too, because each of them runs the main module first, which is this one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from types import ModuleType

__all__ = ["main"]


def main() -> None:
    """Run the module that the first argument names as ``python -m`` would; the others are its own.

    Raises:
        SystemExit: no module, one that ``python -m`` does not run, or a plugin that sglang did not load, with what to do.
    """
    from waterfill_rs.sglang.registration import is_registered

    if len(sys.argv) < 2:
        raise SystemExit("waterfill-rs: give a module of sglang's, like sglang.benchmark.one_batch")
    if not is_registered():
        raise SystemExit("waterfill-rs: sglang did not load waterfill-rs: run waterfill-rs doctor")
    name = sys.argv.pop(1)
    module = _imported(name)
    # In the module itself, and not in one called __main__: ranks are spawned with functions of it, which are sought there.
    if hasattr(module, "cli_main"):
        module.cli_main()
    elif block := _main_block(module):
        exec(compile(block, module.__file__ or name, "exec"), vars(module))
    else:
        raise SystemExit(f"waterfill-rs: {name} runs nothing: give a module that python -m runs")


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # One that it needs.
        import sglang

        version: str = sglang.__version__
        raise SystemExit(
            f"waterfill-rs: no module {name} with sglang {version}: sglang.benchmark.one_batch is there from 0.5.15 on, "
            "sglang.bench_one_batch up to 0.5.20"
        ) from None


def _main_block(module: ModuleType) -> ast.Module | None:
    """What ``python -m`` runs of it beyond an import: sglang's before 0.5.15 has no function for that."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return None  # It is empty, or no Python.
    test = ast.dump(ast.parse("__name__ == '__main__'", mode="eval").body)
    blocks = [
        statement
        for each in ast.parse(source).body
        if isinstance(each, ast.If) and ast.dump(each.test) == test
        for statement in each.body
    ]
    return ast.Module(blocks, type_ignores=[]) if blocks else None


if __name__ in ("__main__", "__mp_main__"):
    from sglang.srt.plugins import load_plugins

    load_plugins()

if __name__ == "__main__":
    main()
