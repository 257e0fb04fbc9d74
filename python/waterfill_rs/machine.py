"""What a GPU takes for the parts of a mixture-of-experts layer, measured or from a built-in table.

``waterfill-rs calibrate`` writes such a file; ``machine_of`` has the built-in ones. The model of a grouped GEMM is: a call
takes a fixed time, and each active expert a time by its rows, which is at the least that of reading its weights once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["PREFILL_GAIN", "VERSION", "Curve", "Machine", "machine_of", "parse"]

VERSION = 1
"""The version of the JSON file's schema, its field ``version``."""

PREFILL_GAIN = 0.1
"""By what share overlapped prefill has to be faster than fused. What is measured is a layer's expert-parallel part alone.
In a server the host launches more than that: two H100 measured 0.96 at 4,096 tokens a rank where the server was at 1.24."""

Curve = tuple[tuple[int, float], ...]
"""``(rows or tokens, microseconds)``: the first rise, the second do not fall."""

_STEP = 128  # Rows of a tile of the grouped GEMM: an expert's rows are padded to it.


@dataclass(frozen=True)
class Machine:
    """A GPU's figures, all of one expert's shape. Every time is in microseconds.

    Raises:
        ValueError: naming the field, its value and what to give.
    """

    name: str
    """As ``torch.cuda.get_device_name`` gives it, like ``NVIDIA H200``."""
    source: str
    """Where the figures are from, in words."""
    shape: tuple[int, int]
    """``(hidden, intermediate)`` of the measured expert: its up projection is ``[2 x intermediate, hidden]``."""
    expert_us: Curve
    """By rows: a grouped call (up, activation, down) of one expert, with the expert's time as its share in a full group."""
    active_expert_us: float
    """What one more active expert costs at the least: its weights are read once."""
    dense_us: Curve
    """By tokens: a dense MLP of the same shape, as the shared expert is where it is not fused."""
    dispatch_us: Curve = ()
    """By tokens a rank: DeepEP's dispatch in normal mode over ``dispatch_ranks``. Empty: not known."""
    dispatch_ranks: int | None = None
    """Ranks of the measured dispatch, all of one node."""
    dispatch_top_k: int | None = None
    """Routed experts a token of the measured dispatch."""
    launch_us: float | None = None
    """Host time of one eager kernel launch. None: not measured."""
    prefill_us: tuple[tuple[int, float, float], ...] = ()
    """``(tokens a rank, overlapped, fused)``, tokens rising: a layer of ``shape`` over ``dispatch_ranks`` as the host launches it
    eagerly, its shared expert as a dense MLP on a second stream beside dispatch, or as a row of the grouped GEMM. Empty: not
    measured."""

    def __post_init__(self) -> None:
        for name in ("name", "source"):
            _check(
                isinstance(getattr(self, name), str) and getattr(self, name), name, self, "a text"
            )
        shape = self.shape
        pair = isinstance(shape, (tuple, list)) and len(shape) == 2 and all(map(_count, shape))
        _check(pair, "shape", self, "[hidden, intermediate], two whole numbers of at least 1")
        object.__setattr__(self, "shape", tuple(shape))
        for name, least in (("expert_us", 1), ("dense_us", 1), ("dispatch_us", 0)):
            object.__setattr__(self, name, _curve(name, getattr(self, name), least))
        active = self.active_expert_us
        fits = _time(active) and active <= self.expert_us[0][1]
        _check(fits, "active_expert_us", self, "a time above 0, at most the first of expert_us")
        for name, least in (("dispatch_ranks", 2), ("dispatch_top_k", 1)):
            value = getattr(self, name)
            wanted = f"a whole number of at least {least} where there is dispatch_us, else null"
            fits = _count(value) and value >= least if self.dispatch_us else value is None
            _check(fits, name, self, wanted)
        launch = self.launch_us
        _check(launch is None or _time(launch), "launch_us", self, "a time above 0, or null")
        object.__setattr__(self, "prefill_us", _pairs(self.prefill_us))
        fits = bool(self.dispatch_us) or not self.prefill_us
        _check(fits, "prefill_us", self, "none of them where there is no dispatch_us")

    @property
    def call_us(self) -> float:
        """What a grouped call takes beyond its experts."""
        return self.expert_us[0][1] - self.active_expert_us

    def dense(self, tokens: int, hidden: int, intermediate: int) -> float:
        """The dense MLP of that shape for ``tokens`` tokens. None takes 0, fewer than measured as many as measured."""
        return _at(self.dense_us, tokens) * self._scale(hidden, intermediate)

    def grouped(self, rows_per_expert: Sequence[int], hidden: int, intermediate: int) -> float:
        """A grouped GEMM (up, activation, down): one number of rows for each expert of the rank, 0 for one without."""
        active = [rows for rows in rows_per_expert if rows]
        if not active:
            return 0.0
        experts = sum(_at(self.expert_us, rows) - self.call_us for rows in active)
        return (self.call_us + experts) * self._scale(hidden, intermediate)

    def dispatch(
        self,
        tokens: int,
        hidden: int | None = None,
        top_k: int | None = None,
        ranks: int | None = None,
    ) -> float | None:
        """DeepEP's dispatch of ``tokens`` tokens a rank; None where none was measured.

        What is left out is as measured. Above the time of the fewest tokens it grows with a token's bytes and with the
        ranks that a token goes to, ``R (1 - (1 - 1/R)^K)`` for even routing. Tokens under 4,096 wide take longer than that.
        """
        if self.dispatch_us == () or self.dispatch_ranks is None or self.dispatch_top_k is None:
            return None
        if tokens <= 0:
            return 0.0
        floor = self.dispatch_us[0][1]
        measured = _copies(self.dispatch_ranks, self.dispatch_top_k)
        wanted = _copies(ranks or self.dispatch_ranks, top_k or self.dispatch_top_k)
        share = (hidden or self.shape[0]) / self.shape[0] * wanted / measured
        return floor + (_at(self.dispatch_us, tokens) - floor) * share

    def prefill_overlaps(self, tokens: int, ranks: int) -> bool | None:
        """Is a prefill of ``tokens`` tokens a rank faster with its shared expert beside dispatch, by more than ``PREFILL_GAIN``?

        The most tokens measured that are no more than ``tokens`` say so, or the fewest measured. None where no prefill was
        measured, or with more than ``dispatch_ranks`` ranks: over several hosts dispatch is another. It is not scaled: the model's
        expert has to be of ``shape``.

        Raises:
            ValueError: for fewer than 0 tokens or 1 rank.
        """
        if tokens < 0 or ranks < 1:
            raise ValueError(f"{tokens} tokens over {ranks} ranks: give at least 0 and 1")
        if not self.prefill_us or self.dispatch_ranks is None or ranks > self.dispatch_ranks:
            return None
        reached = [point for point in self.prefill_us if point[0] <= tokens]
        _, overlapped, fused = reached[-1] if reached else self.prefill_us[0]
        return overlapped < fused * (1 - PREFILL_GAIN)

    def cost_table(self) -> list[tuple[int, float]]:
        """``(rows, microseconds)`` for ``CostModel.table``: an expert's time without the call's, in steps of 128 rows.

        Rows measured below 128 are kept. Between measured points it is interpolated.
        """
        first, last = self.expert_us[0][0], self.expert_us[-1][0]
        rows = {r for r, _ in self.expert_us if r < _STEP} | {first, last}
        rows |= set(range(-(-first // _STEP) * _STEP, last, _STEP))
        return [(r, _at(self.expert_us, r) - self.call_us) for r in sorted(rows)]

    def to_json(self) -> str:
        """The file's text: ``version`` and the fields, one a line."""
        items = {"version": VERSION, **asdict(self)}
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in items.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        beside = path.with_name(path.name + ".part")
        beside.write_text(self.to_json(), "utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read such a file.

        Raises:
            ValueError: naming the file, the field, its value and what to give.
            OSError: if it cannot be read.
        """
        try:
            return parse(json.loads(path.read_text("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: {error}: waterfill-rs calibrate --json writes one"
            ) from error

    def _scale(self, hidden: int, intermediate: int) -> float:
        for name, value in (("hidden", hidden), ("intermediate", intermediate)):
            if not _count(value):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        return hidden * intermediate / (self.shape[0] * self.shape[1])


def parse(content: Any) -> Machine:
    """A machine from a file's parsed JSON.

    Raises:
        ValueError: naming the field, its value and what to give.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"it holds a {type(content).__name__}: give an object with the fields of a machine"
        )
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise ValueError(f"version is {content.get('version')!r}: give {VERSION}")
    known = {field.name: field for field in fields(Machine)}
    unknown = sorted(set(content) - set(known) - {"version"})
    if unknown:
        raise ValueError(f"there is no field {unknown[0]!r}: give {', '.join(known)}")
    needed = ("name", "source", "shape", "expert_us", "active_expert_us", "dense_us")
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"{missing[0]} is missing: give it")
    return Machine(**{name: value for name, value in content.items() if name != "version"})


def machine_of(name: str) -> Machine | None:
    """The built-in figures of a GPU, by its name in full (``NVIDIA H200``) or short (``H200``); letters' case is ignored.

    None for any other. A PCIe, NVL or MIG variant is another GPU: its name has to be that of the table.
    """
    from waterfill_rs.machines import MACHINES  # It makes machines of this class.

    wanted = name.strip().casefold()
    for short, machine in MACHINES.items():
        if wanted in (short.casefold(), f"nvidia {short}".casefold(), machine.name.casefold()):
            return machine
    return None


def _check(fits: Any, name: str, machine: Machine, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {getattr(machine, name)!r}: give {wanted}")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**32


def _time(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < 1e12  # NaN is in no order.


def _curve(name: str, points: Any, least: int) -> Curve:
    if not isinstance(points, (tuple, list)) or len(points) < least:
        raise ValueError(f"{name} is {points!r}: give [[rows, microseconds], ...], {least} or more")
    curve: list[tuple[int, float]] = []
    for index, point in enumerate(points):
        where = f"{name}[{index}] is {point!r}"
        if not isinstance(point, (tuple, list)) or len(point) != 2:
            raise ValueError(f"{where}: give [rows, microseconds]")
        rows, us = point
        if not _count(rows) or not _time(us):
            raise ValueError(f"{where}: give a whole number of at least 1 and a time above 0")
        if curve and (rows <= curve[-1][0] or us < curve[-1][1]):
            wanted = f"more rows than {curve[-1][0]} and no less time than {curve[-1][1]}"
            raise ValueError(f"{where}: give {wanted}, as the point before")
        curve.append((rows, float(us)))
    return tuple(curve)


def _pairs(points: Any) -> tuple[tuple[int, float, float], ...]:
    name, form = "prefill_us", "[tokens, overlapped, fused]"
    if not isinstance(points, (tuple, list)):
        raise ValueError(f"{name} is {points!r}: give [{form}, ...], or []")
    pairs: list[tuple[int, float, float]] = []
    for index, point in enumerate(points):
        where = f"{name}[{index}] is {point!r}"
        if not isinstance(point, (tuple, list)) or len(point) != 3:
            raise ValueError(f"{where}: give {form}")
        tokens, *times = point
        if not _count(tokens) or not all(map(_time, times)):
            raise ValueError(f"{where}: give a whole number of at least 1 and two times above 0")
        if pairs and tokens <= pairs[-1][0]:
            raise ValueError(f"{where}: give more tokens than {pairs[-1][0]}, as the point before")
        pairs.append((tokens, float(times[0]), float(times[1])))
    return tuple(pairs)


def _at(curve: Curve, rows: int) -> float:
    """Between two points on a line, before the first as the first, past the last on the last two points' line."""
    if rows < 0:
        raise ValueError(f"there are {rows} rows or tokens: give at least 0")
    if rows == 0:
        return 0.0
    if rows <= curve[0][0]:
        return curve[0][1]
    if len(curve) == 1:
        return curve[0][1] * rows / curve[0][0]
    upper = next((i for i, (r, _) in enumerate(curve) if r >= rows), len(curve) - 1)
    (r0, us0), (r1, us1) = curve[upper - 1], curve[upper]
    return us0 + (us1 - us0) * (rows - r0) / (r1 - r0)


def _copies(ranks: int, top_k: int) -> float:
    """Ranks that a token goes to, on average, where its experts are drawn evenly over the ranks."""
    return -ranks * math.expm1(top_k * math.log1p(-1 / ranks)) if ranks > 1 else 1.0
