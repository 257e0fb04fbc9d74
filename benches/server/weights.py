"""Dummy weights that a model can run on: activations neither vanish nor overflow, and equal names hold equal bytes on every rank."""

from __future__ import annotations

import zlib
from typing import Any

import torch

SCALE = 0.04
"""FP8 weights are uniform in (-1, 1), and this is their blocks' scale; others are uniform in the product's range."""


def fill(model: Any, *_: Any, **__: Any) -> None:
    """In place of sglang's ``initialize_dummy_weights``, whose FP8 weights are all zero or all tiny."""
    for name, weight in model.state_dict().items():
        if torch.is_floating_point(weight):
            random = torch.Generator(device=weight.device)
            random.manual_seed(zlib.crc32(name.encode()))
            _fill(name, weight.data, random)


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
        # By expert: the wider numbers beside them are gone before the next's are made.
        for part in weight if weight.dim() == 3 else [weight]:
            wide = torch.empty(part.shape, device=part.device, dtype=torch.float16)
            part.copy_(wide.uniform_(-1, 1, generator=random).to(part.dtype))
    elif "embed" in name:
        weight.normal_(0, 1, generator=random)
    elif ".gate." in name:
        weight.normal_(0, 0.02, generator=random)
    else:
        weight.uniform_(-SCALE, SCALE, generator=random)
