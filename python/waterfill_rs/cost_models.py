"""What ``--cost-model`` may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from waterfill_rs import CostModel

__all__ = ["HELP", "parse"]

HELP = (
    "what rows cost: 'rows' (default), 'roofline:WEIGHTS_US,ROW_US,TILE', or a JSON file of "
    "measured [[rows, microseconds], ...]"
)
_ROOFLINE = "give roofline:WEIGHTS_US,ROW_US,TILE, like roofline:20,0.08,64"
_TABLE = "give [[rows, microseconds], ...]"


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
        path = Path(text)
        if not path.is_file():
            raise ValueError("no such file, and not 'rows' or 'roofline:...'")
        return CostModel.table([_point(p) for p in json.loads(path.read_text("utf-8"))])
    # An OverflowError is a number that the core's integers cannot hold, a RecursionError JSON without end.
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"--cost-model {text}: {error}: {form}") from error


def _point(entry: Any) -> tuple[int, float]:
    rows, microseconds = entry
    for value, kinds in ((rows, int), (microseconds, (int, float))):
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"the entry {entry} is not a whole number of rows and a time")
    return rows, float(microseconds)
