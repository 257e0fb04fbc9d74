"""Can waterfill-rs serve here? The reasons against it; ``refusal`` tells them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from waterfill_rs.config import Config
from waterfill_rs.sglang import compat, loaded_hooks
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang_versions import Seams

if TYPE_CHECKING:
    import torch

__all__ = [
    "against_device",
    "against_machine",
    "against_model",
    "against_routers",
    "is_deterministic",
    "moves_experts",
]


def against_machine() -> list[str]:
    """What keeps this machine from it, whatever the model."""
    try:
        importlib.import_module("waterfill_rs.torch")
    except ImportError as error:
        return [f"waterfill_rs.torch cannot be imported: {error}"]
    return []


def against_device(device: torch.device) -> list[str]:
    """What keeps the device that a model is on from it. A kernel is made, which takes a second or two once a machine."""
    if device.type == "cpu":
        return []
    if device.type != "cuda":
        return [f"the model is on {device}, and waterfill-rs expands on CUDA devices and the CPU"]
    from waterfill_rs.cuda import Expander

    try:
        panics_are_errors(Expander)(device, physical_experts=1, ranks=1, rank=0, top_k=1)
    except (RuntimeError, ValueError) as error:
        return [f"no kernel can be made for {device}: {error}"]
    return []


def against_routers(model: Any) -> list[str]:
    """What in a model's routers keeps us from it: not all of them ask a balancer for every batch."""
    vision = "e_score_correction_bias_vl"
    if any(getattr(module, vision, None) is not None for module in model.modules()):
        return [
            f"the model has vision routers ({vision}): sglang asks no Waterfill where they have rows, only where a rank "
            "has none, so ranks would not make the same calls"
        ]
    return []


def against_model(arguments: Any, config: Config, seams: Seams) -> list[str]:
    """What in the ``ServerArgs`` in force, and in what sglang made of them, keeps us from it."""
    reasons = []
    if backend := getattr(arguments, "elastic_ep_backend", None):
        reasons.append(
            f"--elastic-ep-backend {backend}: ranks come and go, and waterfill-rs plans for those at the start"
        )
    if getattr(arguments, "enable_pdmux", False):
        reasons.append(
            "--enable-pdmux: prefill and decode run a model's layers on two streams at once, and waterfill-rs "
            "numbers the calls of one stream, in the same order on all ranks"
        )
    redundant = getattr(arguments, "ep_num_redundant_experts", 0)
    if redundant and not seams.redundant:
        reasons.append(
            f"--ep-num-redundant-experts {redundant}: this sglang's Waterfill takes no notice of redundant experts "
            f"and would misplace ids; use {seams.flag} without them, or a newer sglang"
        )
    reasons += _against_mega_moe(seams)
    if config.required and is_deterministic(arguments) and config.exchange in ("board", "group"):
        reasons.append(
            f"exchange {config.exchange} with --enable-deterministic-inference: plans would depend on "
            "when other ranks' counts come; only exchange solo (or auto, which then is solo) does not"
        )
    return reasons


def _against_mega_moe(seams: Seams) -> list[str]:
    """Where layers run on megamoe: what would leave their peers waiting for a rank without rows."""
    if not compat.resolve(seams.backend)().is_megamoe():
        return []
    reasons = compat.against_posting(seams)
    if not reasons and seams.mega_moe and not loaded_hooks.found().get(seams.mega_moe):
        reasons = [f"{seams.mega_moe} is not waterfill-rs's after registration"]
    return [f"--moe-a2a-backend megamoe: {reason}" for reason in reasons]


def is_deterministic(arguments: Any) -> bool:
    """Was --enable-deterministic-inference given? Then plans may depend on own counts only."""
    return bool(getattr(arguments, "enable_deterministic_inference", False))


def moves_experts(arguments: Any) -> bool:
    """May the server move experts between ranks while it serves?"""
    return bool(
        getattr(arguments, "enable_eplb", False) or getattr(arguments, "elastic_ep_backend", None)
    )
