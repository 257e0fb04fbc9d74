"""The doctor's advice on the planner is one that the ranks of this machine take."""

import pytest

from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.operate import checks

torch = pytest.importorskip("torch", reason="torch is not installed")


def test_ranks_on_gpus_are_never_told_to_plan_inline():
    with pytest.raises(ValueError, match="planner inline with layers on a CUDA device"):
        open_exchange(
            None,
            Member(1, 1, 0),
            settings=BoardSettings(pace="inline"),
            device=torch.device("cuda"),
        )
    for cores, quota in ((8, None), (64, 8.0), (64, 32.0)):
        assert "PLANNER=park" in checks.cpus(cores, quota, 8, "spin", gpus=8).advice
        assert "PLANNER=inline" in checks.cpus(cores, quota, 8, "spin", gpus=0).advice


def test_inline_beside_gpus_fails():
    found = checks.cpus(64, None, 8, "inline", gpus=8)
    assert found.severity == "fail" and "WATERFILL_RS_PLANNER=auto" in found.advice
    assert checks.cpus(64, None, 8, "inline", gpus=0).severity == "ok"
