"""The same inputs for every MoE layer in every engine, and what each layer makes of them.

A model's outputs differ after a few tokens, because an engine's own rounding differs from run to run. A layer's outputs of given
inputs do not run apart, so a row that a wrong expert computed shows. Captured graphs read the flag that turns this on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

NAME = "DeepseekV2MoE"


class Layers:
    """One rank's MoE layers. It is made before any graph, whose replays write what it holds.

    Args:
        modules: of the model; those that are no MoE layers are left out.
        hidden: the model's hidden size.
        rows: the most of a forward; a longer one is left alone.
        rank: another one has other inputs.
    """

    def __init__(
        self,
        modules: Iterable[Any],
        hidden: int,
        rows: int,
        rank: int,
        device: Any,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        layers = [module for module in modules if type(module).__name__ == NAME]
        self._rows = rows
        self._flag = torch.zeros((), dtype=torch.bool, device=device)
        shape = (len(layers), rows, hidden)
        random = torch.Generator(device=device)
        random.manual_seed(rank)
        self._inputs = torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)
        self._outputs = torch.zeros(shape, dtype=dtype, device=device)
        # Hooks of the modules: waterfill-rs unfuses no layer whose class has a method that another plugin hooks.
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._giving(place))
            layer.register_forward_hook(self._keeping(place))

    def force(self, on: bool) -> None:
        """From the next forward on; does not wait for the device."""
        self._flag.fill_(on)

    def _giving(self, place: int) -> Callable[..., Any]:
        def give(_: Any, arguments: tuple[Any, ...]) -> Any:
            hidden_states, *others = arguments
            rows = len(hidden_states)
            if not 0 < rows <= self._rows:
                return None
            inputs = self._inputs[place, :rows]
            return torch.where(self._flag, inputs, hidden_states), *others

        return give

    def _keeping(self, place: int) -> Callable[..., Any]:
        def keep(_: Any, __: tuple[Any, ...], made: Any) -> None:
            if 0 < len(made) <= self._rows:
                self._outputs[place, : len(made)].copy_(made)

        return keep

    def take(self, rows: int) -> np.ndarray:
        """The last forward's outputs of its first rows: float32 ``[layers, rows, hidden]``. Waits for the device."""
        return self._outputs[:, :rows].float().cpu().numpy()
