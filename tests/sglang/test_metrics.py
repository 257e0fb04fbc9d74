"""The metrics as Prometheus reads them: real processes, prometheus_client's multiprocess folder, sglang's page."""

import os
import subprocess
import sys
import types

import pytest

pytest.importorskip("prometheus_client", reason="prometheus_client comes with sglang: make test")
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

import waterfill_rs
from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.ends import SoloEnd
from waterfill_rs.exchange.member import Member
from waterfill_rs.sglang import metrics

RANK = """
import sys
from array import array
from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.ends import BoardEnd
from waterfill_rs.exchange.member import Member
from waterfill_rs.sglang.metrics import INTERVAL_S, Page

rank, name = int(sys.argv[1]), sys.argv[2]
assert "prometheus_client" not in sys.modules, "sglang sets its folder first"
board = _native.Board.attach(name, 2, 4, 7)
exchange = BoardEnd(
    board, Member(2, 4, rank), CostModel.rows(), cap_us=60_000_000, patience_us=3_000_000, pace="inline", reason="a test"
)
now = 0.0
page = Page(clock=lambda: now)
page.watch(exchange, leads=rank == 0)
shared = {"overlapped": 3, "fused": 1}
page.shared.append(shared)
labels = {"model_name": "m", "tp_rank": rank}
ids = array("i", [0, 0, 0, 1, 0, 1, 2, 0] * 4)


def calls(count):
    for _ in range(count):
        exchange.expand_array(ids, 2)


calls(15)
page.push(labels)
calls(5)
page.push(labels)  # a moment later: nothing is done
now += INTERVAL_S
calls(20)
shared["overlapped"] += 4
page.push(labels)
print("pushed", flush=True)
if rank == 0:
    sys.stdin.readline()  # rank 1 has ended
    now += INTERVAL_S
    calls(1)
    page.push(labels)
    print("pushed", flush=True)
    sys.stdin.readline()
"""


def read(folder):
    """Every sample on the page, by name and the labels that tell it from others."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    common = {"model_name", "engine_type", "pp_rank", "moe_ep_rank"}
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k not in common)): s.value
        for metric in registry.collect()
        for s in metric.samples
    }


def test_two_processes_are_read_from_one_page(tmp_path):
    name = f"waterfill-rs-{os.getpid()}-metrics"
    board = _native.Board.create(name, 2, 4, 7)
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), name],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["pushed\n"] * 2
        both = read(tmp_path)
        ranks[1].communicate(timeout=60)
        ranks[0].stdin.write("\n")
        ranks[0].stdin.flush()
        assert ranks[0].stdout.readline() == "pushed\n"
        alone = read(tmp_path)
    finally:
        board.unlink()
        ranks[0].communicate("\n", timeout=60)
    for rank in ("0", "1"):
        assert both["sglang:waterfill_exchange_total", "live", rank] == 40
        assert both["sglang:waterfill_exchange_total", "timed_out", rank] == 0
        assert both["sglang:waterfill_exchange_total", "none", rank] == 0
        assert both["sglang:waterfill_live_ratio", rank] == 1
        assert both["sglang:waterfill_shared_total", "overlapped", rank] == 7
        assert both["sglang:waterfill_shared_total", "fused", rank] == 1
        assert both["sglang:waterfill_exchange_seconds_count", rank] == 40
        assert both["sglang:waterfill_exchange_seconds_bucket", "+Inf", rank] == 40
        info = ("sglang:waterfill_info", "board", "a test", rank, waterfill_rs.__version__)
        assert both[info] == 1
        assert both["sglang:waterfill_peer_alive", rank, "0"] == 1
        assert both["sglang:waterfill_missed_total", rank, "0"] == 0
    home = both["sglang:waterfill_imbalance_ratio", "home", "0"]
    planned = both["sglang:waterfill_imbalance_ratio", "planned", "0"]
    assert 1 <= planned < home
    assert not any(key[-1] == "1" and "peer" in key[0] for key in both), "only the leader knows"
    assert alone["sglang:waterfill_peer_alive", "1", "0"] == 0
    assert alone["sglang:waterfill_missed_total", "1", "0"] == 1
    assert alone["sglang:waterfill_exchange_total", "live", "0"] == 41
    slow = alone["sglang:waterfill_exchange_seconds_bucket", repr(2**30 / 1e9), "0"]
    assert alone["sglang:waterfill_exchange_seconds_count", "0"] == slow == 41, (
        "a gone rank is not waited for"
    )
    reasons = ("late", "silent", "given_up", "refused")
    assert [alone["sglang:waterfill_none_total", reason, "0"] for reason in reasons] == [0] * 4


class PanicException(BaseException):
    """As pyo3's: no Exception."""


class FailingExchange(SoloEnd):
    """``kind``: what its tally raises."""

    def tally(self):
        raise self.kind("no tally")


def test_metrics_that_fail_are_told_once_and_cost_nothing_else(monkeypatch, caplog):
    now = iter([0.0, 10.0, 20.0, 30.0])
    page = metrics.Page(clock=lambda: next(now))
    monkeypatch.setattr(metrics, "_page", page)
    collector = types.SimpleNamespace(labels={"model_name": "m"})
    for kind in (RuntimeError, PanicException):
        exchange = FailingExchange(Member(2, 4, 0), CostModel.rows(), "a test")
        exchange.kind = kind
        metrics.watch(exchange, leads=True)
        for _ in range(2):  # The second time there is nothing to push.
            assert metrics.after_log_stats(None, collector, "stats") is None
        (record,) = caplog.records
        assert "waterfill-rs metrics stop" in record.message and "no tally" in caplog.text
        caplog.clear()


def test_waits_are_in_the_first_bucket_that_holds_them():
    from prometheus_client import Histogram

    for limit_us, expected in (
        (0.001, 2.048e-06),
        (2.048, 2.048e-06),
        (2.56, 4.096e-06),
        (524.288, 2**19 / 1e9),
        (2**33 / 1e3, 2**33 / 1e9),
        (2**34 / 1e3, float("inf")),
    ):
        histogram = Histogram("h", "h", registry=None, buckets=metrics.WAIT_BUCKETS_S)
        metrics._observe(histogram, limit_us, 3)
        counted = [
            (float(s.labels["le"]), s.value)
            for metric in histogram.collect()
            for s in metric.samples
            if s.name == "h_bucket"
        ]
        assert next(le for le, count in counted if count == 3) == expected
        assert {count for _, count in counted} <= {0, 3}


SGLANG = """
import sys
from waterfill_rs.sglang import metrics
metrics.install()
from sglang.srt.plugins import load_plugins
load_plugins()
assert "prometheus_client" not in sys.modules, "sglang sets its folder first"
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector, SchedulerStats
from sglang.srt.runtime_context import get_context
get_context().override_server_args(model_path="dummy").install()
from waterfill_rs import CostModel
from waterfill_rs.exchange.host import SoloExchange
from waterfill_rs.exchange.member import Member
import types
labels = {"model_name": "m", "engine_type": "unified", "tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0}
collector = SchedulerMetricsCollector(labels=labels, server_args=types.SimpleNamespace())
collector.log_stats(SchedulerStats())
metrics.watch(SoloExchange(Member(1, 4, 0), CostModel.rows(), "there is one rank"), leads=True)
metrics.stand_aside("a reason")
collector.log_stats(SchedulerStats())
"""


def test_sglangs_own_collector_shows_ours(tmp_path):
    pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")
    import forked

    done = forked.run(SGLANG, PROMETHEUS_MULTIPROC_DIR=str(tmp_path), WATERFILL_RS="off")
    assert done.returncode == 0, done.stderr[-3000:]
    page = read(tmp_path)
    assert page["sglang:num_running_reqs", "0"] == 0
    version = waterfill_rs.__version__
    assert page["sglang:waterfill_info", "solo", "there is one rank", "0", version] == 1
    assert page["sglang:waterfill_info", "off", "a reason", "0", version] == 1
