"""Maps by the real sglang's EPLB that no order puts primary replicas first in: a few swaps, at start and at rebalances."""

import logging
import time

import pytest
import torch

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import repaired as bench
from inside import RANK, RANKS
from test_primaries_first import (
    FIRST,
    LAYERS,
    LOGICAL,
    REDUNDANT,
    by_eplb,
    by_mapping,
    counts,
    firsts,
    is_consistent,
    on_ranks,
    replicas_of,
    server,
    unfit,
)

from waterfill_rs import _native
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.placement.repair import repaired
from waterfill_rs.sglang import primaries_first
from waterfill_rs.sglang.primaries_first import ordered, swapped

__all__ = ["server"]

UNFIT = 1
"""Seed of counts of whose map by EPLB one layer cannot be ordered."""


def eplbs_own(server, seed, monkeypatch):
    """``[layers, P]`` as sglang alone makes it."""
    server.given.enable_waterfill = False
    agreed = list(primaries_first._agreed)
    primaries_first._agreed.clear()
    rows = by_eplb(server, seed, monkeypatch).physical_to_logical_map.tolist()
    server.given.enable_waterfill = True
    primaries_first._agreed[:] = agreed
    return rows


def cannot_be_ordered(rows):
    firsts_of = (_native.ReplicaTable(RANKS, ordered(row, RANKS)).first_primaries for row in rows)
    return [layer for layer, first in enumerate(firsts_of) if first is None]


def narrowed(server, made, layers):
    """A server with this map whose captured decode graphs leave groups out in these layers."""
    there = server.in_force(made)
    tables = ReplicaTables(RANKS, REDUNDANT, there.physical_to_logical_map_cpu)
    assert {tables.keep_first_primaries(layer) for layer in layers} <= {FIRST}
    primaries_first.keep(there, tables, 0)
    return there, tables


def test_a_rebalance_is_followed_where_no_order_would_do(server, caplog, monkeypatch):
    there, tables = narrowed(server, by_eplb(server, 0, monkeypatch), range(LAYERS))
    theirs = eplbs_own(server, UNFIT, monkeypatch)
    (layer,) = cannot_be_ordered(theirs)
    before = there.physical_to_logical_map[layer].tolist()
    with caplog.at_level(logging.DEBUG):
        made = by_eplb(server, UNFIT, monkeypatch)
    assert "keep their map" not in caplog.text
    assert is_consistent(made) and firsts(made) == [FIRST] * LAYERS
    row = made.physical_to_logical_map[layer].tolist()
    few = sum(a != b for a, b in zip(on_ranks(row), on_ranks(theirs[layer]), strict=True))
    assert few == 2 and on_ranks(row) != on_ranks(before), "one swap of EPLB's new map"
    for expert in range(LOGICAL):
        listed = made.logical_to_all_physical_map[layer, expert].tolist()
        assert listed == sorted(replicas_of(row, expert)) + [-1] * listed.count(-1)
    there.update(made, list(range(LAYERS)))
    tables.renew(range(LAYERS), there.physical_to_logical_map_cpu)
    assert is_consistent(there) and firsts(there) == [FIRST] * LAYERS


def test_a_layer_that_has_all_groups_gets_eplbs_map(server, monkeypatch):
    theirs = eplbs_own(server, UNFIT, monkeypatch)
    (layer,) = cannot_be_ordered(theirs)
    narrowed(server, by_eplb(server, 0, monkeypatch), set(range(LAYERS)) - {layer})
    made = by_eplb(server, UNFIT, monkeypatch)
    assert made.physical_to_logical_map.tolist() == [ordered(row, RANKS) for row in theirs]
    server.in_force(by_mapping(server, unfit().repeat(LAYERS, 1)))
    made = by_eplb(server, UNFIT, monkeypatch)
    assert firsts(made)[layer] is None, "nobody leaves groups out of the map in force"


def test_where_swaps_do_not_do_it_the_layer_keeps_its_map(server, caplog, monkeypatch):
    there, _ = narrowed(server, by_eplb(server, 0, monkeypatch), range(LAYERS))
    monkeypatch.setattr(primaries_first, "repaired", lambda row, *_: row)
    (layer,) = cannot_be_ordered(eplbs_own(server, UNFIT, monkeypatch))
    with caplog.at_level(logging.INFO):
        made = by_eplb(server, UNFIT, monkeypatch)
    assert f"1 of {LAYERS} layers keep their map" in caplog.text
    assert torch.equal(made.physical_to_logical_map[layer], there.physical_to_logical_map[layer])


def test_counts_are_those_of_all_steps_in_any_form(server, monkeypatch):
    made = by_eplb(server, UNFIT, monkeypatch).physical_to_logical_map
    rows = torch.tensor(counts(UNFIT), dtype=torch.int32)
    even = rows * (torch.arange(LOGICAL) % 2)
    for given in (rows, rows.tolist(), rows[None], torch.stack([even, rows - even])):
        found = server.metadata.init_by_eplb(None, logical_count=given)
        assert torch.equal(found.physical_to_logical_map, made)


def test_counts_of_another_shape_repair_nothing(server, monkeypatch):
    from sglang.srt.eplb import eplb_algorithms

    maps = eplbs_own(server, UNFIT, monkeypatch)
    made = by_eplb(server, UNFIT, monkeypatch)
    answer = torch.tensor(maps), made.logical_to_all_physical_map, None
    monkeypatch.setattr(eplb_algorithms, "rebalance_experts", lambda **_: answer)
    monkeypatch.setattr(
        primaries_first, "arranged", lambda mapping, of_logical, _: (mapping, of_logical)
    )
    monkeypatch.setattr(primaries_first, "with_twins", lambda _, of_logical, __: of_logical)
    for shape in ((LAYERS, LOGICAL + 1), (LAYERS + 1, LOGICAL), (LOGICAL,)):
        found = server.metadata.init_by_eplb(None, torch.ones(shape).tolist())
        assert found.physical_to_logical_map.tolist() == maps


def test_counts_are_forgotten_with_the_call(server, monkeypatch):
    def fails(*_):
        raise ValueError("no such model")

    by_eplb(server, UNFIT, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(server.metadata, "_init_common", staticmethod(fails))
        with pytest.raises(ValueError, match="no such model"):
            by_eplb(server, UNFIT, monkeypatch)
    # A map of a file stays as somebody placed it.
    maps = unfit().repeat(LAYERS, 1)
    assert torch.equal(by_mapping(server, maps).physical_to_logical_map, maps)


def test_swaps_stay_within_hosts_where_they_can(server, monkeypatch):
    rows = eplbs_own(server, UNFIT, monkeypatch)
    (layer,) = cannot_be_ordered(rows)
    by_hosts = {
        hosts: ordered(repaired(rows[layer], counts(UNFIT)[layer], RANKS, per_host), RANKS)
        for hosts, per_host in ((1, 8), (2, 4), (4, 2), (3, 1))
    }
    assert len(set(map(tuple, by_hosts.values()))) > 1
    for hosts, expected in by_hosts.items():
        server.given.nnodes = hosts
        made = by_eplb(server, UNFIT, monkeypatch)
        assert made.physical_to_logical_map[layer].tolist() == expected


def test_of_two_maps_that_were_kept_the_first_may_go(server, monkeypatch):
    narrowed(server, by_eplb(server, 0, monkeypatch), range(LAYERS))
    there, tables = narrowed(server, by_eplb(server, 2, monkeypatch), range(LAYERS))
    assert [(held, of) for held, of, _ in primaries_first._kept] == [(there, tables)]


def test_a_map_of_a_large_model_is_repaired_in_no_time():
    """61 layers of 256 + 32 experts on 32 ranks, in CPU time, because other tests run beside this one."""
    from sglang.srt.eplb.eplb_algorithms import deepseek

    rows = torch.tensor(counts(3, 61, 256))
    maps, listed, _ = deepseek.rebalance_experts(rows, 288, 1, 1, 32, False)
    started = time.process_time()
    after, _ = swapped(maps, listed, rows, range(61), 32, 8)
    assert time.process_time() - started < 1
    assert (after != maps).any(1).sum() > 50


@pytest.mark.parametrize(
    "ranks, logical, redundant, nodes",
    [
        (4, 32, 8, 1),
        (4, 64, 16, 1),
        (8, 64, 16, 2),
        (8, 256, 32, 1),
        (16, 128, 32, 2),
        (32, 256, 32, 4),
        (32, 256, 64, 1),
    ],
)
def test_maps_of_any_counts_have_primary_replicas_first(
    server, monkeypatch, ranks, logical, redundant, nodes
):
    """What is in force after a start and two rebalances, and what the core makes of it."""
    layers, physical = 6, logical + redundant
    model = server.common["model_config_for_expert_location"]
    model.num_layers, model.num_logical_experts = layers, logical
    server.common |= {"ep_size": ranks, "num_physical_experts": physical}
    server.given.nnodes = nodes
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: RANK)
    for seed, most in enumerate((0.5, 2, 4, 6, 9)):
        rows = torch.tensor(counts(seed, layers, logical, most))
        monkeypatch.setattr(primaries_first, "_agreed", [["as sglang makes it"]])
        theirs = server.metadata.init_by_eplb(None, rows).physical_to_logical_map
        monkeypatch.setattr(primaries_first, "_agreed", [[]])
        made = server.metadata.init_by_eplb(None, rows)
        for own, row, listed in zip(
            theirs.tolist(),
            made.physical_to_logical_map.tolist(),
            made.logical_to_all_physical_map.tolist(),
            strict=True,
        ):
            table = _native.ReplicaTable(ranks, row)
            assert sorted(row) == sorted(own)
            assert table.first_primaries == logical // ranks, (most, own)
            for expert, of in enumerate(listed):
                assert {p for p in of if p >= 0} == replicas_of(row, expert)
                assert {table.primaries[p] for p in of if p >= 0} <= replicas_of(row, expert)


def test_the_bench_tells_how_many_layers_swaps_put_in_order():
    rows = bench.counts_of(None, 0)[:, :4]
    words = bench.line(rows, 32, 32, 4).strip("| ").split(" | ")
    assert words[:3] == ["32", "32", "4 hosts"]
    assert int(words[3]) < int(words[4]) == 4 and float(words[5]) > 0
    assert bench.repairs_of_made(4).endswith("repaired")
