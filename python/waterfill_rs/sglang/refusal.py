"""Where waterfill-rs does not serve: one warning and a metric, or the end of the server, with every reason."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from waterfill_rs.config import Config
from waterfill_rs.sglang import metrics
from waterfill_rs.sglang_versions import Seams

__all__ = ["no_layer", "stand_aside", "stop"]

logger = logging.getLogger(__name__)


def stand_aside(config: Config, reasons: list[str]) -> None:
    """One warning with every reason, or the end of the server where waterfill-rs was required."""
    if config.required:
        stop(reasons)
    metrics.stand_aside("; ".join(reasons))
    logger.warning("waterfill-rs is off, sglang's own Waterfill stays: %s", "; ".join(reasons))


def no_layer(config: Config, arguments: Any, seams: Seams) -> None:
    """Waterfill was asked for, and no layer of this rank's model has it: sglang itself says nothing then."""
    reason = (
        f"{seams.flag} is on, and no MoE layer here has Waterfill: the model needs a shared expert that sglang "
        "fuses, and sglang's log says where it does not"
    )
    # A stage of a pipeline may have none while others have.
    if config.required and getattr(arguments, "pp_size", 1) == 1:
        stop([reason])
    metrics.stand_aside(reason)
    logger.warning("waterfill-rs balances nothing: %s", reason)


def stop(reasons: list[str]) -> NoReturn:
    """The end of this process, with every reason."""
    # SystemExit, because sglang swallows every Exception of a plugin and serves without it.
    raise SystemExit(
        "waterfill-rs cannot serve:\n" + "\n".join(f"- {reason}" for reason in reasons)
    )
