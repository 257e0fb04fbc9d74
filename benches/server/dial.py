"""Synthetic routing to a dial: routed max/mean over ranks as asked, in every window of tokens; correlated within a rank."""

from __future__ import annotations

import sys
import time

import numpy as np

WINDOW = 64
"""Tokens a rank in which the ratio holds, as near as whole rows allow; what is left goes to the next window."""
PROMPT = 512
SIGMA = 0.7
"""Of the logarithm of an expert's popularity within a prompt."""
DISTINCT_LAYERS = 8
"""Made anew; the layers after them are these again."""
LOWEST, HIGHEST = 1.0, 1.5


def streams(
    ratio: float, ranks: int, experts: int, top_k: int, layers: int, tokens: int, seed: int
) -> list[np.ndarray]:
    """Ids ``[tokens, layers, K]`` for each rank; the same for the same seed.

    In layer l the hottest rank is ``l % ranks``, and the others have equal shares of the rest. Each prompt has its own
    popular experts, so that a rank's own counts say little of all ranks'.

    Raises:
        ValueError: a ratio beyond the dial's range, or one that so few ranks cannot have.
    """
    if not LOWEST <= ratio <= HIGHEST:
        raise ValueError(f"dial {ratio}: give {LOWEST} to {HIGHEST}")
    if ratio > 1 and (ratio >= ranks or experts < ranks * (top_k + 1)):
        raise ValueError(
            f"dial {ratio} with {experts} experts on {ranks} ranks, top {top_k}: take more ranks or experts"
        )
    made = []
    last = time.monotonic()
    for layer in range(min(layers, DISTINCT_LAYERS)):
        random = np.random.default_rng([seed, layer])
        hot = layer % ranks
        ids = np.stack(
            [_tokens(random, ratio, ranks, experts, top_k, tokens, hot) for _ in range(ranks)]
        )
        _level(random, ids, target(ratio, ranks, hot), experts)
        made.append(ids)
        if time.monotonic() - last > 1:
            last = time.monotonic()
            print(
                f"dial {ratio}: layer {layer + 1} of {min(layers, DISTINCT_LAYERS)}",
                file=sys.stderr,
            )
    return [
        np.stack([made[layer % len(made)][rank] for layer in range(layers)], axis=1)
        for rank in range(ranks)
    ]


def target(ratio: float, ranks: int, hot: int) -> np.ndarray:
    """Each rank's share of the routed rows, ``[ranks]``."""
    shares = np.full(ranks, (ranks - ratio) / max(1, ranks - 1) / ranks)
    shares[hot] = ratio / ranks
    return shares


def _tokens(
    random: np.random.Generator,
    ratio: float,
    ranks: int,
    experts: int,
    top_k: int,
    tokens: int,
    hot: int,
) -> np.ndarray:
    """One rank's ids ``[tokens, K]``: K different experts each, drawn by the prompt's popularity."""
    prompts = -(-tokens // PROMPT)
    logs = random.normal(0, SIGMA, (prompts, experts))
    if ratio > 1:
        odds = ratio * (ranks - 1) / (ranks - ratio)
        logs[:, hot * experts // ranks : (hot + 1) * experts // ranks] += np.log(odds)
    logs = np.repeat(logs, PROMPT, axis=0)[:tokens] + random.gumbel(size=(tokens, experts))
    return np.argpartition(-logs, top_k - 1, axis=1)[:, :top_k].astype(np.int16)


def _level(random: np.random.Generator, ids: np.ndarray, shares: np.ndarray, experts: int) -> None:
    """Move as few of ``ids`` ``[ranks, tokens, K]`` as it takes to other ranks' experts, window by window."""
    ranks, tokens, top_k = ids.shape
    owed = np.zeros(ranks)
    for begin in range(0, tokens, WINDOW):
        window = ids[:, begin : begin + WINDOW].reshape(-1, top_k)
        owed += shares * window.size
        wanted = _whole(owed, window.size)
        owed -= wanted
        _move(random, window, wanted, experts // ranks)
        ids[:, begin : begin + WINDOW] = window.reshape(ranks, -1, top_k)


def _whole(owed: np.ndarray, total: int) -> np.ndarray:
    """Rounded so that the sum is ``total``: the largest remainders are rounded up."""
    wanted = np.floor(owed).astype(int)
    for rank in np.argsort(wanted - owed, kind="stable")[: total - int(wanted.sum())]:
        wanted[rank] += 1
    return wanted


def _move(
    random: np.random.Generator, window: np.ndarray, wanted: np.ndarray, capacity: int
) -> None:
    """Change ids of ``window`` ``[tokens, K]`` in place until each rank has ``wanted`` of them."""
    surplus = np.bincount((window // capacity).ravel(), minlength=len(wanted)) - wanted
    for place in random.permutation(window.size):
        row, column = divmod(int(place), window.shape[1])
        source = int(window[row, column]) // capacity
        if surplus[source] <= 0:
            continue
        taken = set(window[row].tolist())
        for rank in np.argsort(surplus, kind="stable")[: int((surplus < 0).sum())]:
            free = [e for e in range(rank * capacity, (rank + 1) * capacity) if e not in taken]
            if free:
                window[row, column] = free[int(random.integers(len(free)))]
                surplus[source] -= 1
                surplus[rank] += 1
                break
        if not (surplus > 0).any():
            return
