"""Answers compared, to the bit: entries of the results, and what is printed of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from server.answers import number
from server.modes import MODES

Answers = Sequence[Mapping[str, Sequence[int]]]
"""One engine's, prompt by prompt: see ``answers.Answers.ask``."""

HEAD = "| phase | mode | first answers to those of off | second answers to the first | tokens, different ones |"
SAME = "equal bit for bit"


def entries(phase: str, answers: Mapping[str, Sequence[Answers]]) -> list[dict[str, Any]]:
    """One for each mode of the results' ``outputs``.

    Args:
        answers: by mode, the first and the second.
    """
    off = answers.get("off")
    return [
        _entry(phase, mode, *answers[mode], off[0] if off else None)
        for mode in MODES
        if mode in answers
    ]


def _entry(
    phase: str, mode: str, first: Answers, second: Answers, off: Answers | None
) -> dict[str, Any]:
    """``different``: how many different tokens there are among all."""
    return {
        "phase": phase,
        "mode": mode,
        "prompts": len(first),
        "tokens": sum(len(one["tokens"]) for one in first),
        "different": len({token for one in first for token in one["tokens"]}),
        "repeated": compared(first, second),
        "to_off": compared(off, first) if off is not None and mode != "off" else None,
    }


def compared(one: Answers, other: Answers) -> dict[str, Any]:
    """Two engines' answers to the same prompts, or two of the same engine.

    ``equal``: are all tokens the same, and all bits of their logprobs? ``equal_tokens``: those of each prompt until its first
    difference, over all prompts, and ``equal_logprobs`` those of them whose logprobs are the same to the bit.
    ``first_difference``: the earliest place of a token that differs, or None. ``logprob_difference``: the largest one over
    equal tokens, or None where there are none or one is no finite number, which ``finite`` tells.
    """
    common = [_common(a, b) for a, b in zip(one, other, strict=True)]
    pairs = [pair for of in common for pair in of]
    total = sum(len(a["tokens"]) for a in one)
    same = sum(a == b for a, b in pairs)
    numbers = [(number(a), number(b)) for a, b in pairs]
    finite = all(math.isfinite(value) for pair in numbers for value in pair)
    return {
        "equal": len(pairs) == same == total,
        "equal_tokens": len(pairs),
        "equal_logprobs": same,
        "first_difference": None if len(pairs) == total else min(map(len, common)),
        "logprob_difference": max(abs(a - b) for a, b in numbers) if finite and numbers else None,
        "finite": finite,
    }


def _common(a: Mapping[str, Sequence[int]], b: Mapping[str, Sequence[int]]) -> list[Any]:
    """Both logprobs of each token until the first that differs."""
    both = list(zip(a["tokens"], b["tokens"], strict=True))
    length = next((i for i, (x, y) in enumerate(both) if x != y), len(both))
    return list(zip(a["logprobs"][:length], b["logprobs"][:length], strict=True))


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table and the verdicts, or nothing."""
    if not found:
        return []
    rows = [_row(entry) for entry in found]
    table = "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *rows])
    about = "Outputs, the same prompts to every engine, twice. Tokens are equal until a prompt's first difference:"
    phases = dict.fromkeys(entry["phase"] for entry in found)
    told = [_verdict(name, [one for one in found if one["phase"] == name]) for name in phases]
    return [f"{about}\n\n{table}", "\n".join(f"- {line}" for of in told for line in of)]


def _row(entry: Mapping[str, Any]) -> str:
    fields = (
        entry["phase"],
        entry["mode"],
        _words(entry["to_off"], entry["tokens"]) if entry["to_off"] else "",
        _words(entry["repeated"], entry["tokens"]),
        f"{entry['tokens']}, {entry['different']}",
    )
    return "| " + " | ".join(fields) + " |"


def _words(comparison: Mapping[str, Any], tokens: int) -> str:
    if not comparison["finite"]:
        return "logprobs that are no finite numbers: nothing can be said"
    if comparison["equal"]:
        return SAME
    first = comparison["first_difference"]
    equal = f"{comparison['equal_tokens']} of {tokens} tokens equal"
    equal = (
        f"all {tokens} tokens equal"
        if first is None
        else f"{equal}, the first difference at {first}"
    )
    most = comparison["logprob_difference"]
    return equal if most is None else f"{equal}, logprobs differ by at most {most:.2g}"


def _verdict(phase: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A phase's, in sentences. Equal answers of an engine that does not repeat itself prove nothing."""
    off = next((entry for entry in found if entry["mode"] == "off"), None)
    if off is None:
        return [f"{phase}: off did not answer, so there is nothing to compare with."]
    told = []
    if not off["repeated"]["equal"]:
        told.append(
            f"{phase}: off does not repeat itself bit for bit, so no engine can be held to it bit for bit."
        )
    same = [entry["mode"] for entry in found if _proves(entry) and off["repeated"]["equal"]]
    if same:
        told.append(
            f"{phase}: {_listed(same)} computes what off computes, bit for bit: {off['tokens']} tokens and their logprobs."
        )
    for entry in found:
        mode = entry["mode"]
        if entry["to_off"] and mode not in same:
            words = _words(entry["to_off"], entry["tokens"])
            told.append(f"{phase}: {mode} beside off, first answers: {words}.")
        if mode != "off" and not entry["repeated"]["equal"]:
            told.append(f"{phase}: {mode} does not repeat itself bit for bit.")
    return told


def _proves(entry: Mapping[str, Any]) -> bool:
    """Is it equal to off, twice, in numbers?"""
    to_off = entry["to_off"]
    return bool(to_off and to_off["equal"] and to_off["finite"] and entry["repeated"]["equal"])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"each of {', '.join(names)}"
