"""The compiled core. Functions named ``unsafe_*_ptr`` take addresses: call them through ``waterfill_rs.torch``."""

from collections.abc import Sequence
from typing import final

__all__ = [
    "CostModel",
    "Plan",
    "__version__",
    "level",
    "own_quotas",
    "plan",
    "unsafe_assign_ptr",
    "unsafe_count_ptr",
    "unsafe_expand_ptr",
    "unsafe_traffic_ptr",
]

__version__: str

@final
class CostModel:
    """What a number of rows of one expert costs: zero for none, never less for more."""

    @staticmethod
    def rows() -> CostModel:
        """A row costs 1."""
    @staticmethod
    def roofline(weights_us: float, row_us: float, tile: int) -> CostModel:
        """An active expert's weights take ``weights_us`` to load; rows, in tiles, ``row_us`` each. Picoseconds."""
    @staticmethod
    def table(points: Sequence[tuple[int, float]]) -> CostModel:
        """A staircase of measured ``(rows, microseconds)``, rows rising. Picoseconds."""
    def cost(self, rows: int) -> int:
        """The cost of ``rows`` rows of one expert."""

@final
class Plan:
    """How many shared rows each source sends to each rank."""

    @property
    def optimum(self) -> int:
        """The slowest rank's cost under this plan, in the cost model's unit."""
    @property
    def shared_rows(self) -> list[int]:
        """``[R]`` shared rows that each rank gets."""
    @property
    def replica_rows(self) -> list[int]:
        """``[P]`` routed rows of each physical expert; empty for a problem with counts per rank."""
    def quotas_of(self, source: int) -> list[int]:
        """``[R]`` how many tokens of ``source`` go to each rank."""

def plan(
    routed: Sequence[int],
    tokens: Sequence[int],
    *,
    ranks: int,
    physical_experts: int,
    physical_to_logical: Sequence[int] | None,
    visits: Sequence[int] | None,
    eligible: Sequence[bool] | None,
    cost_model: CostModel,
    policy: str,
) -> Plan:
    """See ``waterfill_rs.plan``."""

def own_quotas(
    routed: Sequence[int],
    visits: Sequence[int],
    tokens: int,
    *,
    ranks: int,
    rank: int,
    cost_model: CostModel,
) -> list[int]:
    """See ``waterfill_rs.own_quotas``."""

def level(
    routed: Sequence[int], shared: Sequence[int], *, ranks: int, cost_model: CostModel
) -> tuple[int, float]:
    """See ``waterfill_rs.level``."""

def unsafe_count_ptr(
    ids: tuple[int, int, int, int], physical_experts: int, ranks: int
) -> tuple[list[int], list[int], int]:
    """Counts ``[P]``, visits ``[R]`` and tokens of ids (address, rows, top_k, bits)."""

def unsafe_assign_ptr(
    ids: tuple[int, int, int, int],
    quotas: Sequence[int],
    physical_experts: int,
    rank: int,
    shared_rank: int,
) -> None:
    """Write each row's shared rank, int32 ``[rows]`` at ``shared_rank``."""

def unsafe_expand_ptr(
    ids: tuple[int, int, int, int],
    weights: tuple[int, int],
    quotas: Sequence[int],
    out_ids: int,
    out_weights: int,
    physical_experts: int,
    rank: int,
    shared_weight: float,
) -> None:
    """Write ids and weights ``[rows, top_k + 1]``; ``weights`` is (address, bits)."""

def unsafe_traffic_ptr(
    ids: tuple[int, int, int, int], shared_rank: int, physical_experts: int, ranks: int, rank: int
) -> tuple[int, int]:
    """``(extra_copies, extra_messages)`` of one source's shared ranks."""
