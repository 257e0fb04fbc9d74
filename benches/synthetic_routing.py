"""Routing with the statistics of real routing, for those who have no recording. Nothing of a recording is in it.

A token's score for an expert, in each layer anew, is the sum of four normal draws: the expert's popularity, what the
first tokens of every prompt have in common, the prompt's own topic, and the passage's of a few tokens. Experts are drawn
by the exponentials of the scores, without repeats. So popularity is log-normal, and tokens of one text are alike.

The spreads are set so that ``benches/routing.py`` gives about what it gives for DeepSeek-V2-Lite on 620 chat prompts:
benches/README.md says how near.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Sizes of the model and of its prompts, and the spread of each part of a score (standard deviations)."""

    layers: int = 26
    experts: int = 64
    top_k: int = 6
    prompts: int = 620
    median_tokens: float = 34.0
    """Of a prompt. Its tokens are log-normal too, with ``spread_of_tokens``, and at most ``MOST_TOKENS``."""
    spread_of_tokens: float = 1.55
    popularity: float = 0.12
    beginning: float = 0.65
    """Of the first tokens of all prompts. It falls as ``1 / sqrt(1 + position / reach)``."""
    reach: float = 16.0
    topic: float = 0.77
    """Of the median prompt. ``unlike`` is the spread of its logarithm over the prompts: some stay near the average."""
    unlike: float = 0.3
    passage: float = 0.4
    passage_tokens: float = 6.0
    """A passage's mean number of tokens."""


LEAST_TOKENS, MOST_TOKENS = 2, 2800
DEEPSEEK_V2_LITE = Statistics()
SEED = 7


def routing(
    statistics: Statistics = DEEPSEEK_V2_LITE, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids ``[tokens, layers, K]``, int32, and where prompts begin, int64 ``[prompts + 1]``: the same for the same seed.

    Progress goes to standard error.
    """
    of = statistics
    draws = np.random.default_rng(seed)
    lengths = _lengths(of, draws)
    offsets = np.append(0, np.cumsum(lengths))
    prompt = np.repeat(np.arange(of.prompts), lengths)
    position = np.arange(offsets[-1]) - offsets[prompt]
    beginning = of.beginning / np.sqrt(1 + position / of.reach)
    topic = of.topic * np.exp(draws.normal(0, of.unlike, of.prompts))
    begins = (position == 0) | (draws.random(len(prompt)) < 1 / of.passage_tokens)
    passage = np.cumsum(begins) - 1
    topk = np.empty((len(prompt), of.layers, of.top_k), np.int32)
    for layer in range(of.layers):
        scores = _normal(draws, of.popularity, 1, of.experts)
        scores = scores + _scaled(beginning, _normal(draws, 1, 1, of.experts))
        scores += _scaled(topic, _normal(draws, 1, of.prompts, of.experts))[prompt]
        scores += _normal(draws, of.passage, passage[-1] + 1, of.experts)[passage]
        # The k largest of scores with Gumbel's noise are k draws without repeats (Yellott 1977).
        scores -= np.log(draws.standard_exponential(scores.shape, np.float32) + _TINY)
        topk[:, layer] = np.argpartition(-scores, of.top_k - 1)[:, : of.top_k]
        _progress(layer + 1, of.layers)
    return topk, offsets


def expert_rows(
    workloads: int, layers: int, experts: int, rows: int, seed: int = SEED
) -> np.ndarray:
    """Rows of each expert ``[workloads, layers, experts]``, int64, about ``rows`` a layer, like DeepSeek-V3's over long traffic.

    There the logarithms of an expert's rows have a spread of 0.65 in a layer, and two workloads correlate by 2/3.
    """
    draws = np.random.default_rng(seed)
    common = draws.normal(0, 0.65 * np.sqrt(2 / 3), (layers, experts))
    own = draws.normal(0, 0.65 * np.sqrt(1 / 3), (workloads, layers, experts))
    shares = np.exp(common + own)
    return (shares / shares.sum(2, keepdims=True) * rows).astype(np.int64)


_TINY = np.float32(1e-30)


def _lengths(of: Statistics, draws: np.random.Generator) -> np.ndarray:
    """Tokens of each prompt: the quantiles of the distribution, so that no seed has a longer text than another.

    Of each two neighbours in length one becomes an even prompt, the other an odd one: routing.py replays the odd ones.
    """
    quantiles = (np.arange(of.prompts) + 0.5) / of.prompts
    normal = np.array([NormalDist().inv_cdf(quantile) for quantile in quantiles])
    tokens = of.median_tokens * np.exp(of.spread_of_tokens * normal)
    tokens = np.clip(tokens, LEAST_TOKENS, MOST_TOKENS).astype(np.int64)
    for parity in (0, 1):
        tokens[parity::2] = draws.permutation(tokens[parity::2])
    return tokens


def _normal(draws: np.random.Generator, spread: float, *shape: int) -> np.ndarray:
    return draws.standard_normal(shape, np.float32) * np.float32(spread)


def _scaled(factors: np.ndarray, values: np.ndarray) -> np.ndarray:
    return factors.astype(np.float32)[:, None] * values


def _progress(done: int, layers: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\rrouting, layer {done} of {layers}",
            end="\n" if done == layers else "",
            file=sys.stderr,
        )


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".npz"):
        print("usage: synthetic_routing.py ROUTING.npz", file=sys.stderr)
        return 2
    topk, offsets = routing()
    np.savez_compressed(sys.argv[1], topk=topk.astype(np.uint8), offsets=offsets)
    print(f"{sys.argv[1]}: {len(topk)} tokens of {len(offsets) - 1} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
