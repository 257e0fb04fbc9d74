"""At preparation: whether a model's layers can run their shared expert unfused, and what they do it with.

All layers of a model can, or none: and all ranks, or none.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill_rs.config import MACHINE_VARIABLE, Config
from waterfill_rs.machine import Machine
from waterfill_rs.sglang import compat, metrics, refusal, routed_groups
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang.overlap import Choice, OverlappedLayer
from waterfill_rs.sglang.prefill_rule import PrefillRule
from waterfill_rs.sglang.shared_expert import StaysFused, Unfused
from waterfill_rs.sglang.sizes import data_parallel_groups, most_tokens
from waterfill_rs.sglang_versions import Seams

if TYPE_CHECKING:
    import torch

    from waterfill_rs.sglang.peers import Peers

__all__ = ["Share", "against_arguments", "unfuse"]

_AS_ASKED = "fused, as asked"

Layer = tuple[Any, Any, Unfused]
"""sglang's MoE layer, its router, and its shared expert as a dense MLP."""


def against_arguments(arguments: Any, seams: Seams) -> list[str]:
    """What in the ``ServerArgs`` in force keeps shared experts fused."""
    reasons = compat.against_overlap(seams)
    if not resolve(seams.backend)().is_deepep():
        reasons.append(
            "the MoE layers do not run on deepep, whose dispatch would be beside the shared expert"
        )
    for name, text in _MODULES_CHANGE.items():
        if getattr(arguments, name, None):
            reasons.append(f"--{name.replace('_', '-')}: {text}")
    if "full" in str(getattr(arguments, "cuda_graph_backend_prefill", None)).lower():
        reasons.append(
            "--cuda-graph-backend-prefill full: a prefill is captured as a decode is, and cannot be told from it"
        )
    if resolve("sglang.srt.environ.envs").SGLANG_SCHEDULER_SKIP_ALL_GATHER.get():
        reasons.append("SGLANG_SCHEDULER_SKIP_ALL_GATHER: ranks don't tell each other who prefills")
    if (
        getattr(arguments, "offload_group_size", -1) > 0
        or getattr(arguments, "cpu_offload_gb", 0) > 0
    ):
        reasons.append(
            "experts' weights are offloaded, and not always where the shared expert would read them"
        )
    return reasons


_MODULES_CHANGE = {
    "enable_lora": "adapters replace the layers that a shared expert is made of",
    "lora_paths": "adapters replace the layers that a shared expert is made of",
    "enable_torch_compile": "a compiled model keeps one form of its layers",
}


def layers_of(model: Any, routers: Sequence[Any], seams: Seams) -> list[tuple[str, Any, Any]]:
    """Name, MoE layer and router, in the model's order.

    Raises:
        StaysFused: a router belongs to no layer that we know.
    """
    kind, left = resolve(seams.moe), {id(router) for router in routers}
    found = []
    for name, module in model.named_modules():
        router = getattr(module, "topk", None) if isinstance(module, kind) else None
        if id(router) in left:
            left.discard(id(router))
            found.append((name, module, router))
    if left:
        raise StaysFused(f"{len(left)} of {len(routers)} MoE layers are no {kind.__name__}")
    return found


def unfuse(
    model: Any, routers: Sequence[Any], seams: Seams, dtype: torch.dtype | None
) -> list[Layer]:
    """Each layer's shared expert as a dense MLP; nothing of sglang's is changed yet.

    Args:
        dtype: the model's, in which activations are; torch's default if None.

    Raises:
        StaysFused: one layer's cannot be, and why.
    """
    layers = []
    for name, moe, router in layers_of(model, routers, seams):
        if "forward" in vars(moe):
            raise StaysFused(f"{name} has a forward of its own: another plugin's")
        try:
            layers.append((moe, router, Unfused(moe, name, dtype, seams)))
        except StaysFused as error:
            raise StaysFused(f"{name}: {error}") from error
        except Exception as error:  # A sglang that is unlike those we know ends no server by it.
            raise StaysFused(f"{name}: {error!r}") from error
    return layers


def _deep_gemm() -> Any:
    """sglang's module of DeepGEMM; None where it has another name, or cannot be imported: GEMMs stay as they are."""
    try:
        return importlib.import_module("sglang.srt.layers.deep_gemm_wrapper")
    except Exception:  # Of sglang's, and it need not end a server that serves without.
        return None


class Share:
    """Where one model's shared experts run."""

    def __init__(self, seams: Seams, config: Config, arguments: Any) -> None:
        self._seams, self._config, self._arguments = seams, config, arguments

    def decide(
        self,
        model: Any,
        routers: Sequence[Any],
        dtype: torch.dtype | None,
        device: torch.device,
        peers: Peers | None,
    ) -> str:
        """Set the layers up as configured, all ranks alike, and tell in words how.

        Raises:
            SystemExit: overlap was asked for by name and cannot be.
        """
        layers, reasons = self._layers(model, routers, dtype)
        machine, wrong = self._machine(layers, device)
        ranks = getattr(routers[0], self._seams.holder).world_size
        asked = self._config.shared == "overlap"
        rule = PrefillRule(asked, ranks, most_tokens(self._arguments, ranks), machine)
        reasons = wrong + reasons
        if peers is not None:
            reasons = peers.agree(reasons, "shared", rule.text)
        if self._config.shared == "fused":
            return _AS_ASKED
        if wrong:
            refusal.stop(wrong)
        if reasons and asked:
            refusal.stop([f"shared experts cannot run beside dispatch: {r}" for r in reasons])
        if reasons:
            return f"fused in every batch, because {'; '.join(reasons)}"
        choice = Choice(self._seams, ranks, data_parallel_groups(self._arguments), rule)
        metrics.watch_shared(choice.tally)
        if (wrapper := _deep_gemm()) is not None:
            routed_groups.install(wrapper)
        for moe, router, unfused in layers:
            getattr(router, self._seams.holder).overlap = OverlappedLayer(moe, unfused, choice)
        return f"beside dispatch in decode, {rule.text}"

    def _machine(
        self, layers: list[Layer], device: torch.device
    ) -> tuple[Machine | None, list[str]]:
        """The figures that ``auto`` goes by, or why they cannot be those of this machine and model."""
        path = self._config.machine
        if path is None or self._config.shared != "auto" or not layers:
            return None, []
        try:
            machine = Machine.load(Path(path))
        except (OSError, ValueError) as error:
            return None, [f"{MACHINE_VARIABLE}={path}: {error}"]
        return machine, [
            f"{MACHINE_VARIABLE}={path}: {text}" for text in _unlike(machine, layers, device)
        ]

    def _layers(
        self, model: Any, routers: Sequence[Any], dtype: torch.dtype | None
    ) -> tuple[list[Layer], list[str]]:
        if self._config.shared == "fused":
            # A reason like others: ranks that were not asked so must not wait for this one.
            return [], [_AS_ASKED]
        if reasons := against_arguments(self._arguments, self._seams):
            return [], reasons
        try:
            return unfuse(model, routers, self._seams, dtype), []
        except StaysFused as error:
            return [], [str(error)]


def _unlike(machine: Machine, layers: list[Layer], device: torch.device) -> list[str]:
    """In what the figures are of another GPU, or of other experts than the model's."""
    import torch

    config, unlike = layers[0][0].config, []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.name
    if machine.name != name:
        unlike.append(
            f"it is of {machine.name}, and this is {name}: run waterfill-rs calibrate here"
        )
    shape = config.hidden_size, config.moe_intermediate_size
    if machine.shape != shape:
        unlike.append(
            f"it is of experts of {machine.shape}, (hidden, intermediate), and the model's are {shape}: run "
            f"waterfill-rs calibrate --hidden {shape[0]} --intermediate {shape[1]}"
        )
    return unlike
