"""The plugin that each process of an engine loads: routing and weights are ours, forwards are timed, balancers can be switched.

It does nothing where the driver's variable is not set.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from server import moving, weights
from server.control import Control
from server.forced import Forced
from server.gate import Gate
from server.layers import Layers
from server.rank import Rank
from server.switch import Switch, own_exchange

VARIABLE = "SERVER_BENCH_ENGINE"
"""Path of a JSON file: what the driver tells the processes of this engine."""


def register() -> None:
    """sglang's entry point."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from waterfill_rs import sglang
    from waterfill_rs.sglang import compat

    # Hooks wrap each other in the order of registration. Ours are to see a model that the package has prepared.
    sglang.register()
    told = json.loads(Path(path).read_text())
    seams, strange = compat.find()
    if seams is None:
        raise SystemExit(f"the bench knows this sglang as little as waterfill-rs does: {strange}")
    bench = Bench(told, seams, compat.resolve(seams.balancer))
    for target, hook, kind in (
        ("sglang.srt.model_loader.loader.initialize_dummy_weights", bench.load, HookType.REPLACE),
        ("sglang.srt.layers.moe.topk._post_process_topk_ids", bench.choose, HookType.AROUND),
        (seams.prepare, bench.prepared, HookType.AFTER),
        (
            "sglang.srt.model_executor.model_runner.ModelRunner.forward",
            bench.rank.forward,
            HookType.AROUND,
        ),
        (
            "sglang.srt.managers.scheduler.Scheduler.run_batch",
            bench.rank.before_forward,
            HookType.BEFORE,
        ),
        (
            "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
            bench.turn,
            HookType.AROUND,
        ),
        (
            "sglang.srt.eplb.expert_location.ExpertLocationMetadata.update",
            bench.rank.count_rebalance,
            HookType.AFTER,
        ),
    ):
        HookRegistry.register(target, hook, kind)


class Bench:
    """One process. ``told``: ``control``, ``folder``, ``routing``, ``placements``, ``longest``, ``ranks``, ``first_layer``,
    ``experts`` (physical ones), ``mode`` (of graphs), ``switches`` (are balancers replaced?), ``upstream`` (are they to be
    sglang's own?), ``layer_rows`` (of a forward whose layers' outputs are compared, or 0), ``locations`` (of experts: see
    ``redundant.locations``)."""

    def __init__(self, told: dict[str, Any], seams: Any, theirs: type) -> None:
        self.told, self._seams, self._theirs = told, seams, theirs
        self.rank = Rank(
            Control(Path(told["control"])),
            Path(told["folder"]),
            told["experts"],
            told["ranks"],
            move=self._move,
        )
        self.rank.mode, self.rank.switches = told["mode"], told["switches"]
        self._gate = Gate(self.rank.control, lambda: max(0, self.rank.number), told["ranks"])
        self._made: dict[str, Any] = {}

    def load(self, model: Any, *_: Any, **__: Any) -> None:
        """Weights, and with them the routing: before sglang measures what memory is left."""
        import torch

        weights.fill(model, _map_of_experts())
        # One node, and a process for each rank: all groups number them alike.
        self.rank.number = torch.distributed.get_rank()
        self.rank.forced = Forced.load(
            Path(self.told["routing"]),
            self.rank.number,
            self.told["placements"],
            self.told["longest"],
            torch.device("cuda", torch.cuda.current_device()),
        )
        if rows := self.told.get("layer_rows"):
            device = torch.device("cuda", torch.cuda.current_device())
            modules = model.modules()
            self.rank.layers = Layers(
                modules, model.config.hidden_size, rows, self.rank.number, device
            )

    def choose(self, original: Any, **given: Any) -> Any:
        """Around what sglang does with the router's logical ids: it chooses a replica for each, and masks padding.

        Logical ids are forced before it, so that its choice of replicas acts, in captured graphs too.
        """
        layer = given["layer_id"]
        if layer is not None and self.rank.forced is not None and given["topk_ids"].shape[0]:
            ids = self.rank.forced.into(given["topk_ids"], layer - self.told["first_layer"])
            given["topk_ids"] = ids
        chosen = original(**given)
        self.rank.count_chosen(layer, chosen[0])
        return chosen

    def prepared(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """After the preparation of a model's routers: what is ours is known, and may be switched."""
        model = kwargs["model"] if "model" in kwargs else args[0].model
        held = (getattr(module, self._seams.holder, None) for module in model.modules())
        balancers = [balancer for balancer in held if balancer is not None]
        ours = [b for b in balancers if type(b).__module__.startswith("waterfill_rs")]
        wrong = len(ours) if self.told["upstream"] else len(balancers) - len(ours)
        if wrong:
            whose = "sglang's own" if self.told["upstream"] else "of waterfill-rs"
            raise SystemExit(f"{wrong} layers' balancers are not {whose}: see the log above")
        self.rank.balancers = balancers
        if self.told["switches"]:
            own = own_exchange(self._made)
            for balancer in ours:
                balancer.expand_topk = Switch(
                    balancer, self._theirs, self._seams.weight, lambda: self.rank.mode, own
                )
        self.rank.prepared()
        print(
            f"server bench: {len(balancers)} balancers, {len(ours)} of waterfill-rs, switched: {self.told['switches']}",
            flush=True,
        )
        return result

    def _move(self, runner: Any, location: int) -> None:
        moving.move(runner, self.told["locations"][location], self.rank.number, self.told["ranks"])

    def turn(self, original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Around each turn of the scheduler."""
        self.rank.write_if_asked()
        return self._gate.hook(original, scheduler, *args, **kwargs)


def _map_of_experts() -> Any:
    """sglang's ``[L, P]``, the logical expert of each physical one, which is there before any model; None where it has none."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    found = get_global_expert_location_metadata()
    return None if found is None else found.physical_to_logical_map.cpu()
