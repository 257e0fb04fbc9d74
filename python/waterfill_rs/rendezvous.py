"""Ranks agree, once at start, on how they exchange counts: over a ``torch.distributed`` store.

Each rank puts a card there that says where it is; all read all cards and come to the same answer. A board is
tried if the cards say one host; the random token in its header, read back by every rank, proves it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from waterfill_rs import CostModel, __version__, _native
from waterfill_rs.exchange import BoardExchange, Exchange, GroupExchange, Pace, SoloExchange

if TYPE_CHECKING:
    import torch

    from waterfill_rs.device import DeviceExchange

__all__ = ["CHOICES", "BoardSettings", "Choice", "Store", "board_name", "open_exchange"]

Choice = Literal["auto", "solo", "board", "group"]
CHOICES: tuple[Choice, ...] = ("auto", "solo", "board", "group")

_SHARED_MEMORY = "/dev/shm"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Store(Protocol):
    """What is used of ``torch.distributed.Store``; ``get`` waits until the key is there."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class BoardSettings:
    """``cap_us``: the longest wait of a call. ``pace``, ``core``: see ``waterfill_rs.exchange``."""

    cap_us: int = 500
    pace: Pace = "auto"
    core: int | None = None

    @property
    def patience_us(self) -> int:
        """The planner gives late ranks up before the others give the planner up."""
        return max(1, self.cap_us // 2)


@dataclass(frozen=True)
class _Card:
    """Of one rank. The first four must be equal on all ranks, the last three are where it is."""

    version: str
    ranks: int
    experts: int
    choice: str
    boot: str
    shared_memory: str
    user: int

    @staticmethod
    def of(ranks: int, experts: int, choice: str) -> _Card:
        return _Card(__version__, ranks, experts, choice, _boot(), _device(), os.getuid())


def _boot() -> str:
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError as error:
        return f"unknown ({error})"


def _device() -> str:
    """Which file system /dev/shm is: containers of one host may each have their own."""
    try:
        return str(os.stat(_SHARED_MEMORY).st_dev)
    except OSError as error:
        return f"none ({error})"


def board_name() -> str:
    """Of a new board: this process's, and unlike any other."""
    return f"waterfill-rs-{os.getpid()}-{secrets.token_hex(8)}"


def open_exchange(
    store: Store,
    *,
    ranks: int,
    rank: int,
    experts: int,
    choice: Choice = "auto",
    settings: BoardSettings | None = None,
    group: Any = None,
    cost_model: CostModel | None = None,
    device: torch.device | None = None,
) -> Exchange | DeviceExchange:
    """Meet the other ranks and open this rank's end. All ranks call it, with keys of their own in ``store``.

    Args:
        choice: ``auto``: a board on one node, else the group, else own counts. Others: that one or an error.
        group: the ``torch.distributed`` process group of these ranks, for ``group``.
        device: the CUDA device on which this rank's layers run, if they do: then a board has loads a rank, counts
            by a collective are not to be had, and ``cost_model`` is rows.

    Raises:
        ValueError: ranks that disagree, with both sides' values; a choice that cannot be had, with the reason.
        RuntimeError: a rank did not come (the store's own error).
    """
    model = CostModel.rows() if cost_model is None else cost_model
    settings = settings or BoardSettings()
    if choice not in CHOICES:
        raise ValueError(f"exchange {choice!r}: give one of {', '.join(CHOICES)}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank}: give one from 0 to {ranks - 1}")
    if device is not None:
        if choice == "group":
            raise ValueError(
                "exchange group with layers on a CUDA device: give auto, board or solo"
            )
        group = None  # The kernel takes counts from a board alone.
    cards = _meet(store, _Card.of(ranks, experts, choice), rank)
    name, reason = _decide(cards, group is not None)
    board: _native.Board | None = None
    if name == "board":
        board, refusal = _open_board(store, ranks, experts if device is None else ranks, rank)
        if board is None and choice == "board":
            raise ValueError(f"the board was asked for and cannot be had: {refusal}")
        if board is None:
            name, reason = ("solo" if group is None else "group"), refusal
    if device is not None:
        return _on_device(device, ranks, experts, rank, reason, board, settings)
    if board is not None:
        return BoardExchange(
            board,
            rank,
            model,
            cap_us=settings.cap_us,
            patience_us=settings.patience_us,
            pace=settings.pace,
            core=settings.core,
            reason=reason,
        )
    if name == "group":
        return GroupExchange(group, ranks, experts, rank, model, reason)
    return SoloExchange(ranks, experts, rank, model, reason)


def _on_device(
    device: torch.device,
    ranks: int,
    experts: int,
    rank: int,
    reason: str,
    board: _native.Board | None,
    settings: BoardSettings,
) -> DeviceExchange:
    from waterfill_rs.device import DeviceExchange

    if settings.pace == "inline":
        raise ValueError("planner inline with layers on a CUDA device: give auto, park or spin")
    return DeviceExchange(
        device,
        ranks=ranks,
        experts=experts,
        rank=rank,
        reason=reason,
        board=board,
        cap_us=settings.cap_us,
        patience_us=settings.patience_us,
        pace="spin" if settings.pace == "spin" else "park",
        core=settings.core,
    )


def _meet(store: Store, own: _Card, rank: int) -> list[_Card]:
    store.set(f"card/{rank}", json.dumps(asdict(own)))
    cards = []
    for other in range(own.ranks):
        # Compared before the next is waited for, and before it is read as a card: it may be of a rank that
        # counts fewer ranks, or of a version with other fields.
        card = json.loads(store.get(f"card/{other}"))
        for field in ("version", "ranks", "experts", "choice"):
            mine, theirs = getattr(own, field), card.get(field)
            if mine != theirs:
                raise ValueError(
                    f"{field} is {theirs} on rank {other} and {mine} on rank {rank}: "
                    "start all ranks with the same package and the same settings"
                )
        cards.append(_Card(**card))
    return cards


def _decide(
    cards: Sequence[_Card], has_group: bool
) -> tuple[Literal["solo", "board", "group"], str]:
    """The same on every rank, because it looks at the cards only (and at what all ranks have alike)."""
    choice = cards[0].choice
    if choice == "solo":
        return "solo", "it was asked for"
    if len(cards) == 1 and choice != "board":
        return "solo", "there is one rank"
    if choice == "group":
        if not has_group:
            raise ValueError("the group exchange was asked for, and there is no process group")
        return "group", "it was asked for"
    apart = _apart(cards)
    if apart is None:
        return "board", "all ranks are on one host and share its /dev/shm"
    if choice == "board":
        raise ValueError(f"the board was asked for and cannot be had: {apart}")
    return ("group" if has_group else "solo"), apart


def _apart(cards: Sequence[_Card]) -> str | None:
    """What keeps ranks from one board, if anything does."""
    names = {"boot": "host (boot id)", "shared_memory": "/dev/shm (device)", "user": "user id"}
    for field, name in names.items():
        for rank, card in enumerate(cards):
            first, other = getattr(cards[0], field), getattr(card, field)
            if first != other:
                return f"{name} is {first} on rank 0 and {other} on rank {rank}"
    if not cards[0].shared_memory.isdigit():
        return f"/dev/shm: {cards[0].shared_memory}"
    return None


def _open_board(
    store: Store, ranks: int, experts: int, rank: int
) -> tuple[_native.Board | None, str]:
    """The board; or none, and why some rank could not have it. All ranks come to the same."""
    board: _native.Board | None = None
    if rank == 0:
        name, run = board_name(), secrets.randbits(128)
        try:
            board = _native.Board.create(name, ranks, experts, run)
            store.set("board", json.dumps({"name": name, "run": f"{run:x}"}))
        except (OSError, ValueError) as error:
            store.set("board", json.dumps({"refused": str(error)}))
    try:
        told = json.loads(store.get("board"))
        if "refused" in told:
            return None, f"rank 0: {told['refused']}"
        word = "attached"
        if board is None:
            try:
                board = _native.Board.attach(told["name"], ranks, experts, int(told["run"], 16))
            except (OSError, ValueError) as error:
                word = str(error)
        store.set(f"attached/{rank}", word)
        for other in range(ranks):
            word = store.get(f"attached/{other}").decode()
            if word != "attached":
                return None, f"rank {other}: {word}"
        return board, ""
    finally:
        # Everybody is attached, or nobody will be.
        if rank == 0 and board is not None:
            board.unlink()
