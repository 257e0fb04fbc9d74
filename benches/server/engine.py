"""An engine's process: ``python -m server.engine TOLD COMMANDS REPLIES``, with two pipes' descriptors.

``TOLD``: the file that the plugin reads too, with ``arguments`` of ``sglang.Engine``. A command is one round; the reply
has every rank's results. It ends with the commands.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from server.answers import Answers
from server.control import ANSWERED, CLOSED, LAYERS, MIXED, OPEN, Control
from server.modes import MODES
from server.protocol import Closed, Reader, send
from server.traffic import Request, Traffic

WRITTEN_S = 60.0
SETTLE_S = 0.02
"""After the last answer: a forward that was begun ahead of it ends."""


class Rounds:
    """Rounds of one engine.

    Args:
        generate: ``(prompts, new)``: answers all prompts, lists of token ids, with ``new`` tokens each.
        traffic: sends what comes over time.
        answers: asks for what is compared.
        written_s: the longest wait for the ranks' results.
    """

    def __init__(
        self,
        generate: Any,
        traffic: Any,
        answers: Any,
        control: Control,
        folder: Path,
        ranks: int,
        vocabulary: int,
        written_s: float = WRITTEN_S,
    ) -> None:
        self._generate, self._traffic, self._answers = generate, traffic, answers
        self._control, self._folder, self._ranks = control, folder, ranks
        self._vocabulary, self._written_s = vocabulary, written_s
        self._prompts: dict[tuple[int, int], list[list[int]]] = {}

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One round: see ``schedule.message``, ``schedule.mixed_message`` and ``schedule.answers_message``.

        Raises:
            TimeoutError: a rank wrote no results.
            traffic.Unanswered: requests that came over time were not answered by their deadline.
            RuntimeError: an answer that is compared has another number of tokens than was asked for.
        """
        self._set(asked)
        ways = {MIXED: self._mixed, ANSWERED: self._answered, LAYERS: self._answered}
        found = ways.get(asked["kind"], self._full_forwards)(asked)
        time.sleep(SETTLE_S)
        self._control.set(gate=CLOSED, requests=0, asked=asked["round"])
        return {"round": asked["round"], **found, "ranks": self._results(asked["round"])}

    def _set(self, asked: dict[str, Any]) -> None:
        """Tell the ranks what comes; nothing is let in yet."""
        control = self._control
        control.set(gate=CLOSED, requests=0)
        control.list("queued")[:] = 0
        control.list("cycle")[: len(asked["cycle"])] = [
            MODES.index(mode) for mode in asked["cycle"]
        ]
        control.set(
            **{
                name: asked[name]
                for name in ("kind", "tokens", "chunk", "lead", "base", "placement", "location")
            },
            length=len(asked["cycle"]),
            round=asked["round"],
        )

    def _full_forwards(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All requests are there before the first is let in."""
        self._control.set(requests=asked["requests"])
        prompts = self._prompts_of(asked["requests"], asked["prompt"])
        begin = time.monotonic()
        self._generate(prompts, asked["new"])
        return {"seconds": time.monotonic() - begin}

    def _answered(self, asked: dict[str, Any]) -> dict[str, Any]:
        """As full forwards, each rank with prompts of its own; with the answers, rank by rank."""
        self._control.set(requests=asked["requests"])
        prompts = self._prompts_of(asked["requests"], asked["prompt"])
        a_rank = asked["requests"] // self._ranks
        by_rank = [prompts[rank * a_rank : (rank + 1) * a_rank] for rank in range(self._ranks)]
        return {"answers": self._answers.ask(by_rank, asked["new"])}

    def _mixed(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Requests are let in as they come."""
        self._control.set(gate=OPEN)
        sent = [Request(*one) for one in asked["traffic"]]
        seconds, prompt, new = self._traffic.send(sent, asked["window"], asked["deadline"])
        return {"seconds": seconds, "prompt_tokens": prompt, "new_tokens": new}

    def _prompts_of(self, requests: int, length: int) -> list[list[int]]:
        """The same in every engine and round."""
        key = (requests, length)
        if key not in self._prompts:
            numbers = random.Random(7)
            self._prompts[key] = [
                [numbers.randrange(5, self._vocabulary) for _ in range(length)]
                for _ in range(requests)
            ]
        return self._prompts[key]

    def _results(self, number: int) -> list[dict[str, Any]]:
        end = time.monotonic() + self._written_s
        written = self._control.list("written")
        while (written[: self._ranks] != number).any():
            if time.monotonic() > end:
                late = [rank for rank in range(self._ranks) if written[rank] != number]
                raise TimeoutError(
                    f"ranks {late} wrote no results of round {number} in {self._written_s:g} s"
                )
            time.sleep(0.002)
        results = []
        for rank in range(self._ranks):
            path = self._folder / f"round-{number}-{rank}.json"
            results.append(json.loads(path.read_text()))
            path.unlink()
        return results


def serve(reader: Reader, replies: int, rounds: Rounds) -> None:
    """Answer commands until there are no more; a round that fails is told, and ends it."""
    while True:
        try:
            asked = reader.next()
        except Closed:
            return
        try:
            send(replies, rounds.run(asked))
        except Closed:
            return
        except Exception as error:
            send(replies, {"failed": f"round {asked.get('round')}: {error!r}"})
            return


def main(told_path: str, commands: str, replies_text: str) -> None:
    replies = int(replies_text)
    os.set_inheritable(replies, False)
    os.set_inheritable(int(commands), False)
    told = json.loads(Path(told_path).read_text())
    begin = time.monotonic()
    import sglang

    engine = sglang.Engine(**told["arguments"])

    def generate(prompts: list[list[int]], new: int) -> None:
        sampling = {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True}
        engine.generate(input_ids=prompts, sampling_params=sampling)

    try:
        control = Control(Path(told["control"]))
        rounds = Rounds(
            generate,
            Traffic(engine, told["vocabulary"]),
            Answers(engine),
            control,
            Path(told["folder"]),
            told["ranks"],
            told["vocabulary"],
        )
        send(replies, {"ready": time.monotonic() - begin, "sglang": sglang.__version__})
        serve(Reader(int(commands)), replies, rounds)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
