"""What ``--cost-model`` may say."""

from __future__ import annotations

import json
from pathlib import Path

from waterfill_rs import CostModel

__all__ = ["HELP", "parse"]

HELP = (
    "what rows cost: 'rows' (default), 'roofline:WEIGHTS_US,ROW_US,TILE', or a JSON file of "
    "measured [[rows, microseconds], ...]"
)


def parse(text: str) -> CostModel:
    """Read one.

    Raises:
        ValueError: naming the text or the file, and what is wrong with it.
    """
    if text == "rows":
        return CostModel.rows()
    if text.startswith("roofline:"):
        parts = text.removeprefix("roofline:").split(",")
        try:
            weights, row, tile = float(parts[0]), float(parts[1]), int(parts[2])
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"--cost-model {text}: give roofline:WEIGHTS_US,ROW_US,TILE, like roofline:20,0.08,64"
            ) from error
        return CostModel.roofline(weights, row, tile)
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"--cost-model {text}: no such file, and not 'rows' or 'roofline:...'")
    try:
        points = [(int(rows), float(us)) for rows, us in json.loads(path.read_text("utf-8"))]
        return CostModel.table(points)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--cost-model {text}: {error}: give [[rows, microseconds], ...]"
        ) from error
