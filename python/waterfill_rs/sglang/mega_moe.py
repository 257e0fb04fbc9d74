"""Under the backend megamoe sglang asks no router for a rank without rows, and its peers wait for what it posts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from waterfill_rs.sglang.balancer import WaterfillBalancer
from waterfill_rs.sglang_versions import Seams

__all__ = ["post_without_rows"]


def post_without_rows(seams: Seams) -> Callable[..., None]:
    """For before ``seams.mega_moe``: a layer with our balancer posts there too, as in sglang's other paths.

    It is the router's own empty top-k, ids int32 and weights float32 ``[0, K]`` as those of its rows, so the kernel fits
    whichever call is first. Before the layer, because the layer's kernel waits for ranks that may wait for this post.
    """

    def hook(moe: Any, hidden_states: Any, *_: Any, **__: Any) -> None:
        balancer = getattr(moe.topk, seams.holder, None)
        if hidden_states.shape[0] == 0 and isinstance(balancer, WaterfillBalancer):
            moe.topk.empty_topk_output(hidden_states.device, layer_id=moe.layer_id)

    return hook
