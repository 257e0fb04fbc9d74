"""A fused shared expert as a dense MLP of the model's own class: its parameters are views of the fused slot's weights."""

from __future__ import annotations

import inspect
from typing import Any

from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang_versions import Seams

__all__ = ["StaysFused", "Unfused"]

_STACKS = {"gate_up_proj": "w13", "down_proj": "w2"}
"""A dense MLP's linear layers: the prefix of the experts' stacked parameters that hold the same."""
_VIEWABLE = {
    ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod"),
    ("Fp8LinearMethod", "Fp8MoEMethod"),
}
"""Quantization methods, dense and of experts, between which an expert's weights are laid out alike."""
_REARRANGES = ("load_up_proj_weight_first", "use_flashinfer_trtllm_moe", "use_triton_kernels")
"""Attributes of an experts' method, true where it orders a stack in another way than a dense layer does."""
HOPPER = (9, 0)


class StaysFused(Exception):
    """Why a layer's shared expert has no form as a dense MLP."""


class Unfused:
    """One MoE layer's ``mlp``, of the model's class. It owns nothing: memory is that of the fused slot.

    Args:
        moe: sglang's MoE layer, its weights loaded and processed.
        prefix: the layer's name in the model, by which a quantization knows its parts.
        dtype: the model's, in which activations are; torch's default if None.

    Raises:
        StaysFused: the slot cannot be read as the dense MLP's weights, and why.
    """

    def __init__(self, moe: Any, prefix: str, dtype: Any, seams: Seams) -> None:
        self._experts = moe.experts
        self._slot = moe.experts.num_local_experts - 1
        self.mlp = _on_no_device(moe, f"{prefix}.shared_experts", dtype, seams)
        self._bound: list[tuple[str, int]] = []
        _check_formats(self.mlp, self._experts)
        self._bind()

    def follow(self) -> None:
        """Take new weights over, if sglang put others in the place of those that it had.

        Raises:
            StaysFused: the new ones are laid out in another way.
        """
        stacks = self._experts._parameters
        for name, address in self._bound:
            if stacks[name].data_ptr() != address:
                return self._bind()

    def _bind(self) -> None:
        import torch

        stacks, bound = self._experts._parameters, []
        for linear_name, stack in _STACKS.items():
            linear = getattr(self.mlp, linear_name)
            for name, dense in list(linear.named_parameters(recurse=False)):
                full = f"{stack}_{name}"
                if stacks.get(full) is None:
                    raise StaysFused(f"the experts have no {full}")
                view = stacks[full].data[self._slot]
                _check_layout(full, view, dense)
                parameter = torch.nn.Parameter(view, requires_grad=False)
                if hasattr(dense, "format_ue8m0"):
                    parameter.format_ue8m0 = dense.format_ue8m0  # type: ignore[attr-defined]
                setattr(linear, name, parameter)
                bound.append((full, stacks[full].data_ptr()))
        self._bound = bound


def _on_no_device(moe: Any, prefix: str, dtype: Any, seams: Seams) -> Any:
    """The MLP as sglang makes it for a shared expert that is not fused, without memory."""
    import torch

    config, mlp = moe.config, resolve(seams.mlp)
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        with torch.device("meta"):
            return mlp(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
                hidden_act=config.hidden_act,
                quant_config=getattr(moe.experts, "quant_config", None),
                reduce_results=False,
                prefix=prefix,
                **_options(mlp, config),
            )
    except Exception as error:  # Of sglang's, and it need not end a server that serves without.
        raise StaysFused(f"no dense MLP can be made of it: {error!r}") from error
    finally:
        torch.set_default_dtype(before)


def _options(mlp: type, config: Any) -> dict[str, Any]:
    """Arguments that not all versions have: how every rank gets the whole MLP, and the clamp of DeepSeek V4."""
    takes = inspect.signature(mlp).parameters
    whole = (
        {"parallel_group": "replicated"}
        if "parallel_group" in takes
        else {"tp_rank": 0, "tp_size": 1}
    )
    limit = (
        {"swiglu_limit": getattr(config, "swiglu_limit", None)} if "swiglu_limit" in takes else {}
    )
    return whole | limit


def _check_formats(mlp: Any, experts: Any) -> None:
    """Are dense and grouped kernels of this quantization known to read the same bytes?"""
    grouped = experts.quant_method
    for name in _STACKS:
        dense = getattr(mlp, name).quant_method
        pair = type(dense).__name__, type(grouped).__name__
        if pair not in _VIEWABLE:
            raise StaysFused(f"{pair[0]} and {pair[1]} are not known to lay out weights alike")
        if pair[0].startswith("Fp8"):
            _check_blocks(dense, grouped, experts)
    if true := [name for name in _REARRANGES if getattr(grouped, name, False) is True]:
        raise StaysFused(f"{type(grouped).__name__} orders its weights in its own way: {true[0]}")


def _check_blocks(dense: Any, grouped: Any, experts: Any) -> None:
    """FP8: blocks with float32 scales, which Hopper's kernels read as loaded; Blackwell's want them packed, each in its way."""
    import torch

    for method in (dense, grouped):
        if not getattr(method, "block_quant", False) or getattr(method, "use_mxfp8", False):
            raise StaysFused(f"{type(method).__name__} has no blocks with float32 scales")
    if getattr(dense, "use_marlin", False):
        raise StaysFused("FP8 weights are repacked for Marlin")
    device = next(iter(experts._parameters.values())).device
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) != HOPPER:
        raise StaysFused(
            f"FP8 scales of dense and grouped layers differ on SM {found[0]}{found[1]}"
        )


def _check_layout(name: str, view: Any, dense: Any) -> None:
    found, expected = (view.dtype, tuple(view.shape)), (dense.dtype, tuple(dense.shape))
    if found != expected or not view.is_contiguous():
        raise StaysFused(
            f"{name} has slots of {found[0]} {list(found[1])}, strides {list(view.stride())}, and a dense layer "
            f"{expected[0]} {list(expected[1])}"
        )
