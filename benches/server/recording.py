"""Routing that is forced on every MoE layer: from sglang's recorder, from an array of top-k ids, or made to a dial.

A recording is a stream of tokens a rank, logical expert ids ``[tokens, layers, K]``; whole prompts follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from server import dial

LEAST_TOKENS = 64
"""A rank; a recording is read round and round."""


@dataclass(frozen=True)
class Recording:
    """``streams``: for each rank ids ``[tokens, layers, K]``, all as long. ``placed``: its ids already are places, as
    a dial's are. ``other``: rows by logical expert ``[layers, experts]`` of traffic that is not in the streams, for
    placements; empty where none is held out."""

    name: str
    experts: int
    streams: list[np.ndarray]
    placed: bool = False
    other: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))

    @property
    def ranks(self) -> int:
        return len(self.streams)

    @property
    def top_k(self) -> int:
        return int(self.streams[0].shape[2])

    @property
    def layers(self) -> int:
        return int(self.streams[0].shape[1])

    @property
    def tokens(self) -> int:
        return len(self.streams[0])


def read(
    path: Path, ranks: int, experts: int | None = None, seed: int = 3, hold_out: bool = False
) -> Recording:
    """An ``.npz`` with ``topk`` and ``offsets``, or a folder of the recorder's dumps (mode per_token).

    Args:
        experts: how many there are, where only ids are known; by default the least power of two above the highest id.
        hold_out: the first half, of a file's prompts or of the dumps' tokens, is for ``other`` alone.

    Raises:
        ValueError: naming the file, what is wrong with it, and what to give.
    """
    if path.suffix == ".npz":
        tokens, offsets = _array(path)
        first = (len(offsets) - 1) // 2 if hold_out else 0
        order = first + np.random.default_rng(seed).permutation(len(offsets) - 1 - first)
        held = tokens[: offsets[first]]
        stream = np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in order])
        experts = experts or 1 << int(tokens.max()).bit_length()
    else:
        stream, found = _dumps(path)
        held, stream = np.split(stream, [len(stream) // 2 if hold_out else 0])
        experts = experts or found
    for part in (held, stream):
        if part.size and int(part.max()) >= experts:
            raise ValueError(f"{path}: has expert {int(part.max())}, and there are {experts}")
    return Recording(path.name, experts, _split(path, stream, ranks), other=counts([held], experts))


def counts(streams: list[np.ndarray], experts: int) -> np.ndarray:
    """Rows by expert ``[layers, experts]`` of ids ``[tokens, layers, K]``."""
    layers = range(streams[0].shape[1])
    by_layer = (np.concatenate([own[:, layer].ravel() for own in streams]) for layer in layers)
    return np.array([np.bincount(ids, minlength=experts) for ids in by_layer])


def _array(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    with np.load(path) as content:
        missing = {"topk", "offsets"} - set(content.files)
        if missing:
            raise ValueError(f"{path}: has {content.files}, and not {', '.join(sorted(missing))}")
        topk, offsets = content["topk"], content["offsets"]
    whole = np.issubdtype(topk.dtype, np.integer) and np.issubdtype(offsets.dtype, np.integer)
    if topk.ndim != 3 or offsets.ndim != 1 or 0 in topk.shape or not whole:
        raise ValueError(
            f"{path}: topk is {topk.dtype} {list(topk.shape)} and offsets {offsets.dtype} {list(offsets.shape)}: "
            "integers [tokens, layers, K] and [prompts + 1] are needed"
        )
    if (
        len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != len(topk)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(
            f"{path}: offsets go from {offsets[:1]} to {offsets[-1:]}, and there are {len(topk)} tokens: "
            "give rising offsets from 0 to that"
        )
    if topk.min() < 0:
        raise ValueError(f"{path}: topk has {int(topk.min())}: ids from 0 on are needed")
    return topk.astype(np.int16), offsets


def _dumps(path: Path) -> tuple[np.ndarray, int]:
    """All tokens of all passes, one recorded rank after the other, and the number of logical experts."""
    from waterfill_rs.replay import dumps

    dump = dumps.read([path], None, None)
    if not isinstance(dump, dumps.Tokens):
        raise ValueError(f"{path}: holds counts: record with mode per_token")
    parts = []
    for rank in range(dump.ranks):
        ids = np.concatenate([tensors[rank].numpy() for tensors in dump.passes.values()], axis=1)
        parts.append(ids[:, :, : dump.top_k])
    ids = np.concatenate(parts, axis=1)
    routed = (ids >= 0).any(axis=(1, 2))  # Dense layers have no ids.
    if dump.mappings:
        mapping = np.array(dump.mappings)
        logical = np.stack([mapping[i][np.maximum(own, 0)] for i, own in enumerate(ids)])
        ids = np.where(ids < 0, -1, logical)
    ids = ids[routed]
    whole = (ids >= 0).all(axis=(0, 2))  # Rows of padding have none either.
    experts = max(dump.mappings[0]) + 1 if dump.mappings else dump.experts
    return np.ascontiguousarray(ids[:, whole].transpose(1, 0, 2)).astype(np.int16), experts


def _split(path: Path, stream: np.ndarray, ranks: int) -> list[np.ndarray]:
    own = len(stream) // ranks
    if own < LEAST_TOKENS:
        raise ValueError(
            f"{path}: {len(stream)} tokens are {own} for each of {ranks} ranks: record {LEAST_TOKENS} or more each"
        )
    return [stream[rank * own : (rank + 1) * own] for rank in range(ranks)]


def synthetic(
    ratio: float,
    ranks: int,
    experts: int,
    top_k: int,
    layers: int,
    tokens: int,
    seed: int = 3,
    hold_out: bool = False,
) -> Recording:
    """Tokens whose routed max/mean over ranks is ``ratio`` in every layer: see ``dial``.

    ``hold_out``: the other traffic is the dial's with another seed, so with other prompts and the same hot ranks.
    """
    shape = (ratio, ranks, experts, top_k, layers, tokens)
    made = Recording(name_of_dial(ratio), experts, dial.streams(*shape, seed), placed=True)
    if not hold_out:
        return made
    return replace(made, other=counts(dial.streams(*shape, seed + 1), experts))


def name_of_dial(ratio: float) -> str:
    return f"dial-{ratio:.2f}"


@dataclass(frozen=True)
class Placement:
    """Where experts are, without redundant ones: ``positions`` ``[layers, experts]``, each logical expert's physical place.
    With redundant ones sglang places them, and ids stay logical: see ``redundant``."""

    name: str
    positions: np.ndarray

    def tables(self, recording: Recording) -> list[np.ndarray]:
        """For each rank physical ids ``[layers, tokens, K]``."""
        layers = np.arange(recording.layers)[:, None, None]
        return [self.positions[layers, own.transpose(1, 0, 2)] for own in recording.streams]


def place(name: str, recording: Recording) -> Placement:
    """``trivial``: expert i at place i. ``packed``: the busiest experts first, each to the rank with the fewest rows.

    Raises:
        ValueError: another name, or experts that do not divide over the ranks.
    """
    experts, ranks = recording.experts, recording.ranks
    if experts % ranks:
        raise ValueError(f"{experts} experts do not divide over {ranks} ranks: take other ranks")
    trivial = np.tile(np.arange(experts, dtype=np.int16), (recording.layers, 1))
    if recording.placed:
        return Placement(recording.name, trivial)
    if name == "trivial":
        return Placement(name, trivial)
    if name != "packed":
        raise ValueError(f"placement {name!r}: give packed or trivial")
    packed = np.empty_like(trivial)
    for layer in range(recording.layers):
        ids = np.concatenate([own[:, layer].ravel() for own in recording.streams])
        counts = np.bincount(ids, minlength=experts)
        packed[layer] = pack(counts, ranks)
    return Placement(name, packed)


def pack(counts: np.ndarray, ranks: int) -> np.ndarray:
    """Places ``[experts]``, by rows ``[experts]``: the busiest first, each to the least busy rank with a free place."""
    capacity = len(counts) // ranks
    rows, used = np.zeros(ranks), np.zeros(ranks, dtype=int)
    places = np.empty(len(counts), dtype=np.int16)
    for expert in np.argsort(-counts, kind="stable"):
        rank = int(np.argmin(np.where(used < capacity, rows, np.inf)))
        places[expert] = rank * capacity + used[rank]
        used[rank] += 1
        rows[rank] += counts[expert]
    return places


def for_decode(recording: Recording, seed: int = 5) -> Recording:
    """The same tokens in another order: a step of decode has a token of each of many prompts.

    A dial's keep theirs, because its order is what holds the ratio: they were made without prompts.
    """
    if recording.placed:
        return recording
    order = np.random.default_rng(seed).permutation(recording.tokens)
    return replace(recording, streams=[own[order] for own in recording.streams])
