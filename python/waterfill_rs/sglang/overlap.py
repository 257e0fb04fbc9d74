"""Around a MoE layer's call: whether its shared expert runs unfused, on sglang's own second stream beside dispatch.

sglang asks ``num_fused_shared_experts == 0`` at every call. A layer here answers for the batch that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from waterfill_rs.sglang import routed_groups
from waterfill_rs.sglang.compat import resolve
from waterfill_rs.sglang.shared_expert import Unfused
from waterfill_rs.sglang_versions import Seams

__all__ = ["Choice", "OverlappedLayer"]

FUSED = "num_fused_shared_experts"
_VOTES = ("can_run_dp_prefill_cuda_graph", "can_run_dp_breakable_cuda_graph")
"""A batch's attribute, from 0.5.19 on and before: may all ranks replay a prefill's graph? All ranks have the same answer."""


class Choice:
    """Overlapped or fused, batch by batch; all layers of a model share it.

    All ranks choose alike in a step, because they choose by what sglang tells all of them alike: whether any rank
    prefills, by which DeepEP's mode is chosen too, and the tokens of every rank where all know them. So the calls that
    take part in an exchange are the same on all ranks, and so is the top-k width, which DeepEP's normal mode relies on.

    Args:
        ranks: EP size.
        groups: of ranks that share a batch: data-parallel attention's size, or 1.
        prefills_overlap: whether prefills overlap, by the tokens in a MoE layer of the rank that has the most, or None
            where not all ranks know them.
    """

    def __init__(
        self,
        seams: Seams,
        ranks: int,
        groups: int,
        prefills_overlap: Callable[[int | None], bool],
    ) -> None:
        self.forced: str | None = None
        """``overlap`` or ``fused`` for the batches to come, whatever was configured: for comparisons."""
        self.tally = {"overlapped": 0, "fused": 0}
        """Calls of layers that Python saw. A graph's replays are not among them."""
        self._ranks, self._groups = ranks, groups
        self._prefills_overlap = prefills_overlap
        self._extends = resolve(seams.is_extend_in_batch)
        self._in_prefill_graph = resolve(seams.prefill_graph) if seams.prefill_graph else _never

    def overlaps(self, batch: Any) -> bool:
        """Does this batch's shared expert run unfused? ``batch``: sglang's ``ForwardBatch``."""
        if self.forced is not None:
            return self.forced == "overlap"
        # Decode, draft and verify batches: nobody extends. So it is while any graph is captured, a prefill's too.
        if not self.extends:
            return not self._in_prefill_graph()
        # A prefill's graph is cut at dispatch, where sglang joins the second stream, so nothing would overlap: it is captured
        # fused. Where some ranks may replay one, those that don't are fused too.
        if any(getattr(batch, vote, False) for vote in _VOTES):
            return False
        return self._prefills_overlap(self._tokens(batch))

    @property
    def extends(self) -> bool:
        """Does any rank prefill in this step? All ranks have the same answer."""
        return bool(self._extends())

    def _tokens(self, batch: Any) -> int | None:
        """Those that the rank with the most has in a MoE layer, as sglang pads them."""
        groups = getattr(batch, "global_num_tokens_cpu", None)
        # A half of a two-batch overlap has none; and with some settings each rank has its own alone.
        if groups is None or len(groups) != self._groups:
            return None
        # The ranks of a group divide its tokens.
        return int(max(groups)) * self._groups // self._ranks


def _never() -> bool:
    return False


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
        self.decodes_by_primaries = False
        """Whether rows of a step in which nobody prefills go to primary replicas, without an exchange."""
        self.primary_slots: int | None = None
        """A rank's first slots, if those are its primary replicas, whatever comes."""
        self._unfused, self._fields = unfused, moe.__dict__
        self._slots = int(moe.experts.num_local_experts)
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
            # Weights that sglang replaced are not kept alive by the views of them.
            self._unfused.follow()
            overlaps = self.choice.overlaps(batch_of(*args, **kwargs))
            if counts:
                self.choice.tally["overlapped" if overlaps else "fused"] += 1
            if not overlaps:
                return call(*args, **kwargs)
            fused, self._fields[FUSED] = self._fields[FUSED], 0
            self.runs = True
            routed_groups.slots.number, routed_groups.slots.used = self._slots, self._used_slots()
            try:
                return call(*args, **kwargs)
            finally:
                self._fields[FUSED], self.runs = fused, False
                routed_groups.slots.number = routed_groups.slots.used = 0

        return run

    @property
    def chooses_live(self) -> bool:
        """Are replicas of this batch, whose shared expert is unfused, chosen by a live plan? All ranks alike."""
        return not self.decodes_by_primaries or self.choice.extends

    def _used_slots(self) -> int:
        """Of a rank, those that can have rows: not the shared expert's, which is the last."""
        if self.primary_slots is None or self.chooses_live:
            return self._slots - 1
        return self.primary_slots


def _batch_of_forward(*args: Any, **kwargs: Any) -> Any:
    """The second argument, or that of the name."""
    return args[1] if len(args) > 1 else kwargs.get("forward_batch")


def _batch_of_operation(state: Any) -> Any:
    return state.forward_batch
