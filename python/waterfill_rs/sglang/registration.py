"""Has sglang called our entry point in this process? Known apart from the plugin, which imports those who ask."""

from __future__ import annotations

__all__ = ["is_registered", "take_note"]

_registered = False


def is_registered() -> bool:
    """Has sglang called ``register`` in this process?"""
    return _registered


def take_note() -> None:
    """``register`` was called."""
    global _registered
    _registered = True
