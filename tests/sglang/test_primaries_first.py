"""Maps of the real sglang whose primary replicas come first within each rank, at start and at rebalances."""

import inspect
import logging
import types

import pytest
import torch

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

from inside import RANK, RANKS

from waterfill_rs import _native
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.placement.repair import repaired
from waterfill_rs.sglang import compat, primaries_first
from waterfill_rs.sglang.primaries_first import arranged, ordered

LOGICAL, REDUNDANT, LAYERS = 32, 16, 3
PHYSICAL = LOGICAL + REDUNDANT
EACH, FIRST = PHYSICAL // RANKS, LOGICAL // RANKS
UNFIT = [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7]
"""Of 8 experts on 3 ranks, with 4 on the first that are nowhere else."""


def table(row, ranks=RANKS):
    return _native.ReplicaTable(ranks, list(row))


def on_ranks(row, ranks=RANKS):
    return [sorted(row[i : i + len(row) // ranks]) for i in range(0, len(row), len(row) // ranks)]


def shuffled(seed, layers=LAYERS):
    """``[layers, P]``: each rank has ``FIRST`` experts once, and some of others, in any order."""
    draws = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(layers):
        once = torch.randperm(LOGICAL, generator=draws).view(RANKS, FIRST)
        more = torch.randint(LOGICAL, (RANKS, EACH - FIRST), generator=draws)
        held = torch.cat([once, more], dim=1)
        rows.append(torch.cat([rank[torch.randperm(EACH, generator=draws)] for rank in held]))
    return torch.stack(rows)


def unfit():
    """``[P]`` whose first rank has ``EACH`` experts that are nowhere else."""
    rest = list(range(EACH, LOGICAL))
    more = PHYSICAL - EACH - len(rest)
    return torch.tensor([*range(EACH), *rest, *rest[:more]])


def replicas_of(row, expert):
    return {place for place, other in enumerate(row) if other == expert}


# The order


def test_primary_replicas_come_first_and_the_others_keep_their_order():
    # Experts 0 and 1 are on the first rank alone, and 2 is on the second alone: so 3 is primary on the second.
    assert ordered([3, 0, 1, 2, 2, 3], 2) == [0, 1, 3, 2, 3, 2]
    # The second rank is in order already.
    assert ordered([3, 1, 0, 2, 3, 2], 2) == [1, 0, 3, 2, 3, 2]


@pytest.mark.parametrize(
    "row, ranks",
    [
        ([0, 1, 0, 2, 3, 1], 2),  # They are first.
        ([*range(8), *range(4)], 2),  # Trivial.
        (UNFIT, 3),
        ([0, 1, 2, 3, 4, 0], 2),  # 5 experts do not divide.
        ([0, 1, 3, 3], 2),  # Expert 2 is nowhere.
        ([0, 1, 1], 2),
    ],
)
def test_a_map_that_is_in_order_or_cannot_be_stays(row, ranks):
    assert ordered(row, ranks) == row


def test_maps_by_chance_are_put_in_order_exactly_where_it_can_be():
    put = 0
    draws = torch.Generator().manual_seed(1)
    for ranks, logical, redundant in ((2, 8, 4), (4, 16, 8), (8, 32, 32)) * 60:
        row = torch.cat(
            [torch.arange(logical), torch.randint(logical, (redundant,), generator=draws)]
        )
        row = row[torch.randperm(len(row), generator=draws)].tolist()
        found, before = ordered(row, ranks), table(row, ranks)
        primary = {p for p, of in enumerate(before.primaries) if p == of}
        each = len(row) // ranks
        fits = {sum(p // each == rank for p in primary) for rank in range(ranks)} == {
            logical // ranks
        }
        assert on_ranks(found, ranks) == on_ranks(row, ranks)
        assert (table(found, ranks).first_primaries == logical // ranks) == fits
        assert fits or found == row
        assert ordered(found, ranks) == found
        put += fits and found != row
    assert 40 < put < 180


def test_both_maps_are_arranged_alike():
    maps = shuffled(3)
    of_logical = of_logical_of(maps)
    for given in (of_logical, of_logical.int()):
        mapping, places = arranged(maps, given, RANKS)
        assert mapping.tolist() == [ordered(row, RANKS) for row in maps.tolist()]
        assert mapping.is_contiguous() and places.dtype == given.dtype
        assert not torch.equal(mapping, maps)
        assert torch.equal(places >= 0, given >= 0)
        for layer in range(LAYERS):
            for expert in range(LOGICAL):
                physical = [p for p in places[layer, expert].tolist() if p >= 0]
                assert set(physical) == replicas_of(mapping[layer].tolist(), expert)
        again = arranged(mapping, places, RANKS)
        assert again[0] is mapping and again[1] is places


def of_logical_of(maps):
    from sglang.srt.eplb.expert_location import _pad_nested_array

    nested = [[sorted(replicas_of(row, e)) for e in range(LOGICAL)] for row in maps.tolist()]
    return torch.tensor(_pad_nested_array(nested, pad_value=-1))


# In sglang


@pytest.fixture
def server(sglang, monkeypatch):
    """sglang makes maps of ``LAYERS`` layers for a server with these arguments; ``in_force(metadata)`` puts one there."""
    from sglang.srt import runtime_context
    from sglang.srt.eplb import expert_location

    given = types.SimpleNamespace(enable_waterfill=True)
    common = dict(
        ep_size=RANKS,
        num_physical_experts=PHYSICAL,
        base_num_physical_experts=PHYSICAL,
        num_local_physical_experts=EACH,
        model_config_for_expert_location=types.SimpleNamespace(
            num_layers=LAYERS, num_logical_experts=LOGICAL, num_groups=None
        ),
    )
    metadata = expert_location.ExpertLocationMetadata
    monkeypatch.setattr(metadata, "_init_common", staticmethod(lambda *_: common))
    monkeypatch.setattr(expert_location, "get_device", lambda: types.SimpleNamespace(device="cpu"))
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: given)
    monkeypatch.setattr(primaries_first, "_kept", [])
    monkeypatch.setattr(primaries_first, "_agreed", [])
    monkeypatch.delenv("WATERFILL_RS_REPLICAS", raising=False)

    def in_force(made):
        monkeypatch.setattr(runtime_context.get_resources(), "expert_location_metadata", made)
        return made

    with sglang.moe.override(moe_a2a_backend="deepep", ep_dispatch_algorithm="static"):
        yield types.SimpleNamespace(
            given=given, metadata=metadata, in_force=in_force, common=common
        )


def by_mapping(server, maps):
    return server.metadata.init_by_mapping(None, maps.clone(), moe_ep_rank=RANK)


def counts(seed, layers=LAYERS, logical=LOGICAL, most=6):
    """``[layers, L]``"""
    draws = torch.Generator().manual_seed(seed)
    return (torch.rand((layers, logical), generator=draws) * most).exp().long().tolist()


def by_eplb(server, seed, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: RANK)
    return server.metadata.init_by_eplb(None, torch.tensor(counts(seed)))


def is_consistent(made):
    """Do all of sglang's maps say the same? Those of logical experts may have the nearest replica alone."""
    mapping = made.physical_to_logical_map
    assert torch.equal(made.physical_to_logical_map_cpu, mapping)
    assert torch.equal(made.logical_to_all_physical_map_cpu, made.logical_to_all_physical_map)
    valid = made.logical_to_all_physical_map_num_valid
    for layer, row in enumerate(mapping.tolist()):
        for expert in range(LOGICAL):
            physical = made.logical_to_all_physical_map[layer, expert].tolist()
            number = valid[layer, expert].item()
            assert number > 0 and set(physical[number:]) <= {-1}
            all_of_it = replicas_of(row, expert)
            assert set(physical[:number]) <= all_of_it
            here = {p for p in all_of_it if p // EACH == RANK}
            if here:
                assert set(physical[:number]) & here
            else:
                assert set(physical[:number]) == all_of_it
            assert made.logical_to_rank_dispatch_physical_map[layer, expert].item() in all_of_it
    return True


def firsts(made):
    return [table(row).first_primaries for row in made.physical_to_logical_map.tolist()]


def test_a_placement_from_a_file_has_them_first(server):
    maps = shuffled(1)
    maps[2] = unfit()
    made = by_mapping(server, maps)
    assert is_consistent(made) and firsts(made) == [FIRST, FIRST, None]
    assert torch.equal(made.physical_to_logical_map[2], maps[2])
    for row, given in zip(made.physical_to_logical_map.tolist(), maps.tolist(), strict=True):
        assert on_ranks(row) == on_ranks(given)


def test_eplbs_placement_has_them_first(server, monkeypatch):
    server.given.enable_waterfill = False
    theirs = by_eplb(server, 1, monkeypatch)
    server.given.enable_waterfill = True
    primaries_first._agreed.clear()
    made = by_eplb(server, 1, monkeypatch)
    assert is_consistent(made)
    rows = theirs.physical_to_logical_map.tolist()
    fitting = [repaired(row, of, RANKS, RANKS) for row, of in zip(rows, counts(1), strict=True)]
    assert [one != row for one, row in zip(fitting, rows, strict=True)].count(True) == 1
    assert made.physical_to_logical_map.tolist() == [ordered(row, RANKS) for row in fitting]
    assert firsts(theirs) == [None] * LAYERS and firsts(made) == [FIRST] * LAYERS


def test_the_trivial_placement_stays(server):
    made = server.metadata.init_trivial(None, RANK)
    expected = torch.arange(PHYSICAL).repeat(LAYERS, 1) % LOGICAL
    assert torch.equal(made.physical_to_logical_map, expected)


def with_other_names(server):
    """sglang's maker of maps, hooked as it is, and taking one map by a name that nobody knows."""
    init_raw = server.metadata._init_raw

    def changed(ep_size, physical_to_logical_map, **others):
        return init_raw(ep_size, physical_to_logical_map, **others)

    changed.__signature__ = inspect.signature(changed)
    changed.__wrapped__ = init_raw
    return changed


@pytest.mark.parametrize(
    "why, reason",
    [
        ({"enable_waterfill": False}, "--enable-waterfill was not given"),
        ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend mooncake"),
        (
            {"load_format": "sharded_state"},
            "--load-format sharded_state brings weights in an order",
        ),
        ({"weight_cache_mode": "client"}, "another process loads the weights"),
        ("sglang", "WATERFILL_RS_REPLICAS=sglang"),
        ("other names", "_init_raw takes ('ep_size', 'physical_to_logical_map', 'others')"),
    ],
)
def test_where_it_is_not_for_us_sglangs_order_stays(server, monkeypatch, why, reason):
    if isinstance(why, dict):
        vars(server.given).update(why)
    elif why == "sglang":
        monkeypatch.setenv("WATERFILL_RS_REPLICAS", why)
    else:
        monkeypatch.setattr(server.metadata, "_init_raw", staticmethod(with_other_names(server)))
    maps = shuffled(1)
    assert torch.equal(by_mapping(server, maps).physical_to_logical_map, maps)
    seams, _ = compat.find()
    (found,) = primaries_first.against_hook(seams)
    assert reason in found


class Peers:
    """Ranks that have ``answer`` to what one of them would do."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def agree(self, reasons, question, answer):
        self.asked.append((question, answer))
        return list(reasons) or self.answer


def test_all_ranks_have_one_order_and_are_asked_once(server, monkeypatch):
    seams, _ = compat.find()
    maps = shuffled(1)
    for answer in ([], ["EP rank 1: WATERFILL_RS_REPLICAS=sglang"]):
        monkeypatch.setattr(primaries_first, "_agreed", [])
        peers = Peers(answer)
        monkeypatch.setattr(primaries_first, "peers_of_maps", lambda _, peers=peers: peers)
        for _ in range(2):
            mapping = by_mapping(server, maps).physical_to_logical_map
            assert torch.equal(mapping, maps) == bool(answer)
        assert [question for question, _ in peers.asked] == ["order"]
        assert primaries_first.against_hook(seams) == answer
        # What this rank is told later changes nothing: the others have the order that was agreed on.
        monkeypatch.setenv("WATERFILL_RS_REPLICAS", "sglang")
        assert torch.equal(by_mapping(server, maps).physical_to_logical_map, maps) == bool(answer)
        monkeypatch.delenv("WATERFILL_RS_REPLICAS")


def test_twins_are_listed_where_one_of_them_is():
    # Expert 0 twice on the first rank, expert 1 on both and twice on the second.
    mapping = torch.tensor([[0, 1, 0, 2, 1, 1], [0, 1, 2, 0, 1, 2]])
    of_logical = torch.tensor([[[0], [1], [3]], [[0], [1], [2]]])
    found = primaries_first.with_twins(mapping, of_logical, 2)
    # The second rank's replicas of expert 1 are another rank's, and not listed here.
    assert found.tolist() == [[[0, 2], [1, -1], [3, -1]], [[0, -1], [1, -1], [2, -1]]]
    assert of_logical.tolist()[0][0] == [0]
    alone = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert primaries_first.with_twins(alone, of_logical[1:], 2).tolist() == of_logical[1:].tolist()
    wide = torch.tensor([[[0, 3, -1], [1, 4, 5], [2, -1, -1]]])
    found = primaries_first.with_twins(torch.tensor([[0, 1, 2, 0, 1, 1]]), wide, 2)
    assert torch.equal(found, wide)


def test_slots_in_our_order_are_not_saved(server, tmp_path):
    """No file says the order, and a server that loads slots does not change sglang's."""
    from sglang.srt.model_executor.model_runner_components.weight_exporter import WeightExporter
    from sglang.srt.model_loader.loader import RemoteModelLoader, ShardedStateLoader

    by_mapping(server, shuffled(1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stand in the order of waterfill-rs"):
            ShardedStateLoader.save_model(torch.nn.Linear(2, 2), str(tmp_path))
        with pytest.raises(RuntimeError, match="stand in the order of waterfill-rs"):
            RemoteModelLoader.save_model(torch.nn.Linear(2, 2), str(tmp_path), "kv://nowhere")
        with pytest.raises(RuntimeError, match="stand in the order of waterfill-rs"):
            WeightExporter.send_weights_to_remote_instance(None, "10.0.0.1", "1,2", "group")
        # A map that is in order does not undo the earlier one.
        by_mapping(server, torch.tensor([ordered(row, RANKS) for row in shuffled(1).tolist()]))
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_copied_to_slots_are_refused_in_our_order(server):
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    seams, _ = compat.find()
    taken = []
    model = torch.nn.Linear(2, 2)
    model.load_weights = taken.append
    updater = types.SimpleNamespace(
        get_model=lambda: model,
        device="cpu",
        custom_weight_loaders=["mine.loader"],
        _assert_weight_cache_inactive=lambda _: None,
    )

    def update(load_format):
        return WeightUpdater.update_weights_from_tensor(updater, [], load_format)

    hook = WeightUpdater.update_weights_from_tensor
    assert hook is not hook.__wrapped__, seams.slots_in
    by_mapping(server, shuffled(1))
    for load_format in ("direct", "mine.loader"):
        done, why = update(load_format)
        assert not done and "copied to slots as somebody else orders them" in why
    assert not taken


def test_tensors_by_name_or_in_sglangs_order_are_taken():
    from waterfill_rs.sglang.primaries_first import PrimariesFirst

    order = PrimariesFirst(compat.find()[0])

    def update(self, named_tensors, load_format=None):
        return True, (self, named_tensors, load_format)

    for load_format in (None, "flattened_bucket", "direct"):
        answer = order.refuse_tensors_of_slots(update, "it", ["some"], load_format)
        assert answer == (True, ("it", ["some"], load_format))
    order.has_own_order = True
    for load_format in (None, "flattened_bucket"):
        assert order.refuse_tensors_of_slots(update, "it", [], load_format=load_format)[0]
    assert not order.refuse_tensors_of_slots(update, "it", [], load_format="direct")[0]


def test_slots_in_sglangs_order_are_saved(tmp_path):
    from waterfill_rs.sglang.primaries_first import PrimariesFirst

    seams, _ = compat.find()
    PrimariesFirst(seams).refuse_slots(torch.nn.Linear(2, 2), str(tmp_path))


def test_the_hook_is_in_place_and_without_it_there_is_a_reason(server, monkeypatch):
    seams, _ = compat.find()
    assert primaries_first.against_hook(seams) == ["no map was made since"]
    by_mapping(server, shuffled(1))
    assert not primaries_first.against_hook(seams)
    raw = server.metadata._init_raw.__wrapped__
    monkeypatch.setattr(server.metadata, "_init_raw", staticmethod(raw))
    (reason,) = primaries_first.against_hook(seams)
    assert reason == f"{seams.location_init} is not waterfill-rs's after registration"


def test_without_a_servers_arguments_nothing_changes(server, monkeypatch):
    from sglang.srt import runtime_context

    def none():
        raise ValueError("not published")

    monkeypatch.setattr(runtime_context, "get_server_args", none)
    maps = shuffled(1)
    assert torch.equal(by_mapping(server, maps).physical_to_logical_map, maps)


def test_a_rebalance_leaves_a_narrowed_layer_that_would_not_fit(server, caplog, monkeypatch):
    maps = shuffled(1)
    maps[2] = unfit()
    there = server.in_force(by_mapping(server, maps))
    before = there.physical_to_logical_map.clone()
    tables = ReplicaTables(RANKS, REDUNDANT, there.physical_to_logical_map_cpu)
    assert [tables.keep_first_primaries(layer) for layer in range(LAYERS)] == [FIRST, FIRST, None]
    primaries_first.keep(there, tables, 0)
    new = shuffled(2)
    new[1] = unfit().flip(0)
    new[2] = unfit().flip(0)
    with caplog.at_level(logging.INFO):
        made = by_mapping(server, new)
    assert caplog.text.count("1 of 2 layers keep their map of experts in this rebalance") == 1
    assert is_consistent(made)
    assert torch.equal(made.physical_to_logical_map[1], before[1])
    assert torch.equal(made.logical_to_all_physical_map[1], there.logical_to_all_physical_map[1])
    assert made.physical_to_logical_map[0].tolist() == ordered(new[0].tolist(), RANKS)
    assert torch.equal(made.physical_to_logical_map[2], new[2]), "it has all groups anyway"
    # What a pass of some layers, and then the others, make of it.
    for layers in ([1, 2], [0]):
        there.update(made, layers)
        tables.renew(layers, there.physical_to_logical_map_cpu)
    assert is_consistent(there) and firsts(there) == [FIRST, FIRST, None]
    # Whether an expert has more replicas at most in the new map or in a row that is kept.
    caplog.clear()
    of_expert_0 = torch.tensor([*range(LOGICAL), *[0] * REDUNDANT]).flip(0)
    with caplog.at_level(logging.INFO):
        made = [by_mapping(server, of_expert_0.repeat(LAYERS, 1))]
    assert "2 of 2 layers" in caplog.text
    made += [by_eplb(server, seed, monkeypatch) for seed in range(4)]
    for one in made:
        assert is_consistent(one) and firsts(one)[:2] == [FIRST, FIRST]


def test_other_metadata_than_that_in_force_is_left_alone(server):
    there = by_mapping(server, shuffled(1))
    tables = ReplicaTables(RANKS, REDUNDANT, there.physical_to_logical_map_cpu)
    assert tables.keep_first_primaries(0) == FIRST
    primaries_first.keep(there, tables, 0)
    server.in_force(None)
    new = unfit().repeat(LAYERS, 1)
    assert torch.equal(by_mapping(server, new).physical_to_logical_map, new)


def test_sglangs_updater_moves_nothing_of_it():
    from sglang.srt.eplb import expert_location_updater

    row = shuffled(1)[0].tolist()
    logs = expert_location_updater.update_expert_weights_single_layer(
        [torch.zeros(EACH, 1)],
        [torch.zeros(EACH, 1)],
        row,
        row,
        EACH,
        RANKS,
        RANK,
        RANKS,
        debug=True,
    )
    assert len([line for line in logs if "case=unchanged" in line]) == EACH
    assert not [line for line in logs if "case=" in line and "unchanged" not in line]
