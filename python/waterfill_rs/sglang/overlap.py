"""Around a MoE layer's call: whether its shared expert runs unfused, on sglang's own second stream beside dispatch.

sglang asks ``num_fused_shared_experts == 0`` at every call. A layer here answers for the batch that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from waterfill_rs.sglang.compat import Seams, resolve
from waterfill_rs.sglang.shared_expert import Unfused

__all__ = ["Choice", "OverlappedLayer"]

FUSED = "num_fused_shared_experts"


class Choice:
    """Overlapped or fused, batch by batch; all layers of a model share it.

    All ranks choose alike in a step, because they choose by what sglang tells all of them alike: whether any rank
    prefills, by which DeepEP's mode is chosen too, and the tokens of every rank. So the calls that take part in an
    exchange are the same on all ranks, and so is the top-k width that DeepEP's normal mode exchanges.

    Args:
        prefills_overlap: whether prefills overlap, by the tokens of the rank that has the most.
        ranks: EP size.
    """

    def __init__(
        self, seams: Seams, ranks: int, prefills_overlap: Callable[[int], bool]
    ) -> None:
        self.forced: str | None = None
        """``overlap`` or ``fused`` for the batches to come, whatever was configured: for comparisons."""
        self.tally = {"overlapped": 0, "fused": 0}
        """Calls of layers that Python saw. A graph's replays are not among them."""
        self._extends = resolve(seams.is_extend_in_batch)
        self._ranks = ranks
        self._prefills_overlap = prefills_overlap

    def overlaps(self, batch: Any) -> bool:
        """Does this batch's shared expert run unfused? ``batch``: sglang's ``ForwardBatch``."""
        if self.forced is not None:
            overlaps = self.forced == "overlap"
        else:
            # Decode, draft and verify batches. While a graph is captured it is false, as at each of the graph's replays.
            overlaps = not self._extends() or self._prefills_overlap(self._tokens(batch))
        return overlaps

    def _tokens(self, batch: Any) -> int:
        """Those that the rank with the most has in a MoE layer."""
        groups = getattr(batch, "global_num_tokens_cpu", None) or [len(batch.input_ids)]
        # Ranks of one attention group divide its tokens.
        return max(groups) * len(groups) // self._ranks


class OverlappedLayer:
    """One MoE layer that can run its shared expert both ways.

    Args:
        moe: sglang's MoE layer.
        unfused: its shared expert as a dense MLP.
        choice: the model's.
    """

    def __init__(self, moe: Any, unfused: Unfused, choice: Choice) -> None:
        self.choice = choice
        self.runs = False
        """Within a call whose shared expert is unfused: the routers' balancer asks."""
        self._unfused, self._fields = unfused, moe.__dict__
        self._install(moe)

    def _install(self, moe: Any) -> None:
        """Past ``Module.__setattr__``: whoever goes through a model's modules and parameters finds those it had."""
        around = (
            ("forward", _batch_of_forward, True),
            # Two-batch overlap calls a layer's operations one by one.
            ("op_select_experts", _batch_of_operation, True),
            ("op_shared_experts", _batch_of_operation, False),
        )
        for name, batch_of, counts in around:
            self._fields[name] = self._around(getattr(moe, name), batch_of, counts)
        self._fields["shared_experts"] = self._unfused.mlp

    def _around(
        self, call: Callable[..., Any], batch_of: Callable[..., Any], counts: bool
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            overlaps = self.choice.overlaps(batch_of(*args, **kwargs))
            if counts:
                self.choice.tally["overlapped" if overlaps else "fused"] += 1
            if not overlaps:
                return call(*args, **kwargs)
            self._unfused.follow()
            fused, self._fields[FUSED] = self._fields[FUSED], 0
            self.runs = True
            try:
                return call(*args, **kwargs)
            finally:
                self._fields[FUSED], self.runs = fused, False

        return run


def _batch_of_forward(_: Any, forward_batch: Any = None, *__: Any, **___: Any) -> Any:
    return forward_batch


def _batch_of_operation(state: Any) -> Any:
    return state.forward_batch
