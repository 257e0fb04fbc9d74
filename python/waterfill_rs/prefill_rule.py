"""The rule: whether a prefill's shared experts run beside dispatch or fused with the routed ones."""

from __future__ import annotations

from typing import Any

__all__ = ["PrefillRule", "of"]


class PrefillRule:
    def __init__(self, text: str, overlaps: bool) -> None:
        self.text, self._overlaps = text, overlaps

    def __call__(self, tokens: int | None) -> bool:
        return self._overlaps


def of(shared: str, device: Any) -> PrefillRule:
    if shared == "overlap":
        return PrefillRule("and in prefill, as asked", True)
    return PrefillRule("fused in prefill", False)
