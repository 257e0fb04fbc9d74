"""The compiled core. Functions named ``unsafe_*_ptr`` take addresses: call them through ``waterfill_rs.torch``
and ``waterfill_rs.exchange``, which check what is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, final, type_check_only

__all__ = [
    "MAX_EXPERTS",
    "MAX_RANKS",
    "OUTCOMES",
    "SHARED_MEMORY",
    "SNAPSHOT_VERSION",
    "Board",
    "CostModel",
    "CudaRunner",
    "DeviceEnd",
    "Observer",
    "Plan",
    "PlannerThread",
    "Port",
    "ReplicaTable",
    "Solo",
    "__version__",
    "board_bytes",
    "choose_replicas",
    "costs",
    "leave_boards_in_child",
    "max_and_mean",
    "own_quotas",
    "plan",
    "unsafe_assign_ptr",
    "unsafe_count_ptr",
    "unsafe_expand_ptr",
    "unsafe_move_up_ptr",
    "unsafe_traffic_ptr",
]

__version__: str

MAX_RANKS: int
"""The largest EP size supported."""

MAX_EXPERTS: int
"""The largest number of physical experts supported, over all ranks."""

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

def max_and_mean(
    routed: Sequence[int], shared: Sequence[int], *, ranks: int, cost_model: CostModel
) -> tuple[int, float]:
    """See ``waterfill_rs.max_and_mean``."""

def costs(
    routed: Sequence[int],
    placements: Sequence[Sequence[int]],
    *,
    ranks: int,
    cost_model: CostModel,
) -> list[list[int]]:
    """Each rank's cost ``[ranks]`` of ``routed`` ``[physical_experts]`` and its shared rows.

    ``placements``: shared rows ``[ranks]``, several. The answer has as many, in the cost model's unit. The most and the mean
    of each are what ``max_and_mean`` gives.

    Raises:
        ValueError: with the offending numbers, for lengths that do not fit.
    """

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
    out: tuple[int, int],
    quotas: Sequence[int],
    physical_experts: int,
    rank: int,
    shared_weight: float,
) -> None:
    """Write ids and weights ``[rows, top_k + 1]`` at ``out``, two addresses; ``weights`` is (address, bits)."""

def unsafe_move_up_ptr(
    ids: tuple[int, int, int, int], out: int, physical_experts: int, ranks: int
) -> None:
    """Write ids moved up past the shared experts, int64 ``[rows, top_k]`` at ``out``."""

def unsafe_traffic_ptr(
    ids: tuple[int, int, int, int], shared_rank: int, physical_experts: int, ranks: int, rank: int
) -> tuple[int, int]:
    """``(extra_copies, extra_messages)`` of one source's shared ranks."""

@type_check_only
class Ended(TypedDict):
    """Calls by how they ended."""

    live: int
    none: int
    """The planner said that there is no plan."""
    timed_out: int
    broken: int
    torn: int

@type_check_only
class Waits(TypedDict):
    """How long calls waited for their quotas, in microseconds."""

    p50: float
    p99: float
    max: float
    buckets: list[tuple[float, int]]
    """Upper limit, and how many; those with any."""

@type_check_only
class Tally(Ended):
    """What one rank counted."""

    process: int
    """Its id, for display; 0 before it came."""
    calls: int
    tokens: int
    """0 for ranks on a GPU."""
    wait_us: Waits

@type_check_only
class RankSnapshot(Tally):
    """The same, from outside."""

    alive: bool | None
    """By what the kernel says of its process: None if it did not come yet or cannot be watched."""

@type_check_only
class PlannerSnapshot(TypedDict):
    """What the planner counted. Costs are sums over its plans, in the cost model's unit."""

    process: int
    alive: bool | None
    whole: int
    """Plans from all ranks' counts."""
    partial: int
    """Plans without gone ranks."""
    late: int
    """Calls without a plan because a rank was late; ``silent``: because it still was."""
    silent: int
    given_up: int
    """Calls without a plan because a rank had given up the planner."""
    refused: int
    """Calls without a plan because the core refused the counts."""
    home_max: int
    """The slowest rank's cost with shared rows at home."""
    planned_max: int
    """The slowest rank's cost as planned."""
    mean: int
    """The mean cost of the ranks."""
    replicas: int
    """Plans that chose replicas too."""
    missed: list[int]
    """``[ranks]`` calls that ended without each rank's counts."""

@type_check_only
class Snapshot(TypedDict):
    """What ranks and planner of a board counted until now."""

    version: int
    """``SNAPSHOT_VERSION``."""
    ranks: int
    experts: int
    redundant: int
    """Physical experts beyond one for each logical expert, where plans choose among replicas; else 0."""
    by_rank: list[RankSnapshot]
    planner: PlannerSnapshot

OUTCOMES: tuple[str, ...]
"""How a call ends: ``live`` with a plan from live counts; with own counts ``none`` (the planner said that there is no plan),
``timed_out`` (it did not answer), ``broken`` (the rank did not wait) or ``torn`` (the quotas it found do not add up)."""

SHARED_MEMORY: str
"""The folder of a board's name: where Linux keeps POSIX shared memory."""

SNAPSHOT_VERSION: int
"""Of what ``Board.snapshot`` and ``Observer.snapshot`` give."""

@final
class Board:
    """A segment in POSIX shared memory on which ranks of one host exchange counts."""

    @staticmethod
    def create(name: str, ranks: int, experts: int, run: int, redundant: int = 0) -> Board:
        """Make the segment ``name`` for all who know ``run``, 128 random bits.

        ``redundant``: physical experts beyond one for each logical expert, where plans choose among replicas.

        Raises:
            OSError: there is one of that name, or the memory is not to be had.
            ValueError: ranks or experts that do not fit.
        """
    @staticmethod
    def attach(name: str, ranks: int, experts: int, run: int, redundant: int = 0) -> Board:
        """Attach to what another process made with the same arguments.

        Raises:
            OSError: there is none.
            ValueError: a field of the file or its header does not fit; the text names it.
        """
    def unlink(self) -> None:
        """Take the name away, once all are attached; the memory goes with the last of them."""
    @property
    def path(self) -> Path: ...
    @property
    def words(self) -> int:
        """Words that a rank posts in a call, but for the last, which says whether it waits.

        Tokens, visits ``[R]``, counts ``[experts]``. With redundant experts, where a *job* is a replicated expert: tokens, visits
        ``[R]``, loads ``[R]`` by experts of no job, rows of each job ``[redundant]``, a bit for each active expert of no job
        ``[ceil(P / 32)]``, the fingerprint of the map.
        """
    def snapshot(self) -> Snapshot:
        """What ranks and planner counted until now."""

@final
class Observer:
    """A board from outside, read only: a path in /dev/shm, or ``/proc/PID/fd/N`` once its name is gone."""

    def __new__(cls, path: str | Path) -> Observer: ...
    def snapshot(self) -> Snapshot:
        """What ranks and planner counted until now."""

@final
class PlannerThread:
    """The planner of a board, on a thread without Python; it ends with ``stop`` or with the object."""

    def __new__(
        cls,
        board: Board,
        cost_model: CostModel,
        *,
        patience_us: int,
        pace: str,
        core: int | None = None,
    ) -> PlannerThread:
        """``pace``: ``spin``, pinned to ``core`` if given, or ``park``."""
    @property
    def unwatched(self) -> str | None:
        """Why the ranks cannot see whether this process lives, if they can't."""
    def set_map(self, layer: int, table: ReplicaTable) -> None:
        """The planner's map of ``layer``, from the next call that is posted on."""
    def wake(self) -> None:
        """Before a call: if the thread sleeps, it is awake by the time that the counts come."""
    def stop(self) -> None: ...

@final
class DeviceEnd:
    """The end of a rank whose calls a kernel makes: others see that its process lives, and it whether the planner's does.

    ``plans``: the planner is in this process.
    """

    def __new__(cls, board: Board, rank: int, plans: bool) -> DeviceEnd: ...
    @property
    def unwatched(self) -> str | None:
        """Why the others cannot see whether this process lives, if they can't."""
    def leave(self) -> None:
        """This process leaves the board: it makes no more calls."""

def leave_boards_in_child() -> None:
    """In the child of a fork: no longer seem to be the parent at its boards."""

def board_bytes(ranks: int, experts: int, redundant: int = 0) -> int:
    """What a board of this shape takes of the shared memory.

    Raises:
        ValueError: experts that do not divide over the ranks.
    """

@final
class ReplicaTable:
    """The replicas of one layer: ``physical_to_logical`` ``[P]`` says which logical expert each physical expert computes.

    A *job* is a replicated logical expert, a *slot* one of its replicas.

    Raises:
        ValueError: experts that do not divide over the ranks, a logical expert without a physical one.
    """

    def __new__(cls, ranks: int, physical_to_logical: Sequence[int]) -> ReplicaTable: ...
    @property
    def fingerprint(self) -> int:
        """A number of the map's content, never 0: maps that differ have another one."""
    @property
    def redundant(self) -> int:
        """Physical experts beyond one for each logical expert."""
    @property
    def jobs(self) -> int:
        """Replicated experts."""
    @property
    def slots(self) -> int:
        """Replicas of replicated experts."""
    @property
    def primaries(self) -> list[int]:
        """``[P]`` the primary replica of each physical expert's logical one: one an expert, whatever the counts.

        They are the first of each rank, if these are each logical expert once; else as few on the rank with most as can be.
        """
    @property
    def first_primaries(self) -> int | None:
        """How many of a rank's physical experts are primary, if these are its first ones, on every rank as many."""
    @property
    def words(self) -> list[int]:
        """As the kernel reads it, for an int32 tensor ``[2 + P + redundant + 1 + 2 * redundant]``.

        The fingerprint; the jobs; the job of each physical expert or -1; the first slot of each job; the physical expert of
        each slot or -1.
        """
    @staticmethod
    def words_of(physical_experts: int, redundant: int) -> int:
        """How many numbers ``words`` has, whatever the map: ``2 + P + redundant + 1 + 2 * redundant``."""
    @staticmethod
    def words_without(physical_experts: int, redundant: int) -> list[int]:
        """The same of a layer without replicas: fingerprint 0, no job."""

def choose_replicas(
    table: ReplicaTable, quotas: Sequence[int], ids: Sequence[int], top_k: int
) -> list[int]:
    """Physical ids ``[N * top_k]`` with the replicas that one source's quotas ``[slots]`` say.

    Raises:
        ValueError: arrays of other lengths.
    """

@final
class Solo:
    """A rank that knows its own counts only."""

    def __new__(cls, ranks: int, experts: int, rank: int, cost_model: CostModel) -> Solo: ...
    def unsafe_expand_ptr(
        self,
        ids: tuple[int, int, int, int],
        weights: tuple[int, int],
        out: tuple[int, int],
        shared_weight: float,
    ) -> None:
        """One call: count, plan from own counts, and write ids and weights as ``unsafe_expand_ptr`` does."""
    @property
    def quotas(self) -> list[int]:
        """Quotas ``[ranks]`` of the last call."""
    @property
    def calls(self) -> int:
        """Calls so far."""

@final
class Port:
    """A rank's end of a board; with ``plans_patience_us`` it plans for all while it waits."""

    def __new__(
        cls,
        board: Board,
        rank: int,
        cost_model: CostModel,
        *,
        plans_patience_us: int | None = None,
    ) -> Port: ...
    def unsafe_expand_ptr(
        self,
        ids: tuple[int, int, int, int],
        weights: tuple[int, int],
        out: tuple[int, int],
        shared_weight: float,
        cap_us: int,
    ) -> str:
        """One call: count, post, wait for the quotas, and write ids and weights as ``unsafe_expand_ptr`` does.

        Gives how the call ended: ``live``, ``none``, ``timed_out``, ``broken``, ``torn``.

        Raises:
            ValueError: ids that are no experts: nothing is posted or written, and the call does not count.
            RuntimeError: this process is a fork of the one that made the object.
        """
    def unsafe_choose_ptr(
        self,
        ids: tuple[int, int, int, int],
        out: int,
        cap_us: int,
        table: ReplicaTable | None,
        moved: bool,
    ) -> str:
        """One call on a board with redundant experts: count, post, wait for the plan, and name replicas as it says.

        Ids ``[rows, top_k]`` go to ``out``: of the type given; or, ``moved`` up past the shared experts, int64. Moved ids are
        of a batch whose shared rows are not routed. Without a table no replica is chosen. Gives how the call ended.

        Raises:
            ValueError: as ``unsafe_expand_ptr``, or a table of another shape than the board's.
            RuntimeError: as there.
        """
    def set_map(self, layer: int, table: ReplicaTable) -> None:
        """The planner's map of ``layer`` from now on.

        Raises:
            ValueError: this port has no planner.
        """
    @property
    def quotas(self) -> list[int]:
        """Quotas ``[ranks]`` of the last call."""
    @property
    def unwatched(self) -> str | None:
        """Why the others cannot see whether this process lives, if they can't."""
    def tally(self) -> Tally:
        """How the calls so far ended, and how long they waited."""

@final
class CudaRunner:
    """The kernel, compiled and loaded, and its state on one device. Use ``waterfill_rs.cuda.Expander``."""

    def __new__(
        cls,
        device: int,
        *,
        ranks: int,
        experts: int,
        rank: int,
        top_k: int,
        id_bits: int,
        weight_bits: int,
        board: Board | None,
        nvrtc: str | Path | None,
        cache: str | Path | None,
        redundant: int = 0,
    ) -> CudaRunner:
        """Compile, or find in the folder ``cache``, load, and run once. ``nvrtc``: the library's file.

        ``redundant``: experts beyond one for each logical expert, where plans choose among replicas.

        Raises:
            ValueError: a shape, rank or board that does not fit.
            RuntimeError: no driver or NVRTC, or what they refuse.
        """
    @property
    def max_rows(self) -> int:
        """The most rows that a call may have."""
    @property
    def words(self) -> int:
        """Integers that ``unsafe_count_ptr`` writes, or with redundant experts ``unsafe_choose_replicas_ptr``: ``Board.words``.

        Without a board they are tokens, visits ``[R]`` and loads ``[R]``, and with redundant experts as there.
        """
    def unsafe_count_ptr(
        self, ids: int, weights: int, rows: int, unpadded: int, out: int, stream: int
    ) -> None:
        """Count by one launch on ``stream``: int32 ``[words]`` at ``out``."""
    def unsafe_launch_ptr(
        self,
        ids: int,
        weights: int,
        out_ids: int,
        out_weights: int,
        rows: int,
        shared_weight: float,
        unpadded: int,
        quotas: int,
        gathered: int,
        cap_us: int | None,
        stream: int,
    ) -> None:
        """One launch on ``stream``. Quotas at an address unless 0; else live ones, waited for ``cap_us``, of the
        counts ``[ranks, words]`` at ``gathered`` unless 0; else own."""
    def unsafe_choose_replicas_ptr(
        self,
        ids: int,
        rows: int,
        unpadded: int,
        out: int,
        moved: bool,
        quotas: int,
        words: int,
        table: int,
        logical: int,
        gathered: int,
        cap_us: int,
        stream: int,
    ) -> None:
        """Make the board's call and choose replicas by one launch on ``stream``, or only count.

        ``out``: ids ``[rows, top_k]``, int64 past the shared experts if ``moved``, else of the type given. ``quotas``: int32
        ``[ranks]`` that the board's go to, or 0. ``words``: if not 0 it only counts, int32 ``[words]`` there. ``table``: int32,
        ``ReplicaTable.words``. ``logical``: int64 ``[P]``, the server's own map, or 0. ``gathered``: int32 ``[ranks * words]``,
        what all ranks counted, or 0.

        Raises:
            ValueError: no board, no redundant experts, more rows than fit.
            RuntimeError: what the driver refuses.
        """
    def unsafe_move_up_ptr(
        self, ids: int, out: int, count: int, primaries: int, logical: int, stream: int
    ) -> None:
        """Move ``count`` ids up past the shared experts by one launch on ``stream``: int64 ``[count]`` at ``out``.

        By their primary replicas, int32 ``[experts]`` at ``primaries``, checked by int64 ``[experts]`` at ``logical``. 0: without.
        """
    def tally(self, stream: int) -> Ended:
        """How calls with given or live quotas ended; waits for the stream."""
