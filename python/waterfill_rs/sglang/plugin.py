"""The entry point ``sglang.srt.plugins``: which of sglang's names are hooked, and what happens if they can't be.

sglang logs and swallows a plugin's exceptions, so nothing here relies on raising them: what keeps this
package from serving is collected, and told in one warning, or ends the server where it was required.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

from waterfill_rs.config import (
    BACKEND_VARIABLE,
    BACKENDS,
    EXCHANGE_VARIABLE,
    PACES,
    PLANNER_VARIABLE,
    REQUIRE_VARIABLE,
    TIMEOUT_VARIABLE,
    Config,
)
from waterfill_rs.rendezvous import CHOICES

__all__ = ["register"]

logger = logging.getLogger(__name__)

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
BALANCER = "sglang.srt.layers.moe.waterfill.WaterfillBalancer"
HASH_TOPK = "sglang.srt.layers.moe.hash_topk.HashTopK"
PREPARE = "sglang.srt.model_executor.model_runner_components.moe_ep_setup.prepare_moe_topk"

# sglang 0.5.23; another version is used if these are what it has.
BALANCER_PARAMETERS = ("num_routed_experts", "world_size", "rank", "layer_id", "shared_weight")
EXPAND_PARAMETERS = ("topk_output", "num_tokens")

_registered = False


def register() -> None:
    """Called by sglang in every process that loads plugins; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{SERVER_ARGS}.add_cli_args", _add_flags, HookType.AFTER)
    HookRegistry.register(f"{SERVER_ARGS}.from_cli_args", _flags_to_environment, HookType.AROUND)
    try:
        config = Config.from_environment(os.environ)
    except ValueError as error:
        _stop([str(error)])
    if not config.enabled:
        return
    reasons = _reasons_not_to_serve()
    if reasons:
        _cannot_serve(config, reasons)
        return
    from waterfill_rs.sglang.balancer import WaterfillBalancer
    from waterfill_rs.sglang.topk import WaterfillHashTopK

    HookRegistry.register(BALANCER, WaterfillBalancer, HookType.REPLACE)
    HookRegistry.register(HASH_TOPK, WaterfillHashTopK, HookType.REPLACE)
    HookRegistry.register(PREPARE, _verify_and_prepare, HookType.AROUND)


def _reasons_not_to_serve() -> list[str]:
    """Everything about this sglang and this machine that keeps us from serving."""
    reasons = []
    try:
        balancer = _resolve(BALANCER)
        reasons += _unlike(BALANCER, balancer.__init__, BALANCER_PARAMETERS)
        reasons += _unlike(f"{BALANCER}.expand_topk", balancer.expand_topk, EXPAND_PARAMETERS)
        _resolve(HASH_TOPK)
        _resolve(PREPARE)
        importlib.import_module("waterfill_rs.torch")
    except (ImportError, AttributeError) as error:
        return [f"{error}: this sglang has no Waterfill that waterfill-rs knows (it knows 0.5.23)"]
    import torch

    if torch.cuda.is_available():
        reasons.append(
            "the model will run on CUDA, and this version of waterfill-rs expands on the CPU only"
        )
    return reasons


def _unlike(name: str, function: Callable[..., Any], parameters: tuple[str, ...]) -> list[str]:
    found = tuple(inspect.signature(function).parameters)[1:]
    if found == parameters or (found[:2] == parameters and found[2:] == ("is_decode",)):
        return []
    return [f"{name} takes {found}, and waterfill-rs knows {parameters}"]


def _resolve(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _cannot_serve(config: Config, reasons: list[str]) -> None:
    if config.required:
        _stop(reasons)
    logger.warning("waterfill-rs is off, sglang's own Waterfill stays: %s", "; ".join(reasons))


def _stop(reasons: list[str]) -> NoReturn:
    # SystemExit, because sglang swallows every Exception of a plugin and serves without it.
    raise SystemExit(
        "waterfill-rs cannot serve:\n" + "\n".join(f"- {reason}" for reason in reasons)
    )


def _verify_and_prepare(prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around sglang's preparation of the MoE layers: are the hooks really in place? Then say so."""
    from waterfill_rs.sglang.balancer import WaterfillBalancer
    from waterfill_rs.sglang.topk import WaterfillHashTopK

    model: Any = kwargs.get("model", args[0] if args else None)
    asked = [m for m in model.modules() if getattr(m, "enable_waterfill", False)]
    if not asked:  # Off means off: whoever replaced these classes, Waterfill is not in use here.
        return prepare(*args, **kwargs)
    hooks = {BALANCER: WaterfillBalancer, HASH_TOPK: WaterfillHashTopK}
    missing = [
        f"{name} is not ours after registration"
        for name, ours in hooks.items()
        if _resolve(name) is not ours
    ]
    if missing:
        _stop(missing)
    result = prepare(*args, **kwargs)
    others = [m for m in asked if not isinstance(m.waterfill_balancer, WaterfillBalancer)]
    if others:
        kinds = sorted({f"{type(m).__name__} with {type(m.waterfill_balancer)}" for m in others})
        _stop([f"{len(others)} of {len(asked)} MoE layers are not balanced by ours: {kinds}"])
    _connect([m.waterfill_balancer for m in asked if m.waterfill_balancer.exchange is None])
    return result


def _connect(balancers: list[Any]) -> None:
    """Join layers that were just prepared to their peers, and say how."""
    if not balancers:
        return
    from waterfill_rs.sglang.group import connect

    try:
        exchange = connect(balancers, Config.from_environment(os.environ))
    except (OSError, RuntimeError, ValueError) as error:
        _stop([str(error)])
    logger.info(
        "waterfill-rs active: %d MoE layers on the CPU, exchange %s, because %s",
        len(balancers),
        exchange.name,
        exchange.reason,
    )


_VALUES = {
    "waterfill_rs": (
        BACKEND_VARIABLE,
        "Who balances the shared experts where Waterfill is on; 'rust' stops the server if waterfill-rs cannot",
    ),
    "waterfill_rs_exchange": (EXCHANGE_VARIABLE, "How ranks learn each other's counts"),
    "waterfill_rs_planner": (
        PLANNER_VARIABLE,
        "Who plans at the board: the leader's call or a thread",
    ),
    "waterfill_rs_timeout_us": (
        TIMEOUT_VARIABLE,
        "Longest wait of a layer for the plan, microseconds",
    ),
}
"""Flags with a value, by their name in Python: the variable each sets, and its help."""
_CHOICES = {
    "waterfill_rs": BACKENDS,
    "waterfill_rs_exchange": CHOICES,
    "waterfill_rs_planner": PACES,
}


def _add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("waterfill-rs")
    for name, (variable, text) in _VALUES.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, choices=_CHOICES.get(name), help=f"{text} (sets {variable}).")
    group.add_argument(
        "--waterfill-rs-require",
        action="store_true",
        help=f"Stop, with every reason, if waterfill-rs cannot serve (sets {REQUIRE_VARIABLE}=1).",
    )


def _flags_to_environment(from_cli_args: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Flags become environment variables, which reach every process that the server starts."""
    parsed = kwargs.get("args", args[-1] if args else None)
    for name, (variable, _) in _VALUES.items():
        if (value := getattr(parsed, name, None)) is not None:
            os.environ[variable] = value
    if getattr(parsed, "waterfill_rs_require", False):
        os.environ[REQUIRE_VARIABLE] = "1"
    if getattr(parsed, "waterfill_rs", None) == "rust" and not getattr(
        parsed, "enable_waterfill", False
    ):
        logger.warning("--waterfill-rs rust balances nothing without sglang's --enable-waterfill")
    try:
        config = Config.from_environment(os.environ)
    except ValueError as error:
        _stop([str(error)])
    if config.enabled and config.required and (reasons := _reasons_not_to_serve()):
        _stop(reasons)
    return from_cli_args(*args, **kwargs)
