"""Requests as a server with users has them: uneven lengths, over time, uneven over the ranks; and how an engine is sent them."""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHORTEST_PROMPT, LONGEST_PROMPT = 64, 3000
FEWEST_NEW, MOST_NEW = 16, 200
PARTS = (("even", 0.0, 0.35, 0.45), ("one rank", 0.35, 0.7, 0.25), ("burst", 0.85, 0.87, 0.30))
"""Name, begin and end in shares of the window, and share of the requests. In the second all go to one rank, and the others
run dry. Then nobody sends anything. The burst goes to all ranks, half of it to the next one."""


class Unanswered(Exception):
    """The deadline came first."""


@dataclass(frozen=True)
class Request:
    """``at``: when it is sent, as a share of the window. ``prompt``, ``new``: tokens."""

    at: float
    rank: int
    prompt: int
    new: int


def requests(count: int, ranks: int, number: int, seed: int = 11) -> list[Request]:
    """Those of round ``number``, in the order of their times; the same for the same seed.

    The lengths are those of every round, so that no round compiles what none before it did. Which request is sent when
    and where is another one each round, and so is the rank that all requests of a part go to.

    Raises:
        ValueError: fewer requests than four a rank.
    """
    if count < 4 * ranks:
        raise ValueError(f"{count} requests for {ranks} ranks: give {4 * ranks} or more")
    lengths = random.Random(seed)
    sizes = [
        (
            _between(lengths, SHORTEST_PROMPT, LONGEST_PROMPT),
            _between(lengths, FEWEST_NEW, MOST_NEW),
        )
        for _ in range(count)
    ]
    order = random.Random(f"{seed}/{number}")
    order.shuffle(sizes)
    hot = number % ranks
    found = []
    for i, (prompt, new) in enumerate(sizes):
        name, begin, end = _part((i + 0.5) / count)
        if name == "one rank":
            rank = hot
        elif name == "burst" and order.random() < 0.5:
            rank = (hot + 1) % ranks
        else:
            rank = order.randrange(ranks)
        found.append(Request(round(order.uniform(begin, end), 5), rank, prompt, new))
    return sorted(found, key=lambda request: request.at)


def _between(numbers: random.Random, least: int, most: int) -> int:
    """As likely between 100 and 200 as between 1000 and 2000."""
    return round(math.exp(numbers.uniform(math.log(least), math.log(most))))


def _part(place: float) -> tuple[str, float, float]:
    """Name, begin and end of the part that has the request at this share of all requests."""
    until = 0.0
    for part in PARTS[:-1]:
        until += part[3]
        if place < until:
            return part[:3]
    return PARTS[-1][:3]


def rank_argument(engine: Any) -> str:
    """Of ``async_generate``: which rank a request is for."""
    known = inspect.signature(engine.async_generate).parameters
    # Its name before sglang 0.5.16.
    return "routed_dp_rank" if "routed_dp_rank" in known else "data_parallel_rank"


class Traffic:
    """Sends requests to one engine.

    Args:
        engine: sglang's.
        vocabulary: prompts have token ids below it.
    """

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._rank = rank_argument(engine)

    def send(
        self, asked: Sequence[Request], window: float, deadline: float
    ) -> tuple[float, int, int]:
        """Send all and wait for all answers: seconds from the first request's time to the last answer, prompt tokens, and
        new tokens.

        Args:
            window: seconds over which requests come.
            deadline: seconds for everything.

        Raises:
            Unanswered: not all were answered by then; with how many are missing of each rank.
            RuntimeError: an answer has another number of tokens than was asked for.
        """
        return self._engine.loop.run_until_complete(self._send(asked, window, deadline))

    async def _send(
        self, asked: Sequence[Request], window: float, deadline: float
    ) -> tuple[float, int, int]:
        prompts = [self._prompt(i, request.prompt) for i, request in enumerate(asked)]
        begin = time.monotonic()
        tasks = [
            asyncio.ensure_future(self._one(request, prompt, begin + request.at * window))
            for request, prompt in zip(asked, prompts, strict=True)
        ]
        late = (await asyncio.wait(tasks, timeout=deadline))[1]
        seconds = time.monotonic() - begin
        if late:
            missing = Counter(
                request.rank for request, task in zip(asked, tasks, strict=True) if task in late
            )
            for task in late:
                task.cancel()
            raise Unanswered(
                f"{len(late)} of {len(asked)} requests had no answer in {deadline:.0f} s; by rank: {dict(sorted(missing.items()))}"
            )
        new = [task.result() for task in tasks]
        for request, count in zip(asked, new, strict=True):
            if count != request.new:
                raise RuntimeError(
                    f"an answer has {count} tokens, and {request.new} were asked for"
                )
        return seconds, sum(request.prompt for request in asked), sum(new)

    async def _one(self, request: Request, prompt: list[int], at: float) -> int:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        sampling = {"max_new_tokens": request.new, "temperature": 0.0, "ignore_eos": True}
        answer = await self._engine.async_generate(
            input_ids=prompt, sampling_params=sampling, **{self._rank: request.rank}
        )
        return int(answer["meta_info"]["completion_tokens"])

    def _prompt(self, i: int, length: int) -> list[int]:
        numbers = random.Random(i)
        return [numbers.randrange(5, self._vocabulary) for _ in range(length)]
