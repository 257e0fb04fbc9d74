"""Counts and maps as whole numbers, however they were written: tensors of any number type, nested lists, floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_range", "read"]

_MOST_ROWS = 2**32 - 1
"""Of one layer, over all ranks: the core's counts are 32 bits wide."""

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.int64,
)


def read(
    name: str, found: Any, dimensions: tuple[int, ...], shapes: str, *, may_be_empty: bool = False
) -> Tensor:
    """``found`` as a dense int64 tensor of one of these numbers of dimensions, none of them empty.

    Args:
        name: file and field, for the error.
        shapes: what sglang writes, for the error: ``[L, E] or [steps, L, E]``.
        may_be_empty: dimensions between the first and the last may be, as of a rank without tokens.

    Raises:
        ValueError: if it is no array of whole numbers, or of another shape; with the first number that is not whole.
    """
    values = found if isinstance(found, Tensor) else _of_lists(name, found)
    needed = (values.shape[:1] + values.shape[-1:]) if may_be_empty else values.shape
    if (
        values.layout != torch.strided
        or values.is_quantized
        or values.is_complex()
        or values.dtype == torch.bool
        or values.dim() not in dimensions
        or 0 in needed
        or values.is_meta
    ):
        kind = f"{'a meta tensor of ' * values.is_meta}{values.dtype} {list(values.shape)}"
        raise ValueError(f"{name} is {kind}: integers {shapes} are what sglang writes")
    if values.dtype in _INTEGERS:
        return values.to(torch.int64)
    return _of_floats(name, values.to(torch.float64))


def _of_lists(name: str, found: Any) -> Tensor:
    if not isinstance(found, (list, tuple)):
        raise ValueError(
            f"{name} is no array of integers, but {type(found).__name__} {found!r:.40}"
        )
    try:
        plain = _plain(found)
        values = torch.tensor(plain)
        # torch makes float32 of Python's floats, which is exact only up to 2^24.
        return torch.tensor(plain, dtype=torch.float64) if values.is_floating_point() else values
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{name} is no array of integers ({error})") from error


def _plain(found: Any) -> Any:
    """Lists of tensors as lists of lists."""
    if isinstance(found, Tensor):
        return found.tolist()
    if isinstance(found, (list, tuple)) and any(
        isinstance(part, (list, tuple, Tensor)) for part in found[:1]
    ):
        return [_plain(part) for part in found]
    return found


def _of_floats(name: str, values: Tensor) -> Tensor:
    odd = (~values.isfinite() | (values != values.round())).nonzero()
    if len(odd):
        where = odd[0].tolist()
        raise ValueError(
            f"{name}{where} is {values[tuple(where)].item()}: give whole numbers, as counts and experts are"
        )
    if not values.numel():
        return values.to(torch.int64)
    # Beyond these an int64 might not hold them.
    for value in (values.min().item(), values.max().item()):
        if abs(value) > 2**62:
            raise ValueError(_out_of_range(name, f"{value:g}"))
    return values.to(torch.int64)


def check_range(name: str, counts: Tensor) -> None:
    """No count below zero; none, and no layer's sum over experts, of 2^32 or more.

    Raises:
        ValueError: with the number that is out of range.
    """
    least, most = int(counts.min()), int(counts.max())
    if least >= 0 and most <= _MOST_ROWS:
        least, most = 0, int(counts.sum(dim=-1, dtype=torch.int64).max())
    if least < 0 or most > _MOST_ROWS:
        raise ValueError(_out_of_range(name, str(least if least < 0 else most)))


def _out_of_range(name: str, rows: str) -> str:
    return f"{name} has {rows} rows in a layer: 0 to {_MOST_ROWS} are supported"
