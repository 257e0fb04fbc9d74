"""Dummy weights that a model can run on: activations neither vanish nor overflow, and equal names hold equal bytes on every rank.

A routed expert's bytes depend on its layer and its logical id. So an expert's replicas are equal, the experts of two ranks are
not, and engines are one model wherever their experts stand. A shared expert has the same bytes whether it is a dense MLP or
the last slot of its layer's experts, so that engines with and without fusing compute with equal weights.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

SCALE = 0.04
"""FP8 weights are uniform in (-1, 1), and this is their blocks' scale; others are uniform in the product's range."""
FUSED = "num_fused_shared_experts"
"""Attribute of sglang's experts: how many slots of each stack are shared experts, the last ones."""
DENSE = {"w13": "gate_up_proj", "w2": "down_proj"}
"""A stack of experts: the linear layer of a dense MLP that holds the same."""


def fill(model: Any, maps: torch.Tensor | None = None) -> None:
    """In place of sglang's ``initialize_dummy_weights``, whose FP8 weights are all zero or all tiny.

    Args:
        maps: sglang's ``physical_to_logical_map`` ``[L, P]``: the logical expert of each physical one.

    Raises:
        ValueError: experts with more than one fused shared expert, which a dense MLP does not hold slot by slot.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in model.state_dict().items():
        if not torch.is_floating_point(weight):
            continue
        path, _, own = name.rpartition(".")
        module = modules.get(path)
        if hasattr(module, FUSED) and own.startswith(tuple(f"{stack}_" for stack in DENSE)):
            _fill_experts(module, path, own, weight.data, maps)
        else:
            _fill(name, weight.data, _random(name, weight))


def _fill_experts(
    experts: Any, path: str, own: str, weight: torch.Tensor, maps: torch.Tensor | None
) -> None:
    """``weight``: by slot, routed experts first."""
    fused = getattr(experts, FUSED) or 0
    if fused > 1:
        raise ValueError(f"{path} has {fused} fused shared experts, and 1 can be filled")
    name = f"{path}.{own}"
    for slot, expert in enumerate(_logical(experts, len(weight) - fused, maps)):
        _fill(name, weight[slot], _random(f"{name}[{expert}]", weight))
    if fused:
        shared = _shared_name(path, own)
        _fill(shared, weight[-1], _random(shared, weight))


def _logical(experts: Any, slots: int, maps: torch.Tensor | None) -> list[int]:
    """The logical experts of this rank's routed slots; the physical ones where no map has as many, a draft model's for one."""
    first = experts.moe_ep_rank * slots
    own = range(first, first + slots)
    layer = experts.layer_id
    if maps is None or layer >= len(maps) or maps.shape[1] != slots * experts.moe_ep_size:
        return list(own)
    return [int(maps[layer, physical]) for physical in own]


def _shared_name(path: str, own: str) -> str:
    """The name that the fused slot of ``experts.w13_weight`` has where it is not fused: ``shared_experts.gate_up_proj.weight``."""
    layer, _, _ = path.rpartition(".")
    stack, _, parameter = own.partition("_")
    return ".".join([*filter(None, [layer]), "shared_experts", DENSE[stack], parameter])


def _random(seed: str, weight: torch.Tensor) -> torch.Generator:
    random = torch.Generator(device=weight.device)
    random.manual_seed(zlib.crc32(seed.encode()))
    return random


def _fill(name: str, weight: torch.Tensor, random: torch.Generator) -> None:
    if name.endswith("norm.weight"):
        weight.fill_(1.0)
    elif "weight_scale" in name:
        weight.fill_(SCALE)
    elif "scale" in name:
        weight.fill_(1.0)
    elif "correction_bias" in name:
        weight.uniform_(-0.1, 0.1, generator=random)
    elif weight.element_size() == 1:
        wide = torch.empty(weight.shape, device=weight.device, dtype=torch.float16)
        weight.copy_(wide.uniform_(-1, 1, generator=random).to(weight.dtype))
    elif "embed" in name:
        weight.normal_(0, 1, generator=random)
    elif ".gate." in name:
        weight.normal_(0, 0.02, generator=random)
    else:
        weight.uniform_(-SCALE, SCALE, generator=random)
