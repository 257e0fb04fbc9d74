"""The entry point ``sglang.srt.plugins``: which of sglang's names are hooked, and what happens if they can't be.

sglang logs and swallows a plugin's exceptions, so nothing here relies on raising them: what keeps this
package from serving is collected, and told in one warning, or ends the server where it was required.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

from waterfill_rs.config import (
    BACKEND_VARIABLE,
    BACKENDS,
    EXCHANGE_VARIABLE,
    MACHINE_VARIABLE,
    PACES,
    PLANNER_VARIABLE,
    REPLICAS,
    REPLICAS_VARIABLE,
    REQUIRE_VARIABLE,
    SHARED,
    SHARED_VARIABLE,
    TIMEOUT_VARIABLE,
    Config,
    backend_named,
    named,
)
from waterfill_rs.exchange.settings import CHOICES
from waterfill_rs.placement.trivial import TRIVIAL
from waterfill_rs.sglang import compat, eligibility, metrics, ray, refusal, registration
from waterfill_rs.sglang.panics import panics_are_errors
from waterfill_rs.sglang_versions import ROWS, Seams

__all__ = ["hooked", "register"]

logger = logging.getLogger(__name__)

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"

hooked: dict[str, type] = {}
"""The classes that this process was asked to replace, by sglang's name: ours. Empty where we are off."""

_failure: list[str] = []
"""What went wrong in ``register``, if anything did."""


def register() -> None:
    """Called by sglang in every process that loads plugins; a second call does nothing."""
    if registration.is_registered():
        return
    registration.take_note()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{SERVER_ARGS}.add_cli_args", _add_flags, HookType.AFTER)
    HookRegistry.register(f"{SERVER_ARGS}.from_cli_args", _flags_to_environment, HookType.AROUND)
    try:
        config = Config.from_environment(os.environ)
    except ValueError as error:
        refusal.stop([str(error)])
    if not config.enabled:
        return
    ray.load_in_actors(compat.resolve(SERVER_ARGS))
    metrics.install()
    try:
        if seams := compat.find()[0]:
            _enter(seams)
    except Exception as error:
        _failure.append(f"the plugin failed: {error!r}")
    strange = _against_entering()
    if config.required and (reasons := strange + eligibility.against_machine()):
        refusal.stop(reasons)
    if strange:
        _tell_only(strange)
    if ray.can_make_actors() and (reasons := ray.against_actors()):
        refusal.stand_aside(config, reasons)


def _against_entering() -> list[str]:
    """Why this sglang cannot be hooked, if it can't."""
    return _failure or compat.find()[1]


@panics_are_errors
def _enter(seams: Seams) -> None:
    """Hook what Waterfill is made of. Whether we serve is decided where a model is prepared.

    Everything that may fail comes before the first hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from waterfill_rs.sglang import recorder
    from waterfill_rs.sglang.mega_moe import post_without_rows
    from waterfill_rs.sglang.preparation import Preparation
    from waterfill_rs.sglang.primaries_first import PrimariesFirst
    from waterfill_rs.sglang.replicas import follow_update
    from waterfill_rs.sglang.spread_places import SpreadPlaces

    ours = _replacements(seams)
    originals = {name: compat.resolve(name) for name in ours}
    replaced = ours | recorder.replacements(seams)
    around: dict[str, Callable[..., Any]] = {
        seams.prepare: Preparation(seams, ours, originals).hook,
        f"{seams.gatherers}._SinglePassGatherer.init_new": recorder.gatherer_of_auto(seams),
    }
    before: dict[str, Callable[..., Any]] = {}
    if not compat.against_order(seams):
        order = PrimariesFirst(seams)
        around[seams.location_init] = order.hook
        around[seams.location_by_eplb] = order.with_counts
        around[seams.slots_in] = order.refuse_tensors_of_slots
        if not compat.against_places(seams):
            around[seams.location_trivial] = SpreadPlaces(seams, order).hook
        before.update(dict.fromkeys(seams.slots_out, order.refuse_slots))
    if seams.mega_moe and not compat.against_posting(seams):
        before[seams.mega_moe] = post_without_rows(seams)
    follows = not compat.against_replicas(seams)
    hooked.update(replaced)
    for name, replacement in replaced.items():
        HookRegistry.register(name, replacement, HookType.REPLACE)
    for name, hook in around.items():
        HookRegistry.register(name, hook, HookType.AROUND)
    if follows:
        HookRegistry.register(seams.location_update, follow_update, HookType.AFTER)
    for name, hook in before.items():
        HookRegistry.register(name, hook, HookType.BEFORE)


def _replacements(seams: Seams) -> dict[str, type]:
    """Our balancer and our hash router; to be asked for before sglang's are replaced."""
    from waterfill_rs.sglang.balancer import balancer_of
    from waterfill_rs.sglang.hash_topk import hash_topk

    ours: dict[str, type] = {seams.balancer: balancer_of(seams)}
    if name := seams.hash_topk:
        ours[name] = hash_topk(seams, compat.resolve(name), compat.resolve(seams.balancer))
    return ours


def _tell_only(reasons: list[str]) -> None:
    """Where this sglang prepares routers in a way we know of, have it say why we are off."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from waterfill_rs.sglang.preparation import tell_at_preparation

    for name in {row.prepare for row in ROWS}:
        try:
            compat.resolve(name)
        except (ImportError, AttributeError):
            continue
        HookRegistry.register(name, tell_at_preparation(reasons), HookType.AROUND)


_VALUES = {
    "waterfill_rs": (
        BACKEND_VARIABLE,
        "Who balances the shared experts where Waterfill is on; 'rust' stops the server if waterfill-rs cannot",
    ),
    "waterfill_rs_exchange": (EXCHANGE_VARIABLE, "How ranks learn each other's counts"),
    "waterfill_rs_shared": (
        SHARED_VARIABLE,
        "Where shared experts run: 'overlap', unfused beside dispatch; 'fused', with the routed ones; 'auto', as is "
        "faster for each batch",
    ),
    "waterfill_rs_replicas": (
        REPLICAS_VARIABLE,
        "Who chooses replicas of redundant experts: 'live', plans from live counts in every batch, or the server stops; "
        "'sglang'; 'auto', live plans in prefill and one replica of each expert in decode, where they can be had",
    ),
    "waterfill_rs_machine": (
        MACHINE_VARIABLE,
        "File that waterfill-rs calibrate wrote on this machine: what 'auto' goes by in prefill",
    ),
    "waterfill_rs_planner": (
        PLANNER_VARIABLE,
        f"Who plans at the board: {', '.join(PACES)}, or spin:CORE to pin the thread",
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
    "waterfill_rs_shared": SHARED,
    "waterfill_rs_replicas": REPLICAS,
}


def _add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("waterfill-rs")
    for name, (variable, text) in _VALUES.items():
        flag = "--" + name.replace("_", "-")
        choices = _CHOICES.get(name)
        read = backend_named if variable == BACKEND_VARIABLE else named if choices else str
        group.add_argument(flag, type=read, choices=choices, help=f"{text} (sets {variable}).")
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
    try:
        config = Config.from_environment(os.environ)
    except ValueError as error:
        refusal.stop([str(error)])
    if config.enabled:
        ray.load_in_actors(compat.resolve(SERVER_ARGS))
        _judge(config, parsed)
        _have_ids_mapped(parsed)
    elif config.required:
        logger.warning(
            "waterfill-rs was required, and balances nothing with %s=%s",
            BACKEND_VARIABLE,
            config.backend,
        )
    return from_cli_args(*args, **kwargs)


def _judge(config: Config, parsed: Any) -> None:
    """What can be said when the server's flags are read, before a model is loaded."""
    reasons = _against_entering() + eligibility.against_machine()
    if getattr(parsed, "use_ray", False):
        reasons += ray.against_actors()
    asked = any(getattr(parsed, row.switch, False) for row in ROWS)
    if reasons and (asked or config.required):
        refusal.stand_aside(config, reasons)
    elif config.required and not asked:
        flag = (compat.find()[0] or ROWS[0]).flag
        logger.warning("waterfill-rs was required, and balances nothing without sglang's %s", flag)


def _have_ids_mapped(parsed: Any) -> None:
    """Redundant experts without a placement: have sglang map ids, as it does by itself for any placement but the trivial one.

    Else it takes logical ids for physical ones, and the trivial places have to stay.
    """
    from waterfill_rs.sglang import spread_places

    seams, _ = compat.find()
    if (
        seams is None
        or _against_entering()
        or not getattr(parsed, "ep_num_redundant_experts", 0)
        or getattr(parsed, "init_expert_location", None) != TRIVIAL
        or getattr(parsed, spread_places.DISPATCH, "") is not None
        or spread_places.against_arguments(parsed, seams)
    ):
        return
    setattr(parsed, spread_places.DISPATCH, "static")
    logger.warning(
        "waterfill-rs: --ep-dispatch-algorithm is set to static, as sglang does for a placement, so that redundant experts can be "
        "spread over the ranks"
    )
