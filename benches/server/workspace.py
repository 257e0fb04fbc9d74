"""A folder that holds what engines read: the model, the plugin as an installed distribution, routing, and what each is told."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server import model
from server.control import Control
from server.modes import Plan
from server.plugin import VARIABLE

PLUGIN = "server_bench"
OUR_PREFIX = "WATERFILL_RS"
PORTS = 40
"""Between engines: sglang takes some after its port, and some after that + 233."""
FIRST_PORT, LAST_PORT = 31000, 60000


class Workspace:
    """``folder`` is made by the caller, and cleared by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._install()

    def _install(self) -> None:
        """``folder/site``: this package, and a distribution that names its plugin's entry point."""
        site = self.folder / "site"
        information = site / f"{PLUGIN}-0.dist-info"
        information.mkdir(parents=True)
        (site / "server").symlink_to(Path(__file__).resolve().parent, target_is_directory=True)
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n"
        )
        (information / "entry_points.txt").write_text(
            f"[sglang.srt.plugins]\n{PLUGIN} = server.plugin:register\n"
        )

    def write_model(self, name: str, config: Mapping[str, Any]) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    def told(
        self,
        name: str,
        plan: Plan,
        arguments: Mapping[str, Any],
        routing: Mapping[str, Any],
        locations: Sequence[str] = (),
    ) -> Path:
        """The file that an engine's processes read; ``routing``: ``routing``, ``placements``, ``longest``, the logical
        ``experts``, and ``layer_rows``. ``locations``: see ``redundant.locations``."""
        folder = self.folder / name
        folder.mkdir()
        control = folder / "control"
        Control(control, create=True)
        told = {
            "control": str(control),
            "folder": str(folder),
            "ranks": arguments["tp_size"],
            "vocabulary": model.VOCABULARY,
            "first_layer": model.DENSE_LAYERS,
            "mode": plan.modes[0],
            "switches": plan.switches,
            "upstream": plan.upstream,
            "locations": list(locations),
            "arguments": dict(arguments),
            **routing,
            "experts": routing["experts"] + arguments.get("ep_num_redundant_experts", 0),
        }
        path = folder / "told.json"
        path.write_text(json.dumps(told))
        return path

    def environment(
        self, plan: Plan, told: Path, given: Mapping[str, str], most_decode: int
    ) -> dict[str, str]:
        """The caller's, with the plugin. The package's own variables are in it where balancers are switched, and there
        and elsewhere those that the engine is made for."""
        environment = {
            name: value
            for name, value in given.items()
            if not (plan.as_shipped and name.startswith(OUR_PREFIX))
        } | plan.settings
        # Absolute: an engine runs in a folder of its own.
        paths = [
            os.path.abspath(path) for path in given.get("PYTHONPATH", "").split(os.pathsep) if path
        ]
        environment["PYTHONPATH"] = os.pathsep.join([str(self.folder / "site"), *paths])
        environment[VARIABLE] = str(told)
        environment["PYTHONUNBUFFERED"] = "1"
        # Several engines load at once, so that GPUs do not have equal memory left at every moment.
        environment.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
        if most_decode:
            environment.setdefault(
                "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", str(most_decode)
            )
        if listed := environment.get("SGLANG_PLUGINS", "").strip():
            environment["SGLANG_PLUGINS"] = f"{listed},{PLUGIN}"
        return environment


def command(told: Path) -> list[str]:
    """Starts an engine, but for the two descriptors."""
    return [sys.executable, "-m", "server.engine", str(told)]


def ports(count: int, first: int = FIRST_PORT) -> list[int]:
    """One an engine, so far apart that what sglang derives of them does not meet, and free now.

    Raises:
        RuntimeError: too few are free.
    """
    found = []
    for port in range(first, LAST_PORT, PORTS):
        # sglang's own, the rendezvous, and what follows these: see PortArgs.
        if all(_free(p) for p in (port, port + 20, *range(port + 233, port + 240))):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(
        f"{len(found)} of {count} ranges of ports are free between {first} and {LAST_PORT}"
    )


def _free(port: int) -> bool:
    with socket.socket() as end:
        try:
            end.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
