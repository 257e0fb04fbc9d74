"""The ``HashTopK`` that stands in for sglang's: it insists on being prepared with our balancer."""

from __future__ import annotations

from typing import Any

from waterfill_rs.sglang.balancer import WaterfillBalancer
from waterfill_rs.sglang_versions import Seams

__all__ = ["hash_topk"]


def hash_topk(seams: Seams, router: type, sglangs: type) -> type:
    """sglang's hash router, whose ``forward`` and ``empty_topk_output`` both end in ``seams.expands``.

    Args:
        router: sglang's class.
        sglangs: its balancer, which layers keep where we stand aside.
    """

    def expands(self: Any, topk_output: Any, num_tokens: int, **options: Any) -> Any:
        balancer = getattr(self, seams.holder)
        if balancer is not None and not isinstance(balancer, (WaterfillBalancer, sglangs)):
            raise RuntimeError(
                f"Waterfill HashTopK was prepared with {type(balancer)}, not with waterfill-rs's"
            )
        return getattr(super(ours, self), seams.expands)(topk_output, num_tokens, **options)

    expands.__doc__ = """Expand if Waterfill is on.

    Raises:
        RuntimeError: before sglang's preparation (sglang's own), or after one with a strange balancer.
    """
    ours = type("WaterfillHashTopK", (router,), {seams.expands: expands, "__module__": __name__})
    return ours
