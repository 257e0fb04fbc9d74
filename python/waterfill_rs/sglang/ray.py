"""Ray: sglang's scheduler actors load no plugins, and their variables are those of the node they are on.

What an actor is given first are the server's ``ServerArgs``. So where actors can be made, a pickle of those also
loads the plugins, under the settings of the process that made the pickle. All other pickles stay as they are.
"""

from __future__ import annotations

import copyreg
import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

from waterfill_rs.config import BACKEND_VARIABLE, Config
from waterfill_rs.sglang import refusal, registration

__all__ = ["against_actors", "can_make_actors", "load_in_actors"]

ACTORS = "sglang.srt.ray.scheduler_actor"
_SELECTED = "SGLANG_PLUGINS"
"""sglang's: which plugins load. In an actor they are to be those of the server."""


def can_make_actors() -> bool:
    """sglang imports this module, and Ray with it, only to make actors."""
    return ACTORS in sys.modules


def load_in_actors(server_args: type) -> None:
    """From now on, an actor that is sent a pickle of ``server_args``, sglang's class, loads waterfill-rs when it reads it."""
    copyreg.pickle(server_args, _reduced)


def against_actors() -> list[str]:
    """Why sglang's actors would not load us, if they wouldn't. Imports Ray."""
    try:
        module = importlib.import_module(ACTORS)
    except ImportError:
        return []  # sglang can make none then, and says so.
    # Ray makes of sglang's class an object of a class derived from it, whose own __init__ takes anything.
    bases = type(getattr(module, "SchedulerActor", None)).__mro__
    makers = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]
    if any("server_args" in inspect.signature(make).parameters for make in makers):
        return []
    return [
        f"--use-ray: {ACTORS}.SchedulerActor takes no server_args, which would load waterfill-rs"
    ]


def _reduced(arguments: Any) -> tuple[Any, ...]:
    """For pickle: the server's arguments as they reduce themselves, made by ``_made_in_actor`` where actors are made."""
    make, given, *state = arguments.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    if can_make_actors() and Config.from_environment(os.environ).enabled:
        make, given = _made_in_actor, (_settings(os.environ), make, given)
    return (make, given, *state)


def _made_in_actor(
    settings: dict[str, str], make: Callable[..., Any], given: tuple[Any, ...]
) -> Any:
    """Make what such a pickle is of, in an actor and before its scheduler is imported: first settings and plugins."""
    for name in _settings(os.environ).keys() - settings.keys():
        del os.environ[name]
    os.environ.update(settings)
    _load_plugins()
    return make(*given)


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    """All of our variables that are set, whose names begin with that of the first, and sglang's choice of plugins."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(BACKEND_VARIABLE) or name == _SELECTED
    }


def _load_plugins() -> None:
    """As every other process of the server does, once.

    Raises:
        SystemExit: we are required and cannot serve, or are no plugin here. Ray shows the server why its actor ended.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if not registration.is_registered():
        # Whether required or not: a rank that is balanced by another rule spoils the plans of its peers.
        refusal.stop(
            [
                "waterfill-rs is on in the server, and not installed on this node: install it here too"
            ]
        )
