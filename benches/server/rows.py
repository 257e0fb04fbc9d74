"""What placements of the shared rows make of a recording, by the package's own models: rows of the slowest rank over the mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

import waterfill_rs
from waterfill_rs.placement import place
from waterfill_rs.policies.comparison import Batch, Layer, compare
from waterfill_rs.replay import sglang_waterfill

Policy = Literal["joint", "single_replica"]

POLICIES = {"home": "home", "sglang": "sglang-static", "own": "own-counts", "live": "live"}
"""Modes, and the models' names for them."""


def modelled(
    tables: Sequence[np.ndarray], places: Sequence[int], tokens: int, experts: int
) -> dict[str, float]:
    """Means over layers and forwards of max/mean for each mode of ``POLICIES``, of ``routed`` rows alone, and the ``optimum``.

    Args:
        tables: for each rank physical ids ``[layers, tokens of the recording, K]``.
        places: which forwards: forward p has the tokens from ``p * tokens`` on, round and round.
    """
    found: dict[str, list[float]] = {}
    for at in places:
        index = (at * tokens + np.arange(tokens)) % tables[0].shape[1]
        for layer in range(tables[0].shape[0]):
            ids = [np.ascontiguousarray(own[layer, index], dtype=np.int32) for own in tables]
            for name, value in _layer(ids, experts).items():
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def placed(
    tables: Sequence[np.ndarray],
    places: Sequence[int],
    tokens: int,
    mapping: Sequence[Sequence[int]],
    fused: bool,
) -> dict[str, float]:
    """Means over layers and forwards of what a placement allows: max/mean of the ``optimum``, of routed rows alone
    ``routed_optimum``, of routed rows whose replicas have equal parts ``even``, and ``least_active``: experts of the rank that
    has most of them with rows, where each expert's rows are on one replica.

    Args:
        tables: for each rank logical ids ``[layers, tokens of the recording, K]``.
        mapping: ``[layers, P]``, the logical expert of each physical one.
        fused: are shared rows in the optimum?
    """
    found: dict[str, list[float]] = {}
    ranks = len(tables)
    for at in places:
        index = (at * tokens + np.arange(tokens)) % tables[0].shape[1]
        for layer, own in enumerate(mapping):
            ids = np.concatenate([table[layer, index].ravel() for table in tables])
            rows = np.bincount(ids, minlength=max(own) + 1).tolist()
            for name, value in _placed_layer(own, rows, ranks, tokens if fused else 0).items():
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _placed_layer(
    mapping: Sequence[int], rows: list[int], ranks: int, shared: int
) -> dict[str, float]:
    """``shared``: rows of each rank's tokens."""
    best = {
        name: _plan(mapping, rows, [more] * ranks, "joint").optimum / (sum(rows) / ranks + more)
        for name, more in (("optimum", shared), ("routed_optimum", 0))
    }
    single = np.array(_plan(mapping, rows, [0] * ranks, "single_replica").replica_rows)
    return best | {
        "even": place.even(mapping, rows, ranks),
        "least_active": float((single.reshape(ranks, -1) > 0).sum(1).max()),
    }


def _plan(
    mapping: Sequence[int], rows: list[int], tokens: list[int], policy: Policy
) -> waterfill_rs.Plan:
    """Of all ranks' rows by logical expert. A plan moves them as it likes, so here they come at the first replicas."""
    first = {expert: slot for slot, expert in reversed(list(enumerate(mapping)))}
    routed = [rows[e] if first[e] == slot else 0 for slot, e in enumerate(mapping)]
    return waterfill_rs.plan(
        routed, tokens, ranks=len(tokens), physical_to_logical=mapping, policy=policy
    )


def _layer(ids: list[np.ndarray], experts: int) -> dict[str, float]:
    ranks = len(ids)
    batches = [
        Batch.of(own, own.ctypes.data, *own.shape, experts=experts, ranks=ranks) for own in ids
    ]
    sglangs = {}
    if sglang_waterfill.serves(ranks):
        shape = {"physical_experts": experts, "ranks": ranks}
        chosen = [
            sglang_waterfill.static_ranks(torch.from_numpy(own), rank=rank, **shape)
            for rank, own in enumerate(ids)
        ]
        sglangs["sglang-static"] = [_words(own) for own in chosen]
    layer = Layer.of_batches(0, 0, batches, sglangs=sglangs)
    results = {result.policy: result for result in compare(layer, list(POLICIES.values()))}
    values = {
        mode: results[policy].max / results[policy].mean
        for mode, policy in POLICIES.items()
        if policy in results
    }
    live = results["live"]
    routed = sum(layer.routed) / ranks
    return values | {"routed": live.routed_max / routed, "optimum": live.optimum / live.mean}


def _words(chosen: torch.Tensor):
    from array import array

    return array("i", chosen.tolist())
