"""The wiring into sglang. Only this package of ours imports sglang: once ``register`` is called, or a replay asks for EPLB."""

from waterfill_rs.sglang.plugin import register

__all__ = ["register"]
