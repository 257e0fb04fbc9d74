"""A replay as JSON: what was read and assumed, a summary of each phase, and every layer, pass and policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from waterfill_rs import __version__
from waterfill_rs.outputs import write_json
from waterfill_rs.policies import summary, verdict
from waterfill_rs.policies.comparison import Result
from waterfill_rs.policies.report import Compared
from waterfill_rs.policies.summary import of
from waterfill_rs.replay import hottest

__all__ = ["write"]


def write(path: Path, replayed: list[Compared], paths: Sequence[Path], cost_model: str) -> None:
    """One recording as an object; several as ``compared``, a list of such objects. The file is whole or not there.

    ``paths``: what was given to read; ``cost_model``: as it was given.

    Raises:
        ValueError: naming a file that cannot be written.
    """
    about = {
        "version": __version__,
        "paths": [str(one) for one in paths],
        "cost_model": cost_model,
        "unit": "rows" if cost_model == "rows" else "picoseconds",
    }
    objects = [_object(one, timed=about["unit"] == "picoseconds") for one in replayed]
    if len(objects) == 1:
        write_json(path, **about, **objects[0])
    else:
        write_json(path, **about, compared=objects)


def _object(one: Compared, timed: bool) -> dict[str, object]:
    shape = {name: getattr(one, name) for name in ("recording", "ranks", "experts", "redundant")}
    phases = [
        _phase(phase, results, one, timed)
        for phase, results in summary.by_phase(one.results).items()
    ]
    return {
        **shape,
        "top_k": one.top_k,
        "trivial": one.trivial,
        "notes": one.notes,
        "summary": {"phases": phases, **_gained(one.results)},
        "rows": (result.as_json() for result in one.results),
    }


def _phase(
    phase: str | None, results: list[Result], one: Compared, timed: bool
) -> dict[str, object]:
    policies = summary.present(results)
    first = of(results, policies[0])
    ratio, microseconds = summary.bound(results)
    found: dict[str, object] = {
        "phase": phase,
        "passes": summary.passes(results),
        "layers": len({result.layer for result in results}),
        "level_share": summary.level_share(first),
        "bound": {"ratio": ratio, **({"us_a_pass": microseconds} if timed else {})},
        "policies": {policy: _policy(of(results, policy), timed) for policy in policies},
        "rank_loads": {policy: hottest.rank_loads(of(results, policy)) for policy in policies},
        "routed": {c: own.as_json(timed) for c, own in one.routed.get(phase, {}).items()},
        "hottest": [asdict(expert) for expert in one.hottest.get(phase, [])],
    }
    home = of(results, "home")
    if home:
        found["gain"] = {
            policy: summary.gain(home, of(results, policy))
            for policy in policies
            if policy != "home"
        }
    return found | (_gained(results) if phase != "decode" else {"verdict": None})


def _policy(results: list[Result], timed: bool) -> dict[str, float | None]:
    found = {
        "ratio": summary.ratio(results),
        "worst": max(result.max / result.home_mean for result in results),
        "extra_copies": summary.copies_a_token(results),
    }
    return found | ({"us_a_pass": summary.microseconds(results)} if timed else {})


def _gained(results: list[Result]) -> dict[str, object]:
    """What live counts take off, to which decode adds none, and the verdict in words; None where it is not known."""
    home, live = of(results, "home"), of(results, "live")
    balanced = [result for result in home if result.phase != "decode"]
    if not balanced or not live:
        return {"live_gain": None, "verdict": None}
    part = verdict.total_gain(home, live)
    return {"live_gain": part, "verdict": verdict.verdict_of(balanced, part)}
