"""Which tensors are taken, and where CPU tensors are in memory, once they are checked.

Errors are ``ValueError`` with the tensor's name and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ID_BITS", "WEIGHT_BITS", "check", "ids_at", "weights_at"]

ID_BITS = {torch.int32: 32, torch.int64: 64}
WEIGHT_BITS = {torch.float32: 32, torch.bfloat16: 16}


def ids_at(topk_ids: Tensor) -> tuple[int, int, int, int]:
    """Address, rows, top-k and bits of ids ``[N, K]`` on the CPU."""
    if topk_ids.dim() != 2 or topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}: give [N, K], K at least 1")
    rows, top_k = topk_ids.shape
    check("topk_ids", topk_ids, ID_BITS, (rows, top_k))
    return topk_ids.data_ptr(), rows, top_k, ID_BITS[topk_ids.dtype]


def weights_at(topk_weights: Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
    """Address and bits of weights of this shape on the CPU."""
    check("topk_weights", topk_weights, WEIGHT_BITS, shape)
    return topk_weights.data_ptr(), WEIGHT_BITS[topk_weights.dtype]


def check(
    name: str, tensor: Tensor, dtypes: Mapping[torch.dtype, int], shape: tuple[int, ...]
) -> None:
    """The tensor is on the CPU, of one of these dtypes and of this shape, and contiguous."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: give a CPU tensor")
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}: give {known}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: call .contiguous() first")
