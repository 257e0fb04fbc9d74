"""Answers of one engine to the bit: tokens, and the logarithm of each one's probability."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Any

from server.traffic import rank_argument


class Answers:
    """Asks one engine: ``engine`` is sglang's."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._rank = engine, rank_argument(engine)

    def ask(self, prompts: Sequence[list[list[int]]], new: int) -> list[dict[str, list[int]]]:
        """The most likely tokens, step by step: ``new`` after each prompt.

        Args:
            prompts: by rank, as token ids.

        Returns:
            For each prompt, rank by rank, its ``tokens`` and ``logprobs``: the bits of float32 numbers, see ``number``.

        Raises:
            RuntimeError: an answer has another number of tokens than was asked for.
        """
        return self._engine.loop.run_until_complete(self._ask(prompts, new))

    async def _ask(
        self, prompts: Sequence[list[list[int]]], new: int
    ) -> list[dict[str, list[int]]]:
        by_rank = await asyncio.gather(
            *(self._of_rank(rank, own, new) for rank, own in enumerate(prompts))
        )
        return [_told(answer, new) for own in by_rank for answer in own]

    async def _of_rank(self, rank: int, prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
        sampling = {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True}
        return await self._engine.async_generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=True, **{self._rank: rank}
        )


def number(bits: int) -> float:
    """The float32 number of these bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def bits(value: float) -> int:
    """Of a number that is one of float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _told(answer: dict[str, Any], new: int) -> dict[str, list[int]]:
    # Each is a logprob, a token id, and its text or None.
    told = answer["meta_info"]["output_token_logprobs"]
    if len(told) != new:
        raise RuntimeError(f"an answer has {len(told)} tokens, and {new} were asked for")
    return {"tokens": [one[1] for one in told], "logprobs": [bits(one[0]) for one in told]}
