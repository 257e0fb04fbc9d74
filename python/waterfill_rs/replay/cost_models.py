"""What ``--cost-model`` may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from waterfill_rs import CostModel, machine
from waterfill_rs.machines import MACHINES

__all__ = ["HELP", "parse"]

_NAMES = ", ".join(MACHINES)
HELP = (
    "what rows cost: 'rows' (default), 'roofline:WEIGHTS_US,ROW_US,TILE', a JSON file (that of "
    f"'waterfill-rs calibrate --json', or [[rows, microseconds], ...]), or a GPU's name ({_NAMES})"
)
_ROOFLINE = "give roofline:WEIGHTS_US,ROW_US,TILE, like roofline:20,0.08,64"
_TABLE = "give [[rows, microseconds], ...] or what waterfill-rs calibrate --json writes"


def parse(text: str) -> CostModel:
    """Read one.

    Raises:
        ValueError: naming the text or the file, and what is wrong with it.
    """
    if text == "rows":
        return CostModel.rows()
    form = _ROOFLINE if text.startswith("roofline:") else _TABLE
    try:
        if form is _ROOFLINE:
            weights, row, tile = text.removeprefix("roofline:").split(",")
            return CostModel.roofline(float(weights), float(row), int(tile))
        return CostModel.table(_measured(text))
    # An OverflowError is a number that the core's integers cannot hold, a RecursionError JSON without end.
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"--cost-model {text}: {error}: {form}") from error


def _measured(text: str) -> list[tuple[int, float]]:
    """The points of a file, or of a GPU of the built-in table. A file goes before a name."""
    path = Path(text)
    if path.is_file():
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict):
            return machine.parse(content).cost_table()
        return [_point(point) for point in content]
    known = machine.machine_of(text)
    if known is None:
        raise ValueError(f"no such file, not 'rows' or 'roofline:...', and no GPU of {_NAMES}")
    return known.cost_table()


def _point(entry: Any) -> tuple[int, float]:
    rows, microseconds = entry
    for value, kinds in ((rows, int), (microseconds, (int, float))):
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"the entry {entry} is not a whole number of rows and a time")
    return rows, float(microseconds)
