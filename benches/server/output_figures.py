"""Answers compared, to the bit: entries of the results, and what is printed of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from server.answers import number
from server.modes import MODES
from server.redundant import Place

Answers = Sequence[Mapping[str, Sequence[int]]]
"""One engine's, prompt by prompt: see ``answers.Answers.ask``."""

Who = tuple[str, Place | None]
"""A mode, and where its engine's experts are placed, or None where they stand in order."""

HEAD = "| phase | mode | first answers to those of off | second answers to the first | tokens, different ones |"
PLACED_HEAD = (
    "| phase | mode | placement | first answers to those of off | to those of off-static | second answers to the first "
    "| tokens, different ones |"
)
SAME = "equal bit for bit"


def entries(phase: str, answers: Mapping[Who, Sequence[Answers]]) -> list[dict[str, Any]]:
    """Those of the results' ``outputs``, one for each that answered, in the order of modes.

    Args:
        answers: the first and the second, and off's with other experts.
    """
    return [_entry(phase, who, answers) for mode in MODES for who in answers if who[0] == mode]


def _entry(phase: str, who: Who, answers: Mapping[Who, Sequence[Answers]]) -> dict[str, Any]:
    """``different``: how many different tokens there are among all. ``to_static``: to ``off-static`` of the same placement.
    ``other_experts``: the same prompts with other experts, to the first."""
    mode, place = who
    first, second, *other = answers[who]
    name, redundant = place or (None, 0)

    def to(reference: Who) -> dict[str, Any] | None:
        known = reference in answers and who != reference
        return compared(answers[reference][0], first) if known else None

    return {
        "phase": phase,
        "mode": mode,
        "placement": name,
        "redundant": redundant,
        "prompts": len(first),
        "tokens": sum(len(one["tokens"]) for one in first),
        "different": len({token for one in first for token in one["tokens"]}),
        "repeated": compared(first, second),
        "to_off": to(("off", None)),
        "to_static": to(("off-static", place)),
        "other_experts": compared(first, other[0]) if other else None,
    }


def name(mode: str, place: Place | None) -> str:
    """Of who answered, as it is printed."""
    return f"{mode} ({place[0]} + {place[1]})" if place else mode


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
    placed = any(entry.get("placement") for entry in found)
    head = PLACED_HEAD if placed else HEAD
    rows = [_row(entry, placed) for entry in found]
    table = "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])
    about = "Outputs, the same prompts to every engine, twice. Tokens are equal until a prompt's first difference:"
    phases = dict.fromkeys(entry["phase"] for entry in found)
    told = [_verdict(name, [one for one in found if one["phase"] == name]) for name in phases]
    return [f"{about}\n\n{table}", "\n".join(f"- {line}" for of in told for line in of)]


def _row(entry: Mapping[str, Any], placed: bool) -> str:
    def words(name: str) -> str:
        return _words(entry[name], entry["tokens"]) if entry.get(name) else ""

    where = f"{entry['placement']} + {entry['redundant']}" if entry.get("placement") else ""
    fields = [
        entry["phase"],
        entry["mode"],
        *([where] if placed else []),
        words("to_off"),
        *([words("to_static")] if placed else []),
        words("repeated"),
        f"{entry['tokens']}, {entry['different']}",
    ]
    return "| " + " | ".join(fields) + " |"


def _name(entry: Mapping[str, Any]) -> str:
    place = entry.get("placement")
    return name(entry["mode"], (place, entry["redundant"]) if place else None)


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
    if other := off.get("other_experts"):
        words = _words(other, off["tokens"])
        told.append(
            f"{phase}: off with other experts beside off, which is how wrong ones look: {words}."
        )
    same = [_name(entry) for entry in found if _proves(entry) and off["repeated"]["equal"]]
    if same:
        told.append(
            f"{phase}: {_listed(same)} computes what off computes, bit for bit: {off['tokens']} tokens and their logprobs."
        )
    for entry in found:
        who = _name(entry)
        for reference, key in (("off", "to_off"), ("off-static", "to_static")):
            if entry.get(key) and who not in same:
                words = _words(entry[key], entry["tokens"])
                told.append(f"{phase}: {who} beside {reference}, first answers: {words}.")
        if who != "off" and not entry["repeated"]["equal"]:
            told.append(f"{phase}: {who} does not repeat itself bit for bit.")
    return told


def _proves(entry: Mapping[str, Any]) -> bool:
    """Is it equal to off, twice, in numbers?"""
    to_off = entry["to_off"]
    return bool(to_off and to_off["equal"] and to_off["finite"] and entry["repeated"]["equal"])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"each of {', '.join(names)}"
