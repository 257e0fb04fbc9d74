"""The wiring into sglang. Only this package of ours imports sglang, and only once ``register`` is called."""

from waterfill_rs.sglang.plugin import register

__all__ = ["register"]
