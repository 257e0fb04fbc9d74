"""The rule: whether a prefill's shared experts run beside dispatch, or fused with the routed ones.

Decode, draft and verify batches are no question of it: there the shared expert is hidden behind dispatch, always.
"""

from __future__ import annotations

from waterfill_rs.machine import Machine

__all__ = ["PrefillRule"]


class PrefillRule:
    """Of one model on one machine; ranks that have the same ``text`` choose alike.

    A prefill is fused, unless a measurement of this machine says that it is faster overlapped. Models of GPU time alone
    say overlapped, and real servers refuted them: an eager prefill is bound by the host up to thousands of tokens a rank,
    and an unfused shared expert is seven launches more (docs/measurements/server.md).

    Args:
        asked: overlap was asked for by name.
        ranks: EP size.
        most: tokens of a prefill in a rank's MoE layer, at most: what is taken where a batch's are not known to all.
        machine: what ``waterfill-rs calibrate`` measured here, if it did.
    """

    def __init__(self, asked: bool, ranks: int, most: int, machine: Machine | None = None) -> None:
        self._asked, self._ranks, self._most, self._machine = asked, ranks, most, machine
        self.text = self._text()

    def __call__(self, tokens: int | None) -> bool:
        """Does a prefill overlap in which the rank with the most has so many tokens? None: not all ranks know."""
        if self._asked:
            return True
        return self._measured(self._most if tokens is None else tokens) or False

    def _measured(self, tokens: int) -> bool | None:
        return (
            None if self._machine is None else self._machine.prefill_overlaps(tokens, self._ranks)
        )

    def _text(self) -> str:
        if self._asked:
            return "beside dispatch in prefill, as asked"
        if self._machine is None or self._measured(self._most) is None:
            return "fused in prefill"
        tokens = [tokens for tokens, _, _ in self._machine.prefill_us]
        overlapped = [str(least) for least in tokens if self._measured(least)]
        if not overlapped:
            return "fused in prefill, as measured here"
        return (
            f"in prefill as measured here with {', '.join(map(str, tokens))} tokens a rank: "
            f"beside dispatch with {', '.join(overlapped)}, else fused"
        )
