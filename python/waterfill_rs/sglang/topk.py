"""The ``HashTopK`` that stands in for sglang's: it insists on being prepared with our balancer."""

from __future__ import annotations

from sglang.srt.layers.moe.hash_topk import HashTopK
from sglang.srt.layers.moe.topk import StandardTopKOutput

from waterfill_rs.sglang.balancer import WaterfillBalancer

__all__ = ["WaterfillHashTopK"]


class WaterfillHashTopK(HashTopK):  # type: ignore[misc]
    """sglang's hash router; ``forward`` and ``empty_topk_output`` both end in ``_apply_waterfill``."""

    def _apply_waterfill(
        self, topk_output: StandardTopKOutput, num_tokens: int
    ) -> StandardTopKOutput:
        """Expand if Waterfill is on.

        Raises:
            RuntimeError: before sglang's preparation (sglang's own), or after one with another balancer.
        """
        balancer = self.waterfill_balancer
        if balancer is not None and not isinstance(balancer, WaterfillBalancer):
            raise RuntimeError(
                f"Waterfill HashTopK was prepared with {type(balancer)}, not with waterfill-rs's"
            )
        return super()._apply_waterfill(topk_output, num_tokens)
