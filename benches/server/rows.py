"""What placements of the shared rows make of a recording, by the package's own models: rows of the slowest rank over the mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch

from waterfill_rs.policies.comparison import Batch, Layer, compare
from waterfill_rs.replay import sglang_waterfill

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
    for place in places:
        index = (place * tokens + np.arange(tokens)) % tables[0].shape[1]
        for layer in range(tables[0].shape[0]):
            ids = [np.ascontiguousarray(own[layer, index], dtype=np.int32) for own in tables]
            for name, value in _layer(ids, experts).items():
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


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
