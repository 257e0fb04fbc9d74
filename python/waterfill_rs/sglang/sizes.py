"""At preparation: do a model's layers have sizes that we serve?

They are asked once sglang has prepared them with our balancers, which then hold what it counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from waterfill_rs.sglang.panics import panics_are_errors

if TYPE_CHECKING:
    import torch

__all__ = [
    "against_kernel",
    "against_sizes",
    "data_parallel_groups",
    "most_tokens",
    "routed_experts",
]


def against_sizes(
    model: Any, routers: Sequence[Any], balancers: Sequence[Any], device: torch.device, tokens: int
) -> list[str]:
    """Every reason against it; none if we serve them. On a CUDA device the layers' kernel is made.

    Args:
        balancers: of the routers, in their order.
        tokens: of a prefill in a rank's layer, at most.
    """
    shapes = {(b.world_size, b.num_routed_experts, b.rank) for b in balancers}
    if len(shapes) != 1:
        return [f"layers of one model differ in (ranks, experts, rank): {sorted(shapes)}"]
    ranks, experts, rank = shapes.pop()
    reasons = _against_slots(model, routers, experts // ranks + 1)
    top_ks = sorted({routed_experts(router) for router in routers})
    if device.type != "cuda":
        return reasons + _against_core(ranks, experts)
    if len(top_ks) != 1:
        text = (
            f"layers of one model route tokens to {top_ks} experts, and a kernel is of one number"
        )
        return [*reasons, text]
    return reasons + against_kernel(device, ranks, experts, rank, top_ks[0], tokens)


def _against_slots(model: Any, routers: Sequence[Any], counted: int) -> list[str]:
    """Layers whose experts are fewer or more than Waterfill counts, so that ids would name other experts.

    sglang adds the redundant experts for all layers, and DeepSeek V4's draft layers have none.
    """
    of_layers = [slots for slots in _slots(model, routers) if slots != counted]
    if not of_layers:
        return []
    found = " or ".join(map(str, sorted(set(of_layers))))
    return [
        f"{len(of_layers)} of {len(routers)} MoE layers have {found} slots a rank, and Waterfill counts {counted}, the "
        "shared expert and redundant ones included: leave --ep-num-redundant-experts out, if this is a draft model"
    ]


def _slots(model: Any, routers: Sequence[Any]) -> Iterator[int]:
    """A rank's experts of each layer that has one of these routers, the shared one included."""
    asked = {id(router) for router in routers}
    for layer in model.modules():
        slots = getattr(getattr(layer, "experts", None), "num_local_experts", None)
        if id(getattr(layer, "topk", None)) in asked and isinstance(slots, int):
            yield slots


def routed_experts(router: Any) -> int:
    """A router's top-k, without the columns that it may have for shared experts."""
    config = getattr(router, "topk_config", None)
    if config is None:
        return int(router.topk) - _shared_columns(router)
    return int(config.top_k) - _shared_columns(config)


def _shared_columns(holder: Any) -> int:
    older: int = getattr(holder, "num_fused_shared_experts", 0)
    return getattr(holder, "num_shared_topk_slots", older)


def _against_core(ranks: int, experts: int) -> list[str]:
    import torch

    from waterfill_rs.torch import count

    no_rows = torch.empty((0, 1), dtype=torch.int32)
    try:
        panics_are_errors(count)(no_rows, physical_experts=experts, ranks=ranks)
    except (RuntimeError, ValueError) as error:
        return [f"no plan can be made for this model: {error}"]
    return []


def against_kernel(
    device: torch.device,
    ranks: int,
    experts: int,
    rank: int,
    top_k: int,
    tokens: int,
    redundant: int = 0,
) -> list[str]:
    """What keeps one kernel of these sizes from this device; ``redundant``: experts whose replicas it chooses."""
    from waterfill_rs.cuda import Expander

    try:
        expander = panics_are_errors(Expander)(
            device,
            physical_experts=experts,
            ranks=ranks,
            rank=rank,
            top_k=top_k,
            redundant=redundant,
        )
    except (RuntimeError, ValueError) as error:
        return [f"no kernel can be made for this model: {error}"]
    if tokens > expander.max_rows:
        return [
            f"a prefill may have {tokens} tokens a rank, and the kernel takes {expander.max_rows} with {ranks} ranks and "
            f"{experts} experts: lower --chunked-prefill-size"
        ]
    return []


def most_tokens(arguments: Any, ranks: int) -> int:
    """Tokens of a prefill in a rank's MoE layer, at most, by the ``ServerArgs`` in force."""
    chunk = getattr(arguments, "chunked_prefill_size", None) or 0
    tokens = chunk if chunk > 0 else getattr(arguments, "max_prefill_tokens", None) or 0
    return int(tokens) * data_parallel_groups(arguments) // ranks


def data_parallel_groups(arguments: Any) -> int:
    """Groups of ranks that have requests of their own."""
    data_parallel = getattr(arguments, "enable_dp_attention", False)
    return int(arguments.dp_size) if data_parallel else 1
