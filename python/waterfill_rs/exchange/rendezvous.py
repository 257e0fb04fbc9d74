"""Ranks agree, once at start, on how they exchange counts: over a ``torch.distributed`` store.

Each rank puts a card there that says where it is; all read all cards and come to the same answer. A board is
tried if the cards say one host; the random token in its header, read back by every rank, proves it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed

from waterfill_rs import CostModel, __version__, _native
from waterfill_rs.exchange.boards import SHARED_MEMORY, board_name
from waterfill_rs.exchange.device import DeviceExchange, DeviceGroupExchange
from waterfill_rs.exchange.host import BoardExchange, SoloExchange
from waterfill_rs.exchange.interface import Exchange
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.exchange.settings import CHOICES, BoardSettings, Choice

__all__ = ["Store", "open_exchange"]

logger = logging.getLogger(__name__)

Name = Literal["solo", "board", "group"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Store(Protocol):
    """What is used of ``torch.distributed.Store``; ``get`` waits until the key is there."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class _Card:
    """Of one rank. ``_ALIKE`` must be equal on all ranks, the others are where it is."""

    version: str
    ranks: int
    experts: int
    redundant: int
    choice: str
    layers_on: str
    timeout_us: int
    cost_model: str
    process_group: bool
    boot: str
    shared_memory: str
    user: int


_PLACE = ("boot", "shared_memory", "user")
_ALIKE = tuple(field.name for field in fields(_Card) if field.name not in _PLACE)


def _boot() -> str:
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError as error:
        return f"unknown ({error})"


def _device() -> str:
    """Which file system /dev/shm is: containers of one host may each have their own."""
    try:
        return str(os.stat(SHARED_MEMORY).st_dev)
    except OSError as error:
        return f"none ({error})"


def open_exchange(
    store: Store,
    member: Member,
    *,
    choice: Choice = "auto",
    settings: BoardSettings | None = None,
    group: Any = None,
    cost_model: CostModel | None = None,
    device: torch.device | None = None,
    replicas: ReplicaTables | None = None,
) -> Exchange:
    """Meet the other ranks and open this rank's end. All ranks call it, with keys of their own in ``store``.

    Args:
        choice: ``auto``: a board on one node, else the group if there is one, else own counts. Others: that one or an error.
        group: the ``torch.distributed`` process group of these ranks, whose collectives take the device's tensors. Without
            it, or without a device, there is no ``group``.
        device: the CUDA device on which this rank's layers run, if they do: then ranks tell loads a rank, and
            ``cost_model`` is rows.
        replicas: choose replicas of redundant experts by these tables, which all ranks have; on ``device``, if there is
            one. An exchange of own counts alone has none.

    Raises:
        ValueError: tables of other sizes than the member's; ranks that disagree, with both sides' values; a choice that cannot be had, with the reason.
        RuntimeError: a rank did not come (the store's own error).
    """
    model = CostModel.rows() if cost_model is None else cost_model
    settings = settings or BoardSettings()
    if choice not in CHOICES:
        raise ValueError(f"exchange {choice!r}: give one of {', '.join(CHOICES)}")
    if group is not None:
        _check_group(group, member.ranks)
    if device is not None and settings.pace == "inline":
        raise ValueError("planner inline with layers on a CUDA device: give auto, park or spin")
    if replicas is not None:
        _check_replicas(replicas, member)
    own = _Card(
        version=__version__,
        ranks=member.ranks,
        experts=member.experts,
        redundant=0 if replicas is None else replicas.redundant,
        choice=choice,
        layers_on="cpu" if device is None else device.type,
        timeout_us=settings.cap_us,
        cost_model=repr(model),
        process_group=group is not None and device is not None,
        boot=_boot(),
        shared_memory=_device(),
        user=os.getuid(),
    )
    name, reason = _decide(_meet(store, own, member.rank))
    exchange = _open(name, reason, store, own, member, model, settings, group, device, replicas)
    if exchange.unwatched is not None:
        logger.warning(
            "waterfill-rs: rank %d cannot be watched (%s): should its process end, the other ranks wait up to %g s for it "
            "twice, and take own counts from then on",
            member.rank,
            exchange.unwatched,
            settings.cap_us / 1e6,
        )
    return exchange


def _open(
    name: Name,
    reason: str,
    store: Store,
    own: _Card,
    member: Member,
    model: CostModel,
    settings: BoardSettings,
    group: Any,
    device: torch.device | None,
    replicas: ReplicaTables | None,
) -> Exchange:
    """What was decided on, or what all ranks take where one of them cannot have it."""
    choice = own.choice
    board: _native.Board | None = None
    if name == "board":
        by_expert = device is None or own.redundant > 0
        board, refusal = _open_board(store, member, by_expert, own.redundant)
        if board is None:
            name, reason = _instead(choice, name, "group" if own.process_group else "solo", refusal)
    if name == "group":
        board, refusal = _own_board(store, member, own.redundant)
        if board is None:
            name, reason = _instead(choice, name, "solo", refusal)
    if device is not None:
        joined = group if name == "group" else None
        return _on_device(device, member, reason, board, settings, joined, replicas)
    if board is not None:
        exchange = BoardExchange.open(board, member, settings, reason, model)
        if replicas is not None:
            exchange.choose_by(replicas)
        return exchange
    return SoloExchange(member, model, reason)


def _check_group(group: Any, ranks: int) -> None:
    if (found := torch.distributed.get_world_size(group)) != ranks:
        raise ValueError(f"the process group has {found} ranks: give one of {ranks}")


def _check_replicas(replicas: ReplicaTables, member: Member) -> None:
    found, wanted = (replicas.ranks, replicas.experts), (member.ranks, member.experts)
    if found != wanted:
        raise ValueError(f"tables of (ranks, experts) {found}: give those of {wanted}")


def _on_device(
    device: torch.device,
    member: Member,
    reason: str,
    board: _native.Board | None,
    settings: BoardSettings,
    group: Any,
    replicas: ReplicaTables | None,
) -> DeviceExchange:
    pace = "spin" if settings.pace == "spin" else "park"
    if group is not None and board is not None:
        # Each process has a planner, so none is pinned: several would share the core.
        return DeviceGroupExchange(
            device,
            group,
            member,
            reason=reason,
            board=board,
            cap_us=settings.cap_us,
            patience_us=settings.patience_us,
            pace=pace,
            replicas=replicas,
        )
    return DeviceExchange(
        device,
        member,
        reason=reason,
        board=board,
        plans=member.rank == 0,
        cap_us=settings.cap_us,
        patience_us=settings.patience_us,
        pace=pace,
        core=settings.core,
        replicas=replicas,
    )


def _meet(store: Store, own: _Card, rank: int) -> list[_Card]:
    store.set(f"card/{rank}", json.dumps(asdict(own)))
    cards = []
    for other in range(own.ranks):
        # Compared before the next is waited for, and before it is read as a card: it may be of a rank that
        # counts fewer ranks, or of a version with other fields.
        card = json.loads(store.get(f"card/{other}"))
        for field in _ALIKE:
            mine, theirs = getattr(own, field), card.get(field)
            if mine != theirs:
                raise ValueError(
                    f"{field} is {theirs} on rank {other} and {mine} on rank {rank}: "
                    "start all ranks with the same package and the same settings"
                )
        cards.append(_Card(**card))
    return cards


def _decide(cards: Sequence[_Card]) -> tuple[Name, str]:
    """The same on every rank, because it looks at the cards only."""
    choice, has_group = cards[0].choice, cards[0].process_group
    if choice == "solo":
        return "solo", "it was asked for"
    if len(cards) == 1 and choice != "board":
        return "solo", "there is one rank"
    if choice == "group":
        if cards[0].layers_on == "cpu":
            raise ValueError(
                "the group was asked for and cannot be had: layers are on the CPU, and its collective is one of CUDA devices"
            )
        if not has_group:
            raise ValueError("the group exchange was asked for, and there is no process group")
        return "group", "it was asked for"
    apart = _apart(cards)
    if apart is None:
        return "board", "all ranks are on one host and share its /dev/shm"
    if choice == "board":
        raise ValueError(f"the board was asked for and cannot be had: {apart}")
    return ("group" if has_group else "solo"), apart


def _instead(choice: str, lacking: Name, instead: Name, refusal: str) -> tuple[Name, str]:
    """What is used where ``lacking`` cannot be had, unless that was asked for by name."""
    if choice == lacking:
        raise ValueError(f"the {lacking} was asked for and cannot be had: {refusal}")
    return instead, refusal


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
    store: Store, member: Member, by_expert: bool, redundant: int
) -> tuple[_native.Board | None, str]:
    """The board; or none, and why some rank could not have it. All ranks come to the same.

    ``by_expert``: counts on it are of experts, else of ranks. ``redundant``: experts whose replicas are chosen by it.
    """
    board: _native.Board | None = None
    ranks, rank = member.ranks, member.rank
    experts = member.experts if by_expert else ranks
    try:
        if rank == 0:
            name, run = board_name(), secrets.randbits(128)
            try:
                board = _native.Board.create(name, ranks, experts, run, redundant)
                store.set("board", json.dumps({"name": name, "run": f"{run:x}"}))
            except (OSError, ValueError) as error:
                store.set("board", json.dumps({"refused": str(error)}))
        told = json.loads(store.get("board"))
        if "refused" in told:
            return None, f"rank 0: {told['refused']}"
        word = _HAVE
        if board is None:
            try:
                run = int(told["run"], 16)
                board = _native.Board.attach(told["name"], ranks, experts, run, redundant)
            except (OSError, ValueError) as error:
                word = str(error)
        refusal = _first_refusal(store, "attached", ranks, rank, word)
        return (None, refusal) if refusal else (board, "")
    finally:
        # Everybody is attached, or nobody will be.
        if rank == 0 and board is not None:
            board.unlink()


def _own_board(store: Store, member: Member, redundant: int) -> tuple[_native.Board | None, str]:
    """A board of this process alone; or none, and why some rank could not have one. All ranks come to the same."""
    board: _native.Board | None = None
    word = _HAVE
    experts = member.experts if redundant else member.ranks
    try:
        board = _native.Board.create(
            board_name(), member.ranks, experts, secrets.randbits(128), redundant
        )
        board.unlink()
    except (OSError, ValueError) as error:
        word = str(error)
    refusal = _first_refusal(store, "own", member.ranks, member.rank, word)
    return (None, refusal) if refusal else (board, "")


_HAVE = "attached"


def _first_refusal(store: Store, key: str, ranks: int, rank: int, word: str) -> str:
    """Tell the others this rank's word; the first of all ranks' that is not ``_HAVE``, or empty."""
    store.set(f"{key}/{rank}", word)
    for other in range(ranks):
        if (said := store.get(f"{key}/{other}").decode()) != _HAVE:
            return f"rank {other}: {said}"
    return ""
