"""Dummy weights that a model can run on: activations neither vanish nor overflow, and equal names hold equal bytes on every rank.

A shared expert has the same bytes whether it is a dense MLP or the last slot of its layer's experts, so that engines with
and without fusing compute with equal weights.
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


def fill(model: Any, *_: Any, **__: Any) -> None:
    """In place of sglang's ``initialize_dummy_weights``, whose FP8 weights are all zero or all tiny.

    Raises:
        ValueError: experts with more than one fused shared expert, which a dense MLP does not hold slot by slot.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in model.state_dict().items():
        if not torch.is_floating_point(weight):
            continue
        path, _, own = name.rpartition(".")
        fused = getattr(modules.get(path), FUSED, 0) or 0
        if fused and own.startswith(tuple(f"{stack}_" for stack in DENSE)):
            if fused > 1:
                raise ValueError(f"{path} has {fused} fused shared experts, and 1 can be filled")
            _seeded(name, weight.data[:-1])
            _seeded(_shared_name(path, own), weight.data[-1])
        else:
            _seeded(name, weight.data)


def _shared_name(path: str, own: str) -> str:
    """The name that the fused slot of ``experts.w13_weight`` has where it is not fused: ``shared_experts.gate_up_proj.weight``."""
    layer, _, _ = path.rpartition(".")
    stack, _, parameter = own.partition("_")
    return ".".join([*filter(None, [layer]), "shared_experts", DENSE[stack], parameter])


def _seeded(name: str, weight: torch.Tensor) -> None:
    random = torch.Generator(device=weight.device)
    random.manual_seed(zlib.crc32(name.encode()))
    # By expert: what one holds does not depend on how many follow.
    for part in weight if weight.dim() == 3 else [weight]:
        _fill(name, part, random)


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
