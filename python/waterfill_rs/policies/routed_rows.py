"""What redundant experts make of the routed rows alone, as recorded, without them, and with replicas chosen batch by batch.

Shared rows are left out: in decode the shared expert runs beside dispatch, and in a prefill they level what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from waterfill_rs import CostModel, _native
from waterfill_rs.policies import live_replicas
from waterfill_rs.policies.comparison import Layer

__all__ = ["CHOICES", "RoutedRows", "measure", "print_routed_rows", "trap"]

CHOICES = {
    "no-redundant": "no redundant experts",
    "recorded": "as recorded",
    "joint": "joint",
    "single-replica": "single-replica",
    "replicas": "replicas",
    "place": "place, split evenly",
    "place-replicas": "place, replicas",
}
"""By name, in the order and with the words of the table: see docs/replay.md."""


@dataclass
class RoutedRows:
    """One choice over many layers and passes. ``most``, ``mean``: sums of the slowest and of the mean rank's cost, the
    mean as recorded. ``active``: sum of the active experts of the rank that has most. ``layers``: how many; ``passes``: of these."""

    most: int = 0
    mean: float = 0.0
    active: int = 0
    layers: int = 0
    passes: frozenset[int] = frozenset()

    def as_json(self, timed: bool) -> dict[str, float]:
        """With ``us_a_pass`` where costs are picoseconds."""
        found = {"ratio": self.most / self.mean, "active": self.active / self.layers}
        return found | ({"us_a_pass": self.most / len(self.passes) / 1e6} if timed else {})


def measure(
    layer: Layer, placed: Sequence[int] | None, model: CostModel, totals: dict[str, RoutedRows]
) -> None:
    """Add one layer of one pass to ``totals``, by choice; nothing where no expert has replicas.

    Args:
        placed: ``[P]``, where ``waterfill-rs place`` would put its experts; None where that is not asked for.
    """
    if layer.mapping is None:
        return
    mean = None
    for choice, routed in _choices(layer, layer.mapping, placed, model):
        costs = _costs(routed, len(layer.tokens), model)
        mean = sum(costs) / len(costs) if mean is None else mean
        total = totals.setdefault(choice, RoutedRows())
        total.most += max(costs)
        total.mean += mean
        total.active += _active(routed, len(layer.tokens))
        total.layers += 1
        total.passes |= {layer.pass_id}


def _choices(
    layer: Layer, mapping: Sequence[int], placed: Sequence[int] | None, model: CostModel
) -> Iterator[tuple[str, list[int]]]:
    """Routed rows ``[P]`` by choice, the recorded ones first."""
    nothing = [0] * len(layer.tokens)
    yield "recorded", layer.routed
    rows = [0] * (max(mapping) + 1)
    for logical, own in zip(mapping, layer.routed, strict=True):
        rows[logical] += own
    if len(rows) % len(layer.tokens) == 0:
        yield "no-redundant", rows
    for policy in ("joint", "single-replica", "replicas"):
        if policy != "single-replica" or layer.phase == "decode":
            yield (
                policy,
                live_replicas.plan(policy, layer.routed, nothing, mapping, model).replica_rows,
            )
    if placed is not None:
        even = _evenly(rows, placed)
        yield "place", even
        yield (
            "place-replicas",
            live_replicas.plan("replicas", even, nothing, placed, model).replica_rows,
        )


def _evenly(rows: Sequence[int], mapping: Sequence[int]) -> list[int]:
    """``[P]``: each expert's rows ``[E]`` split over its replicas, the first ones with one more where some are left."""
    left = [mapping.count(expert) for expert in range(len(rows))]
    rest, found = list(rows), []
    for expert in mapping:
        found.append(-(-rest[expert] // left[expert]))
        rest[expert] -= found[-1]
        left[expert] -= 1
    return found


def _costs(routed: Sequence[int], ranks: int, model: CostModel) -> list[int]:
    (costs,) = _native.costs(routed, [[0] * ranks], ranks=ranks, cost_model=model)
    return costs


def _active(routed: Sequence[int], ranks: int) -> int:
    """Experts with rows, of the rank that has most of them."""
    held = len(routed) // ranks
    return max(
        sum(rows > 0 for rows in routed[rank * held : (rank + 1) * held]) for rank in range(ranks)
    )


def print_routed_rows(
    totals: dict[str, RoutedRows], phase: str | None, unit: str, trivial: bool
) -> None:
    """The table, and in words what a trivial placement does. ``unit``: ``rows``, or ``time`` under a cost model.

    ``trivial``: redundant experts stand as sglang's default puts them.
    """
    if not totals:
        return
    found = {
        choice: totals[choice].as_json(unit == "time") for choice in CHOICES if choice in totals
    }
    columns = ["ratio", *["active"] * (phase == "decode"), *["us_a_pass"] * (unit == "time")]
    heads = {"ratio": "max/mean", "active": "active experts", "us_a_pass": "us a pass"}
    print("Routed rows alone, by choice of replicas:")
    print(f"{'':<22}" + "".join(f"{heads[column]:>16}" for column in columns))
    for choice, numbers in found.items():
        cells = (f"{numbers[column]:>16.{4 if column == 'ratio' else 1}f}" for column in columns)
        print(f"{CHOICES[choice]:<22}{''.join(cells)}")
    ratios = {choice: numbers["ratio"] for choice, numbers in found.items()}
    less = 1 - ratios["replicas"] / ratios["recorded"]
    print(
        f"Live replicas {f'take {less:.1%} off' if less > -0.0005 else f'add {-less:.1%} to'} the slowest rank's routed {unit}."
    )
    if trivial:
        print(trap(totals))


def trap(totals: dict[str, RoutedRows]) -> str:
    """What trivial places of redundant experts do to routed rows, and what to do, in words."""
    ratios = {choice: total.as_json(False)["ratio"] for choice, total in totals.items()}
    without = ratios.get("no-redundant")
    start = f"Redundant experts stand in trivial places, sglang's default: max/mean is {ratios['recorded']:.3f}"
    if without is not None:
        worse = ", worse than" if without < ratios["recorded"] else ", and"
        start += f"{worse} {without:.3f} without redundant experts"
    placed = ratios.get("place-replicas")
    if placed is not None:
        start += (
            f".\nLive replicas there give {ratios['replicas']:.3f}, and {placed:.3f} where waterfill-rs place "
            "puts them for this recording"
        )
    return (
        f"{start}.\nA server with waterfill-rs spreads them at start, where it can: --placement spread tells what that gives."
        "\nMake a placement (waterfill-rs place), and start the server with --init-expert-location."
    )
